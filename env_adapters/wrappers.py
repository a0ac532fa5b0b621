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
  normalize_obs, normalize_reward, reward_gamma
                    running normalisation, see `envs.Preprocessed`

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

from env_adapters.task import Box, Discrete, Task, cast, scale
from harness import errors
from harness.errors import did_you_mean

# --- Masks ---------------------------------------------------------------------------------------


def mask_observation(env_id: str, task: Task, mask: tuple[str, ...]) -> Task:
    """Remove entries of a vector observation.

    Args:
      mask: what to remove: indices ("0", "3"), or names from `Task.masks` ("velocity").

    Raises:
      ValueError: the observation is not a vector, an entry is unknown, or nothing is left.
    """
    space = task.observation_space
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


# --- Wrappers that change one observation at a time ----------------------------------------------


def map_observation(task: Task, function, space: Box) -> Task:
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


def with_zero(space: Box) -> Box:
    """The space with bounds that include 0."""
    return replace(space, low=np.minimum(space.low, 0), high=np.maximum(space.high, 0))


def noise(task: Task, scale: float) -> Task:
    """Add normal noise with this standard deviation to every entry of the observation."""

    def add_noise(key, obs):
        return obs + scale * jax.random.normal(key, obs.shape)

    space = replace(task.observation_space, low=-np.inf, high=np.inf)
    return map_observation(task, add_noise, space)


def mask_probability(task: Task, probability: float) -> Task:
    """Set every entry of the observation to 0 with this probability."""

    def hide(key, obs):
        hidden = jax.random.bernoulli(key, probability, obs.shape)
        return jnp.where(hidden, jnp.zeros_like(obs), obs)

    return map_observation(task, hide, with_zero(task.observation_space))


def flicker(task: Task, probability: float) -> Task:
    """Set the whole observation to 0 with this probability."""

    def hide(key, obs):
        hidden = jax.random.bernoulli(key, probability)
        return jnp.where(hidden, jnp.zeros_like(obs), obs)

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


def remember(task: Task, length: int, show, space: Box) -> Task:
    """The task with the observations show(history), which lie in `space`.

    The history (length, *obs_shape) holds the last observations, oldest first. Before an episode
    has that many, its first observation fills the older rows.
    """

    def reset(key):
        obs, state = task.reset(key)
        obs = cast(obs, task.observation_space)
        history = jnp.broadcast_to(obs, (length, *obs.shape))
        return show(history), Wrapped(state, history)

    def step(key, state, action):
        obs, inner, *rest = task.step(key, state.inner, action)
        history = jnp.concatenate([state.own[1:], cast(obs, task.observation_space)[None]])
        return show(history), Wrapped(inner, history), *rest

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
    return jnp.concatenate(history, axis=-1)


def keep_full(task: Task, length: int) -> Task:
    """Keep the observation for a critic, as the wrappers on top hide or disturb that of the actor.

    It is the task's privileged observation: the last `length` ones, as `frame_stack` joins them.
    """
    kept = remember(task, length, lambda history: history[-1], task.observation_space)
    return replace(kept, privileged=lambda state: join(state.own))


def frame_stack(task: Task, length: int) -> Task:
    """Show the last `length` observations, joined along the last axis."""

    def repeat(bound):
        return np.concatenate([np.broadcast_to(bound, space.shape)] * length, axis=-1)

    space = task.observation_space
    low = repeat(space.low)
    high = repeat(space.high)
    return remember(task, length, join, Box(low, high, low.shape, space.dtype))


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

    first_obs: jax.Array  # what every trial begins with
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
    (255 in images of bytes) where a trial begins, and 0 elsewhere. So do privileged ones.

    The returns of the first and of the last trial are reported: a memory shows in their difference.
    """
    space = task.observation_space

    def mark(dtype):
        return 255 if dtype == np.uint8 else 1

    def show(obs, begins):
        entry = jnp.where(begins, mark(obs.dtype), 0)
        entry = jnp.full((*obs.shape[:-1], 1), entry, obs.dtype)
        return jnp.concatenate([obs, entry], axis=-1)

    def privileged(state):
        return show(jnp.asarray(task.privileged(state.inner)), state.own.begins)

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

        obs = select(own.first_obs, cast(obs, space))
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

    high = extend(space.high, mark(space.dtype))
    return replace(
        task,
        reset=reset,
        step=step,
        observation_space=Box(extend(space.low, 0), high, high.shape, space.dtype),
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


# --- What every task gets ------------------------------------------------------------------------

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
            return jnp.asarray(task.privileged(state))

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
    if name == "rescale_actions" and isinstance(task.action_space, Discrete):
        kind = f"{env_id} has {task.action_space.n} discrete ones"
        raise ValueError(f"rescale_actions is for continuous actions; {kind}")
    if name == "sticky_actions" and task.action_mask:
        reason = "a repeated action may be invalid"
        raise ValueError(f"sticky_actions is not for action masks, which {env_id} has: {reason}")
    if name == "noise" and task.observation_space.dtype == np.uint8:
        raise ValueError(f"noise is not for images of whole numbers, which {env_id} has")
    if name == "rescale_actions" and not has_bounds(task.action_space):
        requirement = "rescale_actions needs actions with bounds"
        raise ValueError(f"{requirement}, those of {env_id} have none")


def check_memory(option: str, space: Box, length: int) -> None:
    """Refuse to keep more past observations than memory serves.

    Raises:
      ValueError: names the option, its value and the greatest that is possible.
    """
    most = MOST_BYTES // (math.prod(space.shape) * np.dtype(space.dtype).itemsize)
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
