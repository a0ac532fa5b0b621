"""Any class with Gymnasium's interface as pure functions, by replaying its episodes.

What the state of a stranger's simulator consists of is not known. So the state here is what led to
it: the seed that the episode began with, and the actions since. Objects that are just there are
kept, and a step usually finds its own; otherwise, as after --resume, the episode is replayed.

This is exact if an episode depends on its seed and actions only. States are numbers, also in the
checkpoint of a stranger: the worst that they can do is to play some other episode.
"""

import collections
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters import contract
from env_adapters.callbacks import call_on_host
from env_adapters.contract import blaming
from env_adapters.task import Box, Discrete, MultiDiscrete, Task, first_of, numbers_of, parts_of
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

    def __init__(self, make: Callable, first, space, actions, max_steps: int):
        """`first` is an object that make() has made; the spaces are ours."""
        self.space = space
        self.max_steps = max_steps
        self._make = make
        self._unused = [first]
        self._playing = collections.OrderedDict()  # (seed, bytes of actions) -> object
        self._most = KEPT
        self._drawn = None, None, ()  # an object for pictures, its seed and its actions so far
        self._actions = actions
        self._own_actions = first.action_space
        self._lock = threading.Lock()  # programs that run at the same time share the objects

    def reset(self, seed):
        """Seeds (...) uint32 -> the parts of first observations, each (..., *shape)."""
        with self._lock:
            rows = [self._first(number) for number in np.ravel(seed).tolist()]
        return in_columns(rows, np.shape(seed))

    def step(self, seed, time, actions, action):
        """`Replay` (...) and actions (..., *action_shape) -> what a `Task` returns, less the state.

        Rewards (...) float32, terminated and truncated (...) bool, and the parts of observations,
        each (..., *shape).
        """
        batch = np.shape(seed)
        number = np.size(seed)
        actions = np.reshape(actions, (number, *np.shape(actions)[len(batch) :]))
        action = np.reshape(action, (number, *np.shape(action)[len(batch) :]))
        rows = zip(np.ravel(seed).tolist(), np.ravel(time).tolist(), actions, action, strict=True)
        with self._lock:
            self._most = max(self._most, 4 * number * jax.local_device_count())
            return in_columns([self._next(*row) for row in rows], batch)

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
        return self._parts(obs)

    def _next(self, seed, time, actions, action):
        past = actions[: min(max(time, 0), self.max_steps)]
        env = self._at(seed, past)
        obs, reward, terminated, truncated, _ = env.step(self._action(action))
        if terminated or truncated or len(past) + 1 >= self.max_steps:
            self._unused.append(env)
        else:
            self._keep((seed, past.tobytes() + action.tobytes()), env)
        flags = np.bool_(terminated), np.bool_(truncated and not terminated)
        return np.float32(reward), *flags, *self._parts(obs)

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
        space, own = self._actions, self._own_actions
        if isinstance(space, Box):
            return np.clip(np.nan_to_num(action), own.low, own.high).astype(own.dtype)
        first = first_of(space)
        action = np.clip(action, first, first + numbers_of(space) - 1)
        return action.reshape(own.shape).astype(own.dtype) if action.shape else int(action)

    def _parts(self, obs):
        parts = parts_of(self.space).items()
        return [
            np.asarray(part_at(name, obs)).astype(part.dtype).reshape(part.shape)
            for name, part in parts
        ]


def in_columns(rows, batch):
    """Lists of arrays, one per environment, as one tuple of arrays (*batch, ...)."""
    columns = zip(*rows, strict=True)
    return tuple(np.stack(x).reshape((*batch, *x[0].shape)) for x in map(list, columns))


def part_at(name: str, obs):
    """The part of an observation that has this name, see `parts_of`; "" for the whole.

    Raises:
      KeyError, IndexError, TypeError: there is none.
    """
    for key in name.split(".") if name else ():
        obs = obs[key] if isinstance(obs, Mapping) else obs[int(key)]
    return obs


# --- Spaces of libraries -------------------------------------------------------------------------


def observation_space_of(owner: str, space):
    """An observation space of Gymnasium, gymnax or alike as ours, with the same parts.

    Raises:
      UsageError: there is no vector, image or integer in its place.
    """
    kind = type(space).__name__
    inner = getattr(space, "spaces", None)
    if isinstance(inner, Mapping):
        for name in inner:
            if not isinstance(name, str):
                raise UsageError(f"part {name!r} of {owner} must have a text as its name")
        return {name: observation_space_of(owner, inner[name]) for name in inner}
    if isinstance(inner, tuple | list) and kind != "OneOf":  # which is one of them at a time
        return tuple(observation_space_of(owner, part) for part in inner)
    if hasattr(space, "nvec"):
        return multi_discrete_of(space)
    if hasattr(space, "n"):
        shape = tuple(getattr(space, "shape", None) or ())
        start = int(getattr(space, "start", 0))
        return Box(0.0, 1.0, shape) if shape else Discrete(int(space.n), start=start)
    if not hasattr(space, "low"):
        valid = "a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these"
        raise UsageError(f"observation_space of {owner} is a {kind}, not {valid}")
    return box_of(space)


