"""Operations on a carry or a step: a tree of arrays (B, ...) with one row per environment."""

import jax
import jax.numpy as jnp


def reset(carry, initial, starts):
    """`carry`, replaced by `initial` (same structure) where `starts` (B,) is True."""

    # Selects instead of multiplying by a mask: 0 * nan is nan, but a nan must end with its episode.
    def select(old, new):
        mask = starts.reshape(starts.shape + (1,) * (old.ndim - 1))
        return jnp.where(mask, new, old)

    return jax.tree.map(select, carry, initial)


def episode_steps(count, starts):
    """Each step's number within its episode, counted from 0.

    Args:
      count: (B,) steps already read of the running episodes.
      starts: (T, B) bool.

    Returns:
      (T, B), of the dtype of `count`.
    """
    time = jnp.arange(len(starts))[:, None]
    start = jax.lax.cummax(jnp.where(starts, time, -1))
    return jnp.where(start < 0, count + time, time - start)


def take(carry, envs):
    """The carries of the environments `envs`, an index array: for minibatches of environments."""
    return jax.tree.map(lambda leaf: leaf[envs], carry)


def as_sequence(step):
    """A step (B, ...) as a sequence of one, (1, B, ...)."""
    return jax.tree.map(lambda x: x[None], step)


def detach(carry):
    """The carry as a constant: no gradient flows back through it."""
    return jax.lax.stop_gradient(carry)
