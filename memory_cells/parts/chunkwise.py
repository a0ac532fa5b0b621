"""Matrix memories over whole sequences: a loop over chunks of steps, with matrix products inside each chunk.

Per head, with keys k, queries q (dk,), values v (dv,), a memory S (dk, dv) and a decay a = exp(log_decay) in (0, 1]:

    linear_memory   S' = a S + k v^T
    delta_memory    S' = a S + beta k (v - a S^T k)^T          first erases what is stored under k
    gated_memory    S' = f S + i k [v, 1]^T                    f, i divided by exp(m), a running maximum
    all read        y  = S'^T q

A loop over T steps is short of arithmetic and, differentiated, keeps T memories. Within a chunk of C steps all reads
are masked matrix products instead (Yang et al. 2024, arXiv 2312.06635 section 4 and, for the delta rule, 2406.06484
section 3): with w_ts = a_(s+1) ... a_t for s <= t and S the memory before the chunk,

    y_t = sum_(s <= t) w_ts (q_t . k_s) v_s  +  w_t0 S^T q_t

Resets are exact: w_ts is 0 where an episode starts after s and not after t, decays are summed within episodes only, and
terms of the old memory are selected, not multiplied away. Gradients keep T / C memories; all else in a chunk is
computed a second time. A single step (acting) does without chunks.
Cost per step and head: 2 dk dv multiply-adds stepwise, about 2 dk dv + C (2 dk + dv) in chunks.
"""

from functools import partial, wraps

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memory_cells.parts.carry import reset

CHUNK = 32  # steps at most; measured on CPU with 16 environments, where 16 and 64 are slower
GATED_CHUNK = 64  # measured likewise, where 16 and 32 are slower
CACHED = 2**18  # inputs for which all that a layer computes stays in the processor's cache, more or less


def linear_memory(state, q, k, v, log_decay, starts, impl="auto"):
    """S' = a S + k v^T, y = S'^T q, with resets to zero.

    Args:
      state: S (B, heads, dk, dv) before the first step.
      q: queries (T, B, heads, dk); k: keys, likewise; v: values (T, B, heads, dv).
      log_decay: log a (T, B, heads), or None for a = 1.
      starts: (T, B) bool, the memory is set to zero before step t.
      impl: "scan" steps; "parallel" and "auto" go in chunks: on CPU 2 to 6 times faster, gradient included.

    Returns:
      S after the last step, and ys (T, B, heads, dv).
    """
    return _run(_linear_step, _linear_chunk, state, (q, k, v, log_decay), starts, impl, CHUNK)


def delta_memory(state, q, k, v, beta, log_decay, starts, impl="auto"):
    """S' = a S + beta k (v - a S^T k)^T, y = S'^T q; as `linear_memory`, with write strengths beta (T, B, heads)."""
    return _run(_delta_step, _delta_chunk, state, (q, k, v, beta, log_decay), starts, impl, CHUNK)


def gated_memory(carry, q, k, v, log_f, log_i, starts, impl="auto"):
    """S' = f S + i k [v, 1]^T, y = S'^T q / max(|n . q|, 1) with n the last column of S', stable for any log_i.

    Args:
      carry: S / exp(m) (B, heads, dk, dv + 1), and m (B, heads).
      log_f: (T, B, heads), at most 0; log_i: likewise, any finite size. The others as in `linear_memory`.

    Returns:
      The carry after the last step, and ys (T, B, heads, dv).
    """
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    return _run(_gated_step, _gated_chunk, carry, (q, k, v, log_f, log_i), starts, impl, GATED_CHUNK)


def in_pieces(sequence, length=CHUNK):
    """Let the method `sequence` of a cell go through many inputs piece by piece: on CPU, for impl = "auto".

    What a layer computes for a piece stays in the processor's cache. The gradient keeps the carries between pieces and
    computes all else a second time, still faster than to fetch it from memory, where it is not in the cache anyway. A
    piece is one chunk of the cell's memory: of several, each computed twice by itself, everything would be computed
    three times.
    """

    def piece(cell, carry, inputs):
        return sequence(cell, carry, *inputs)

    @wraps(sequence)
    def run(cell, carry, xs, starts):
        if cell.impl != "auto" or jax.default_backend() != "cpu" or len(xs) <= length or xs.size <= CACHED:
            return sequence(cell, carry, xs, starts)
        pieces, rest = split_steps((xs, starts), length)
        scan = nn.scan(nn.remat(piece, prevent_cse=False), variable_broadcast="params", split_rngs={"params": False})
        carry, ys = scan(cell, carry, pieces)
        ys = ys.reshape(-1, *ys.shape[2:])
        if rest is not None:
            carry, rest_ys = sequence(cell, carry, *rest)
            ys = jnp.concatenate([ys, rest_ys])
        return carry, ys

    return run


