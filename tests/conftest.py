"""Shared by all tests: a compilation cache, and small environments that can be proven things about."""

import gc
import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # for the scripts that the tests start, too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import envs  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def constant_task(episode_length: int = 5) -> envs.Task:
    """Constant observation, reward 1, truncated after `episode_length` steps: the value is 1 / (1 - gamma)."""

    def reset(key):
        return jnp.ones(1), jnp.int32(0)

    def step(key, time, action):
        return jnp.ones(1), time + 1, 1.0, False, time + 1 >= episode_length

    return envs.Task(reset, step, envs.Box(0.0, 1.0, (1,)), envs.Discrete(2), episode_length)


def counting_task(terminal_every: int = 7) -> envs.Task:
    """Observations (a number drawn once per episode, steps so far); reward 1; terminates or truncates by turns.

    Made so that a batch shows where each of its entries comes from.
    """

    def reset(key):
        number = jax.random.uniform(key)
        return jnp.stack([number, 0.0]), (number, jnp.int32(0))

    def step(key, state, action):
        number, time = state
        ends = time + 1 >= terminal_every
        obs = jnp.stack([number, (time + 1) / terminal_every])
        return obs, (number, time + 1), 1.0, ends & (number < 0.5), ends & (number >= 0.5)

    return envs.Task(reset, step, envs.Box(0.0, 1.0, (2,)), envs.Discrete(3), terminal_every)


def coin_task() -> envs.Task:
    """Episodes of 1 or 9 steps, equally likely, with return equal to length: a biased evaluation shows."""

    def reset(key):
        return jnp.zeros(1), (jax.random.bernoulli(key), jnp.int32(0))

    def step(key, state, action):
        is_long, time = state
        return jnp.zeros(1), (is_long, time + 1), 1.0, time + 1 >= jnp.where(is_long, 9, 1), False

    return envs.Task(reset, step, envs.Box(0.0, 1.0, (1,)), envs.Discrete(2), 9)


TASKS = {"Constant": constant_task, "Counting": counting_task, "Coin": coin_task}


# `make("test::Constant")` and so on, through the same door as every library.
envs.NAMESPACES["test"] = (lambda: list(TASKS), lambda env_id, **options: TASKS[env_id](**options))


@pytest.fixture(autouse=True)
def room_for_programs():
    """Every compiled program maps memory, of which a Linux process may have 65,530 pieces; past that XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- Small runs of every script --------------------------------------------------------------------------------------

ALGORITHMS = Path(__file__).parent.parent / "algorithms"
SCRIPTS = sorted(path.stem for path in ALGORITHMS.glob("[a-z]*.py"))

# A small run on the command line, whatever the script, and a smaller one of its module.
COMMAND_LINE = ("--num-envs", "4", "--num-steps", "8", "--num-minibatches", "2", "--hidden-size", "8")
COMMAND_LINE += ("--eval-episodes", "4", "--num-eval-envs", "4", "--env-kwargs", "max_steps_in_episode", "50")
SMALL = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "hidden_size": 8, "eval_episodes": 4, "num_eval_envs": 4}
SMALL |= {"env": "test::Counting", "env_kwargs": {"terminal_every": 5}, "total_steps": 32, "compilation_cache": ""}


def tiny(module, **changes):
    """The config of a run of `module` that takes no time."""
    return module.Config(**SMALL | changes)


def last_line(text):
    return text.strip().splitlines()[-1]
