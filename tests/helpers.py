"""What several tests need: tasks of known outcome, small runs of every script, rollouts."""

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from env_adapters.cli import Command, main
from envs import Box, Discrete, MultiDiscrete, Task
from experiment import seed_keys
from harness import options
from loggers import Logger

ROOT = Path(__file__).parents[1]
ALGORITHMS = ROOT / "algorithms"
SCRIPTS = sorted(path.stem for path in ALGORITHMS.glob("[a-z]*.py"))
REPLAY = [
    script for script in SCRIPTS if script.removeprefix("r") in ("dqn", "drqn", "sac", "sacd")
]


class Bomb:
    """Unpickled, it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def last_line(text):
    return text.strip().splitlines()[-1]


@contextlib.contextmanager
def disk(path, options):
    """A disk at `path`, with options of `mount`; the test is skipped where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


# --- Tasks, as make("test::Constant") and so on ---------------------------------------------------


def constant_task(episode_length: int = 5, continuous: bool = False) -> Task:
    """Constant observation, reward 1, truncated after some steps: the value is 1 / (1 - gamma)."""

    def reset(key):
        return jnp.ones(1), jnp.int32(0)

    def step(key, time, action):
        return jnp.ones(1), time + 1, 1.0, False, time + 1 >= episode_length

    actions = Box(-1.0, 1.0, (1,)) if continuous else Discrete(2)
    return Task(reset, step, Box(0.0, 1.0, (1,)), actions, episode_length)


def counting_task(terminal_every: int = 7) -> Task:
    """Observations (a number drawn once per episode, steps so far); reward 1.

    Each entry of a batch shows where it comes from. Episodes terminate if their number is less
    than 0.5, else they truncate.
    """

    def reset(key):
        number = jax.random.uniform(key)
        return jnp.stack([number, 0.0]), (number, jnp.int32(0))

    def step(key, state, action):
        number, time = state
        ends = time + 1 >= terminal_every
        obs = jnp.stack([number, (time + 1) / terminal_every])
        return obs, (number, time + 1), 1.0, ends & (number < 0.5), ends & (number >= 0.5)

    return Task(reset, step, Box(0.0, 1.0, (2,)), Discrete(3), terminal_every)


def drawn_task(terminal_every: int = 7) -> Task:
    """`counting_task` with pictures that become lighter with every step."""

    def render(state):
        _, time = state
        return np.full((4, 6, 3), 40 * time, np.uint8)

    return dataclasses.replace(counting_task(terminal_every), render=render)


def steering_task(terminal_every: int = 7) -> Task:
    """`counting_task` with two actions between -3 and 2; the first is added to the reward."""
    task = counting_task(terminal_every)

    def step(key, state, action):
        obs, state, reward, terminated, truncated = task.step(key, state, action)
        return obs, state, reward + action[0], terminated, truncated

    return dataclasses.replace(task, step=step, action_space=Box(-3.0, 2.0, (2,)))


def echo_task(continuous: bool = False) -> Task:
    """Observations (steps so far / 5, previous action); the 5 steps of an episode pay 1, ..., 5.

    The state keeps what its keys draw, but nobody sees it: environments in which an agent acts
    alike look alike.
    """

    def observe(time, action):
        return jnp.concatenate([time[None] / 5, jnp.ravel(action) / 1.0]).astype(jnp.float32)

    def reset(key):
        return observe(jnp.int32(0), jnp.zeros(1)), (jnp.int32(0), jax.random.uniform(key))

    def step(key, state, action):
        time, _ = state
        state = (time + 1, jax.random.uniform(key))
        return observe(time + 1, action), state, time + 1.0, time == 4, False

    actions = Box(-1.0, 1.0, (1,)) if continuous else Discrete(3)
    return Task(reset, step, Box(-1.0, 2.0, (2,)), actions, 5)


def picture_task() -> Task:
    """Images of bytes; episodes of 5 steps."""

    def reset(key):
        return jax.random.randint(key, (8, 8, 3), 0, 256).astype(jnp.uint8), jnp.int32(0)

    def step(key, time, action):
        return reset(key)[0], time + 1, 1.0, False, time + 1 >= 5

    return Task(reset, step, Box(0, 255, (8, 8, 3), np.uint8), Discrete(3), 5)


