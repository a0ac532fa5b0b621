"""Wrappers for the tasks of all libraries: options of `envs.make`, the same in every namespace.

They are applied in this order, the first one closest to the task:

  mask              removes entries of the observation, see `mask_observation`
  sticky_actions    p: with probability p the last action is repeated instead of the one given
  noise             s: adds normal noise with standard deviation s to every entry
  mask_probability  p: sets every entry to 0 with probability p, independently of the others
  flicker           p: sets the whole observation to 0 with probability p
  delay             k: shows the observation of k steps ago, or the first one before step k
  frame_stack       k: shows the last k observations, oldest first, joined along the last axis
                    (the channels of images)
  time_limit        n: truncates episodes after n steps
  trials            k: k episodes of the same task make one, so that a memory can learn the task
  rescale_actions   True: continuous actions lie in [-1, 1], whatever the bounds of the task
  joint_actions     True: actions of several parts become one of all combinations
  normalize_obs, normalize_reward, reward_gamma
                    running normalisation, see `envs.Preprocessed`

Observations of several parts are treated part by part, and `flicker` hides all of them at once.

A wrapper is a function from a `Task` to a `Task`. Its randomness comes from the keys of reset and
step. What it has to remember (the last action, past observations) is part of the task's state and
starts afresh with every episode, and with every trial.

Some hide or disturb what the task shows, `HIDING`. With `keep_full` below them a critic can read
what the environment would show without them.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.task import (
    Box,
    Discrete,
    MultiDiscrete,
    Task,
    as_parts,
    cast,
    first_of,
    numbers_of,
    parts_of,
    scale,
)
from harness import errors
from harness.errors import did_you_mean

# --- Masks ---------------------------------------------------------------------------------------


def mask_observation(env_id: str, task: Task, mask: tuple[str, ...]) -> Task:
    """Remove entries of a vector observation, or parts of one that has parts.

    Args:
      mask: what to remove: indices ("0", "3"), or names from `Task.masks` ("velocity"). With parts:
        names of parts ("image"), or an entry of one ("vector.3").

    Raises:
      ValueError: the observation is not a vector, an entry is unknown, or nothing is left.
    """
    space = task.observation_space
    if not isinstance(space, Box):
        return mask_parts(env_id, task, mask)
    if len(space.shape) != 1:
        rule = "mask hides entries of vector observations"
        raise ValueError(f"{rule}; {env_id} has observations of shape {space.shape}")
    (size,) = space.shape
    hidden: set[int] = set()
    for entry in map(str, mask):
        if entry in task.masks:
            hidden.update(task.masks[entry])
        elif entry.isdecimal() and int(entry) < size:
            hidden.add(int(entry))
        else:
            hint = did_you_mean(entry, task.masks.keys())
            names = f", or {' or '.join(task.masks)}" if task.masks else ""
            valid = f"valid for {env_id}: indices 0 to {size - 1}{names}"
            raise ValueError(f"unknown mask {entry!r}{hint}; {valid}")
    kept = np.array([i for i in range(size) if i not in hidden], int)
    if not len(kept):
        given = " ".join(map(str, mask))
        raise ValueError(f"mask {given} hides the whole observation of {env_id}")

    def reset(key):
        obs, state = task.reset(key)
        return obs[kept], state

    def step(key, state, action):
        obs, *rest = task.step(key, state, action)
        return obs[kept], *rest

    low = np.broadcast_to(space.low, space.shape)[kept]
    high = np.broadcast_to(space.high, space.shape)[kept]
    visible = Box(low, high, (len(kept),), space.dtype)
    return replace(task, reset=reset, step=step, observation_space=visible)


def mask_parts(env_id: str, task: Task, mask: tuple[str, ...]) -> Task:
    """Remove parts of an observation, which become None, or entries of those that are vectors.

    Raises:
      ValueError: a part or entry is unknown, or nothing is left.
    """
    space = task.observation_space
    parts = parts_of(space)
    kept = {name: None for name in parts}  # name -> the entries that are left, None: all
    for entry in map(str, mask):
        inside = [name for name in parts if f"{name}.".startswith(f"{entry}.")]
        owner, _, index = entry.rpartition(".")
        shape = parts[owner].shape if owner in parts else ()
        if inside:
            kept |= {name: [] for name in inside}
        elif len(shape) == 1 and index.isdecimal() and int(index) < shape[0]:
            left = range(shape[0]) if kept[owner] is None else kept[owner]
            kept[owner] = [i for i in left if i != int(index)]
        else:
            vectors = [name for name, part in parts.items() if len(part.shape) == 1]
            hint = did_you_mean(entry, list(parts))
            example = f", or an entry of one, as in {vectors[0]}.0" if vectors else ""
            valid = f"valid for {env_id}: its parts {', '.join(parts)}{example}"
            raise ValueError(f"unknown mask {entry!r}{hint}; {valid}")
    if not any(left is None or left for left in kept.values()):
        given = " ".join(map(str, mask))
        raise ValueError(f"mask {given} hides the whole observation of {env_id}")
    structure = jax.tree.structure(space)
    entries = [None if left is None else np.array(left, int) for left in kept.values()]

    def show(part, left):
        return part if left is None else part[left] if len(left) else None

    def shown(obs):
        return structure.unflatten(map(show, structure.flatten_up_to(obs), entries))

    def reset(key):
        obs, state = task.reset(key)
        return shown(obs), state

    def step(key, state, action):
        obs, *rest = task.step(key, state, action)
        return shown(obs), *rest

    def visible(part, left):
        if left is None:
            return part
        low, high = (np.broadcast_to(bound, part.shape)[left] for bound in (part.low, part.high))
        return Box(low, high, low.shape, part.dtype) if len(left) else None

    visible_space = structure.unflatten(map(visible, parts.values(), entries))
    return replace(task, reset=reset, step=step, observation_space=visible_space)


# --- Wrappers that change one observation at a time ----------------------------------------------


def map_observation(task: Task, function, space) -> Task:
    """The task with the observations function(key, obs), which lie in `space`."""

    def reset(key):
        key, own_key = jax.random.split(key)
        obs, state = task.reset(key)
        return function(own_key, cast(obs, task.observation_space)), state

    def step(key, state, action):
        key, own_key = jax.random.split(key)
        obs, *rest = task.step(key, state, action)
        return function(own_key, cast(obs, task.observation_space)), *rest

    return replace(task, reset=reset, step=step, observation_space=space)


def by_part(function):
    """function(key, part of an observation) for observations; each part has a key of its own."""

    def map_parts(key, obs):
        parts, structure = jax.tree.flatten(obs)
        keys = jax.random.split(key, len(parts)) if len(parts) > 1 else [key]
        return structure.unflatten(map(function, keys, parts))

    return map_parts


def with_zero(space):
    """The space with bounds that include 0."""

    def extend(part):
        return replace(part, low=np.minimum(part.low, 0), high=np.maximum(part.high, 0))

    return jax.tree.map(extend, space)


def noise(task: Task, scale: float) -> Task:
    """Add normal noise with this standard deviation to every entry of the observation."""

    def add_noise(key, obs):
        return obs + scale * jax.random.normal(key, obs.shape)

    def unbounded(part):
        return replace(part, low=-np.inf, high=np.inf)

    space = jax.tree.map(unbounded, task.observation_space)
    return map_observation(task, by_part(add_noise), space)


def mask_probability(task: Task, probability: float) -> Task:
    """Set every entry of the observation to 0 with this probability."""

    def hide(key, obs):
        hidden = jax.random.bernoulli(key, probability, obs.shape)
        return jnp.where(hidden, jnp.zeros_like(obs), obs)

    return map_observation(task, by_part(hide), with_zero(task.observation_space))


def flicker(task: Task, probability: float) -> Task:
    """Set the whole observation to 0 with this probability."""

    def hide(key, obs):
        hidden = jax.random.bernoulli(key, probability)
        return jax.tree.map(lambda x: jnp.where(hidden, jnp.zeros_like(x), x), obs)

    return map_observation(task, hide, with_zero(task.observation_space))


# --- Wrappers that remember something ------------------------------------------------------------


class Wrapped(NamedTuple):
    """The state of a task, and what a wrapper adds to it."""

    inner: Any
    own: Any


def on_inner(task: Task) -> dict:
    """The task's functions of a state, for states that a wrapper has wrapped."""

    def render(state):
        return task.render(state.inner)

    def reseed(key, state):
        return state._replace(inner=task.reseed(key, state.inner))

    def action_mask(state):
        return task.action_mask(state.inner)

    def privileged(state):
        return task.privileged(state.inner)

    def report(state):
        return task.report(state.inner)

    return {
        "render": task.render and render,
        "reseed": task.reseed and reseed,
        "action_mask": task.action_mask and action_mask,
        "privileged": task.privileged and privileged,
        "report": task.report and report,
    }


