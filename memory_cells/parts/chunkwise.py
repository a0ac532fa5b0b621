"""Matrix memories over whole sequences: a loop over chunks, with matrix products inside each chunk.

Per head, with keys k and queries q (dk,), values v (dv,), a memory S (dk, dv) and a decay
a = exp(log_decay) in (0, 1]:

    linear_memory   S' = a S + k v^T
    delta_memory    S' = a S + beta k (v - a S^T k)^T    first erases what is stored under k
    gated_memory    S' = f S + i k [v, 1]^T              f, i divided by exp(m), a running maximum
    all read        y  = S'^T q

A loop over T steps does little arithmetic per step, and its gradient stores T memories. Within a
chunk of C steps, all reads are masked matrix products instead (Yang et al. 2024, arXiv 2312.06635,
section 4; for the delta rule arXiv 2406.06484, section 3). With w_ts = a_(s+1) ... a_t for s <= t,
w_t0 the decay from the chunk's start to t, and S the memory before the chunk:

    y_t = sum_(s <= t) w_ts (q_t . k_s) v_s  +  w_t0 S^T q_t

Resets are exact: w_ts is 0 if an episode starts after s and at or before t, decays are summed
within episodes only, and terms of the old memory are selected instead of multiplied by 0. The
gradient stores T / C memories and recomputes everything else in a chunk. A single step, for acting,
does not use chunks.

Cost per step and head: 2 dk dv multiply-adds step by step, about 2 dk dv + C (2 dk + dv) in chunks.
"""

from functools import partial, wraps

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memory_cells.parts.carry import reset

# Steps per chunk, at most. On a CPU with 16 environments, half and twice as many are slower.
CHUNK = 32
GATED_CHUNK = 64

# The size of xs up to which the values that a layer computes roughly fit into a CPU's cache.
CACHED = 2**18


def linear_memory(state, q, k, v, log_decay, starts, impl="auto"):
    """S' = a S + k v^T, y = S'^T q, with resets to zero.

    Args:
      state: S (B, heads, dk, dv) before the first step.
      q: queries (T, B, heads, dk).
      k: keys (T, B, heads, dk).
      v: values (T, B, heads, dv).
      log_decay: log a (T, B, heads), or None for a = 1.
      starts: (T, B) bool; where True, the memory before step t is zero.
      impl: "scan" goes step by step; "parallel" and "auto" go in chunks, which is 2 to 6 times
        faster on a CPU, gradient included.

    Returns:
      S after the last step, and ys (T, B, heads, dv).
    """
    inputs = (q, k, v, log_decay)
    return _run(_linear_step, _linear_chunk, state, inputs, starts, impl, CHUNK)


def delta_memory(state, q, k, v, beta, log_decay, starts, impl="auto"):
    """S' = a S + beta k (v - a S^T k)^T, y = S'^T q, with resets to zero.

    Args:
      beta: write strengths (T, B, heads). The others are those of `linear_memory`.

    Returns:
      S after the last step, and ys (T, B, heads, dv).
    """
    inputs = (q, k, v, beta, log_decay)
    return _run(_delta_step, _delta_chunk, state, inputs, starts, impl, CHUNK)


def gated_memory(carry, q, k, v, log_f, log_i, starts, impl="auto"):
    """S' = f S + i k [v, 1]^T, y = S'^T q / max(|n . q|, 1), with n the last column of S'.

    Numerically stable for any log_i.

    Args:
      carry: S / exp(m) (B, heads, dk, dv + 1), and m (B, heads).
      log_f: (T, B, heads), at most 0.
      log_i: (T, B, heads), any finite number. The others are those of `linear_memory`.

    Returns:
      The carry after the last step, and ys (T, B, heads, dv).
    """
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    inputs = (q, k, v, log_f, log_i)
    return _run(_gated_step, _gated_chunk, carry, inputs, starts, impl, GATED_CHUNK)