def coin_task() -> Task:
    """Episodes of 1 or 9 steps, equally likely, the return is the length: biased means show."""

    def reset(key):
        return jnp.zeros(1), (jax.random.bernoulli(key), jnp.int32(0))

    def step(key, state, action):
        is_long, time = state
        return jnp.zeros(1), (is_long, time + 1), 1.0, time + 1 >= jnp.where(is_long, 9, 1), False

    return Task(reset, step, Box(0.0, 1.0, (1,)), Discrete(2), 9)


def probe_task(wait=0, obs_matters=True, action_matters=True, continuous=False) -> Task:
    """A sign, -1 or 1, is shown for one step; `wait` steps later the reward is sign * action.

    That ends the episode. Without `obs_matters` or `action_matters` that factor is left out; with
    neither the reward is 1. The action is 0 or 1 and counts as -1 or 1; `continuous`: any number
    between these. Observations are (sign or 0, steps to go): the best action needs memory if there
    is a wait. Solved, the values are discount ** steps_to_go, times the sign if that alone matters.
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
        ends = time == wait
        return observe(sign, time + 1), (sign, time + 1), reward * ends, ends, False

    actions = Box(-1.0, 1.0, (1,)) if continuous else Discrete(2)
    return Task(reset, step, Box(-1.0, float(max(1, wait)), (2,)), actions, wait + 1)


def masked_task(terminal_every=5, num_actions=3, empty_at=-1) -> Task:
    """At every step some actions are valid, drawn anew; the last of these pays 1, the others 0.

    What is valid is not seen. The last action is the best one, wherever it is valid: where it is
    not, an agent that does not know the mask is wrong. An invalid action pays -100 and ends the
    episode. At step `empty_at` of an episode nothing is valid.
    """

    def draw(key, time):
        valid = jax.random.bernoulli(key, 0.5, (num_actions,))
        one = jnp.arange(num_actions) == jax.random.randint(key, (), 0, num_actions)
        return (valid | one) & (time != empty_at)

    def observe(time):
        return (time / terminal_every)[None].astype(jnp.float32)

    def reset(key):
        time = jnp.int32(0)
        return observe(time), (time, draw(key, time))

    def step(key, state, action):
        time, valid = state
        best = num_actions - 1 - valid[::-1].argmax()
        reward = jnp.where(valid[action], action == best, -100.0)
        time = time + 1
        ends = time >= terminal_every
        # Nothing is valid in the last observation, and nothing needs to be.
        state = (time, draw(key, time) & ~ends)
        return observe(time), state, reward, ends | ~valid[action], False

    space = Box(0.0, 1.0, (1,))
    task = Task(reset, step, space, Discrete(num_actions), terminal_every)
    return dataclasses.replace(task, action_mask=lambda state: state[1])


def parts_task(continuous=False) -> Task:
    """What pays is in two parts: a bright row of an image, and the sign of a vector in a tuple.

    At every step both are drawn anew. The first part of an action is to be the row, 0 to 2, the
    second whether the sign is positive; each pays 1. The 4 steps of an episode pay 8 at best.
    `continuous`: both are numbers between -1 and 1, and what they miss is subtracted.
    """

    def draw(key):
        row_key, sign_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, 3)
        return row, jax.random.bernoulli(sign_key).astype(jnp.int32)

    def observe(row, sign):
        image = jnp.zeros((4, 4, 1), jnp.uint8).at[row].set(255)
        return {"image": image, "body": (jnp.stack([2.0 * sign - 1.0, 0.5]),)}

    def reset(key):
        wanted = draw(key)
        return observe(*wanted), (wanted, jnp.int32(0))

    def step(key, state, action):
        (row, sign), time = state
        reward = 0.0 + (action[0] == row) + (action[1] == sign)
        if continuous:
            reward = 2.0 - abs(action[0] - row + 1) - abs(action[1] - 2 * sign + 1)
        wanted = draw(key)
        return observe(*wanted), (wanted, time + 1), reward, False, time + 1 >= 4

    space = {"image": Box(0, 255, (4, 4, 1), np.uint8), "body": (Box(-1.0, 1.0, (2,)),)}
    actions = Box(-1.0, 1.0, (2,)) if continuous else MultiDiscrete((3, 2))
    return Task(reset, step, space, actions, 4)


TASKS = {
    "Drawn": drawn_task,
    "Constant": constant_task,
    "Counting": counting_task,
    "Steering": steering_task,
    "Coin": coin_task,
    "Echo": echo_task,
    "Picture": picture_task,
    "Masked": masked_task,
    "Probe": probe_task,
    "Parts": parts_task,
}


# --- Scripts as users start them ------------------------------------------------------------------

# The sizes of a small run; a script takes those that it has.
SMALL = {
    "num_devices": 1,
    "num_envs": 4,
    "num_steps": 8,
    "num_minibatches": 2,
    "hidden_size": 8,
    "eval_episodes": 4,
    "num_eval_envs": 4,
    "buffer_size": 256,
    "learning_starts": 32,
    "batch_size": 4,
    "gradient_steps": 2,
    "sequence_length": 4,
    "burn_in": 2,
    "eval_policy": "greedy",  # one program instead of two
}


def is_continuous(module) -> bool:
    """Whether the actions of a script are continuous."""
    return isinstance(module.Config().make_env().action_space, Box)


def sizes_of(module) -> dict:
    """The part of SMALL that a script has."""
    names = {field.name for field in dataclasses.fields(module.Config)}
    return {name: value for name, value in SMALL.items() if name in names}


def command_line(script):
    """Arguments for a small run of `script`."""
    module = importlib.import_module(f"algorithms.{script}")
    env = "gymnax::Pendulum-v1" if is_continuous(module) else "gymnax::CartPole-v1"
    sizes = sizes_of(module).items()
    words = [word for name, value in sizes for word in ("--" + name.replace("_", "-"), str(value))]
    return (*words, "--env", env, "--env-kwargs", "max_steps_in_episode", "50")


def tiny(module, **changes):
    """The config of a run of `module` that takes no time."""
    sizes = sizes_of(module) | {"total_steps": 64, "compilation_cache": ""}
    env = "test::Steering" if is_continuous(module) else "test::Counting"
    return module.Config(**sizes | {"env": env, "env_kwargs": {"terminal_every": 5}} | changes)


def one_gradient_step(module, **changes):
    """A config whose update takes one gradient step, and without a memory, which takes time.

    Its task shows what an agent did and nothing else.
    """
    names = {field.name for field in dataclasses.fields(module.Config)}
    sizes = {"update_epochs": 1, "num_minibatches": 1, "gradient_steps": 1, "cell": "none"}
    echo = {"env": "test::Echo", "env_kwargs": {"continuous": is_continuous(module)}}
    changes = {name: value for name, value in (sizes | changes).items() if name in names}
    return tiny(module, **echo | changes)


def run_script(script, *args, **kwargs):
    """A script in a process of its own, to its end."""
    command = [sys.executable, str(ALGORITHMS / f"{script}.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **kwargs)


@contextlib.contextmanager
def as_command(script, *args):
    """Within, `launch` reads this command line and leaves the process as it is."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sys, "argv", [f"{script}.py", *args])
        # It may start the process again.
        patches.setattr(options, "use_compilation_cache", lambda folder: None)
        patches.setattr(gc, "disable", lambda: None)
        yield


