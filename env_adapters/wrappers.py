"""What can be put around a task of any library: options of `envs.make` with the same names in every namespace.

They are applied in this order, the first one innermost:

  mask              entries of the observation removed for good, see `envs.mask_observation`
  sticky_actions    p: with probability p the last action is done again instead of the one given
  noise             s: normal noise with standard deviation s is added to every entry of the observation
  mask_probability  p: every entry of the observation is 0 with probability p, each on its own
  flicker           p: the whole observation is 0 with probability p
  delay             k: what is seen is the observation of k steps ago, or the first one until then
  frame_stack       k: the last k observations, oldest first, side by side along the last axis (channels of images)
  time_limit        n: episodes are truncated after n steps
  rescale_actions   continuous actions are given between -1 and 1, whatever the bounds of the task
  normalize_obs, normalize_reward, reward_gamma   running normalisation, see `envs.Normalized`

Each is a function from a `Task` to a `Task`. Randomness comes from the keys of reset and step; what has to be
remembered (the last action, earlier observations) is in the task's state and begins anew with every episode.
"""


from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.task import Box, Discrete, Task, cast
from harness import errors
from harness.errors import did_you_mean


def mask_observation(env_id: str, task: Task, mask: tuple[str, ...]) -> Task:
    """Hide entries of a vector observation: the task that is left has them removed.

    Args:
      mask: what to hide, indices ("0", "3") or a name that the task has for some of them ("velocity"
        hides the velocities).
    """
    space = task.observation_space
    if len(space.shape) != 1:
        raise ValueError(f"mask hides entries of vector observations; {env_id} has observations of shape {space.shape}")
    size, names = space.shape[0], task.masks
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


class Wrapped(NamedTuple):
    """The state of a task, and what a wrapper remembers."""

    inner: Any
    own: Any


def map_observation(task: Task, function, space: Box) -> Task:
    """function: (key, obs) -> obs."""

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
    return replace(space, low=np.minimum(space.low, 0), high=np.maximum(space.high, 0))


def noise(task: Task, scale: float) -> Task:
    space = replace(task.observation_space, low=-np.inf, high=np.inf)
    return map_observation(task, lambda key, obs: obs + scale * jax.random.normal(key, obs.shape), space)


def mask_probability(task: Task, probability: float) -> Task:
    def hide(key, obs):
        return jnp.where(jax.random.bernoulli(key, probability, obs.shape), jnp.zeros_like(obs), obs)

    return map_observation(task, hide, with_zero(task.observation_space))


def flicker(task: Task, probability: float) -> Task:
    def hide(key, obs):
        return jnp.where(jax.random.bernoulli(key, probability), jnp.zeros_like(obs), obs)

    return map_observation(task, hide, with_zero(task.observation_space))


def remember(task: Task, length: int, show, space: Box) -> Task:
    """show: the last `length` observations (length, *obs_shape), oldest first -> what is seen of them."""

    def reset(key):
        obs, state = task.reset(key)
        obs = cast(obs, task.observation_space)
        history = jnp.broadcast_to(obs, (length, *obs.shape))
        return show(history), Wrapped(state, history)

    def step(key, state, action):
        obs, inner, *rest = task.step(key, state.inner, action)
        history = jnp.concatenate([state.own[1:], cast(obs, task.observation_space)[None]])
        return show(history), Wrapped(inner, history), *rest

    return replace(task, reset=reset, step=step, observation_space=space, render=inner_render(task))


def inner_render(task: Task):
    return task.render and (lambda state: task.render(state.inner))


def delay(task: Task, steps: int) -> Task:
    return remember(task, steps + 1, lambda history: history[0], task.observation_space)


def frame_stack(task: Task, length: int) -> Task:
    space = task.observation_space
    low, high = (np.concatenate([np.broadcast_to(x, space.shape)] * length, axis=-1) for x in (space.low, space.high))
    return remember(
        task, length, lambda history: jnp.concatenate(history, axis=-1), Box(low, high, low.shape, space.dtype)
    )


