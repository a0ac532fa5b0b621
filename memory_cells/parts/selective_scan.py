"""The recurrence of Mamba's S6: a diagonal state space whose parameters depend on the input.

For channel i with N states n:

    h'_ni = exp(dt_i A_ni) h_ni + v_i B_n,   y_i = sum_n C_n h'_ni

All states of a sequence, T B N I numbers, would need too much memory. So a sequence is computed in
chunks, and the gradient recomputes the states of a chunk from its first. There are two ways to
compute a chunk:

    scan      a loop over time that computes decay, state and output of a step together, with a
              gradient written by hand that does the same backwards: several times faster on a CPU
    parallel  an associative scan (see `linear_scan.py`)

The gradient, with d_t that of y_t and a_t = exp(dt_t A): the gradient of h_t is
g_t = C_t d_t + a_(t+1) g_(t+1), and

    dv_i = sum_n g B,   dB_n = sum_i g v,   dC_n = sum_i h d
    d(dt)_i = sum_n g a h_(t-1) A,   dA = g a h_(t-1) dt
"""

import jax
import jax.numpy as jnp

from memory_cells.parts.carry import reset
from memory_cells.parts.linear_scan import linear_scan


def selective_scan(A, h, inputs, chunk_size, impl="auto"):
    """Outputs of the recurrence, with resets to zero.

    Args:
      A: (N, I), negative.
      h: the state before the first step (B, N, I).
      inputs: the tuple (dt, v, B, C, starts): dt and v (T, B, I), B and C (T, B, N),
        starts (T, B) bool; where True, the state before step t is zero.
      chunk_size: the number of steps whose states are in memory together.
      impl: "scan", "parallel", or "auto": the loop on a CPU, the parallel form elsewhere.

    Returns:
      The state after the last step, and ys (T, B, I).
    """
    if impl == "auto":
        impl = "scan" if jax.default_backend() == "cpu" else "parallel"
    steps = len(inputs[0])
    if steps == 1:  # acting: skip the overhead of a loop
        h, y = _step(A, h, [x[0] for x in inputs])
        return h, y[None]
    chunk = _loop if impl == "scan" else jax.checkpoint(_parallel)
    if steps <= chunk_size:
        return chunk(A, h, inputs)

    def split(x):
        # Padding with zeros leaves the state as it is: no start, and a time step of 0.
        x = jnp.pad(x, [(0, -steps % chunk_size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk_size, *x.shape[1:])

    chunks = jax.tree.map(split, inputs)
    h, ys = jax.lax.scan(lambda h, inputs: chunk(A, h, inputs), h, chunks)
    return h, ys.reshape(-1, *ys.shape[2:])[:steps]


def _parallel(A, h, inputs):
    dt, v, write, read, starts = inputs
    decay = jnp.exp(dt[:, :, None] * A)
    hs = linear_scan(decay, v[:, :, None] * write[..., None], h, starts, 0.0, "parallel")
    return hs[-1], jnp.einsum("tbni,tbn->tbi", hs, read)


def _advance(A, h, inputs):
    """The decayed state before a step's input is added, and the new state, (B, N, I) each."""
    dt, v, write, _, start = inputs
    decay = jnp.exp(dt[:, None] * A)
    kept = decay * reset(h, jnp.zeros_like(h), start)
    return kept, kept + v[:, None] * write[..., None]


def _step(A, h, inputs):
    *_, read, _ = inputs
    _, h = _advance(A, h, inputs)
    return h, (h * read[..., None]).sum(axis=1)


@jax.custom_vjp
def _loop(A, h, inputs):
    return jax.lax.scan(lambda h, inputs: _step(A, h, inputs), h, inputs)


def _loop_forward(A, h, inputs):
    return _loop(A, h, inputs), (A, h, inputs)


def _loop_backward(residuals, cotangents):
    A, h, inputs = residuals
    d_h, d_ys = cotangents

    def forward(h, inputs):
        kept, h = _advance(A, h, inputs)
        return h, kept

    def backward(carry, x):
        g, d_A = carry
        kept, (dt, v, write, read, start), d_y = x
        h = kept + v[:, None] * write[..., None]
        g = g + d_y[:, None] * read[..., None]
        g_kept = g * kept
        d_dt = (g_kept * A).sum(axis=1)
        d_v = (g * write[..., None]).sum(axis=1)
        d_write = jnp.einsum("bni,bi->bn", g, v)
        d_read = jnp.einsum("bni,bi->bn", h, d_y)
        g_before = reset(jnp.exp(dt[:, None] * A) * g, jnp.zeros_like(g), start)
        return (g_before, d_A + g_kept * dt[:, None]), (d_dt, d_v, d_write, d_read)

    _, all_kept = jax.lax.scan(forward, h, inputs)
    zeros = jnp.zeros_like(h)
    steps = (all_kept, inputs, d_ys)
    (d_h, d_A), d_inputs = jax.lax.scan(backward, (d_h, zeros), steps, reverse=True)
    return d_A.sum(axis=0), d_h, (*d_inputs, None)


_loop.defvjp(_loop_forward, _loop_backward)