def sentence_of(capsys, *args):
    """What `python envs.py ...` says; it must be one sentence and exit code 2."""
    with as_command("envs", *args), pytest.raises(SystemExit) as ended:
        options.launch(main, Command)
    output = capsys.readouterr()
    assert ended.value.code == 2, output.out
    assert len(output.err.splitlines()) == 1 and output.err.startswith("error: "), output.err
    return output.err


def words(text):
    """Text without the boxes and line breaks of the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# --- Scripts as modules ---------------------------------------------------------------------------

# Equal configs share a compiled program: tests differ from these sizes where they must.
ON_POLICY = {"num_envs": 8, "num_steps": 16, "hidden_size": 16, "log": (), "eval_episodes": 8}
ON_POLICY |= {"total_steps": 8 * 16 * 6, "log_every": 4}


def small_on_policy(script, **changes):
    """A config of PPO or PQN, for tests that look at every step of a rollout."""
    env = "gymnax::Pendulum-v1" if is_continuous(script) else "gymnax::CartPole-v1"
    return script.Config(**{"env": env} | ON_POLICY | changes)


OFF_POLICY = {"num_envs": 4, "hidden_size": 16, "log": (), "eval_episodes": 8}
OFF_POLICY |= {"batch_size": 16, "buffer_size": 512, "total_steps": 2000, "learning_starts": 200}
SEQUENCES = {"num_steps": 4, "burn_in": 4, "sequence_length": 8}


def small_off_policy(script, **changes):
    """A config of DQN or SAC, for tests that look at every step in a buffer."""
    env = "test::Steering" if is_continuous(script) else "test::Counting"
    sequences = SEQUENCES if hasattr(script.Config, "sequence_length") else {}
    return script.Config(**OFF_POLICY | sequences | {"env": env} | changes)


def counting(script, **changes):
    """`small_on_policy` for test::Counting, or its twin with continuous actions."""
    env = "test::Steering" if is_continuous(script) else "test::Counting"
    return small_on_policy(script, env=env, **changes)


def records(run_dir):
    """The metrics of a run, less what is never the same twice."""
    text = (Path(run_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    varying = {"time", "charts/SPS", "system/memory_mb", "charts/compile_seconds"}
    lines = [{name: value for name, value in line.items() if name not in varying} for line in lines]
    return [line for line in lines if len(line) > 1]  # not those about compiling


def start(config, script, seed=0):
    """The environment and the first state of all seeds.

    Another `seed` here is that of the config, but the program for other seeds is the same.
    """
    keys = seed_keys(dataclasses.replace(config, seed=config.seed + seed))
    return config.make_env(), script.init(config, keys)


def network_of(script, config):
    """The network that a script makes for its own environment."""
    return script.make_network(config, config.make_env())


def one_seed(state):
    return jax.tree.map(lambda x: x[0], state)


def replayed_steps(buffer):
    """All the steps that a replay buffer keeps, of a state or of shapes."""
    return buffer.chunks.experience.steps if hasattr(buffer, "chunks") else buffer.experience


def copy(state):
    """The public functions donate their state: keep one to compare with."""
    return jax.tree.map(jnp.copy, state)


def assert_same(actual, expected):
    """Equal pytrees, typed keys included."""

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), actual, expected)


def assert_close(actual, expected, **tolerances):
    """Pytrees that are equal up to `rtol` and `atol`."""

    def check(a, b):
        np.testing.assert_allclose(a, b, **tolerances)

    jax.tree.map(check, actual, expected)


def assert_same_shapes(actual, expected):
    """Pytrees of the same structure, shapes and dtypes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def order_of(batch):
    """Metrics: whether a minibatch is of whole environments in test::Counting, and of which.

    The task marks every observation with its episode and its time in it.
    """
    number, time = batch.inputs.obs[..., 0], batch.inputs.obs[..., 1]
    follows = (number[1:] == number[:-1]) & (jnp.abs(time[1:] - time[:-1] - 1 / 7) < 1e-6)
    fresh = (number[1:] != number[:-1]) & (time[1:] == 0)
    in_order = jnp.where(batch.start[1:], fresh, follows).all() & (number.shape == (16, 2))
    return {"test/in_order": in_order.astype(jnp.float32), "test/number": number[0].mean()}


