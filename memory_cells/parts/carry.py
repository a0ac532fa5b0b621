"""What every memory does with its carry: reset it, count the steps of its episode, pick environments, detach it."""

import jax
import jax.numpy as jnp


def reset(carry, initial, starts):
    """The carry, with the environments where `starts` (B,) is True set to `initial` (same structure as the carry)."""

    # Selected, never multiplied by a mask: 0 * nan is nan, and a broken episode must not outlive its end.
    def select(old, new):
        return jnp.where(starts.reshape(starts.shape + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(select, carry, initial)


def episode_steps(count, starts):
    """The number of each step within its episode (T, B), where `count` (B,) continues the carried episode."""
    time = jnp.arange(len(starts))[:, None]
    start = jax.lax.cummax(jnp.where(starts, time, -1))
    return jnp.where(start < 0, count + time, time - start)


def take(carry, envs):
    """The carries of the environments `envs` (an index array): what a minibatch of whole environments needs."""
    return jax.tree.map(lambda leaf: leaf[envs], carry)


def detach(carry):
    """The carry as a constant: no gradient flows into what came before it."""
    return jax.lax.stop_gradient(carry)
