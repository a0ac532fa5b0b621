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


INVALID = -1e9  # the value, and the logit, of an invalid action: exp(INVALID) is 0, nothing is nan


@dataclass(frozen=True, eq=False)
class Discrete:
    """The integers start ... start + n - 1.

    The methods besides `sample` are for networks, with an output for every action; the actions that
    these see count from 0.
    """

    n: int
    shape: tuple[int, ...] = ()
    dtype: Any = np.int32
    start: int = 0

    def sample(self, key):
        """A uniform sample."""
        end = self.start + self.n
        return jax.random.randint(key, self.shape, self.start, end, self.dtype)

    @property
    def num_outputs(self) -> int:
        """How many outputs a network has."""
        return self.n

    def logits(self, outputs):
        """Outputs as logits: (..., n)."""
        return outputs

    def values(self, outputs):
        """Outputs as values Q(s, a): (..., n)."""
        return outputs

    def sum_parts(self, x):
        """What is known of the whole action, from x (...) of its parts."""
        return x

    def sum_actions(self, x):
        """The sum of x (..., n) over all actions, (...)."""
        return x.sum(axis=-1)

    def one_hot(self, action):
        """Actions (...) as vectors (..., num_outputs)."""
        return jax.nn.one_hot(action, self.n)


@dataclass(frozen=True, eq=False)
class MultiDiscrete:
    """Several integers at once, part i from start[i] to start[i] + nvec[i] - 1.

    A network has an output for every action of every part. Here and for `Discrete` logits, values
    and actions have the same axes, but for one more axis before the last, that of the parts.

    Attributes:
      start: the smallest of each part; all 0 if it is empty.
    """

    nvec: tuple[int, ...]
    dtype: Any = np.int32
    start: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("nvec", "start"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.nvec),)

    def sample(self, key):
        """A uniform sample."""
        first = first_of(self)
        return jax.random.randint(key, self.shape, first, first + self.nvec, self.dtype)

    @property
    def num_outputs(self) -> int:
        """How many outputs a network has."""
        return sum(self.nvec)

    def logits(self, outputs):
        """Outputs as logits (..., parts, max(nvec)), `INVALID` beyond the actions of a part."""

        def pad(part):
            missing = max(self.nvec) - part.shape[-1]
            padding = [(0, 0)] * (part.ndim - 1) + [(0, missing)]
            return jnp.pad(part, padding, constant_values=INVALID)

        return jnp.stack([pad(part) for part in self._split(outputs)], axis=-2)

    def values(self, outputs):
        """Outputs as values Q_i(s, a_i), like `logits`; Q(s, a) is their sum over the parts.

        The sum does not say how much of it belongs to which part. So all parts get the same mean:
        of two estimates, the smaller can then be taken part by part.
        """
        parts = self._split(outputs)
        means = [part.mean(axis=-1, keepdims=True) for part in parts]
        mean = sum(means) / len(means)
        level = [part - own + mean for part, own in zip(parts, means, strict=True)]
        return self.logits(jnp.concatenate(level, axis=-1))

    def sum_parts(self, x):
        """What is known of the whole action, from x (..., parts): log pi(a|s) or Q(s, a)."""
        return x.sum(axis=-1)

    def sum_actions(self, x):
        """The sum of x (..., parts, max(nvec)) over the actions of all parts, (...)."""
        return x.sum(axis=(-2, -1))

    def one_hot(self, action):
        """Actions (..., parts) as vectors (..., num_outputs): the parts one after the other."""
        parts = [jax.nn.one_hot(action[..., i], n) for i, n in enumerate(self.nvec)]
        return jnp.concatenate(parts, axis=-1)

    def _split(self, outputs):
        return jnp.split(outputs, np.cumsum(self.nvec)[:-1], axis=-1)


def numbers_of(space: Discrete | MultiDiscrete):
    """How many integers there are in a space, or in every part of it."""
    return np.asarray(space.nvec if isinstance(space, MultiDiscrete) else space.n)


def first_of(space: Discrete | MultiDiscrete):
    """The smallest integer of a space, of every part."""
    return np.asarray(space.start or np.zeros(space.shape), space.dtype)


@dataclass(frozen=True, eq=False)
class Task:
    """An environment without auto-reset, as pure functions that JAX can compile and vmap.

    Attributes:
      reset: key -> (obs, state); the state is any pytree of arrays.
      step: (key, state, action) -> (obs, state, reward, terminated, truncated).
        obs is the true next observation, also when the episode ends. Shapes are those of the
        spaces; dtypes may differ, `Environment` casts them.
      observation_space: a `Box`, or a dict or tuple of them, also nested: observations have the
        same parts. Integers in it, `Discrete` or `MultiDiscrete`, become one-hot vectors.
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
      own_actions: the task's own actions, where a wrapper has made another `action_space` of them;
        None where it has not.
    """

    reset: Callable
    step: Callable
    observation_space: Any
    action_space: Box | Discrete | MultiDiscrete
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
    own_actions: Box | Discrete | MultiDiscrete | None = None


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

    obs: Any  # what the actor sees: an observation, or `MaskedObs`
    full: Any  # what the critic sees


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


def greatest_entropy(space: Discrete | MultiDiscrete, obs):
    """The entropy of a uniform choice of the valid actions; (...), or one number without a mask."""
    obs = seen_by("actor", obs)
    if isinstance(obs, MaskedObs):
        return jnp.log(obs.action_mask.sum(axis=-1))
    return np.log(numbers_of(space)).sum()


# --- Actions of several parts as one -------------------------------------------------------------


def as_parts(action, space: MultiDiscrete):
    """Joint actions (...) as parts (..., parts), which count from 0; the last one changes fastest.

    Action a stands for the parts `np.unravel_index(a, nvec)`.
    """
    return jnp.stack(jnp.unravel_index(action, space.nvec), axis=-1)


def as_joint(parts, space: MultiDiscrete):
    """The inverse of `as_parts`; parts that do not exist are moved to those that do."""
    parts = tuple(parts[..., i] for i in range(len(space.nvec)))
    return jnp.ravel_multi_index(parts, space.nvec, mode="clip")


# --- Observations of several parts ---------------------------------------------------------------


def each_part(encode):
    """A function (obs, num_axes) -> vectors, for observations of several parts: the vectors joined.

    The action mask is left out.
    """

    def encode_all(obs, num_axes):
        parts = [encode(part, num_axes) for part in jax.tree.leaves(without_mask(obs))]
        return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    return encode_all


def parts_of(space) -> dict[str, Any]:
    """The parts of a space by their names, as "hand.0" for {"hand": (Box, Box)}; "" for the whole.

    A part that `mask` hides is None, and is left out.
    """
    paths = jax.tree_util.tree_leaves_with_path(space)
    return {jax.tree_util.keystr(path, simple=True, separator="."): part for path, part in paths}


def cast(obs, space):
    """The observation with the dtypes and shapes of its space."""
    return jax.tree.map(cast_part, space, obs)


def cast_part(space: Box, obs):
    return jnp.asarray(obs).astype(space.dtype).reshape(space.shape)


# --- Bounds --------------------------------------------------------------------------------------


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