def remember(task: Task, length: int, show, space) -> Task:
    """The task with the observations show(history), part by part, which lie in `space`.

    The history (length, *obs_shape) holds the last observations, oldest first. Before an episode
    has that many, its first observation fills the older rows.
    """

    def repeat(obs):
        return jnp.broadcast_to(obs, (length, *obs.shape))

    def shift_in(history, obs):
        return jnp.concatenate([history[1:], obs[None]])

    def reset(key):
        obs, state = task.reset(key)
        obs = cast(obs, task.observation_space)
        history = jax.tree.map(repeat, obs)
        return jax.tree.map(show, history), Wrapped(state, history)

    def step(key, state, action):
        obs, inner, *rest = task.step(key, state.inner, action)
        history = jax.tree.map(shift_in, state.own, cast(obs, task.observation_space))
        return jax.tree.map(show, history), Wrapped(inner, history), *rest

    return replace(
        task,
        reset=reset,
        step=step,
        observation_space=space,
        **on_inner(task),
    )


def delay(task: Task, steps: int) -> Task:
    """Show the observation of this many steps ago."""
    return remember(task, steps + 1, lambda history: history[0], task.observation_space)


def join(history):
    """Observations (length, *obs_shape), joined along the last axis."""
    return jnp.concatenate(history, axis=-1) if history.ndim > 1 else history


