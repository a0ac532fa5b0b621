"""One factory for every environment: `make("namespace::id")`.

    env = make("gymnax::CartPole-v1", mask="velocity")
    obs, state = env.reset(key)
    obs, state, reward, terminated, truncated, info = env.step(key, state, action)

A single environment made of pure functions: wrap them in `jax.vmap` for many, `jax.lax.scan` for rollouts.

Episodes end in one of two ways, and never in both at once:
  terminated: the task is over, the future is worth nothing;
  truncated: the time limit cut in, the future is worth V(final_obs).
A step that ends an episode already returns the first observation of the next one (same-step auto-reset);
`info["final_obs"]` is always the true next observation. Between steps that do not end an episode the two are equal.

Where things are: a library supplies a `Task` (no auto-reset, its own dtypes); `Environment` does casting, time limits,
auto-reset and episode bookkeeping for all of them, once. Masks and the wrappers of env_wrappers.py turn a `Task` into
another `Task`. On the command line (env_cli.py) `python envs.py` lists namespaces, `python envs.py gymnax` the ids of
one, and `python envs.py gymnax::CartPole-v1` tries an environment with random actions.
To add a library: write a function `(env_id, **options) -> Task` and enter it in `NAMESPACES`.
"""

import contextlib
import functools
import importlib
import inspect
import io
import math
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import experiment
import fast_random  # noqa: F401 - what is random is drawn faster on CPUs
from experiment import UsageError, did_you_mean

# ---------------------------------------------------------------------------------------------------------------------
# Spaces


@dataclass(frozen=True, eq=False)
class Box:
    """Arrays of one shape and dtype between `low` and `high` (arrays of that shape, or scalars)."""

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: Any = np.float32

    def sample(self, key):
        """A uniform sample; needs finite bounds."""
        low, high = jnp.asarray(self.low, jnp.float32), jnp.asarray(self.high, jnp.float32)
        return jax.random.uniform(key, self.shape, jnp.float32, low, high).astype(self.dtype)


