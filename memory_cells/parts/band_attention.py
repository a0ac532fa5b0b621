"""Attention over a rolling window: each step sees itself and the M steps before it in its episode.

Times count from the first step of the sequence. The memory holds the rows of times -M ... -1,
oldest first; the new rows have times 0 ... T - 1. Step t sees the rows of times
max(t - M, began_t) ... t, where began_t is the time at which its episode began. This one number
says everything about resets, and how much of the memory is filled. It follows from `age` in the
carry, the number of steps already read of the episode. A sequence gives the same numbers whether
it is read at once, in pieces or step by step.

A sequence is cut into chunks of at least M steps. Each chunk sees its own rows and the M rows
before it, so the scores need memory linear in T; the gradient recomputes them.

Cost: 4 T (M + C) H floating-point operations per environment, for chunks of C steps.

Unlike elsewhere, the environment is the first axis here, and time is the last but one. The memory
stores its rows in this order, so that a single step moves little data.
"""

import jax
import jax.numpy as jnp

from memory_cells.parts.carry import episode_steps

# Smaller chunks compute fewer scores outside of the window, but in more and smaller products.
MIN_CHUNK = 32  # steps


def start_times(age, starts):
    """The time at which the episode of every step began; negative if before the sequence.

    Args:
      age: (B,) steps already read of the episode, in floating point, so that the whole carry is
        differentiable.
      starts: (T, B) bool.

    Returns:
      (B, T).
    """
    return (jnp.arange(len(starts))[:, None] - episode_steps(age, starts)).T


def append(memory, xs, began):
    """Memory (B, ..., M, n) and new rows (B, ..., T, n) -> (B, ..., M + T, n), oldest first."""
    # Rows of earlier episodes are hidden later. They are also zeroed here, because a nan in them
    # would reach the gradients of the weights.
    return jnp.concatenate([_forget(memory, -memory.shape[-2], began[:, 0]), xs], axis=-2)


def newest(rows, began):
    """The memory (B, ..., M, n) after a sequence, from the rows that `append` returned."""
    steps = began.shape[1]
    return _forget(rows[..., steps:, :], 2 * steps - rows.shape[-2], began[:, -1])


def _forget(rows, first_time, began):
    """Rows of times first_time, first_time + 1, ...; zero where older than `began` (B,)."""
    time = first_time + jnp.arange(rows.shape[-2])
    belongs = time >= began[:, None]  # (B, rows)
    mask = belongs.reshape(rows.shape[0], *(1,) * (rows.ndim - 3), -1, 1)
    return jnp.where(mask, rows, 0.0)


def band_attention(queries, keys, values, began, by_distance=None):
    """Softmax attention of every step to itself and to the M rows before it, within its episode.

    Args:
      queries: (B, heads, T, d), scaled.
      keys: (B, heads, M + T, d), of the rows that `append` returns.
      values: (B, heads, M + T, e), of the same rows.
      began: (B, T), from `start_times`.
      by_distance: optional (B, heads, T, M + 1), added to the scores; entry i is for the row M - i
        steps before.

    Returns:
      (B, heads, T, e).
    """
    steps = queries.shape[-2]
    length = keys.shape[-2] - steps
    began = began[:, None, :, None]  # (B, 1, T, 1), the layout of queries
    size = max(length, MIN_CHUNK)
    if steps <= size:
        return _attend(queries, keys, values, began, by_distance)
    num_chunks = -(-steps // size)
    padding = num_chunks * size - steps

    def pad(rows):  # padded keys are in the future of every real step
        return jnp.pad(rows, [(0, 0), (0, 0), (0, padding), (0, 0)])

    def chunks(rows):
        return jnp.moveaxis(rows.reshape(*rows.shape[:2], num_chunks, size, -1), 2, 0)

    def windows(rows):
        before = chunks(rows[:, :, : num_chunks * size])
        own = chunks(rows[:, :, length:])
        return jnp.concatenate([before[..., :length, :], own], axis=-2)

    offsets = size * jnp.arange(num_chunks).reshape(-1, 1, 1, 1, 1)
    by_distance = None if by_distance is None else chunks(pad(by_distance))
    inputs = (
        chunks(pad(queries)),
        windows(pad(keys)),
        windows(pad(values)),
        chunks(pad(began)) - offsets,
        by_distance,
    )
    ys = jax.lax.map(lambda chunk: jax.checkpoint(_attend)(*chunk), inputs)
    ys = jnp.moveaxis(ys, 0, 2).reshape(*queries.shape[:2], -1, values.shape[-1])
    return ys[:, :, :steps]


def _attend(queries, keys, values, began, by_distance):
    """`band_attention` for a short sequence: scores of all queries with all keys."""
    steps = queries.shape[-2]
    length = keys.shape[-2] - steps
    time = jnp.arange(steps)[:, None]
    key_time = jnp.arange(-length, steps)
    in_window = (key_time <= time) & (key_time >= time - length)
    visible = in_window & (key_time >= began)  # (B, 1, T, M + T)

    # Hiding a row is not enough, because 0 * nan is nan. So rows with nan or inf are taken out of
    # the sums, and the scores of steps that see them become nan. A single step sees every row that
    # `append` did not zero.
    is_finite = True
    if steps > 1:
        is_finite = jnp.isfinite(keys.sum(axis=-1) + values.sum(axis=-1))[..., None]
        keys = jnp.where(is_finite, keys, 0.0)
        values = jnp.where(is_finite, values, 0.0)
        is_finite = is_finite.swapaxes(-1, -2)
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys)
    if by_distance is not None:
        scores += skew(by_distance, keys.shape[-2])
    scores = jnp.where(is_finite, scores, jnp.nan)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("bhts,bhse->bhte", weights, values)


def skew(x, width):
    """Reindex x (..., T, M + 1) from distance to the key's time, (..., T, width).

    Row t moves right by t entries.
    """
    *batch, steps, length = x.shape
    x = jnp.pad(x, [(0, 0)] * (len(batch) + 1) + [(0, width + 1 - length)])
    flat = x.reshape(*batch, steps * (width + 1))
    return flat[..., : steps * width].reshape(*batch, steps, width)