def keep_full(task: Task, length: int) -> Task:
    """Keep the observation for a critic, as the wrappers on top hide or disturb that of the actor.

    It is the task's privileged observation: the last `length` ones, as `frame_stack` joins them.
    """
    kept = remember(task, length, lambda history: history[-1], task.observation_space)
    return replace(kept, privileged=lambda state: jax.tree.map(join, state.own))


def frame_stack(task: Task, length: int) -> Task:
    """Show the last `length` observations, joined along the last axis."""

    def repeat(bound, shape):
        return np.concatenate([np.broadcast_to(bound, shape or (1,))] * length, axis=-1)

    def joined(part):
        low = repeat(part.low, part.shape)
        return Box(low, repeat(part.high, part.shape), low.shape, part.dtype)

    return remember(task, length, join, jax.tree.map(joined, task.observation_space))


def sticky_actions(task: Task, probability: float) -> Task:
    """Repeat the last action with this probability, instead of taking the one given.

    As in the Arcade Learning Environment (Machado et al. 2018, arXiv 1709.06009). The first action
    of an episode is always taken.
    """
    space = task.action_space

    def reset(key):
        obs, state = task.reset(key)
        no_action = jnp.zeros(space.shape, space.dtype)
        return obs, Wrapped(state, (no_action, jnp.bool_(False)))

    def step(key, state, action):
        key, own_key = jax.random.split(key)
        last, exists = state.own
        action = jnp.where(exists & jax.random.bernoulli(own_key, probability), last, action)
        obs, inner, *rest = task.step(key, state.inner, action)
        return obs, Wrapped(inner, (action, jnp.bool_(True))), *rest

    return replace(task, reset=reset, step=step, **on_inner(task))


def time_limit(task: Task, steps: int) -> Task:
    """Truncate episodes after this many steps."""

    def reset(key):
        obs, state = task.reset(key)
        return obs, Wrapped(state, jnp.int32(0))

    def step(key, state, action):
        obs, inner, reward, terminated, truncated = task.step(key, state.inner, action)
        time = state.own + 1
        truncated = truncated | (time >= steps)
        return obs, Wrapped(inner, time), reward, terminated, truncated

    return replace(
        task,
        reset=reset,
        step=step,
        max_steps=min(steps, task.max_steps),
        **on_inner(task),
    )


class Trials(NamedTuple):
    """What `trials` keeps."""

    first_obs: Any  # what every trial begins with
    first_state: Any  # likewise
    finished: jax.Array  # () int32, trials of this episode that have ended
    first_return: jax.Array  # () float32, the return of the first trial, so far
    last_return: jax.Array  # () float32, the return of the latest trial, so far
    begins: Any = ()  # () bool, with a privileged observation: the state begins a trial