@dataclass(frozen=True, eq=False)
class Discrete:
    """The integers 0 ... n - 1."""

    n: int
    shape: tuple[int, ...] = ()
    dtype: Any = np.int32

    def sample(self, key):
        """A uniform sample."""
        return jax.random.randint(key, self.shape, 0, self.n, self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The environment


@dataclass(frozen=True, eq=False)
class Task:
    """What a library supplies: pure functions without auto-reset.

    reset: key -> (obs, state)
    step: (key, state, action) -> (obs, state, reward, terminated, truncated)
    max_steps: steps after which the task truncates by itself.
    render: state -> uint8 image (height, width, 3), on the host; None if the library cannot draw it.
    masks: names for entries of the observation, as those of `NAMED_MASKS`.
    costly_reset: worth a loop, so that it is computed for those environments only whose episode ends.
    """

    reset: Callable
    step: Callable
    observation_space: Box
    action_space: Box | Discrete
    max_steps: int
    render: Callable | None = None
    masks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    costly_reset: bool = False


class EnvState(NamedTuple):
    """The state of one environment."""

    task: Any  # the library's own state
    time: jax.Array  # () int32, steps since the episode began
    episode_return: jax.Array  # () float32, rewards since the episode began
    statistics: Any = ()  # what `Normalized` keeps, across episodes


class Environment:
    """A single environment with same-step auto-reset: the interface of this module's docstring.

    `info` has the keys
      final_obs: the true next observation, also where the returned one begins the next episode;
      episode_done: () bool, terminated or truncated;
      episode_return: () float32, sum of rewards of the episode up to and including this step;
      episode_length: () int32, its steps; both count the whole episode where episode_done.
    """

    def __init__(self, id: str, task: Task):
        self.id = id
        self.observation_space = task.observation_space
        self.action_space = task.action_space
        self.max_steps = task.max_steps
        self.render = task.render
        self._task = task
        self._state_avals = jax.eval_shape(task.reset, jax.random.key(0))[1]

    def __repr__(self):
        return f"make({self.id!r})"

    def reset(self, key):
        """key -> (obs, EnvState)."""
        obs, task_state = self._task.reset(key)
        return self._cast_obs(obs), EnvState(self._cast_state(task_state), jnp.int32(0), jnp.float32(0.0))

    def step(self, key, state, action):
        """key, EnvState, action -> (obs, EnvState, reward, terminated, truncated, info)."""
        step_key, reset_key = jax.random.split(key)
        action = jnp.asarray(action, self.action_space.dtype).reshape(self.action_space.shape)
        if isinstance(self.action_space, Box):
            action = jnp.clip(action, self.action_space.low, self.action_space.high)
        final_obs, task_state, reward, terminated, truncated = self._task.step(step_key, state.task, action)
        final_obs = self._cast_obs(final_obs)
        reward = strong(jnp.asarray(reward, jnp.float32).reshape(()))
        terminated = jnp.asarray(terminated, bool).reshape(())
        truncated = jnp.asarray(truncated, bool).reshape(()) & ~terminated
        done = terminated | truncated

        state = EnvState(self._cast_state(task_state), state.time + 1, state.episode_return + reward)
        info = {
            "final_obs": final_obs,
            "episode_done": done,
            "episode_return": state.episode_return,
            "episode_length": state.time,
        }
        begin = branch_where if self._task.costly_reset else where
        obs, state = begin(done, functools.partial(Environment.reset, self), reset_key, (final_obs, state))
        return obs, state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in; see `Normalized.frozen`."""
        return self

    def _cast_obs(self, obs):
        return strong(cast(obs, self._task.observation_space))

    def _cast_state(self, task_state):
        # Libraries return weak types, and other dtypes from step than from reset: either compiles everything twice.
        def cast_leaf(leaf, aval):
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                return leaf
            return strong(jnp.asarray(leaf).astype(aval.dtype))

        return jax.tree.map(cast_leaf, task_state, self._state_avals)


def cast(obs, space: Box):
    """An observation with the shape and dtype of its space."""
    return jnp.asarray(obs).astype(space.dtype).reshape(space.shape)


def strong(x):
    """x without jax's weak type."""
    return jax.lax.convert_element_type(x, x.dtype)


def where(condition, function, key, otherwise):
    """function(key) where the condition holds, else `otherwise`; all may have leading axes, those of the condition."""

    def select(x, y):
        return jnp.where(condition.reshape(condition.shape + (1,) * (y.ndim - condition.ndim)), x, y)

    return jax.tree.map(select, function(key), otherwise)


def branch_where(condition, function, key, otherwise):
    """`where` that computes the function only where the condition holds; under vmap in groups, not for all of a batch.

    Groups of sqrt(n) of n compute little in vain, and n / 16 are not too many turns for a GPU. A group that the
    condition does not fill computes its first member again: a task that looks can spare itself that.
    """

    @jax.custom_batching.custom_vmap  # a plain cond would become a select, which computes both branches
    def branch(condition, key, otherwise):
        if condition.ndim == 0:
            return jax.lax.cond(condition, lambda: function(key), lambda: otherwise)
        if condition.size == 1:  # of a batch of one a loop would compute all outside, always
            return jax.tree.map(lambda x: x[None], branch(*jax.tree.map(lambda x: x[0], (condition, key, otherwise))))

        def body(loop):
            waiting, result = loop
            (rows,) = jnp.nonzero(waiting, size=group_size, fill_value=waiting.argmax())
            computed = jax.vmap(function)(flat_key[rows])
            return waiting.at[rows].set(False), jax.tree.map(lambda x, y: x.at[rows].set(y), result, computed)

        axes, flat_key = condition.ndim, key.reshape(-1)
        group_size = max(math.isqrt(condition.size), condition.size // 16)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), (condition, otherwise))
        _, result = jax.lax.while_loop(lambda loop: loop[0].any(), body, flat)
        return jax.tree.map(lambda x, y: x.reshape(y.shape), result, otherwise)

    @branch.def_vmap
    def _(size, is_batched, *args):
        def batched(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        condition, key, otherwise = jax.tree.map(batched, args, tuple(is_batched))
        result = branch_where(condition, function, key, otherwise)
        return result, jax.tree.map(lambda _: True, result)

    return branch(condition, key, otherwise)


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation


class Moments(NamedTuple):
    """Running mean and variance of everything seen (Chan et al. 1979), with the prior of gymnasium's RunningMeanStd."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # () float32; where it is too large to be counted up, new values keep the weight they had then

    @classmethod
    def init(cls, shape):
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.float32(1e-4))

    def update(self, x):
        """Take in x of this environment, or of all that are vmapped with axis_name="envs"."""
        try:
            number, mean = jax.lax.psum(1, "envs"), jax.lax.pmean(x, "envs")
            var = jax.lax.pmean((x - mean) ** 2, "envs")
        except NameError:  # there is no such axis
            number, mean, var = 1, x, jnp.zeros_like(x)
        count = self.count + number
        weight, change = number / count, mean - self.mean
        var = self.var + weight * (var - self.var + (1.0 - weight) * change**2)
        return Moments(self.mean + weight * change, var, count)


class Statistics(NamedTuple):
    """What normalisation knows; None stands for what is not normalised."""

    obs: Moments | None  # of every observation returned
    returns: Moments | None  # of the discounted return so far, at every step
    discounted: jax.Array  # () float32, the discounted return so far of this episode


class Normalized(Environment):
    """An environment whose observations, rewards or both have a variance of about 1.

      observation: (obs - mean) / sqrt(var + 1e-8), of all observations returned so far, this one included;
      reward: reward / sqrt(var + 1e-8) of the discounted return so far, g <- gamma * g + reward;
    both clipped to +-10, as by CleanRL and Engstrom et al. 2020, arXiv 2005.12729.

    The statistics are part of the state and outlive episodes. Environments under `jax.vmap(env.step, axis_name="envs")`
    (the same for env.reset) share theirs; without that name each has its own. `info["final_obs"]` is normalised with
    the statistics of that step but, as the one observation that is never acted upon, does not count towards them.
    `info["episode_return"]` is that of the task. This is what gymnasium's NormalizeObservation and NormalizeReward for
    vectors do, but that the latter restarts g one step early at a termination, and not at all at a truncation.
    """

    def __init__(self, id, task, observations: bool, rewards: bool, gamma: float, statistics: Statistics | None = None):
        super().__init__(id, task)
        self._observations, self._rewards, self._gamma, self._fixed = observations, rewards, gamma, statistics
        if observations:
            if task.observation_space.dtype == np.uint8:
                raise ValueError(f"normalize_obs is not for images, which {id} has: the networks divide them by 255")
            self.observation_space = Box(-10.0, 10.0, task.observation_space.shape)

    def reset(self, key):
        obs, state = super().reset(key)
        shape, discounted = self.observation_space.shape, jnp.float32(0.0)
        moments = (Moments.init(shape) if self._observations else None), (Moments.init(()) if self._rewards else None)
        statistics = self._fixed or self._see(Statistics(*moments, discounted), obs)
        return self._normalize(obs, statistics), state._replace(statistics=() if self._fixed else statistics)

    def step(self, key, state, action):
        statistics = state.statistics
        obs, state, reward, terminated, truncated, info = super().step(key, state._replace(statistics=()), action)
        if self._fixed:
            statistics = self._fixed
        else:
            statistics = self._see(statistics, obs)
            discounted = self._gamma * statistics.discounted + reward
            returns = statistics.returns.update(discounted) if self._rewards else None
            discounted = jnp.where(info["episode_done"], 0.0, discounted)
            statistics = Statistics(statistics.obs, returns, discounted)
            state = state._replace(statistics=statistics)
        if self._rewards:
            reward = jnp.clip(reward / jnp.sqrt(statistics.returns.var + 1e-8), -10.0, 10.0)
        info |= {"final_obs": self._normalize(info["final_obs"], statistics)}
        return self._normalize(obs, statistics), state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in: it normalises with the statistics of `env_state` and leaves them as they are.

        Its rewards are scaled too, as a policy with memory may read them; `info["episode_return"]` is the raw return.

        Args:
          env_state: states of vmapped environments, (N, ...), of which the mean is taken: they share their statistics.
        """
        statistics = jax.tree.map(lambda x: x.mean(axis=0), env_state.statistics)
        return Normalized(self.id, self._task, self._observations, self._rewards, self._gamma, statistics)

    def _see(self, statistics, obs):
        return statistics._replace(obs=statistics.obs.update(obs)) if self._observations else statistics

    def _normalize(self, obs, statistics):
        if not self._observations:
            return obs
        return jnp.clip((obs - statistics.obs.mean) / jnp.sqrt(statistics.obs.var + 1e-8), -10.0, 10.0)


# ---------------------------------------------------------------------------------------------------------------------
# Whole episodes, for evaluation


class Episodes(NamedTuple):
    """What finished episodes were like."""

    returns: jax.Array  # (episodes,) float32
    lengths: jax.Array  # (episodes,) int32


def play(env: Environment, policy: Callable, initialize: Callable, key, num_envs: int, episodes: int) -> Episodes:
    """Play exactly `episodes` episodes from start to end.

    Each environment plays the same number of them in turn; taking the first `episodes` to end would favour short ones.

    Args:
      policy: (memory, obs, start, previous_action, previous_reward, key) -> (memory, action), for all environments at
        once; start (num_envs,) is True where obs begins an episode, the previous_ ones are then those of the last.
      initialize: num_envs -> the memory to begin with, any pytree.
      num_envs: environments played in parallel; fewer if `episodes` is less.
    """
    num_envs = min(num_envs, episodes)
    quota = -(-episodes // num_envs)
    key, reset_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset)(jax.random.split(reset_key, num_envs))
    action_space = env.action_space

    class Loop(NamedTuple):
        key: jax.Array
        memory: Any
        obs: jax.Array
        start: jax.Array
        action: jax.Array
        reward: jax.Array
        env_state: EnvState
        finished: jax.Array  # episodes ended so far, of each environment
        result: Episodes  # (quota, num_envs)

    def unfinished(loop):
        return (loop.finished < quota).any()

    def step(loop):
        key, policy_key, step_key = jax.random.split(loop.key, 3)
        memory, action = policy(loop.memory, loop.obs, loop.start, loop.action, loop.reward, policy_key)
        action = action.astype(action_space.dtype)
        step_keys = jax.random.split(step_key, num_envs)
        obs, env_state, reward, _, _, info = jax.vmap(env.step)(step_keys, loop.env_state, action)
        done = info["episode_done"]
        row = jnp.where(done, loop.finished, quota)  # there is no row `quota`: what is written to it is dropped
        new = Episodes(info["episode_return"], info["episode_length"])
        result = jax.tree.map(lambda x, y: x.at[row, jnp.arange(num_envs)].set(y, mode="drop"), loop.result, new)
        return Loop(key, memory, obs, done, action, reward, env_state, loop.finished + done, result)

    loop = Loop(
        key=key,
        memory=initialize(num_envs),
        obs=obs,
        start=jnp.ones(num_envs, bool),
        action=jnp.zeros((num_envs, *action_space.shape), action_space.dtype),
        reward=jnp.zeros(num_envs, jnp.float32),
        env_state=env_state,
        finished=jnp.zeros(num_envs, jnp.int32),
        result=Episodes(jnp.zeros((quota, num_envs), jnp.float32), jnp.zeros((quota, num_envs), jnp.int32)),
    )
    result = jax.lax.while_loop(unfinished, step, loop).result
    return jax.tree.map(lambda x: x.reshape(-1)[:episodes], result)


class Recording(NamedTuple):
    """One episode to look at."""

    states: Any  # (T, ...) states of the library, those that the actions were chosen in
    length: jax.Array  # () int32, how many of them belong to the episode


def record(env: Environment, policy: Callable, initialize: Callable, key, num_envs: int, episodes: int) -> Recording:
    """Play one episode, or its first 1,000 steps, and keep what happened; the arguments are those of `play`."""
    key, reset_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset)(reset_key[None])
    action = jnp.zeros((1, *env.action_space.shape), env.action_space.dtype)

    def step(carry, _):
        key, memory, obs, start, action, reward, env_state = carry
        key, policy_key, step_key = jax.random.split(key, 3)
        memory, action = policy(memory, obs, start, action, reward, policy_key)
        action = action.astype(env.action_space.dtype)
        obs, next_state, reward, _, _, info = jax.vmap(env.step)(step_key[None], env_state, action)
        done = info["episode_done"]
        return (key, memory, obs, done, action, reward, next_state), (env_state.task, done)

    carry = (key, initialize(1), obs, jnp.ones(1, bool), action, jnp.zeros(1), env_state)
    _, (states, done) = jax.lax.scan(step, carry, length=min(env.max_steps, 1000))
    length = jnp.where(done.any(), done.argmax() + 1, len(done))
    return Recording(jax.tree.map(lambda x: x[:, 0], states), length)


def write_gif(path: str, env: Environment, recording: Recording, width: int = 300) -> None:
    """Draw a recording, `width` pixels wide, at 25 frames per second."""
    from PIL import Image

    frames = []
    states = jax.device_get(recording.states)
    for t in range(int(recording.length)):
        frame = Image.fromarray(env.render(jax.tree.map(lambda x, t=t: x[t], states)))
        height = frame.height * width // frame.width
        frames.append(frame.resize((width, height), Image.Resampling.BOX if frame.width > width else Image.NEAREST))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0, optimize=True)


# ---------------------------------------------------------------------------------------------------------------------
# Observation masks

_CART_POLE = {"position": (0, 2), "velocity": (1, 3)}
_MOUNTAIN_CAR = {"position": (0,), "velocity": (1,)}
NAMED_MASKS: dict[str, dict[str, tuple[int, ...]]] = {
    "gymnax::CartPole-v1": _CART_POLE,
    "gymnax::Acrobot-v1": {"position": (0, 1, 2, 3), "velocity": (4, 5)},
    "gymnax::Pendulum-v1": {"position": (0, 1), "velocity": (2,)},
    "gymnax::MountainCar-v0": _MOUNTAIN_CAR,
    "gymnax::MountainCarContinuous-v0": _MOUNTAIN_CAR,
}


def mask_observation(env_id: str, task: Task, mask: tuple[str, ...]) -> Task:
    """Hide entries of a vector observation: the task that is left has them removed.

    Args:
      mask: what to hide, indices ("0", "3") or a name that `NAMED_MASKS[env_id]` or the task has for some ("velocity"
        hides the velocities).
    """
    space = task.observation_space
    if len(space.shape) != 1:
        raise ValueError(f"mask hides entries of vector observations; {env_id} has observations of shape {space.shape}")
    size, names = space.shape[0], NAMED_MASKS.get(env_id, {}) | task.masks
    hidden: set[int] = set()
    for entry in map(str, mask):
        if entry in names:
            hidden.update(names[entry])
        elif entry.isdecimal() and int(entry) < size:
            hidden.add(int(entry))
        else:
            named = f", or {' or '.join(names)}" if names else ""
            raise ValueError(
                f"unknown mask {entry!r}{did_you_mean(entry, names.keys())}; "
                f"valid for {env_id}: indices 0 to {size - 1}{named}"
            )
    kept = np.array([i for i in range(size) if i not in hidden], int)
    if not len(kept):
        raise ValueError(f"mask {' '.join(map(str, mask))} hides the whole observation of {env_id}")

    def reset(key):
        obs, state = task.reset(key)
        return obs[kept], state

    def step(key, state, action):
        obs, *rest = task.step(key, state, action)
        return obs[kept], *rest

    low, high = (np.broadcast_to(bound, space.shape)[kept] for bound in (space.low, space.high))
    visible = Box(low, high, (len(kept),), space.dtype)
    return replace(task, reset=reset, step=step, observation_space=visible)


# ---------------------------------------------------------------------------------------------------------------------
# gymnax


@contextlib.contextmanager
def imported_when_used(*names):
    """Within, `import name` gives a module that is really imported when something in it is used."""
    stand_ins = [name for name in names if name not in sys.modules]
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda item, name=name: getattr(importlib.import_module(name), item)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def import_gymnax():
    """gymnax, without the second that its tasks spend on importing what they draw with."""
    with imported_when_used("seaborn", "matplotlib.pyplot"):
        import gymnax
    return gymnax


CLASSIC_CONTROL = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")


def gymnax_ids() -> list[str]:
    """The ids of gymnax, less the one that downloads its data."""
    return [env_id for env_id in import_gymnax().registered_envs if env_id != "MNISTBandit-bsuite"]


def gymnax_task(env_id: str, **options) -> Task:
    """A gymnax task; options are its environment parameters or its constructor's arguments.

    Works with gymnax 1.x and with the 0.0.x interface, which `stable-gymnax` installs under the same name:
    `reset_env` and `step_env` are common to both, and neither auto-resets.
    """
    gymnax = import_gymnax()
    env, params = gymnax.make(env_id)
    parameters = {field.name: getattr(params, field.name) for field in fields(params)}
    arguments = {name: argument.default for name, argument in inspect.signature(type(env)).parameters.items()}
    check_options(f"gymnax::{env_id}", options, parameters | arguments)
    env, params = gymnax.make(env_id, **{name: value for name, value in options.items() if name in arguments})
    params = params.replace(**{name: value for name, value in options.items() if name in parameters})

    def reset(key):
        obs, state = env.reset_env(key, params)
        return observe(obs), state

    def step(key, state, action):
        obs, state, reward, done, _ = env.step_env(key, state, action, params)
        if hasattr(env, "is_truncated"):  # gymnax 1.x: `done` is natural termination only
            return observe(obs), state, reward, done, env.is_truncated(state, params)
        truncated = state.time >= params.max_steps_in_episode  # 0.0.x: `done` includes the time limit
        return observe(obs), state, reward, jnp.asarray(done, bool) & ~truncated, truncated

    # The declared space serves for bounds only: in several tasks its dtype or shape is not that of the observation.
    declared = env.observation_space(params)
    if hasattr(declared, "n"):
        observation_space = Box(0.0, 1.0, (int(declared.n),))
        observe = functools.partial(jax.nn.one_hot, num_classes=int(declared.n))
    else:
        actual = jax.eval_shape(lambda key: env.reset_env(key, params)[0], jax.random.key(0))
        low, high = np.asarray(declared.low, np.float32), np.asarray(declared.high, np.float32)
        observation_space = Box(low, high, actual.shape, np.uint8 if actual.dtype == np.uint8 else np.float32)
        observe = jnp.asarray
    actions = env.action_space(params)
    if hasattr(actions, "n"):
        action_space = Discrete(int(actions.n))
    else:
        shape = tuple(actions.shape)
        action_space = Box(np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32), shape)
    render = gymnax_renderer(env_id, env, params)
    return Task(reset, step, observation_space, action_space, int(params.max_steps_in_episode), render)