def sticky_actions(task: Task, probability: float) -> Task:
    """As the Arcade Learning Environment (Machado et al. 2018, arXiv 1709.06009) does it."""
    space = task.action_space

    def reset(key):
        obs, state = task.reset(key)
        return obs, Wrapped(state, (jnp.zeros(space.shape, space.dtype), jnp.bool_(False)))

    def step(key, state, action):
        key, own_key = jax.random.split(key)
        last, exists = state.own
        action = jnp.where(exists & jax.random.bernoulli(own_key, probability), last, action)
        obs, inner, *rest = task.step(key, state.inner, action)
        return obs, Wrapped(inner, (action, jnp.bool_(True))), *rest

    return replace(task, reset=reset, step=step, render=inner_render(task))


def time_limit(task: Task, steps: int) -> Task:
    def reset(key):
        obs, state = task.reset(key)
        return obs, Wrapped(state, jnp.int32(0))

    def step(key, state, action):
        obs, inner, reward, terminated, truncated = task.step(key, state.inner, action)
        time = state.own + 1
        return obs, Wrapped(inner, time), reward, terminated, truncated | (time >= steps)

    limit = min(steps, task.max_steps)
    return replace(task, reset=reset, step=step, max_steps=limit, render=inner_render(task))


def rescale_actions(task: Task, _) -> Task:
    space = task.action_space
    if isinstance(space, Discrete):
        return task

    def step(key, state, action):
        action = space.low + 0.5 * (action + 1.0) * (np.asarray(space.high) - space.low)
        # Rounding must not take an action past a bound, which some tasks refuse.
        return task.step(key, state, jnp.clip(action, space.low, space.high))

    return replace(task, step=step, action_space=Box(-1.0, 1.0, space.shape, space.dtype))


# name -> (the value that means "not at all", the wrapper), the first one innermost
WRAPPERS = {
    "sticky_actions": (0.0, sticky_actions),
    "noise": (0.0, noise),
    "mask_probability": (0.0, mask_probability),
    "flicker": (0.0, flicker),
    "delay": (0, delay),
    "frame_stack": (1, frame_stack),
    "time_limit": (0, time_limit),
    "rescale_actions": (False, rescale_actions),
}


DEFAULTS = {name: default for name, (default, _) in WRAPPERS.items()}


PROBABILITIES = ("sticky_actions", "mask_probability", "flicker")


def wrap(task: Task, env_id: str, options: dict) -> Task:
    """The task with the wrappers whose option in `options` is not that of `DEFAULTS`.

    Raises:
      ValueError: a value out of range, or a wrapper that the spaces of the task do not allow.
    """
    for name, (default, wrapper) in WRAPPERS.items():
        value = options.get(name, default)
        if name in PROBABILITIES and not 0 <= value < 1:
            raise ValueError(f"option {name} of {env_id} must be at least 0 and less than 1, got {value}")
        if not default <= value < np.inf:  # nan is not either
            raise ValueError(f"option {name} of {env_id} must be {default:g} or more, got {value}")
        if value != default:
            check_spaces(task, env_id, name)
            task = wrapper(task, value)
    return task


def check_spaces(task: Task, env_id: str, name: str) -> None:
    """Refuse a wrapper that the spaces of the task do not allow."""
    if name == "noise" and task.observation_space.dtype == np.uint8:
        raise ValueError(f"noise is not for images of whole numbers, which {env_id} has")
    bounds = (task.action_space.low, task.action_space.high) if isinstance(task.action_space, Box) else ()
    if name == "rescale_actions" and not all(np.isfinite(bound).all() for bound in bounds):
        raise ValueError(f"rescale_actions needs actions with bounds, those of {env_id} have none")


def common_options() -> dict:
    """Options of every environment, and their defaults."""
    return DEFAULTS | {"normalize_obs": False, "normalize_reward": False, "reward_gamma": 0.99}


def check_options(owner: str, options: dict, defaults: dict) -> None:
    """`errors.check_options`, whose answer to an unknown option also names those that every environment has."""
    errors.check_options(owner, options, defaults | common_options())
