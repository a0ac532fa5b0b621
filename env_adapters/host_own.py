"""Any class with Gymnasium's interface as pure functions, by replaying its episodes.

What the state of a stranger's simulator consists of is not known. So the state here is what led to
it: the seed that the episode began with, and the actions since. Objects that are just there are
kept, and a step usually finds its own; otherwise, as after --resume, the episode is replayed.

This is exact if an episode depends on its seed and actions only. States are numbers, also in the
checkpoint of a stranger: the worst that they can do is to play some other episode.
"""

import collections
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.callbacks import call_on_host
from env_adapters.contract import blaming
from env_adapters.task import Box, Discrete, Task
from harness.errors import UsageError

KEPT = 256  # objects to keep at least, before the one unused for longest is used again


class Replay(NamedTuple):
    """What led to a state."""

    seed: jax.Array  # () uint32, of the episode
    time: jax.Array  # () int32, steps since it began
    actions: jax.Array  # (max_steps, *action_shape), the first `time` of them


class Host:
    """Objects of one class, and the episodes that they are in.

    All methods take and return numpy arrays with any leading axes (...), one row per environment.
    """

    def __init__(self, make: Callable, first, space: Box, action_space, max_steps: int):
        """`first` is an object that make() has made; `action_space` its own."""
        self.space = space
        self.max_steps = max_steps
        self._make = make
        self._unused = [first]
        self._playing = collections.OrderedDict()  # (seed, bytes of actions) -> object
        self._most = KEPT
        self._drawn = None, None, ()  # an object for pictures, its seed and its actions so far
        self._actions = action_space
        self._observations = first.observation_space
        self._lock = threading.Lock()  # programs that run at the same time share the objects

    def reset(self, seed):
        """Seeds (...) uint32 -> (first observations (..., *obs_shape),)."""
        with self._lock:
            obs = [self._first(number) for number in np.ravel(seed).tolist()]
        return (np.stack(obs).reshape((*np.shape(seed), *self.space.shape)),)

    def step(self, seed, time, actions, action):
        """`Replay` (...) and actions (..., *action_shape) -> what a `Task` returns, less the state.

        Observations (..., *obs_shape), rewards (...) float32, terminated and truncated (...) bool.
        """
        batch = np.shape(seed)
        number = np.size(seed)
        actions = np.reshape(actions, (number, *np.shape(actions)[len(batch) :]))
        action = np.reshape(action, (number, *np.shape(action)[len(batch) :]))
        rows = zip(np.ravel(seed).tolist(), np.ravel(time).tolist(), actions, action, strict=True)
        with self._lock:
            self._most = max(self._most, 4 * number * jax.local_device_count())
            columns = zip(*(self._next(*row) for row in rows), strict=True)
        return tuple(np.stack(x).reshape((*batch, *x[0].shape)) for x in map(list, columns))

    def picture(self, state: Replay):
        """What the environment draws of a state, (height, width, 3) uint8."""
        seed, past = int(state.seed), np.asarray(state.actions)[: int(state.time)]
        with self._lock:
            env, drawn_seed, drawn = self._drawn
            if drawn_seed != seed or not np.array_equal(drawn, past[: len(drawn)]):
                env, drawn = env or self._make(), ()
                env.reset(seed=seed)
            for action in past[len(drawn) :]:  # one, if the states of an episode come in order
                env.step(self._action(action))
            self._drawn = env, seed, past
            return np.asarray(env.render())

    def _first(self, seed):
        env = self._object()
        obs, _ = env.reset(seed=seed)
        self._keep((seed, b""), env)
        return self._obs(obs)

    def _next(self, seed, time, actions, action):
        past = actions[: min(max(time, 0), self.max_steps)]
        env = self._at(seed, past)
        obs, reward, terminated, truncated, _ = env.step(self._action(action))
        if terminated or truncated or len(past) + 1 >= self.max_steps:
            self._unused.append(env)
        else:
            self._keep((seed, past.tobytes() + action.tobytes()), env)
        flags = np.bool_(terminated), np.bool_(truncated and not terminated)
        return self._obs(obs), np.float32(reward), *flags

    def _at(self, seed, past):
        """An object after these steps of the episode of this seed."""
        env = self._playing.pop((seed, past.tobytes()), None)
        if env is None:
            env = self._object()
            env.reset(seed=seed)
            for action in past:
                env.step(self._action(action))
        return env

    def _object(self):
        if self._unused:
            return self._unused.pop()
        if len(self._playing) < self._most:
            return self._make()
        return self._playing.popitem(last=False)[1]

    def _keep(self, episode, env):
        if episode in self._playing:  # of another environment with the same seed
            self._unused.append(self._playing.pop(episode))
        self._playing[episode] = env

    def _action(self, action):
        """An action as the class wants it; numbers from a checkpoint are moved to valid ones."""
        space = self._actions
        if hasattr(space, "n"):
            return int(np.clip(action, 0, space.n - 1)) + int(getattr(space, "start", 0))
        return np.clip(np.nan_to_num(action), space.low, space.high).astype(space.dtype)

    def _obs(self, obs):
        return to_box(self._observations, obs).astype(self.space.dtype).reshape(self.space.shape)