def let_pygame_run_anywhere():
    """It looks for a screen and a sound card otherwise."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")


def gymnax_renderer(env_id, env, params) -> Callable | None:
    """Classic control as gymnasium draws it (with gymnax 1.x); grids with one colour per channel."""

    def render_classic_control(state):
        let_pygame_run_anywhere()
        from gymnax.visualize.vis_gym import render_gym_frame

        return render_gym_frame(env_id, state, params)

    def render_grid(state):
        from matplotlib import colormaps

        grid = np.asarray(env.get_obs(state), bool)
        colors = colormaps["tab10"](np.arange(grid.shape[-1]))[:, :3]
        channel = np.where(grid.any(axis=-1), grid.argmax(axis=-1) + 1, 0)
        return (255 * np.concatenate([np.zeros((1, 3)), colors])[channel]).astype(np.uint8)

    if env_id.endswith("-MinAtar"):
        return render_grid
    return render_classic_control if env_id in CLASSIC_CONTROL and hasattr(env, "is_truncated") else None


# ---------------------------------------------------------------------------------------------------------------------
# Libraries that need not be installed


@contextlib.contextmanager
def silence():
    """Nothing is printed, no warning shown."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def import_silently(module: str, owner: str, package: str):
    """The module, without what it prints and warns of; a ValueError that says how to install it if it is missing."""
    try:
        with silence():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{owner} needs {error.name}, which is not installed: pip install {package!r}") from None