def in_pieces(sequence, length=CHUNK):
    """Decorate a cell's `sequence` to read large inputs piece by piece, if impl = "auto" on a CPU.

    The values that a layer computes for one piece stay in the processor's cache. The gradient
    stores the carries between pieces and recomputes the rest, which is faster than fetching it from
    main memory. A piece is one chunk of the cell's memory. With several chunks per piece, the
    gradient would recompute everything twice: once for the piece and once for each chunk.
    """

    def piece(cell, carry, inputs):
        return sequence(cell, carry, *inputs)

    @wraps(sequence)
    def run(cell, carry, xs, starts):
        is_small = len(xs) <= length or xs.size <= CACHED
        if cell.impl != "auto" or jax.default_backend() != "cpu" or is_small:
            return sequence(cell, carry, xs, starts)
        pieces, rest = split_steps((xs, starts), length)
        scan = nn.scan(
            nn.remat(piece, prevent_cse=False),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        carry, ys = scan(cell, carry, pieces)
        ys = ys.reshape(-1, *ys.shape[2:])
        if rest is not None:
            carry, rest_ys = sequence(cell, carry, *rest)
            ys = jnp.concatenate([ys, rest_ys])
        return carry, ys

    return run


# Compiled also for callers outside of jit: they run one program instead of fifty.
@partial(jax.jit, static_argnames=("step", "chunk", "impl", "length"))
def _run(step, chunk, carry, inputs, starts, impl, length):
    """Compute a sequence step by step or in chunks.

    Args:
      step: (carry, *inputs of one step (B, heads, ...)) -> carry, y.
      chunk: (carry, *inputs (B, heads, C, ...), starts (B, C)) -> carry, ys (B, heads, C, dv), for
        C up to `length`.
      inputs: q, then everything that the memory stores; leaves (T, B, heads, ...).
    """

    def one(carry, x):
        inputs, start = x
        return step(reset(carry, jax.tree.map(jnp.zeros_like, carry), start), *inputs)

    def many(carry, x):
        inputs, starts = x
        # The chunk does not read the old memory after a start. A nan in it would still reach the
        # gradient, so it is reset if the first step is a start.
        carry = reset(carry, jax.tree.map(jnp.zeros_like, carry), starts[0])
        q, *stored = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), inputs)
        # 0 * nan is nan. So steps that store nan or inf are taken out of the products, and the
        # steps that see them become nan afterwards.
        sums = [a.sum(axis=range(3, a.ndim)) for a in jax.tree.leaves(stored)]
        broken = ~jnp.isfinite(sum(sums))  # (B, heads, C)
        stored = jax.tree.map(lambda a: jnp.where(_expand(broken, a), 0.0, a), stored)
        carry, ys = chunk(carry, q, *stored, starts.T)
        sees, _ = _segments(starts.T)
        spoilt = (sees[:, None] & broken[:, :, None]).any(axis=-1)  # (B, heads, C)
        carry = jax.tree.map(lambda a: jnp.where(_expand(spoilt[..., -1], a), jnp.nan, a), carry)
        return carry, jnp.moveaxis(jnp.where(_expand(spoilt, ys), jnp.nan, ys), 2, 0)

    xs = (inputs, starts)
    steps = len(starts)
    if steps == 1:
        carry, y = one(carry, jax.tree.map(lambda a: a[0], xs))
        return carry, y[None]
    if impl == "scan":
        return jax.lax.scan(one, carry, xs)
    if steps <= length:
        return many(carry, xs)
    chunks, rest = split_steps(xs, length)
    carry, ys = jax.lax.scan(jax.checkpoint(many, prevent_cse=False), carry, chunks)
    ys = ys.reshape(-1, *ys.shape[2:])
    if rest is not None:
        carry, rest_ys = many(carry, rest)
        ys = jnp.concatenate([ys, rest_ys])
    return carry, ys