def trials(task: Task, number: int) -> Task:
    """Make one episode of `number` episodes of the same task, its trials.

    As in RL^2 (Duan et al. 2016, arXiv 1611.02779): what the first trial shows of the task, a
    memory can use in the later ones. Every trial begins with the observation and the state that
    reset has drawn. What happens then depends on the keys of the steps, or on `Task.reseed` where
    random numbers come from the state.

    A trial that ends begins the next one in the same step: the observation is the first one of that
    trial, and nothing has terminated. The end of the last trial terminates the episode.

    Observations get one more entry along their last axis, a channel if they are images. It is 1
    (255 in images of bytes) where a trial begins, and 0 elsewhere. Those that have parts become a
    tuple of what they are and a vector with this entry. So do privileged ones.

    The returns of the first and of the last trial are reported: a memory shows in their difference.
    """
    space = task.observation_space

    def mark(dtype):
        return 255 if dtype == np.uint8 else 1

    def show(obs, begins):
        like = obs if isinstance(obs, jax.Array) else jnp.zeros(0)  # what the mark is joined to
        entry = jnp.where(begins, mark(like.dtype), 0)
        entry = jnp.full((*like.shape[:-1], 1), entry, like.dtype)
        return jnp.concatenate([obs, entry], axis=-1) if like is obs else (obs, entry)

    def privileged(state):
        full = jax.tree.map(jnp.asarray, task.privileged(state.inner))
        return show(full, state.own.begins)

    def reset(key):
        obs, state = task.reset(key)
        obs = cast(obs, space)
        own = Trials(
            first_obs=obs,
            first_state=state,
            finished=jnp.int32(0),
            first_return=jnp.float32(0.0),
            last_return=jnp.float32(0.0),
            begins=jnp.bool_(True) if task.privileged else (),
        )
        return show(obs, True), Wrapped(state, own)

    def step(key, state, action):
        key, own_key = jax.random.split(key)
        obs, inner, reward, terminated, truncated = task.step(key, state.inner, action)
        own = state.own
        ends = jnp.asarray(terminated, bool).reshape(()) | jnp.asarray(truncated, bool).reshape(())
        finished = own.finished + ends
        is_over = finished == number
        begins = ends & ~is_over
        trial_return = own.last_return + jnp.asarray(reward, jnp.float32).reshape(())
        start = task.reseed(own_key, own.first_state) if task.reseed else own.first_state

        def select(new, old):
            return jnp.where(begins, new, old)

        obs = jax.tree.map(select, own.first_obs, cast(obs, space))
        inner = jax.tree.map(select, start, inner)
        own = own._replace(
            finished=finished,
            first_return=jnp.where(own.finished == 0, trial_return, own.first_return),
            last_return=select(0.0, trial_return),
            begins=begins if task.privileged else (),
        )
        return show(obs, begins), Wrapped(inner, own), reward, is_over, False

    def report(state):
        first, last = state.own.first_return, state.own.last_return
        return {"first_trial_return": first, "last_trial_return": last}

    def extend(bound, entry):
        bound = np.broadcast_to(bound, space.shape)
        entry = np.full((*space.shape[:-1], 1), entry, bound.dtype)
        return np.concatenate([bound, entry], axis=-1)

    if not isinstance(space, Box):
        extended = (space, Box(0.0, 1.0, (1,)))
    else:
        high = extend(space.high, mark(space.dtype))
        extended = Box(extend(space.low, 0), high, high.shape, space.dtype)
    return replace(
        task,
        reset=reset,
        step=step,
        observation_space=extended,
        max_steps=number * task.max_steps,
        **on_inner(task) | {"privileged": task.privileged and privileged, "report": report},
    )


# --- Wrappers that change actions ----------------------------------------------------------------


def rescale_actions(task: Task, _) -> Task:
    """Take continuous actions in [-1, 1]."""
    space = task.action_space

    def step(key, state, action):
        return task.step(key, state, scale(action, space))

    scaled = Box(-1.0, 1.0, space.shape, space.dtype)
    return replace(task, step=step, action_space=scaled, own_actions=space)


MOST_JOINT = 256  # actions of which a network has values


def joint_actions(task: Task, _) -> Task:
    """Make one `Discrete` action of those that have several parts; others stay as they are.

    `as_parts` says which parts an action stands for.
    """
    space = task.action_space
    if not isinstance(space, MultiDiscrete):
        return task

    def step(key, state, action):
        return task.step(key, state, as_parts(action, space))

    own = task.own_actions or space
    joint = Discrete(math.prod(space.nvec))
    return replace(task, step=step, action_space=joint, own_actions=own)