# ---------------------------------------------------------------------------------------------------------------------
# What brax and mujoco have in common


@contextlib.contextmanager
def quiet():
    """`silence`, also of MuJoCo itself, which would append its warnings to ./MUJOCO_LOG.TXT, too."""
    import mujoco

    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with silence():
            yield
    finally:
        mujoco.set_mju_user_warning(None)


def arguments_of(constructor) -> dict:
    """What a constructor can be given by name, and the defaults, a whole number for a float written as a float."""
    arguments = inspect.signature(constructor).parameters.values()
    given = {x.name: x for x in arguments if x.default is not x.empty and x.name != "default_camera_config"}
    return {name: float(x.default) if x.annotation is float else x.default for name, x in given.items()}


def take_max_steps(owner: str, options: dict, default: int) -> int:
    max_steps = options.pop("max_steps", default)
    if max_steps < 1:
        raise ValueError(f"option max_steps of {owner} must be at least 1, got {max_steps}")
    return max_steps


def without_screen(render: Callable, owner: str) -> Callable:
    """`render` of MuJoCo on a machine that need not have a screen; what it lacks it says in one sentence."""

    def rendered(state):
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            with quiet():
                return render(state)
        except Exception as error:  # every way to get an OpenGL context has exceptions of its own
            raise UsageError(
                f"{owner} cannot be drawn here, MuJoCo gets no OpenGL context ({str(error).splitlines()[0]}); "
                "the environment variable MUJOCO_GL chooses between egl, osmesa and glfw"
            ) from None

    return rendered


# coordinates that the observation leaves out: the robot's place in the plane
HIDDEN_COORDINATES = {"halfcheetah": 1, "hopper": 1, "walker2d": 1, "swimmer": 2, "ant": 2, "humanoid": 2}
HIDDEN_COORDINATES["humanoidstandup"] = 2


def kinematic_masks(env_id: str, env, nq: int, nv: int, cinert: int, cvel: int) -> dict[str, tuple[int, ...]]:
    """Positions are what follows from qpos alone, velocities what follows from qvel, too; forces are neither.

    Positions include sines, cosines, places of bodies, and the bodies' inertia about the centre of mass (cinert entries
    of a humanoid); velocities those of the bodies (cvel entries). brax and Gymnasium have the same order.
    """
    robot = env_id.partition("-")[0].lower().replace("_", "")
    if robot == "inverteddoublependulum":
        kinds = "p" * 5 + "v" * 3  # cart, sines, cosines; velocities; then Gymnasium's constraint forces
    elif robot == "reacher":
        kinds = "p" * 6 + "v" * 2 + "p" * 3  # cosines, sines, target; velocities; from target to fingertip
    elif robot == "pusher":
        kinds = "p" * 7 + "v" * 7 + "p" * 9  # joints; velocities; places of fingertip, object and goal
    else:
        hidden = HIDDEN_COORDINATES.get(robot, 0) * getattr(env, "_exclude_current_positions_from_observation", True)
        kinds = "p" * (nq - hidden) + "v" * nv  # then forces
        if robot.startswith("humanoid"):
            kinds += "p" * cinert + "v" * cvel  # then forces
    position, velocity = (tuple(i for i, kind in enumerate(kinds) if kind == letter) for letter in "pv")
    return {"position": position, "velocity": velocity}


# ---------------------------------------------------------------------------------------------------------------------
# brax

# all of brax but `fast`, which simulates nothing, and `swimmer`, which brax 0.14 cannot make
BRAX = ("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_double_pendulum", "inverted_pendulum")
BRAX += ("pusher", "reacher", "walker2d")
BRAX_BACKENDS = ("generalized", "spring", "positional", "mjx")