class Table:
    """A network whose outputs are its parameters."""

    action_space = Discrete(3)

    def apply(self, params, *_):
        return params


def outputs_at_final_observations(module, network, state, batch):
    """Of a memory that no end resets, in the observation (number, 1) after every step."""
    starts = jnp.zeros(batch.reward.shape[1], bool)

    @jax.jit
    def unroll(params, carry, rows):
        def step(carry, row):
            inputs, _, action, reward = row
            carry, *_ = network.apply(params, carry, *jax.tree.map(lambda x: x[None], row[:2]))
            final = module.Inputs(inputs.obs.at[:, 1].set(1.0), action, reward)
            *_, output = network.apply(params, carry, final, starts, method="step")
            return carry, output

        return jax.lax.scan(step, carry, rows)[1]

    rows = batch.inputs, batch.start, batch.action, batch.reward
    return unroll(state.params, state.carry, rows)


def final_returns(script, **changes):
    """The mean greedy return (S,) of agents that were trained with the script's own sizes."""
    config = script.Config(**changes, log=())
    env, state = start(config, script)
    state = script.warmup(state, env, Logger())
    num_steps = config.total_steps - getattr(config, "learning_starts", 0)
    state, _ = script.train(state, env, Logger(), num_steps)
    return np.asarray(script.evaluate(state, env, 100).returns.mean(axis=1))


# --- Environments ---------------------------------------------------------------------------------