def multi_discrete_of(space) -> MultiDiscrete:
    """A MultiDiscrete of a library as ours, whose parts are in one row."""
    nvec = np.asarray(space.nvec)
    start = np.broadcast_to(getattr(space, "start", 0), nvec.shape)
    return MultiDiscrete(tuple(nvec.ravel().tolist()), start=tuple(start.ravel().tolist()))


def box_of(space) -> Box:
    """A Box of a library as one of ours: uint8, or else float32."""
    low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    dtype = np.uint8 if np.dtype(space.dtype) == np.uint8 else np.float32
    return Box(low, high, tuple(space.shape), dtype)


def action_space_of(owner: str, space) -> Box | Discrete | MultiDiscrete:
    """An action space of a library as one of ours; actions of a Box are float32.

    Raises:
      UsageError: it is none of these.
    """
    if hasattr(space, "nvec"):
        return multi_discrete_of(space)
    if hasattr(space, "n"):
        shape = tuple(getattr(space, "shape", None) or ())
        if shape:  # MultiBinary
            return MultiDiscrete((2,) * int(np.prod(shape)))
        return Discrete(int(space.n), start=int(getattr(space, "start", 0)))
    if not hasattr(space, "low"):
        kind = type(space).__name__
        valid = "Discrete, MultiDiscrete, MultiBinary or a Box"
        raise UsageError(f"action_space of {owner} is a {kind}, not {valid}")
    return replace(box_of(space), dtype=np.float32)


def space_of(owner: str, env, name: str):
    space = getattr(env, name, None)
    if space is None:
        raise UsageError(f"{owner} has no {name}: set self.{name} to a space of gymnasium.spaces")
    return space


def try_once(owner: str, env, space, action, file=None) -> None:
    """Reset an object and step it once, and refuse what a class with this interface never returns.

    Raises:
      UsageError: says what is wrong.
    """
    what = f"reset of {owner}"
    with blaming(what, file):
        result = env.reset(seed=0)
    if not isinstance(result, tuple) or len(result) != 2:
        raise UsageError(f"{what} must return (observation, info), as in Gymnasium")
    check_obs(what, result[0], space)
    what = f"step of {owner}"
    with blaming(what, file):
        result = env.step(action)
    names = "(observation, reward, terminated, truncated, info)"
    if not isinstance(result, tuple) or len(result) != 5:
        number = f"{len(result)} values" if isinstance(result, tuple) else "one value"
        raise UsageError(f"{what} returns {number}, not the 5 of {names}, as in Gymnasium")
    obs, reward, terminated, truncated, _ = result
    check_obs(what, obs, space)
    if np.ndim(reward) != 0 or np.asarray(reward).dtype.kind not in "fiub":
        raise UsageError(f"{what} returns a reward that is {reward!r}, not one number")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            raise UsageError(f"{what} returns a {name} that is {flag!r}, not True or False")


def check_obs(what: str, obs, space) -> None:
    """Refuse an observation without the parts, shapes and dtypes of its space.

    Raises:
      UsageError: says what is wrong.
    """
    for name, part in parts_of(space).items():
        try:
            found = np.asarray(part_at(name, obs))
        except (KeyError, IndexError, TypeError, ValueError):
            fault = f"{what} returns an observation that has no part {name}"
            raise UsageError(f"{fault}, and observation_space has one") from None
        if isinstance(obs, Mapping | tuple) and not name:
            kind = type(obs).__name__
            raise UsageError(f"{what} returns a {kind}, observation_space has no parts")
        if isinstance(
            part, MultiDiscrete
        ):  # which has one axis here, whatever the library gives it
            found = found.reshape(-1)
        contract.check_part(what, found, part, name)


def make_task(owner: str, make: Callable, env, max_steps: int, file=None) -> Task:
    """The task of a class with Gymnasium's interface, without a time limit.

    Args:
      make: makes an object of it.
      env: an object that it made.
      max_steps: the most steps of an episode, which the caller truncates then.

    Raises:
      UsageError: the class does not keep the interface; says what is wrong.
    """
    space = observation_space_of(owner, space_of(owner, env, "observation_space"))
    contract.check_observation_space(owner, space)
    actions = action_space_of(owner, space_of(owner, env, "action_space"))
    host = Host(make, env, space, actions, max_steps)
    no_action = np.zeros(actions.shape, actions.dtype)
    try_once(owner, env, space, host._action(no_action), file)
    spaces, structure = jax.tree.flatten(space)
    parts = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in spaces]
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    results = (jax.ShapeDtypeStruct((), jnp.float32), flag, flag, *parts)

    def reset(key):
        seed = jax.random.bits(key, dtype=jnp.uint32)
        obs = structure.unflatten(call_on_host(host.reset, parts, seed))
        past = jnp.zeros((max_steps, *actions.shape), actions.dtype)
        return obs, Replay(seed, jnp.int32(0), past)

    def step(key, state, action):
        reward, terminated, truncated, *obs = call_on_host(host.step, results, *state, action)
        past = state.actions.at[state.time].set(action)
        state = Replay(state.seed, state.time + 1, past)
        return structure.unflatten(obs), state, reward, terminated, truncated

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