def brax_task(env_id: str, **options) -> Task:
    """A brax environment without brax's wrappers; options: its arguments, of which `backend`, and max_steps.

    The state is the physics' alone: what brax adds to it for its own training (metrics, info) is not read by a step.
    """
    from env_wrappers import time_limit

    owner = f"brax::{env_id}"
    brax = import_silently("brax.envs", owner, "brax")
    check_options(owner, options, {"max_steps": 1000} | arguments_of(brax._envs[env_id]))
    max_steps, backend = take_max_steps(owner, options, 1000), options.get("backend", BRAX_BACKENDS[0])
    if backend not in BRAX_BACKENDS:
        hint = did_you_mean(backend, BRAX_BACKENDS)
        raise ValueError(f"unknown backend {backend!r} of {owner}{hint}; valid: {', '.join(BRAX_BACKENDS)}")
    with quiet():
        env = brax.get_environment(env_id, **options)

    def reset(key):
        state = env.reset(key)
        return state.obs, state.pipeline_state

    def step(key, physics, action):
        state = env.step(brax.State(physics, obs=None, reward=jnp.float32(0), done=jnp.float32(0)), action)
        return state.obs, state.pipeline_state, state.reward, state.done > 0.5, False

    @functools.cache
    def renderer():
        import mujoco
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        data = mujoco.MjData(env.sys.mj_model)
        return data, MujocoRenderer(env.sys.mj_model, data, width=480, height=480)

    def render(state):
        import mujoco

        data, draw = renderer()
        data.qpos[:] = state.q
        mujoco.mj_forward(env.sys.mj_model, data)
        return draw.render("rgb_array")

    observations = jax.eval_shape(reset, jax.random.key(0))[0].shape
    bodies = env.sys.num_links()
    masks = kinematic_masks(env_id, env, env.sys.q_size(), env.sys.qd_size(), 10 * bodies, 6 * bodies)
    spaces = Box(-np.inf, np.inf, observations), Box(-1.0, 1.0, (env.action_size,))
    task = Task(reset, step, *spaces, max_steps, without_screen(render, owner), masks, costly_reset=True)
    return time_limit(task, max_steps)


# ---------------------------------------------------------------------------------------------------------------------
# mujoco

# of MuJoCo Playground those of the DeepMind Control Suite; the others download their robots
_CONTROL_SUITE = """
    AcrobotSwingup AcrobotSwingupSparse BallInCup CartpoleBalance CartpoleBalanceSparse CartpoleSwingup
    CartpoleSwingupSparse CheetahRun FingerSpin FingerTurnEasy FingerTurnHard FishSwim HopperHop HopperStand
    HumanoidStand HumanoidWalk HumanoidRun PendulumSwingup PointMass ReacherEasy ReacherHard SwimmerSwimmer6
    WalkerRun WalkerStand WalkerWalk
"""
PLAYGROUND = _CONTROL_SUITE.split()


def mujoco_ids() -> list[str]:
    """Gymnasium's that run with today's MuJoCo, then those of MuJoCo Playground."""
    import gymnasium

    specs = gymnasium.registry.values()
    ours = [spec for spec in specs if str(spec.entry_point).startswith("gymnasium.envs.mujoco.")]
    return [spec.id for spec in ours if spec.version >= 4 and spec.id != "Pusher-v4"] + PLAYGROUND


def mujoco_task(env_id: str, **options) -> Task:
    """A MuJoCo environment of Gymnasium, simulated on the host; options are its arguments and max_steps.

    One callback steps all environments of a vmap: a pure function of states, see `host_mujoco`.
    """
    owner = f"mujoco::{env_id}"
    if env_id in PLAYGROUND:
        return playground_task(env_id, **options)
    gymnasium = import_silently("gymnasium", owner, "gymnasium[mujoco]")
    import_silently("mujoco", owner, "gymnasium[mujoco]")
    from env_wrappers import time_limit
    from host_mujoco import HostMujoco, call_on_host

    spec = gymnasium.spec(env_id)
    arguments = arguments_of(gymnasium.envs.registration.load_env_creator(spec.entry_point))
    check_options(owner, options, {"max_steps": spec.max_episode_steps} | arguments)
    max_steps = take_max_steps(owner, options, spec.max_episode_steps)
    try:
        with quiet():
            host = HostMujoco(gymnasium.make(env_id, render_mode="rgb_array", **options))
    except Exception as error:  # whatever Gymnasium and MuJoCo think of the values
        raise ValueError(f"{owner} cannot be made with {options}: {error}") from None
    env = host.env
    observation_space = Box(-np.inf, np.inf, env.observation_space.shape)
    low, high = env.action_space.low, env.action_space.high
    size = host.state_size + observation_space.shape[0]

    def reset(key):
        results = call_on_host(host.reset, jax.random.bits(key, (1,), jnp.uint32), size)
        state, obs = jnp.split(results, [host.state_size])
        return jax.lax.bitcast_convert_type(obs, jnp.float32), state

    def step(key, state, action):
        given = jnp.concatenate([state, jax.lax.bitcast_convert_type(action, jnp.uint32)])
        results = call_on_host(host.step, given, size + 2)
        state, results = jnp.split(results, [host.state_size])
        results = jax.lax.bitcast_convert_type(results, jnp.float32)
        return results[:-2], state, results[-2], results[-1] > 0.5, False

    entries = {"cinert": 10 * env.model.nbody, "cvel": 6 * env.model.nbody}  # of the v4 humanoids
    entries |= getattr(env, "observation_structure", {})
    masks = kinematic_masks(env_id, env, env.model.nq, env.model.nv, entries["cinert"], entries["cvel"])
    num_entries = observation_space.shape[0]
    masks = {name: tuple(i for i in entries if i < num_entries) for name, entries in masks.items()}
    action_space = Box(low, high, env.action_space.shape)
    render = without_screen(host.render, owner)
    task = Task(reset, step, observation_space, action_space, max_steps, render, masks, costly_reset=True)
    return time_limit(task, max_steps)


def playground_task(env_id: str, **options) -> Task:
    """An environment of MuJoCo Playground, in JAX; the only option is max_steps."""
    from env_wrappers import time_limit

    owner = f"mujoco::{env_id}"
    registry = import_silently("mujoco_playground", owner, "playground").registry
    default = int(registry.get_default_config(env_id).episode_length)
    check_options(owner, options, {"max_steps": default})
    max_steps = take_max_steps(owner, options, default)
    with quiet():
        env = registry.load(env_id, config_overrides={"impl": "jax"})  # the default needs an NVIDIA GPU

    def reset(key):
        state = env.reset(key)
        return state.obs, state

    def step(key, state, action):
        state = env.step(state, action)
        return state.obs, state, state.reward, state.done > 0.5, False

    spaces = Box(-np.inf, np.inf, (env.observation_size,)), Box(-1.0, 1.0, (env.action_size,))
    return time_limit(Task(reset, step, *spaces, max_steps, costly_reset=True), max_steps)


# ---------------------------------------------------------------------------------------------------------------------
# popjaxrl


def popjaxrl_ids() -> list[str]:
    """The ids of popjaxrl.py."""
    from popjaxrl import GAMES

    return list(GAMES)


def popjaxrl_task(env_id: str, **options) -> Task:
    """A task of POPGym; they have no options."""
    import popjaxrl

    check_options(f"popjaxrl::{env_id}", options, {})
    return popjaxrl.popjaxrl_task(env_id)


