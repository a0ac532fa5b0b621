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
auto-reset and episode bookkeeping for all of them, once. Observation masks turn a `Task` into another `Task`.
To add a library: write a function `(env_id, **options) -> Task` and enter it in `NAMESPACES`.
"""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import experiment
from experiment import did_you_mean

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
    """

    reset: Callable
    step: Callable
    observation_space: Box
    action_space: Box | Discrete
    max_steps: int
    render: Callable | None = None


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
        first_obs, first_state = Environment.reset(self, reset_key)
        obs = jnp.where(done, first_obs, final_obs)
        state = jax.tree.map(lambda first, next: jnp.where(done, first, next), first_state, state)
        return obs, state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in; see `Normalized.frozen`."""
        return self

    def _cast_obs(self, obs):
        space = self._task.observation_space
        return strong(jnp.asarray(obs).astype(space.dtype).reshape(space.shape))

    def _cast_state(self, task_state):
        # Libraries return weak types, and other dtypes from step than from reset: either compiles everything twice.
        def cast(leaf, aval):
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                return leaf
            return strong(jnp.asarray(leaf).astype(aval.dtype))

        return jax.tree.map(cast, task_state, self._state_avals)


def strong(x):
    """x without jax's weak type."""
    return jax.lax.convert_element_type(x, x.dtype)


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
      mask: what to hide, indices ("0", "3") or a name of `NAMED_MASKS[env_id]` ("velocity" hides the velocities).
    """
    space = task.observation_space
    if len(space.shape) != 1:
        raise ValueError(f"mask hides entries of vector observations; {env_id} has observations of shape {space.shape}")
    size, names = space.shape[0], NAMED_MASKS.get(env_id, {})
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
# Scaled actions


def rescale_actions(env_id: str, task: Task) -> Task:
    """Continuous actions are given between -1 and 1, whatever the bounds of the task."""
    space = task.action_space
    if isinstance(space, Discrete) or not np.isfinite([space.low, space.high]).all():
        raise ValueError(f"rescale_actions needs continuous actions between bounds, which {env_id} does not have")
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), space.shape) for bound in (space.low, space.high))

    def step(key, state, action):
        # Clipped again: rounding must not take an action past a bound, which some tasks refuse.
        return task.step(key, state, jnp.clip(low + 0.5 * (action + 1.0) * (high - low), low, high))

    return replace(task, step=step, action_space=Box(-1.0, 1.0, space.shape))


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


def gymnax_renderer(env_id, env, params) -> Callable | None:
    """Classic control as gymnasium draws it (with gymnax 1.x); grids with one colour per channel."""

    def render_classic_control(state):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame looks for a screen and a sound card otherwise
        os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
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
# The factory

# namespace -> (its ids, (id, **options) -> Task); libraries are imported when one of their ids is asked for
NAMESPACES: dict[str, tuple[Callable[[], list[str]], Callable[..., Task]]] = {
    "gymnax": (gymnax_ids, gymnax_task),
}


# options of every environment, and their defaults
COMMON_OPTIONS = {"normalize_obs": False, "normalize_reward": False, "reward_gamma": 0.99, "rescale_actions": False}


def check_options(owner: str, options: dict, defaults: dict) -> None:
    """`experiment.check_options`, whose answer to an unknown option also names those that every environment has."""
    experiment.check_options(owner, options, defaults | COMMON_OPTIONS)


def make(id: str, /, mask: str | tuple[str, ...] = (), **options) -> Environment:
    """The environment `namespace::id`.

    Equal arguments give the same object: it has no state, and is a static argument of the scripts' jitted functions.

    Args:
      id: namespace and the library's own id, e.g. "gymnax::CartPole-v1".
      mask: entries of the observation to hide, see `mask_observation`.
      **options: parameters of the task, e.g. memory_length=10 for gymnax::MemoryChain-bsuite, and for every task
        normalize_obs, normalize_reward: running normalisation, see `Normalized`;
        reward_gamma: discount per step of the return that normalize_reward looks at;
        rescale_actions: continuous actions are given between -1 and 1, whatever the task's own bounds are.

    Raises:
      ValueError: unknown namespace, id, mask or option; names what is valid and what is nearest.
    """
    return _make(id, (mask,) if isinstance(mask, str) else tuple(mask), tuple(sorted(options.items())))


@functools.cache
def _make(id, mask, options):
    namespace, separator, env_id = id.partition("::")
    if not separator:
        known = [f"{name}::{known_id}" for name, (ids, _) in NAMESPACES.items() for known_id in ids()]
        hint = did_you_mean(id, {name.partition("::")[2]: name for name in known}) or did_you_mean(id, known)
        raise ValueError(f"environment {id!r} has no namespace{hint or ''}; write namespace::id, as in {known[0]}")
    if namespace not in NAMESPACES:
        valid = ", ".join(NAMESPACES)
        raise ValueError(f"unknown environment namespace {namespace!r} in {id!r}; this version has: {valid}")
    ids, make_task = NAMESPACES[namespace]
    if env_id not in ids():
        hint = did_you_mean(env_id, {known: f"{namespace}::{known}" for known in ids()})
        raise ValueError(f"unknown environment {id!r}{hint}; valid ids of {namespace}: {', '.join(ids())}")
    own = {name: value for name, value in options if name not in COMMON_OPTIONS}
    given = {name: value for name, value in options if name in COMMON_OPTIONS}
    check_options(id, given, {})
    common = COMMON_OPTIONS | given
    if not 0 <= common["reward_gamma"] <= 1:
        raise ValueError(f"option reward_gamma of {id} must be between 0 and 1, got {common['reward_gamma']}")
    task = make_task(env_id, **own)
    if mask:
        task = mask_observation(id, task, mask)
    if common["rescale_actions"]:
        task = rescale_actions(id, task)
    observations, rewards = common["normalize_obs"], common["normalize_reward"]
    if observations or rewards:
        return Normalized(id, task, observations, rewards, common["reward_gamma"])
    return Environment(id, task)