# --- What every task gets ------------------------------------------------------------------------


def from_zero(task: Task) -> Task:
    """The task with discrete actions that count from 0, wherever its own begin."""
    space = task.action_space
    if isinstance(space, Box) or not first_of(space).any():
        return task

    def step(key, state, action):
        return task.step(key, state, action + first_of(space))

    empty = () if isinstance(space, MultiDiscrete) else 0
    return replace(task, step=step, action_space=replace(space, start=empty), own_actions=space)


def with_vectors(task: Task) -> Task:
    """The task with one-hot vectors for the integers of its observations."""
    spaces = task.observation_space
    if all(isinstance(part, Box) for part in jax.tree.leaves(spaces)):
        return task

    def show(space, obs):
        if isinstance(space, Box):
            return obs
        return space.one_hot(jnp.asarray(obs) - first_of(space))

    def vector(space):
        is_box = isinstance(space, Box)
        return space if is_box else Box(0.0, 1.0, (space.num_outputs,))

    def reset(key):
        obs, state = task.reset(key)
        return jax.tree.map(show, spaces, obs), state

    def step(key, state, action):
        obs, *rest = task.step(key, state, action)
        return jax.tree.map(show, spaces, obs), *rest

    return replace(task, reset=reset, step=step, observation_space=jax.tree.map(vector, spaces))


# Inside `enable_x64(False)` JAX makes numbers of 32 bits. Before JAX 0.8 it was experimental.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def in_32_bits(task: Task) -> Task:
    """The task with numbers of 32 bits, also where JAX_ENABLE_X64 is set.

    The libraries are written for 32 bits: with 64, states change their dtypes from step to step.
    """

    def reset(key):
        with enable_x64(False):
            return jax.tree.map(jnp.asarray, task.reset(key))

    def step(key, state, action):
        with enable_x64(False):
            return jax.tree.map(jnp.asarray, task.step(key, state, action))

    def render(state):
        with enable_x64(False):
            return task.render(state)

    def privileged(state):
        with enable_x64(False):
            return jax.tree.map(jnp.asarray, task.privileged(state))

    return replace(
        task,
        reset=reset,
        step=step,
        render=task.render and render,
        privileged=task.privileged and privileged,
    )


# --- Options -------------------------------------------------------------------------------------

UNLIMITED = int(jnp.iinfo(jnp.int32).max)
# option -> (the value that means "none", the wrapper), the first one closest to the task
WRAPPERS = {
    "sticky_actions": (0.0, sticky_actions),
    "noise": (0.0, noise),
    "mask_probability": (0.0, mask_probability),
    "flicker": (0.0, flicker),
    "delay": (0, delay),
    "frame_stack": (1, frame_stack),
    "time_limit": (UNLIMITED, time_limit),
    "trials": (1, trials),
    "rescale_actions": (False, rescale_actions),
    "joint_actions": (False, joint_actions),
}
HIDING = ("noise", "mask_probability", "flicker", "delay")  # and masks
DEFAULTS = {name: default for name, (default, _) in WRAPPERS.items()}
PROBABILITY = ("_rate", "_prob", "_probability")  # how the names of probabilities end
LARGEST = {  # magnitude of an option's value
    bool: 1,
    int: UNLIMITED,
    float: float(jnp.finfo(jnp.float32).max),
}
MOST_BYTES = 2**22  # of past observations that a wrapper keeps for one environment
PROBABILITIES = ("sticky_actions", "mask_probability", "flicker")


def wrap(task: Task, env_id: str, options: dict) -> Task:
    """Apply every wrapper whose option differs from its value in `DEFAULTS`.

    Raises:
      ValueError: a value is out of range, or the task's spaces do not allow a wrapper.
    """
    for name, (default, wrapper) in WRAPPERS.items():
        value = options.get(name, default)
        option = f"option {name} of {env_id}"
        if name in PROBABILITIES and not 0 <= value < 1:
            raise ValueError(f"{option} must be at least 0 and less than 1, got {value}")
        lowest = min(default, 1)
        if not lowest <= value < np.inf:  # true for nan as well
            raise ValueError(f"{option} must be {lowest:g} or more, got {value}")
        if name in ("delay", "frame_stack"):
            check_memory(option, task.observation_space, value)
        if value != default:
            check_spaces(task, env_id, name)
            task = wrapper(task, value)
    return task