# ---------------------------------------------------------------------------------------------------------------------
# craftax

CRAFTAX = ("Craftax-Symbolic-v1", "Craftax-Pixels-v1", "Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1")


def craftax_task(env_id: str, **options) -> Task:
    """Craftax and Craftax-Classic; options are the numbers and flags of its environment parameters."""
    owner = f"craftax::{env_id}"
    import_silently("craftax.craftax_env", owner, "craftax")
    package = "craftax_classic" if "Classic" in env_id else "craftax"
    constants = importlib.import_module(f"craftax.{package}.constants")
    with craftax_textures(owner, constants) if "Pixels" in env_id else contextlib.nullcontext():
        env = sys.modules["craftax.craftax_env"].make_craftax_env_from_name(env_id, auto_reset=False)
    params = env.default_params
    check_options(owner, options, {name: value for name, value in vars(params).items() if not isinstance(value, tuple)})
    params = params.replace(**options)
    unlimited = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        obs, state, reward, _, _ = env.step_env(key, state, action, params)
        terminated = env.is_terminal(state, unlimited)  # with `params` it is true at the time limit, too
        return obs, state, reward, terminated, state.timestep >= params.max_timesteps

    @functools.cache
    def renderer():
        make_renderer = importlib.import_module(f"craftax.{package}.renderer").make_craftax_pixel_renderer
        with craftax_textures(owner, constants):
            return jax.jit(make_renderer(constants.BLOCK_PIXEL_SIZE_IMG))

    def render(state):
        return np.asarray(renderer()(state)).clip(0, 255).astype(np.uint8)

    observation_space = Box(0.0, 1.0, env.observation_space(params).shape)
    actions = Discrete(env.action_space(params).n)
    return Task(reset, step, observation_space, actions, int(params.max_timesteps), render, costly_reset=True)


@contextlib.contextmanager
def craftax_textures(owner, constants):
    """Within, craftax loads its textures: it makes them for a minute, once, and stores them in its own folder."""
    cache = constants.TEXTURE_CACHE_FILE
    if not os.path.exists(cache) and not os.access(os.path.dirname(cache), os.W_OK):
        raise ValueError(
            f"the pictures of {owner} need craftax's textures, which it makes once and writes to {cache}: "
            f"that folder cannot be written to"
        )
    with contextlib.redirect_stdout(io.StringIO() if os.path.exists(cache) else sys.stderr):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# navix

NAVIX_OBSERVATIONS = ("symbolic", "symbolic_first_person", "categorical", "categorical_first_person")
NAVIX_OBSERVATIONS += ("rgb", "rgb_first_person")
NAVIX_ENTITIES = 10  # the greatest of its EntityIds


def import_navix():
    """navix, without the second that its training code spends on importing what it logs and draws with."""
    with imported_when_used("wandb", "wandb.util", "matplotlib.pyplot"):
        return import_silently("navix", "navix", "navix")


def navix_ids() -> list[str]:
    """The ids of navix: of its version 0.7, which Python 3.11 gets, about half of those of version 4."""
    return sorted(import_navix().registry())


def navix_alias(env_id: str) -> str:
    """FourRooms is short for Navix-FourRooms-v0."""
    return f"navix::{env_id if env_id.startswith('Navix-') else f'Navix-{env_id}-v0'}"


def navix_task(env_id: str, **options) -> Task:
    """A navix grid world.

    Options:
      observation: one of NAVIX_OBSERVATIONS, by default symbolic_first_person, the 7 x 7 cells before the agent.
        symbolic: (type, colour, state) of every cell as float32 numbers; rgb: uint8 pixels.
        categorical: the type, one-hot; in navix -1 is a wall, 0 the floor, 100 what is not seen: first, second, last.
      max_steps: by default that of navix 4, whatever the version: navix 0.7 would end all tasks after 100 steps.
    """
    owner = f"navix::{env_id}"
    navix = import_navix()
    library = navix.make(env_id)
    limit = library.max_steps if hasattr(library, "disable_autoreset") else 4 * library.height * library.width
    defaults = {"observation": "symbolic_first_person", "max_steps": int(limit)}
    check_options(owner, options, defaults)
    observation = options.get("observation", defaults["observation"])
    max_steps = take_max_steps(owner, options, defaults["max_steps"])
    if observation not in NAVIX_OBSERVATIONS:
        hint = did_you_mean(observation, NAVIX_OBSERVATIONS)
        raise ValueError(f"{owner} has no observation {observation!r}{hint}; valid: {', '.join(NAVIX_OBSERVATIONS)}")
    env = navix.make(env_id, observation_fn=getattr(navix.observations, observation), max_steps=max_steps)
    is_categorical, is_rgb = observation.startswith("categorical"), observation.startswith("rgb")

    def observe(timestep):
        if is_categorical:
            return jax.nn.one_hot(jnp.minimum(timestep.observation, NAVIX_ENTITIES + 1) + 1, NAVIX_ENTITIES + 3)
        return timestep.observation

    def reset(key):
        timestep = env.reset(key)
        return observe(timestep), timestep.replace(observation=())

    def step(key, timestep, action):
        timestep = env._step(timestep, action)  # `step` would reset a finished episode instead
        ends = timestep.is_termination(), timestep.is_truncation()
        return observe(timestep), timestep.replace(observation=()), timestep.reward, *ends

    draw = jax.jit(lambda timestep: navix.observations.rgb(timestep.state))
    obs = jax.eval_shape(reset, jax.random.key(0))[0]
    high = 255 if is_rgb else 1.0 if is_categorical else NAVIX_ENTITIES
    space = Box(0, high, obs.shape, np.uint8 if is_rgb else np.float32)
    actions = Discrete(len(env.action_set))
    return Task(reset, step, space, actions, max_steps, lambda state: np.asarray(draw(state)), costly_reset=True)


# ---------------------------------------------------------------------------------------------------------------------
# popgym_arcade


def import_arcade():
    """popgym_arcade on whichever gymnax is installed, see `gymnax_task`."""
    with imported_when_used("seaborn", "matplotlib.pyplot"):
        return import_silently("popgym_arcade", "popgym_arcade", "popgym-arcade")


def arcade_ids() -> list[str]:
    """The ids of POPGym Arcade: ten games, each Easy, Medium and Hard."""
    return list(import_arcade().registration.REGISTERED_ENVIRONMENTS)


