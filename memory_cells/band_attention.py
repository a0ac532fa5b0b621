"""Attention over a rolling window: every step sees itself and the M steps before it, as far as its episode reaches.

Times count from the sequence's first step: memory rows, oldest first, are times -M ... -1, new rows 0 ... T - 1. Step t
sees the rows of times max(t - M, start_t) ... t, start_t being the time at which its episode began; that one number
holds all there is to know about resets. It follows from an `age` in the carry, the steps already read of the episode,
which also tells how much of the memory is filled. Reading a sequence at once, in pieces or step by step is the same.

A sequence is cut into chunks of at least M steps; each sees the last M rows before it and its own. So scores take
memory linear in T, and they are recomputed for the gradient instead of being kept. Cost: 4 T (M + C) H floating-point
operations per environment for chunks of C steps.
"""

import jax
import jax.numpy as jnp

MIN_CHUNK = 32  # steps; smaller chunks waste less on steps outside of the window, but make more and smaller products


def start_times(age, starts):
    """When the episode of every step began: age (B,) and starts (T, B) bool -> (T, B), negative before the sequence."""
    time = jnp.arange(len(starts))[:, None]
    latest = jax.lax.cummax(jnp.where(starts, time, -1))
    return jnp.where(latest >= 0, latest, -age)


def append(memory, xs, began):
    """Memory (B, M, ...) and new rows (T, B, ...) in one: (M + T, B, ...), oldest first."""
    return jnp.concatenate([_forget(jnp.moveaxis(memory, 1, 0), -memory.shape[1], began[0]), xs])


def newest(rows, began):
    """The memory (B, M, ...) after a sequence, from the rows (M + T, B, ...) that `append` made."""
    steps = len(began)
    return jnp.moveaxis(_forget(rows[steps:], 2 * steps - len(rows), began[-1]), 0, 1)


def _forget(rows, first_time, began):
    """Zeros in place of what is older than the episode: were nan there only hidden, it would reach the gradients."""
    time = first_time + jnp.arange(len(rows))[:, None]
    return jnp.where((time >= began).reshape(*time.shape[:1], -1, *(1,) * (rows.ndim - 2)), rows, 0.0)


def band_attention(queries, keys, values, began, by_distance=None):
    """Softmax attention of every step to itself and the M rows before it, within its episode.

    Args:
      queries: (T, B, heads, d), scaled.
      keys: (M + T, B, heads, d), memory first.
      values: (M + T, B, heads, e).
      began: (T, B), the `start_times`.
      by_distance: optional (T, B, heads, M + 1), added to the scores; [..., i] meets the row M - i steps before.

    Returns:
      (T, B, heads, e).
    """
    steps, length = len(queries), len(keys) - len(queries)
    size = max(length, MIN_CHUNK)
    if steps <= size:
        return _attend(queries, keys, values, began, by_distance)
    num_chunks = -(-steps // size)
    padding = num_chunks * size - steps

    def pad(rows):  # padded keys lie in every real step's future
        return jnp.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1))

    def chunks(rows):
        return rows.reshape(num_chunks, size, *rows.shape[1:])

    def windows(rows):
        rows = pad(rows)
        return jnp.concatenate([chunks(rows[: num_chunks * size])[:, :length], chunks(rows[length:])], axis=1)

    began = chunks(pad(began)) - size * jnp.arange(num_chunks)[:, None, None]
    by_distance = None if by_distance is None else chunks(pad(by_distance))
    inputs = chunks(pad(queries)), windows(keys), windows(values), began, by_distance
    ys = jax.lax.map(lambda chunk: jax.checkpoint(_attend)(*chunk), inputs)
    return ys.reshape(-1, *ys.shape[2:])[:steps]


def _attend(queries, keys, values, began, by_distance):
    """`band_attention` for a short sequence, by scores of all queries with all keys."""
    steps, length = len(queries), len(keys) - len(queries)
    # 0 * nan is nan: a broken row is taken out of the sums and put into the scores, which only steps that see it keep.
    intact = jnp.isfinite(keys).all(axis=-1) & jnp.isfinite(values).all(axis=-1)  # (M + T, B, heads)
    keys, values = (jnp.where(intact[..., None], rows, 0.0) for rows in (keys, values))

    scores = jnp.einsum("tbhd,sbhd->bhts", queries, keys)
    if by_distance is not None:
        scores += skew(jnp.moveaxis(by_distance, 0, 2), len(keys))
    scores = jnp.where(jnp.moveaxis(intact, 0, 2)[:, :, None], scores, jnp.nan)

    time, key_time = jnp.arange(steps)[:, None], jnp.arange(-length, steps)
    in_band = (key_time <= time) & (key_time >= time - length)
    in_episode = key_time >= began.T[:, :, None]
    visible = in_band & in_episode  # (B, T, M + T), at least the step itself
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
    return jnp.einsum("bhts,sbhe->tbhe", weights, values)


def skew(x, width):
    """x (..., T, M + 1) moved right by t in row t, into (..., T, width): what was by distance is by key's time."""
    *batch, steps, length = x.shape
    x = jnp.pad(x, [(0, 0)] * (len(batch) + 1) + [(0, width + 1 - length)])
    flat = x.reshape(*batch, steps * (width + 1))
    return flat[..., : steps * width].reshape(*batch, steps, width)
