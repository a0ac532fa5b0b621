"""What an adapter returns: a `Task` of pure functions, and the spaces of its arrays."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, eq=False)
class Box:
    """Arrays with one shape and dtype.

    Attributes:
      low: smallest values, a scalar or an array of that shape; may be -inf.
      high: greatest values, likewise; may be inf.
    """

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: Any = np.float32

    @property
    def half_width(self):
        """Half the distance between the bounds, an array of the space's shape."""
        return 0.5 * (self.high - self.low) * np.ones(self.shape)

    def sample(self, key):
        """A uniform sample; the bounds must be finite."""
        low = jnp.asarray(self.low, jnp.float32)
        high = jnp.asarray(self.high, jnp.float32)
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


@dataclass(frozen=True, eq=False)
class Task:
    """An environment without auto-reset, as pure functions that JAX can compile and vmap.

    Attributes:
      reset: key -> (obs, state); the state is any pytree of arrays.
      step: (key, state, action) -> (obs, state, reward, terminated, truncated).
        obs is the true next observation, also when the episode ends. Shapes are those of the
        spaces; dtypes may differ, `Environment` casts them.
      max_steps: an upper bound of an episode's length; the task ends every episode by then.
      render: state -> uint8 image (height, width, 3), called with numpy arrays outside of JAX;
        None if the library cannot draw.
      masks: names for entries of a vector observation, as in {"velocity": (1, 3)}.
      action_mask: state -> (num_actions,) bool, which discrete actions are valid; None if all are.
        At least one is, unless the episode has ended.
      privileged: state -> all that a critic should read, which actors do not see: an array with at
        least one axis, an image of bytes or what float32 can hold; None if the task has no such
        observation. Only environments of `make_asymmetric` compute it.
      clip_reward: True if a learner should read rewards clipped to [-1, 1]; `step` gives them as
        they are, and episodes' returns are sums of these.
      costly_reset: True if a reset costs about as much as a step or more. `Environment` then
        computes resets only for environments whose episode has ended (`branch_where`).
      equal_resets_once: True if a costly reset computes equal keys of a batch only once, as a
        function on the host can.
      reseed: (key, state) -> the same state, but the random numbers of later steps follow from the
        key; None if no step draws from its state.
      report: state -> {name: () float32}, what evaluations say of an episode besides its return and
        length, called after its last step; None if there is nothing to say.
      own_actions: the task's own actions, where a wrapper has made `action_space` [-1, 1] of them;
        None where it has not.
    """

    reset: Callable
    step: Callable
    observation_space: Box
    action_space: Box | Discrete
    max_steps: int
    render: Callable | None = None
    masks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    action_mask: Callable | None = None
    privileged: Callable | None = None
    clip_reward: bool = False
    costly_reset: bool = False
    equal_resets_once: bool = False
    reseed: Callable | None = None
    report: Callable | None = None
    own_actions: Box | None = None


class MaskedObs(NamedTuple):
    """An observation of a task with an action mask: what the agent sees, and what it may do.

    They travel together through rollouts, replay buffers and memories.
    """

    obs: jax.Array
    action_mask: jax.Array  # (num_actions,) bool


class AsymmetricObs(NamedTuple):
    """An observation of which the actor sees less than the critic.

    As in asymmetric actor-critic (Pinto et al. 2017, arXiv 1710.06542). The two travel together
    through rollouts, replay buffers and memories.
    """

    obs: Any  # what the actor sees: an array, or `MaskedObs`
    full: jax.Array  # what the critic sees


INVALID = -1e9  # the value, and the logit, of an invalid action: exp(INVALID) is 0, nothing is nan


def seen_by(reader: Literal["actor", "critic"], obs):
    """A reader's part of an observation: the whole if it is not asymmetric."""
    if not isinstance(obs, AsymmetricObs):
        return obs
    return obs.obs if reader == "actor" else obs.full


def without_mask(obs):
    """What the agent sees."""
    return obs.obs if isinstance(obs, MaskedObs) else obs


def only_valid(values, obs):
    """Values or logits (..., num_actions), with `INVALID` for the actions that obs rules out."""
    obs = seen_by("actor", obs)
    if not isinstance(obs, MaskedObs):
        return values
    # Where an episode ended nothing may be valid: a truncated one is worth what it was without.
    is_over = ~obs.action_mask.any(axis=-1, keepdims=True)
    return jnp.where(obs.action_mask | is_over, values, INVALID)


def random_valid(key, values):
    """Any of the actions (...) that `only_valid` has left of values (..., num_actions)."""
    valid = ~(values <= INVALID)  # nan, of a seed that diverged, counts as valid
    place = jax.random.randint(key, values.shape[:-1], 0, valid.sum(axis=-1))  # among the valid
    return (valid.cumsum(axis=-1) > place[..., None]).argmax(axis=-1)


def greatest_entropy(values, obs):
    """The entropy of a uniform choice of the valid actions; (...), or one number without a mask."""
    obs = seen_by("actor", obs)
    if isinstance(obs, MaskedObs):
        return jnp.log(obs.action_mask.sum(axis=-1))
    return np.log(values.shape[-1])


def cast(obs, space: Box):
    """The observation with the dtype and shape of its space."""
    return jnp.asarray(obs).astype(space.dtype).reshape(space.shape)


def scale(action, space: Box):
    """Actions in [-1, 1], with any leading axes, as the space has them."""
    action = space.low + 0.5 * (action + 1.0) * (np.asarray(space.high) - space.low)
    # Rounding may take an action past a bound, and some tasks refuse such actions.
    return jnp.clip(action, space.low, space.high)


def unscale(action, space: Box):
    """The inverse of `scale`."""
    width = np.asarray(space.high) - space.low
    return 2.0 * (action - space.low) / np.where(width > 0, width, 1.0) - 1.0


def strong(x):
    """The array without JAX's weak type, which would make JAX compile a second time."""
    return jax.lax.convert_element_type(x, x.dtype)