def to_box(space, obs):
    """An observation as an array: what is no Box in Gymnasium is flattened, integers one-hot."""
    if hasattr(space, "low"):
        return np.asarray(obs)
    from gymnasium import spaces

    return np.asarray(spaces.flatten(space, obs))


def observation_space_of(owner: str, env) -> Box:
    """The observation space, as one of ours.

    Raises:
      UsageError: it is none that can be shown as one array.
    """
    space = space_of(owner, env, "observation_space")
    if not hasattr(space, "low"):
        from gymnasium import spaces

        kind = type(space).__name__
        valid = "a Box, or of a kind that gymnasium.spaces.flatten makes one"
        try:
            space = spaces.flatten_space(space)
        except NotImplementedError:
            raise UsageError(f"observation_space of {owner} is a {kind}, not {valid}") from None
        if not hasattr(space, "low"):  # of changing size
            raise UsageError(f"observation_space of {owner} is a {kind}, not {valid}")
    return box_of(space)


def box_of(space) -> Box:
    """A Box of a library as one of ours: uint8, or else float32."""
    low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    dtype = np.uint8 if np.dtype(space.dtype) == np.uint8 else np.float32
    return Box(low, high, tuple(space.shape), dtype)


def action_space_of(owner: str, space) -> Box | Discrete:
    """An action space of a library as one of ours; actions of a Box are float32.

    Raises:
      UsageError: it is neither Discrete nor a Box.
    """
    if hasattr(space, "n") and np.ndim(space.n) == 0 and not getattr(space, "shape", ()):
        return Discrete(int(space.n))
    if not hasattr(space, "low"):
        kind = type(space).__name__
        raise UsageError(f"action_space of {owner} is a {kind}, not Discrete or a Box")
    return replace(box_of(space), dtype=np.float32)


def space_of(owner: str, env, name: str):
    space = getattr(env, name, None)
    if space is None:
        raise UsageError(f"{owner} has no {name}: set self.{name} to a space of gymnasium.spaces")
    return space


def try_once(owner: str, env, space: Box, action, file=None) -> None:
    """Reset an object and step it once, and refuse what a class with this interface never returns.

    Raises:
      UsageError: says what is wrong.
    """
    what = f"reset of {owner}"
    with blaming(what, file):
        result = env.reset(seed=0)
    if not isinstance(result, tuple) or len(result) != 2:
        raise UsageError(f"{what} must return (observation, info), as in Gymnasium")
    check_obs(what, env, result[0], space)
    what = f"step of {owner}"
    with blaming(what, file):
        result = env.step(action)
    names = "(observation, reward, terminated, truncated, info)"
    if not isinstance(result, tuple) or len(result) != 5:
        number = f"{len(result)} values" if isinstance(result, tuple) else "one value"
        raise UsageError(f"{what} returns {number}, not the 5 of {names}, as in Gymnasium")
    obs, reward, terminated, truncated, _ = result
    check_obs(what, env, obs, space)
    if np.ndim(reward) != 0 or np.asarray(reward).dtype.kind not in "fiub":
        raise UsageError(f"{what} returns a reward that is {reward!r}, not one number")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            raise UsageError(f"{what} returns a {name} that is {flag!r}, not True or False")


def check_obs(what: str, env, obs, space: Box) -> None:
    with blaming(f"flattening the observation of {what}"):
        found = to_box(env.observation_space, obs)
    if found.shape != space.shape:
        shapes = f"of shape {found.shape}, observation_space has the shape {space.shape}"
        raise UsageError(f"{what} returns an observation {shapes}")
    if space.dtype == np.uint8 and found.dtype != np.uint8:
        dtypes = f"of dtype {found.dtype}, observation_space has the dtype uint8"
        raise UsageError(f"{what} returns an observation {dtypes}")


def make_task(owner: str, make: Callable, env, max_steps: int, file=None) -> Task:
    """The task of a class with Gymnasium's interface, without a time limit.

    Args:
      make: makes an object of it.
      env: an object that it made.
      max_steps: the most steps of an episode, which the caller truncates then.

    Raises:
      UsageError: the class does not keep the interface; says what is wrong.
    """
    space = observation_space_of(owner, env)
    actions = action_space_of(owner, space_of(owner, env, "action_space"))
    host = Host(make, env, space, env.action_space, max_steps)
    no_action = np.zeros(actions.shape, actions.dtype)
    try_once(owner, env, space, host._action(no_action), file)
    obs = jax.ShapeDtypeStruct(space.shape, space.dtype)
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    results = (obs, jax.ShapeDtypeStruct((), jnp.float32), flag, flag)

    def reset(key):
        seed = jax.random.bits(key, dtype=jnp.uint32)
        (obs_first,) = call_on_host(host.reset, (obs,), seed)
        past = jnp.zeros((max_steps, *actions.shape), actions.dtype)
        return obs_first, Replay(seed, jnp.int32(0), past)

    def step(key, state, action):
        obs_next, *rest = call_on_host(host.step, results, *state, action)
        past = state.actions.at[state.time].set(action)
        return obs_next, Replay(state.seed, state.time + 1, past), *rest

    return Task(
        reset=reset,
        step=step,
        observation_space=space,
        action_space=actions,
        max_steps=max_steps,
        render=host.picture if getattr(env, "render_mode", None) == "rgb_array" else None,
        costly_reset=True,
        equal_resets_once=True,
    )