def check_spaces(task: Task, env_id: str, name: str) -> None:
    """Refuse a wrapper that the task's spaces do not allow.

    Raises:
      ValueError: names the wrapper and the reason.
    """
    if name == "rescale_actions" and not isinstance(task.action_space, Box):
        numbers = " x ".join(map(str, np.ravel(numbers_of(task.action_space))))
        raise ValueError(
            f"rescale_actions is for continuous actions; {env_id} has {numbers} discrete ones"
        )
    if name == "joint_actions" and isinstance(task.action_space, MultiDiscrete):
        number = math.prod(task.action_space.nvec)
        if number > MOST_JOINT:
            parts = " x ".join(map(str, task.action_space.nvec))
            advice = "ppo.py, rppo.py, sacd.py and rsacd.py take the parts one by one"
            fact = f"the actions of {env_id} have {parts} = {number} combinations"
            raise ValueError(f"{fact}, joint_actions is for at most {MOST_JOINT}; {advice}")
    if name == "sticky_actions" and task.action_mask:
        reason = "a repeated action may be invalid"
        raise ValueError(f"sticky_actions is not for action masks, which {env_id} has: {reason}")
    parts = jax.tree.leaves(task.observation_space)
    if name == "noise" and any(part.dtype == np.uint8 for part in parts):
        raise ValueError(f"noise is not for images of whole numbers, which {env_id} has")
    if name == "rescale_actions" and not has_bounds(task.action_space):
        requirement = "rescale_actions needs actions with bounds"
        raise ValueError(f"{requirement}, those of {env_id} have none")


def check_memory(option: str, space, length: int) -> None:
    """Refuse to keep more past observations than memory serves.

    Raises:
      ValueError: names the option, its value and the greatest that is possible.
    """
    parts = jax.tree.leaves(space)
    size = sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in parts)
    most = MOST_BYTES // size
    if length > max(1, most):
        reason = f"the past of one environment would exceed {MOST_BYTES // 2**20} MiB"
        raise ValueError(f"{option} must be at most {most}, got {length}: {reason}")


def has_bounds(space: Box) -> bool:
    """Whether all bounds of the space are finite."""
    return bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())


def common_options() -> dict:
    """The options that every environment has, and their defaults."""
    return DEFAULTS | {"normalize_obs": False, "normalize_reward": False, "reward_gamma": 0.99}


def check_options(owner: str, options: dict, defaults: dict, guess: bool = True) -> None:
    """Refuse options that are neither in `defaults` nor common, and values that make no sense.

    A value has the type of its default. Numbers are finite and have 32 bits, whole numbers whose
    default is positive are positive, and probabilities, by their names, are between 0 and 1.

    Args:
      defaults: the task's own options. Those that are neither numbers, flags, text nor tuples
        cannot be set, and are left out.
      guess: whether defaults and names tell what is positive and what a probability, as they do in
        the libraries.

    Raises:
      ValueError: names the option, its value and what is valid.
    """
    kinds = (bool, int, float, str, tuple)
    known = {name: x for name, x in (defaults | common_options()).items() if isinstance(x, kinds)}
    errors.check_options(owner, options, known)
    for name, value in options.items():
        default = known[name]
        option = f"option {name} of {owner}"
        if isinstance(default, tuple):
            check_tuple(option, value, default)
        elif isinstance(value, (int, float)) and not abs(value) <= LARGEST[type(value)]:
            raise ValueError(f"{option} must be a finite number of 32 bits, got {value}")
        elif not guess:
            continue
        elif type(default) is int and default > 0 and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
        elif name.endswith(PROBABILITY) and not 0 <= value <= 1:
            raise ValueError(f"{option} must be between 0 and 1, got {value}")


def check_tuple(option: str, value, default: tuple) -> None:
    """Refuse what is no tuple, or not of as many numbers as the default, unless that is empty.

    Raises:
      ValueError: names the option, its value and what is valid.
    """
    if not isinstance(value, tuple) or (default and len(value) != len(default)):
        size = f" of {len(default)} numbers" if default else ""
        raise ValueError(f"{option} must be a tuple{size}, got {value!r}")
    for x in value if default else ():
        if type(x) not in (int, float) or np.isnan(x):
            raise ValueError(f"{option} must consist of numbers, got {value!r}")
