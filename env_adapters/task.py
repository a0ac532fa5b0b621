"""What a library supplies: a `Task` of pure functions, and the spaces of its observations and actions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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


@dataclass(frozen=True, eq=False)
class Task:
    """What a library supplies: pure functions without auto-reset.

    reset: key -> (obs, state)
    step: (key, state, action) -> (obs, state, reward, terminated, truncated)
    max_steps: steps after which the task truncates by itself.
    render: state -> uint8 image (height, width, 3), on the host; None if the library cannot draw it.
    masks: names for entries of the observation, as in {"velocity": (1, 3)}.
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


def cast(obs, space: Box):
    """An observation with the shape and dtype of its space."""
    return jnp.asarray(obs).astype(space.dtype).reshape(space.shape)


def strong(x):
    """x without jax's weak type."""
    return jax.lax.convert_element_type(x, x.dtype)
