"""Shared by all tests: a compilation cache, and small environments that can be proven things about."""

import dataclasses
import gc
import importlib
import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # for the scripts that the tests start, too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Most programs run for a moment here: machine code that is not optimised is ready in half the time. With XLA_FLAGS set,
# to nothing for instance, they are compiled as users have them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import envs  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def constant_task(episode_length: int = 5, continuous: bool = False) -> envs.Task:
    """Constant observation, reward 1, truncated after `episode_length` steps: the value is 1 / (1 - gamma)."""

    def reset(key):
        return jnp.ones(1), jnp.int32(0)

    def step(key, time, action):
        return jnp.ones(1), time + 1, 1.0, False, time + 1 >= episode_length

    actions = envs.Box(-1.0, 1.0, (1,)) if continuous else envs.Discrete(2)
    return envs.Task(reset, step, envs.Box(0.0, 1.0, (1,)), actions, episode_length)


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


def steering_task(terminal_every: int = 7) -> envs.Task:
    """As `counting_task`, with two continuous actions between -3 and 2, whose first entry is added to the reward."""
    task = counting_task(terminal_every)

    def step(key, state, action):
        obs, state, reward, terminated, truncated = task.step(key, state, action)
        return obs, state, reward + action[0], terminated, truncated

    return dataclasses.replace(task, step=step, action_space=envs.Box(-3.0, 2.0, (2,)))


def picture_task() -> envs.Task:
    """Images of bytes; episodes of 5 steps."""

    def reset(key):
        return jax.random.randint(key, (8, 8, 3), 0, 256).astype(jnp.uint8), jnp.int32(0)

    def step(key, time, action):
        return reset(key)[0], time + 1, 1.0, False, time + 1 >= 5

    return envs.Task(reset, step, envs.Box(0, 255, (8, 8, 3), np.uint8), envs.Discrete(3), 5)


def coin_task() -> envs.Task:
    """Episodes of 1 or 9 steps, equally likely, with return equal to length: a biased evaluation shows."""

    def reset(key):
        return jnp.zeros(1), (jax.random.bernoulli(key), jnp.int32(0))

    def step(key, state, action):
        is_long, time = state
        return jnp.zeros(1), (is_long, time + 1), 1.0, time + 1 >= jnp.where(is_long, 9, 1), False

    return envs.Task(reset, step, envs.Box(0.0, 1.0, (1,)), envs.Discrete(2), 9)


def probe_task(wait=0, obs_matters=True, action_matters=True, continuous=False) -> envs.Task:
    """A sign, -1 or 1, shown for one step; `wait` steps later the episode ends with its only reward, sign * action.

    Without `obs_matters` or `action_matters` that factor is left out; with neither the reward is 1. The action is 0 or
    1 and counts as -1 or 1; `continuous`: any number between these. Observations (sign or 0, steps to go): the best
    action needs memory if there is a wait. Solved, the values are discount ** steps_to_go, times the sign if that
    alone matters.
    """

    def observe(sign, time):
        return jnp.stack([jnp.where(time == 0, sign, 0.0), jnp.float32(wait - time)])

    def reset(key):
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        return observe(sign, 0), (sign, jnp.int32(0))

    def step(key, state, action):
        sign, time = state
        choice = action[0] if continuous else 2.0 * action - 1.0
        reward = jnp.where(obs_matters, sign, 1.0) * jnp.where(action_matters, choice, 1.0)
        return observe(sign, time + 1), (sign, time + 1), reward * (time == wait), time == wait, False

    actions = envs.Box(-1.0, 1.0, (1,)) if continuous else envs.Discrete(2)
    return envs.Task(reset, step, envs.Box(-1.0, float(max(1, wait)), (2,)), actions, wait + 1)


TASKS = {"Constant": constant_task, "Counting": counting_task, "Steering": steering_task, "Coin": coin_task}
TASKS |= {"Picture": picture_task, "Probe": probe_task}


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

# The sizes of a small run; a script takes those that it has.
SMALL = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "hidden_size": 8, "eval_episodes": 4, "num_eval_envs": 4}
SMALL |= {"buffer_size": 256, "learning_starts": 32, "batch_size": 4, "gradient_steps": 2}
SMALL |= {"sequence_length": 4, "burn_in": 2}
REPLAY = [script for script in SCRIPTS if script.removeprefix("r") in ("dqn", "drqn", "sac", "sacd")]


def small(module):
    """What of SMALL a script has, whether its actions are continuous."""
    config = module.Config()
    names = {field.name for field in dataclasses.fields(config)}
    sizes = {name: value for name, value in SMALL.items() if name in names}
    return sizes, isinstance(config.make_env().action_space, envs.Box)


def command_line(script):
    """Arguments for a small run of `script`."""
    sizes, continuous = small(importlib.import_module(f"algorithms.{script}"))
    words = [word for name, value in sizes.items() for word in ("--" + name.replace("_", "-"), str(value))]
    env = "gymnax::Pendulum-v1" if continuous else "gymnax::CartPole-v1"
    return (*words, "--env", env, "--env-kwargs", "max_steps_in_episode", "50")


def tiny(module, **changes):
    """The config of a run of `module` that takes no time."""
    sizes, continuous = small(module)
    sizes |= {"env": "test::Steering" if continuous else "test::Counting", "env_kwargs": {"terminal_every": 5}}
    return module.Config(**sizes | {"total_steps": 64, "compilation_cache": ""} | changes)


def last_line(text):
    return text.strip().splitlines()[-1]