@partial(
    jax.jit, static_argnames=("step", "chunk", "impl", "length")
)  # for callers outside jit: one program, not fifty
def _run(step, chunk, carry, inputs, starts, impl, length):
    """Through the sequence in single steps or in chunks.

    step: (carry, inputs of one step (B, heads, ...)) -> carry, y.
    chunk: (carry, inputs (B, heads, C, ...), starts (B, C)) -> carry, ys (B, heads, C, dv), C at most `length`.
    """

    def one(carry, x):
        inputs, start = x
        return step(reset(carry, jax.tree.map(jnp.zeros_like, carry), start), *inputs)

    def many(carry, x):
        inputs, starts = x
        carry = reset(carry, jax.tree.map(jnp.zeros_like, carry), starts[0])  # keeps nan out of the gradient, too
        q, *stored = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), inputs)
        # 0 * nan is nan: a broken step leaves the products, and breaks what sees it afterwards.
        broken = ~jnp.isfinite(sum(a.sum(axis=range(3, a.ndim)) for a in jax.tree.leaves(stored)))
        stored = jax.tree.map(lambda a: jnp.where(_expand(broken, a), 0.0, a), stored)
        carry, ys = chunk(carry, q, *stored, starts.T)
        spoilt = (_segments(starts.T)[0][:, None] & broken[:, :, None]).any(axis=-1)  # (B, heads, C)
        carry = jax.tree.map(lambda a: jnp.where(_expand(spoilt[..., -1], a), jnp.nan, a), carry)
        return carry, jnp.moveaxis(jnp.where(_expand(spoilt, ys), jnp.nan, ys), 2, 0)

    xs, steps = (inputs, starts), len(starts)
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
    """Leaves (T, ...) -> n chunks of at most `length` steps (n, T // n, ...), and the fewer than n steps left over."""
    steps = len(jax.tree.leaves(tree)[0])
    num_chunks = -(-steps // length)
    whole = steps - steps % num_chunks
    chunks = jax.tree.map(lambda a: a[:whole].reshape(num_chunks, -1, *a.shape[1:]), tree)
    return chunks, jax.tree.map(lambda a: a[whole:], tree) if whole < steps else None


def _expand(mask, like):
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _linear_step(state, q, k, v, log_decay):
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    state = state + k[..., :, None] * v[..., None, :]
    return state, _read(state, q)


def _linear_chunk(state, q, k, v, log_decay, starts):
    sees, old = _segments(starts)
    return _attend(state, q, k, v, *_weights(log_decay, sees, q.dtype), old)


def _delta_step(state, q, k, v, beta, log_decay):
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    error = v - _read(state, k)
    state = state + (beta[..., None] * k)[..., :, None] * error[..., None, :]
    return state, _read(state, q)


def _delta_chunk(state, q, k, v, beta, log_decay, starts):
    """The rows u_t that the chunk adds to the memory, S' = decayed S + sum k_t u_t^T, solve a triangular system:

    u_t = beta_t (v_t - w_t0 S^T k_t - sum_(s < t) w_ts (k_t . k_s) u_s)
    """
    sees, old = _segments(starts)
    weights, since = _weights(log_decay, sees, q.dtype)
    strictly_lower = np.tri(q.shape[2], k=-1, dtype=bool)
    overlaps = jnp.where(strictly_lower, beta[..., None] * weights * (k @ _transpose(k)), 0.0)
    solve = unit_lower_inverse(overlaps) * beta[..., None, :]
    stored = jnp.where(old, since * (k @ state), 0.0)
    # What is broken stays out of the product, which has zeros for it where an episode started since.
    stored = jnp.where(jnp.isfinite(stored).all(axis=-2, keepdims=True), stored, 0.0)
    return _attend(state, q, k, solve @ (v - stored), weights, since, old)


def _gated_step(carry, q, k, v, log_f, log_i):
    state, m = carry
    log_old = log_f + m
    # y does not depend on m (it cancels), so neither need its gradient.
    m = jax.lax.stop_gradient(jnp.maximum(log_old, log_i))
    f, i = jnp.exp(log_old - m), jnp.exp(log_i - m)
    state = f[..., None, None] * state + (i[..., None] * k)[..., :, None] * v[..., None, :]
    return (state, m), _normalise(_read(state, q), m)


def _gated_chunk(carry, q, k, v, log_f, log_i, starts):
    state, m = carry
    sees, old = _segments(starts)
    total = _sum_within(sees, log_f)
    log_weights = total[..., :, None] - total[..., None, :] + log_i[..., None, :]
    log_weights = jnp.where(sees[:, None], log_weights, -jnp.inf)
    log_since = total + jnp.where(old[..., 0], m[..., None], 0.0)
    m = jax.lax.stop_gradient(jnp.maximum(log_weights.max(axis=-1), log_since))
    weights, since = jnp.exp(log_weights - m[..., None]), jnp.exp(log_since - m)[..., None]
    state, ys = _attend(state, q, k, v, weights, since, old)
    return (state, m[..., -1]), _normalise(ys, m)


def _segments(starts):
    """starts (B, C) -> sees (B, C, C): step t may see step s; old (B, 1, C, 1): the carried episode still runs at t."""
    episode = jnp.cumsum(starts, axis=1)
    sees = (episode[:, :, None] == episode[:, None, :]) & np.tri(starts.shape[1], dtype=bool)
    return sees, (episode == 0)[:, None, :, None]


def _sum_within(sees, x):
    """Sums of x (B, heads, C) up to each step, over its episode only: a plain cumsum leaks round-off across resets."""
    return jnp.einsum("bts,bhs->bht", sees.astype(x.dtype), x)


def _weights(log_decay, sees, dtype):
    """Decay between two steps, w_ts (B, heads, C, C), and since the carried memory, w_t0 (B, heads, C, 1)."""
    if log_decay is None:
        return sees[:, None].astype(dtype), jnp.ones((1, 1, sees.shape[1], 1), dtype)
    total = _sum_within(sees, log_decay)
    # Masked before the exponential: above the diagonal the differences are positive and could overflow.
    between = jnp.where(sees[:, None], total[..., :, None] - total[..., None, :], -jnp.inf)
    return jnp.exp(between), jnp.exp(total)[..., None]


def _attend(state, q, k, v, weights, since, old):
    """Reads of all steps of a chunk, and the memory after it; `weights`, `since` and `old` as made above."""
    ys = (weights * (q @ _transpose(k))) @ v + jnp.where(old, since * (q @ state), 0.0)
    kept = jnp.where(old[..., -1:, :], since[..., -1:, :] * state, 0.0)
    return kept + _transpose(weights[..., -1, :, None] * k) @ v, ys


def _normalise(ys, m):
    """Divide by the last column, but never by less than 1, in units of exp(m)."""
    return ys[..., :-1] / (jnp.maximum(jnp.abs(ys[..., -1]), jnp.exp(-m)) + 1e-6)[..., None]


def _read(state, q):
    return jnp.einsum("bhkv,bhk->bhv", state, q)


def _transpose(a):
    return jnp.swapaxes(a, -1, -2)


@jax.custom_jvp
def unit_lower_inverse(a):
    """(I + a)^-1 for strictly lower triangular a (..., C, C), with matrix products only.

    With X and Y the inverses of the two diagonal halves, the corner below the diagonal is -Y a X. As stable as forward
    substitution, which the product of all I + (-a)^(2^j) is not.
    """
    size = a.shape[-1]
    if size % 2 or size <= 8:
        return _inverse_by_masks(a)
    half, matrices = size // 2, a.reshape(-1, size, size)  # XLA's compiler fails at products with an axis for each half
    halves = jnp.concatenate([matrices[:, :half, :half], matrices[:, half:, half:]])
    x, y = jnp.split(unit_lower_inverse(halves), 2)
    corner = -y @ matrices[:, half:, :half] @ x
    upper, lower = jnp.concatenate([x, jnp.zeros_like(x)], axis=2), jnp.concatenate([corner, y], axis=2)
    return jnp.concatenate([upper, lower], axis=1).reshape(a.shape)


@unit_lower_inverse.defjvp
def _(primals, tangents):
    inverse = unit_lower_inverse(*primals)
    return inverse, -inverse @ tangents[0] @ inverse


def _inverse_by_masks(a):
    """The same from the diagonal outwards, all blocks of a size at once: fewer operations, more arithmetic."""

    def corners(size):
        block = np.arange(a.shape[-1]) // size
        return jnp.where((block[:, None] == block + 1) & (block % 2 == 0), a, 0.0)

    inverse, size = jnp.eye(a.shape[-1], dtype=a.dtype) - corners(1), 2
    while size < a.shape[-1]:
        inverse = inverse - inverse @ corners(size) @ inverse
        size *= 2
    return inverse