def arcade_task(env_id: str, **options) -> Task:
    """A game of POPGym Arcade.

    Options:
      partial_obs: True hides what a memory must keep; the library's default is False, but this is about memory.
      obs_size: 128 or 256 pixels.
    """
    owner = f"popgym_arcade::{env_id}"
    arcade = import_arcade()
    defaults = {"partial_obs": True, "obs_size": 128}
    check_options(owner, options, defaults)
    options = defaults | options
    if options["obs_size"] not in (128, 256):
        raise ValueError(f"option obs_size of {owner} must be 128 or 256, got {options['obs_size']}")
    env, params = made_compiled(lambda: arcade.make(env_id, **options))
    if hasattr(env, "is_terminal"):
        env.is_terminated = env.is_terminal  # its name since gymnax 1.0, where the games' step looks for it

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        obs, state, reward, done, info = env.step_env(key, state, action, params)
        truncated = jnp.asarray(info["truncated"], bool)
        # info["terminated"] includes the time limit in some of the games; `done` lacks it in others.
        return obs, state, reward, jnp.asarray(done, bool) & ~truncated, truncated

    takes = inspect.signature(env.get_obs).parameters.values()
    rest = {"params": params, "key": jax.random.key(0)}  # of the noise, in some of the games
    rest = {x.name: rest[x.name] for x in takes if x.name in rest}
    draw = jax.jit(lambda state: env.get_obs(state, **rest))
    space = Box(0, 255, (options["obs_size"], options["obs_size"], 3), np.uint8)
    # Those of `params` mean nothing in several games, and AutoEncode does not count the action that confirms.
    max_steps = int(getattr(env, "max_steps_in_episode", 0) or env.max_episode_length)
    return Task(reset, step, space, Discrete(5), max_steps, lambda state: np.asarray(draw(state)), costly_reset=True)


def made_compiled(make_env):
    """What make_env() makes, (env, params), the arrays it keeps computed by one program, not operation by operation."""
    made = []

    def build():
        made.append(make_env())
        return {name: value for name, value in vars(made[-1][0]).items() if is_made_of_arrays(value)}

    arrays = jax.jit(build)()
    vars(made[-1][0]).update(arrays)
    return made[-1]


def is_made_of_arrays(value):
    return bool(jax.tree.leaves(value)) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))


# ---------------------------------------------------------------------------------------------------------------------
# gxm
#
# gxm 0.4 gives many libraries one interface. Its ids are understood here, but its adapters are not used: most lose the
# final observation and the truncation, and that of Gymnasium ignores the key and steps simulators that it hides.

GXM_LIBRARIES = {"Gymnax": "gymnax", "Brax": "brax", "Craftax": "craftax", "Navix": "navix"}


def import_gymnasium():
    """Gymnasium with the games of the Arcade Learning Environment, where they are installed."""
    gymnasium = import_silently("gymnasium", "gxm::Gymnasium", "gymnasium")
    with contextlib.suppress(ImportError):
        importlib.import_module("ale_py")  # registers them
    return gymnasium


def gxm_ids() -> list[str]:
    """Those of Gymnasium's ids that `gxm_task` makes; the other libraries' are in their own namespaces."""
    toys = "gymnasium.envs.classic_control", "gymnasium.envs.toy_text"
    specs = import_gymnasium().registry.values()
    return [f"Gymnasium/{spec.id}" for spec in specs if is_atari(spec) or str(spec.entry_point).startswith(toys)]


def is_atari(spec):
    return spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"


def gxm_alias(env_id: str) -> str:
    """Gymnax/CartPole-v1 is gymnax::CartPole-v1, Gymnasium/Ant-v5 is mujoco::Ant-v5."""
    library, separator, name = env_id.partition("/")
    if not separator or library not in GXM_LIBRARIES | {"Gymnasium": ""}:
        valid = ", ".join([*GXM_LIBRARIES, "Gymnasium"])
        raise ValueError(
            f"unknown environment 'gxm::{env_id}'; write gxm::Library/id, with one of the libraries {valid}"
        )
    if library in GXM_LIBRARIES:
        return full_id(f"{GXM_LIBRARIES[library]}::{name}")
    spec = import_gymnasium().registry.get(name)
    if spec is None or env_id in gxm_ids():
        return f"gxm::{env_id}"
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco."):
        return f"mujoco::{name}"
    raise ValueError(f"gxm::{env_id} is not supported: its simulator does not let its state be read and set")


def gxm_task(env_id: str, **options) -> Task:
    """An environment of Gymnasium, simulated on the host, as a pure function of its state."""
    spec = import_gymnasium().registry[env_id.partition("/")[2]]
    return (atari_task if is_atari(spec) else pickled_task)(f"gxm::{env_id}", spec, **options)


