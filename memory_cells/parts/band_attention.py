"""Attention over a rolling window: every step sees itself and the M steps before it, as far as its episode reaches.

Times count from the sequence's first step: memory rows, oldest first, are times -M ... -1, new rows 0 ... T - 1. Step t
sees the rows of times max(t - M, began_t) ... t, began_t being the time at which its episode began; that one number
holds all there is to know about resets. It follows from an `age` in the carry, the steps already read of the episode,
which also tells how much of the memory is filled. Reading a sequence at once, in pieces or step by step is the same.

A sequence is cut into chunks of at least M steps; each sees the last M rows before it and its own. So scores take
memory linear in T, and they are recomputed for the gradient instead of being kept. Cost: 4 T (M + C) H floating-point
operations per environment for chunks of C steps.

Here the environment comes first and time last but one, as a memory keeps it: a step then has little to move.
"""

import jax
import jax.numpy as jnp

from memory_cells.parts.carry import episode_steps

MIN_CHUNK = 32  # steps; smaller chunks waste less on steps outside of the window, but make more and smaller products


def start_times(age, starts):
    """When the episode of every step began: age (B,) and starts (T, B) bool -> (B, T), negative before the sequence.

    The age counts in floating point, so that one may differentiate with respect to the whole of a carry.
    """
    return (jnp.arange(len(starts))[:, None] - episode_steps(age, starts)).T


def append(memory, xs, began):
    """Memory (B, ..., M, n) and new rows (B, ..., T, n) in one: (B, ..., M + T, n), oldest first."""
    # Zeros, not only hidden: nan in there would reach the gradients of weights.
    return jnp.concatenate([_forget(memory, -memory.shape[-2], began[:, 0]), xs], axis=-2)


def newest(rows, began):
    """The memory (B, ..., M, n) after a sequence, from the rows (B, ..., M + T, n) that `append` made."""
    steps = began.shape[1]
    return _forget(rows[..., steps:, :], 2 * steps - rows.shape[-2], began[:, -1])


def _forget(rows, first_time, began):
    """Zeros in place of what is older than the episode that began at `began` (B,)."""
    time = first_time + jnp.arange(rows.shape[-2])
    belongs = time >= began[:, None]  # (B, rows)
    return jnp.where(belongs.reshape(len(rows), *(1,) * (rows.ndim - 3), -1, 1), rows, 0.0)


def band_attention(queries, keys, values, began, by_distance=None):
    """Softmax attention of every step to itself and the M rows before it, within its episode.

    Args:
      queries: (B, heads, T, d), scaled.
      keys: (B, heads, M + T, d), made from the rows that `append` returns.
      values: (B, heads, M + T, e), likewise.
      began: (B, T), the `start_times`.
      by_distance: optional (B, heads, T, M + 1), added to the scores; [..., i] meets the row M - i steps before.

    Returns:
      (B, heads, T, e).
    """
    steps, length = queries.shape[-2], keys.shape[-2] - queries.shape[-2]
    began = began[:, None, :, None]  # to be handled like the others: (B, 1, T, 1)
    size = max(length, MIN_CHUNK)
    if steps <= size:
        return _attend(queries, keys, values, began, by_distance)
    num_chunks = -(-steps // size)
    padding = num_chunks * size - steps

    def pad(rows):  # a padded key lies in every real step's future
        return jnp.pad(rows, [(0, 0), (0, 0), (0, padding), (0, 0)])

    def chunks(rows):
        return jnp.moveaxis(rows.reshape(*rows.shape[:2], num_chunks, size, -1), 2, 0)

    def windows(rows):
        before, own = chunks(rows[:, :, : num_chunks * size]), chunks(rows[:, :, length:])
        return jnp.concatenate([before[..., :length, :], own], axis=-2)

    offsets = size * jnp.arange(num_chunks).reshape(-1, 1, 1, 1, 1)
    by_distance = None if by_distance is None else chunks(pad(by_distance))
    inputs = chunks(pad(queries)), windows(pad(keys)), windows(pad(values)), chunks(pad(began)) - offsets, by_distance
    ys = jax.lax.map(lambda chunk: jax.checkpoint(_attend)(*chunk), inputs)
    return jnp.moveaxis(ys, 0, 2).reshape(*queries.shape[:2], -1, values.shape[-1])[:, :, :steps]


def _attend(queries, keys, values, began, by_distance):
    """`band_attention` for a short sequence, by the scores of all queries with all keys."""
    steps, length = queries.shape[-2], keys.shape[-2] - queries.shape[-2]
    time, key_time = jnp.arange(steps)[:, None], jnp.arange(-length, steps)
    visible = (key_time <= time) & (key_time >= time - length) & (key_time >= began)  # (B, 1, T, M + T)

    # 0 * nan is nan, so hiding is not enough: a broken row leaves the sums, and comes back where it is seen.
    # For a single step `append` has seen to that.
    intact = True
    if steps > 1:
        intact = jnp.isfinite(keys.sum(axis=-1) + values.sum(axis=-1))[..., None]
        keys, values = jnp.where(intact, keys, 0.0), jnp.where(intact, values, 0.0)
        intact = intact.swapaxes(-1, -2)
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys)
    if by_distance is not None:
        scores += skew(by_distance, keys.shape[-2])
    weights = jax.nn.softmax(jnp.where(visible, jnp.where(intact, scores, jnp.nan), -jnp.inf))
    return jnp.einsum("bhts,bhse->bhte", weights, values)


def skew(x, width):
    """x (..., T, M + 1) moved right by t in row t, into (..., T, width): what was by distance is by key's time."""
    *batch, steps, length = x.shape
    x = jnp.pad(x, [(0, 0)] * (len(batch) + 1) + [(0, width + 1 - length)])
    flat = x.reshape(*batch, steps * (width + 1))
    return flat[..., : steps * width].reshape(*batch, steps, width)