def check_conformance(env):
    """Shapes and dtypes are those of the spaces, the same after reset and step, never weak."""

    def one_step(key):
        obs, state = env.reset(key)
        return (obs, state), env.step(key, state, env.action_space.sample(key))

    first, later = jax.eval_shape(one_step, jax.random.key(0))
    first_obs, first_state = first
    obs, state, reward, terminated, truncated, info = later
    space = env.observation_space
    for actual in (first_obs, obs, info["final_obs"]):
        assert (actual.shape, actual.dtype) == (space.shape, space.dtype)
    assert_same_shapes(first_state, state)
    typed = jax.tree.leaves((first_obs, first_state, obs, state, reward, info))
    assert not any(leaf.weak_type for leaf in typed)
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    flags = (terminated, truncated, info["episode_done"])
    assert [(x.shape, x.dtype) for x in flags] == [((), jnp.bool_)] * 3
    always = ("episode_done", "episode_length", "episode_return", "final_obs")
    assert set(info) == {*always, *env.reports}
    assert info["episode_length"].dtype == jnp.int32
    assert info["episode_return"].dtype == jnp.float32
    assert isinstance(env.action_space, (Box, Discrete)) and isinstance(env.max_steps, int)


def random_rollout(env, steps, key=0, policy=lambda key, space: space.sample(key)):
    """Of each step: obs acted on, next obs, reward, terminated, truncated, info."""

    def step(carry, key):
        obs, state = carry
        action = policy(key, env.action_space)
        next_obs, state, reward, terminated, truncated, info = env.step(key, state, action)
        return (next_obs, state), (obs, next_obs, reward, terminated, truncated, info)

    keys = jax.random.split(jax.random.key(key), steps)
    first = env.reset(jax.random.key(key))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[1])(first)


def batch_rollout(env, steps, num_envs, key=0, actions=None):
    """First (obs, state); of each step (steps, num_envs, ...) the state before, action, results."""

    def step(carry, inputs):
        obs, state = carry
        key, action = inputs
        keys = jax.random.split(key, num_envs)
        action = jax.vmap(env.action_space.sample)(keys) if actions is None else action
        next_obs, next_state, *rest = jax.vmap(env.step)(keys, state, action)
        return (next_obs, next_state), (state, action, next_obs, *rest)

    @jax.jit
    def run(key):
        first = jax.vmap(env.reset)(jax.random.split(key, num_envs))
        return first, jax.lax.scan(step, first, (jax.random.split(key, steps), actions))[1]

    return run(jax.random.key(key))


def checked_ends(steps):
    """The steps' (terminated, truncated, info), after checks of what holds in every library."""
    _, _, next_obs, _, terminated, truncated, info = steps
    done = info["episode_done"]
    np.testing.assert_array_equal(done, terminated | truncated)
    assert not (terminated & truncated).any()
    np.testing.assert_array_equal(info["final_obs"][~done], next_obs[~done])
    return np.asarray(terminated), np.asarray(truncated), info


def check_picture(env):
    """A first state is drawn, in more than two colours."""
    _, state = jax.jit(env.reset)(jax.random.key(0))
    picture = env.render(jax.device_get(state.task))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2


CHEAP_BRAX = "brax::inverted_pendulum"


@functools.partial(jax.jit, static_argnames=("env", "steps"))
def physics_rollout(env, key, steps):
    """The first obs; of each step obs, action, reward, terminated, truncated and info."""

    def step(state, key):
        action = env.action_space.sample(key)
        obs, state, *rest = env.step(key, state, action)
        return state, (obs, action, *rest)

    obs, state = env.reset(key)
    return obs, jax.lax.scan(step, state, jax.random.split(key, steps))[1]


# --- Files of runs --------------------------------------------------------------------------------


def make_run(path, seeds=3, reports=30, level=100.0, total=3000, script="rppo", about=(), **config):
    """The files of a run with a report every 100 steps; `config` adds to its fields or replaces."""
    path.mkdir()
    fields = {"env": "gymnax::CartPole-v1", "mask": [], "env_kwargs": {}, "cell": "gru", "seed": 0}
    fields |= {"hidden_size": 8, "total_steps": total, "num_seeds": seeds, "run_dir": str(path)}
    saved = {"script": script, "config": fields | config, "final_step": total} | dict(about)
    (path / "config.json").write_text(json.dumps(saved))
    records = []
    for i in range(reports):
        returns = [level * i / reports + seed for seed in range(seeds)]
        records.append(
            {
                "step": 100 * (i + 1),
                "time": 0.5 * i,
                "charts/SPS": 5000.0,
                "losses/value_loss": returns,
                "charts/episodic_return": [*returns[:-1], None],
                "eval/greedy_return": returns,
                "system/memory_mb": 512.0,
            }
        )
    return write_records(path, records)


def write_records(path, records):
    """Give a run these reports instead of its own."""
    lines = [json.dumps(record) + "\n" for record in records]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path