def atari_task(owner: str, spec, **options) -> Task:
    """An Atari game as ale_py's vector environment prepares it, but with the stack of frames as the last axis.

    Observations are the last 4 frames, (84, 84, 4) uint8. The key decides on the number of idle frames at the beginning
    and on which frames repeat the action of the one before; the console itself is deterministic.

    Options: those of the vector environment in `defaults`.
    """
    from host_gymnasium import Atari

    defaults = {
        "repeat_action_probability": 0.25,
        "full_action_space": False,
        "frameskip": 4,
        "noop_max": 30,
        "use_fire_reset": True,
        "reward_clipping": True,
        "max_num_frames_per_episode": 108_000,
    }
    check_options(owner, options, defaults)
    options = defaults | options
    for name in ("frameskip", "noop_max", "max_num_frames_per_episode"):
        if options[name] < 1:
            raise ValueError(f"option {name} of {owner} must be at least 1, got {options[name]}")
    frameskip, max_frames = options["frameskip"], options["max_num_frames_per_episode"]
    host = Atari(spec.kwargs["game"], frameskip, options["full_action_space"], max_frames)
    first_frames, first_states = host.starts(options["noop_max"], options["use_fire_reset"])
    space = Box(0, 255, (84, 84, 4), np.uint8)
    shapes = (
        jax.ShapeDtypeStruct((84, 84), jnp.uint8),
        jax.ShapeDtypeStruct((host.state_size,), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((), bool),
        jax.ShapeDtypeStruct((), bool),
    )

    def reset(key):
        idle = jax.random.randint(key, (), 0, options["noop_max"])
        frames = jnp.zeros(space.shape, jnp.uint8).at[..., -1].set(jnp.asarray(first_frames)[idle])
        return frames, (jnp.asarray(first_states)[idle], frames, jnp.int32(0))

    def step(key, state, action):
        console, frames, held = state
        sticks = jax.random.bernoulli(key, options["repeat_action_probability"], (frameskip,))
        held_actions = []
        for stick in sticks:
            held = jnp.where(stick, held, action)
            held_actions.append(held)
        arguments = console, jnp.stack(held_actions)
        results = jax.pure_callback(host.step, shapes, *arguments, vmap_method="broadcast_all")
        frame, console, reward, terminated, truncated = results
        frames = jnp.concatenate([frames[..., 1:], frame[..., None]], axis=-1)
        reward = jnp.clip(reward, -1, 1) if options["reward_clipping"] else reward
        return frames, (console, frames, held), reward, terminated, truncated

    max_steps = -(-max_frames // frameskip)
    return Task(reset, step, space, Discrete(host.actions), max_steps, lambda state: host.picture(state[0]))


def pickled_task(owner: str, spec, **options) -> Task:
    """A small environment of Gymnasium, carried as its pickle; options are those of `gymnasium.make` and its own."""
    import gymnasium

    from host_gymnasium import Pickled

    constructor = gymnasium.envs.registration.load_env_creator(spec.entry_point)
    arguments = inspect.signature(constructor).parameters.values()
    defaults = {x.name: x.default for x in arguments if x.default is not x.empty} | spec.kwargs
    defaults = {"max_episode_steps": spec.max_episode_steps or 1000} | defaults
    check_options(owner, options, defaults)
    steps = {"max_episode_steps": defaults["max_episode_steps"]}
    env = gymnasium.make(spec, disable_env_checker=True, **{"render_mode": "rgb_array"} | steps | options)
    host = Pickled(env)
    obs = jax.ShapeDtypeStruct(host.space.shape, np.uint8 if host.space.dtype == np.uint8 else np.float32)
    shapes = obs, jax.ShapeDtypeStruct((host.state_size,), jnp.uint8)
    ends = [jax.ShapeDtypeStruct((), jnp.float32), *[jax.ShapeDtypeStruct((), bool)] * 2]

    def reset(key):
        seed = jax.random.bits(key, dtype=jnp.uint32)
        return jax.pure_callback(host.reset, shapes, seed, vmap_method="broadcast_all")

    def step(key, state, action):
        return jax.pure_callback(host.step, (*shapes, *ends), state, action, vmap_method="broadcast_all")

    low, high = host.space.low.astype(np.float32), host.space.high.astype(np.float32)
    space, actions = Box(low, high, obs.shape, obs.dtype), env.action_space
    discrete = hasattr(actions, "n")
    action_space = Discrete(int(actions.n)) if discrete else Box(actions.low, actions.high, actions.shape)
    max_steps = env.spec.max_episode_steps

    def render(state):
        let_pygame_run_anywhere()
        return host.picture(state)

    return Task(reset, step, space, action_space, max_steps, render, costly_reset=True)


# ---------------------------------------------------------------------------------------------------------------------
# The factory

# namespace -> (its ids, (id, **options) -> Task); libraries are imported when one of their ids is asked for
NAMESPACES: dict[str, tuple[Callable[[], list[str]], Callable[..., Task]]] = {
    "gymnax": (gymnax_ids, gymnax_task),
    "brax": (lambda: list(BRAX), brax_task),
    "mujoco": (mujoco_ids, mujoco_task),
    "popjaxrl": (popjaxrl_ids, popjaxrl_task),
    "craftax": (lambda: list(CRAFTAX), craftax_task),
    "navix": (navix_ids, navix_task),
    "popgym_arcade": (arcade_ids, arcade_task),
    "gxm": (gxm_ids, gxm_task),
}
# namespace -> (id -> the full id that it is short for)
ALIASES: dict[str, Callable[[str], str]] = {"navix": navix_alias, "gxm": gxm_alias}


def common_options() -> dict:
    """Options of every environment, and their defaults."""
    from env_wrappers import DEFAULTS

    return DEFAULTS | {"normalize_obs": False, "normalize_reward": False, "reward_gamma": 0.99}


def check_options(owner: str, options: dict, defaults: dict) -> None:
    """`experiment.check_options`, whose answer to an unknown option also names those that every environment has."""
    experiment.check_options(owner, options, defaults | common_options())


def make(id: str, /, mask: str | tuple[str, ...] = (), **options) -> Environment:
    """The environment `namespace::id`.

    Equal arguments give the same object: it has no state, and is a static argument of the scripts' jitted functions.

    Args:
      id: namespace and the library's own id, e.g. "gymnax::CartPole-v1".
      mask: entries of the observation to hide, see `mask_observation`.
      **options: parameters of the task, e.g. memory_length=10 for gymnax::MemoryChain-bsuite, and for every task
        sticky_actions, noise, mask_probability, flicker, delay, frame_stack, time_limit, rescale_actions: see
          env_wrappers.py, also for the order in which they are applied;
        normalize_obs, normalize_reward: running normalisation, see `Normalized`;
        reward_gamma: discount per step of the return that normalize_reward looks at.

    Raises:
      ValueError: unknown namespace, id, mask or option; names what is valid and what is nearest.
    """
    return _make(full_id(id), (mask,) if isinstance(mask, str) else tuple(mask), tuple(sorted(options.items())))


def full_id(id: str) -> str:
    """The namespace::id that `id` is short for, or `id` itself."""
    namespace, separator, env_id = id.partition("::")
    return ALIASES[namespace](env_id) if separator and namespace in ALIASES else id


# Namespaces that take seconds to list their ids: asked only by name, or about what they are likely to have.
SLOW_TO_LIST = {"navix": "MiniGrid", "popgym_arcade": "Arcade"}


def known_ids(wanted: str, namespaces=()) -> dict[str, str]:
    """Names that someone might have in mind, and the full ids they stand for; of all namespaces that are installed.

    An id is also known without what libraries put before or after the name of a task: Catch is gymnax::Catch-bsuite.
    """
    known: dict[str, str] = {}
    for namespace, (ids, _) in NAMESPACES.items():
        if namespace not in (namespaces or NAMESPACES):
            continue
        if not namespaces and SLOW_TO_LIST.get(namespace, "") not in wanted:
            continue
        with contextlib.suppress(ImportError, ValueError):
            for env_id in ids():
                name = env_id.rpartition("/")[2]
                for short in (f"{namespace}::{env_id}", env_id, name, name.rpartition("-")[0], name.partition("-")[2]):
                    known.setdefault(short, f"{namespace}::{env_id}")
    if "popjaxrl" in (namespaces or NAMESPACES):
        from popjaxrl import LEVELS, POPGYM_NAMES

        for theirs, ours in POPGYM_NAMES.items():
            known |= {theirs + level: f"popjaxrl::{ours}{level}" for level in LEVELS}
    return {name: full for name, full in known.items() if name}


@functools.cache
def _make(id, mask, options):
    namespace, separator, env_id = id.partition("::")
    if not separator:
        hint = did_you_mean(id, known_ids(id))
        raise ValueError(f"environment {id!r} has no namespace{hint}; write namespace::id, as in gymnax::CartPole-v1")
    if namespace not in NAMESPACES:
        valid, hint = ", ".join(NAMESPACES), did_you_mean(env_id, known_ids(env_id))
        raise ValueError(f"unknown environment namespace {namespace!r} in {id!r}{hint}; this version has: {valid}")
    ids, make_task = NAMESPACES[namespace]
    if env_id not in ids():
        hint = did_you_mean(env_id, known_ids(env_id, [namespace])) or did_you_mean(env_id, known_ids(env_id))
        raise ValueError(f"unknown environment {id!r}{hint}; valid ids of {namespace}: {', '.join(ids())}")
    from env_wrappers import DEFAULTS, wrap

    common = common_options()
    own = {name: value for name, value in options if name not in common}
    given = {name: value for name, value in options if name in common}
    check_options(id, given, {})
    common |= given
    if not 0 <= common["reward_gamma"] <= 1:
        raise ValueError(f"option reward_gamma of {id} must be between 0 and 1, got {common['reward_gamma']}")
    task = make_task(env_id, **own)
    if mask:
        task = mask_observation(id, task, mask)
    task = wrap(task, id, {name: common[name] for name in DEFAULTS})
    observations, rewards = common["normalize_obs"], common["normalize_reward"]
    if observations or rewards:
        return Normalized(id, task, observations, rewards, common["reward_gamma"])
    return Environment(id, task)


if __name__ == "__main__":
    from env_cli import Command, main

    experiment.launch(main, Command)