def split_steps(tree, length):
    """Split leaves (T, ...) into n chunks of at most `length` steps.

    Returns:
      The chunks, leaves (n, T // n, ...), and the fewer than n steps left over, or None.
    """
    steps = len(jax.tree.leaves(tree)[0])
    num_chunks = -(-steps // length)
    whole = steps - steps % num_chunks
    chunks = jax.tree.map(lambda a: a[:whole].reshape(num_chunks, -1, *a.shape[1:]), tree)
    rest = jax.tree.map(lambda a: a[whole:], tree) if whole < steps else None
    return chunks, rest


def _expand(mask, like):
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _linear_step(state, q, k, v, log_decay):
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    state = state + k[..., :, None] * v[..., None, :]
    return state, _read(state, q)


def _linear_chunk(state, q, k, v, log_decay, starts):
    sees, old = _segments(starts)
    weights, since = _weights(log_decay, sees, q.dtype)
    return _attend(state, q, k, v, weights, since, old)


def _delta_step(state, q, k, v, beta, log_decay):
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    error = v - _read(state, k)
    state = state + (beta[..., None] * k)[..., :, None] * error[..., None, :]
    return state, _read(state, q)


def _delta_chunk(state, q, k, v, beta, log_decay, starts):
    """A linear chunk that stores u_t instead of v_t.

    u_t = beta_t (v_t - w_t0 S^T k_t - sum_(s < t) w_ts (k_t . k_s) u_s), a triangular system.
    """
    sees, old = _segments(starts)
    weights, since = _weights(log_decay, sees, q.dtype)
    strictly_lower = np.tri(q.shape[2], k=-1, dtype=bool)
    overlaps = jnp.where(strictly_lower, beta[..., None] * weights * (k @ _transpose(k)), 0.0)
    solve = unit_lower_inverse(overlaps) * beta[..., None, :]
    stored = jnp.where(old, since * (k @ state), 0.0)
    # nan or inf must stay out of the product: `solve` is 0 for steps of other episodes.
    is_finite = jnp.isfinite(stored).all(axis=-2, keepdims=True)
    stored = jnp.where(is_finite, stored, 0.0)
    return _attend(state, q, k, solve @ (v - stored), weights, since, old)


def _gated_step(carry, q, k, v, log_f, log_i):
    state, m = carry
    log_old = log_f + m
    # y does not depend on m, which cancels. So no gradient needs to flow through m.
    m = jax.lax.stop_gradient(jnp.maximum(log_old, log_i))
    f = jnp.exp(log_old - m)
    i = jnp.exp(log_i - m)
    state = f[..., None, None] * state + (i[..., None] * k)[..., :, None] * v[..., None, :]
    return (state, m), _normalise(_read(state, q), m)


def _gated_chunk(carry, q, k, v, log_f, log_i, starts):
    state, m = carry
    sees, old = _segments(starts)
    log_weights = _sums_between(log_f) + log_i[..., None, :]
    log_weights = jnp.where(sees[:, None], log_weights, -jnp.inf)
    log_since = _sum_within(sees, log_f) + jnp.where(old[..., 0], m[..., None], 0.0)
    m = jax.lax.stop_gradient(jnp.maximum(log_weights.max(axis=-1), log_since))
    weights = jnp.exp(log_weights - m[..., None])
    since = jnp.exp(log_since - m)[..., None]
    state, ys = _attend(state, q, k, v, weights, since, old)
    return (state, m[..., -1]), _normalise(ys, m)


def _segments(starts):
    """What each step of a chunk may see, from starts (B, C).

    Returns:
      sees (B, C, C): step t may see step s, which is not later and in the same episode.
      old (B, 1, C, 1): the episode of the old memory still runs at step t.
    """
    episode = jnp.cumsum(starts, axis=1)
    is_same = episode[:, :, None] == episode[:, None, :]
    sees = is_same & np.tri(starts.shape[1], dtype=bool)
    return sees, (episode == 0)[:, None, :, None]


def _sum_within(sees, x):
    """Cumulative sums of x (B, heads, C) within episodes.

    A plain cumulative sum would carry round-off from one episode to the next.
    """
    return jnp.einsum("bts,bhs->bht", sees.astype(x.dtype), x, precision="highest")


def _sums_between(x):
    """Sums of x (B, heads, C) over the steps s + 1 to t: (B, heads, C, C), 0 above the diagonal.

    Every sum is added up by itself, as a product with a triangle of ones. The difference of two
    cumulative sums would have the round-off of the larger: after a step that forgets everything,
    with a log decay of -1e5, all later ones would be wrong by 1e-2.
    """
    steps = x.shape[-1]
    terms = jnp.where(np.tri(steps, k=-1, dtype=bool), x[..., None], 0.0)
    return jnp.matmul(np.tri(steps, dtype=x.dtype), terms, precision="highest")


def _weights(log_decay, sees, dtype):
    """The decays between two steps, w_ts (B, heads, C, C), and w_t0 (B, heads, C, 1)."""
    if log_decay is None:
        return sees[:, None].astype(dtype), jnp.ones((1, 1, sees.shape[1], 1), dtype)
    weights = jnp.where(sees[:, None], jnp.exp(_sums_between(log_decay)), 0.0)
    return weights, jnp.exp(_sum_within(sees, log_decay))[..., None]


def _attend(state, q, k, v, weights, since, old):
    """The memory after a chunk and the reads of all its steps.

    `weights` is w_ts and `since` w_t0, as `_weights` returns them; `old` is that of `_segments`.
    """
    new_reads = (weights * (q @ _transpose(k))) @ v
    old_reads = jnp.where(old, since * (q @ state), 0.0)
    ys = new_reads + old_reads
    kept = jnp.where(old[..., -1:, :], since[..., -1:, :] * state, 0.0)
    return kept + _transpose(weights[..., -1, :, None] * k) @ v, ys


def _normalise(ys, m):
    """Divide by the size of the last column, at least by 1, in units of exp(m)."""
    reads = ys[..., :-1]
    divisor = jnp.maximum(jnp.abs(ys[..., -1]), jnp.exp(-m)) + 1e-6
    return reads / divisor[..., None]


def _read(state, q):
    return jnp.einsum("bhkv,bhk->bhv", state, q)


def _transpose(a):
    return jnp.swapaxes(a, -1, -2)


@jax.custom_jvp
def unit_lower_inverse(a):
    """(I + a)^-1 for strictly lower triangular a (..., C, C), by matrix products only.

    With X and Y the inverses of the two diagonal halves, the corner below the diagonal is -Y a X.
    This is as stable as forward substitution; the product of all I + (-a)^(2^j) is not.
    """
    size = a.shape[-1]
    if size % 2 or size <= 8:
        return _inverse_by_masks(a)
    half = size // 2
    # Both halves in one batch axis: XLA's compiler crashes on products with an axis for the halves.
    matrices = a.reshape(-1, size, size)
    halves = jnp.concatenate([matrices[:, :half, :half], matrices[:, half:, half:]])
    x, y = jnp.split(unit_lower_inverse(halves), 2)
    corner = -y @ matrices[:, half:, :half] @ x
    upper = jnp.concatenate([x, jnp.zeros_like(x)], axis=2)
    lower = jnp.concatenate([corner, y], axis=2)
    return jnp.concatenate([upper, lower], axis=1).reshape(a.shape)


@unit_lower_inverse.defjvp
def _(primals, tangents):
    inverse = unit_lower_inverse(*primals)
    return inverse, -inverse @ tangents[0] @ inverse


def _inverse_by_masks(a):
    """The same inverse, from blocks of 1 to larger ones, with all blocks of a size in one product.

    Fewer operations than by halves, but more arithmetic.
    """

    def corners(size):
        block = np.arange(a.shape[-1]) // size
        return jnp.where((block[:, None] == block + 1) & (block % 2 == 0), a, 0.0)

    inverse = jnp.eye(a.shape[-1], dtype=a.dtype) - corners(1)
    size = 2
    while size < a.shape[-1]:
        inverse = inverse - inverse @ corners(size) @ inverse
        size *= 2
    return inverse
