"""The recurrence of Mamba's S6: a diagonal state space whose decay, input and output all depend on the input.

Per channel i with N states n:   h'_ni = exp(dt_i A_ni) h_ni + v_i B_n,   y_i = sum_n C_n h'_ni

T B N I states are too many to keep: sequences go in chunks, and the gradient recomputes the states of a chunk from its
first. Two ways through a chunk:

    scan      a loop over time that makes decays, states and outputs of a step in one go, and a gradient written by
              hand that does the same backward: on CPU several times faster
    parallel  an associative scan (see `linear_scan.py`)

The gradient, with d_t that of y_t: g_t = C_t d_t + a_(t+1) g_(t+1) is that of h_t, a_t = exp(dt_t A) and

    dv_i = sum_n g B,   dB_n = sum_i g v,   dC_n = sum_i h d,   d(dt)_i = sum_n g a h_(t-1) A,   dA = g a h_(t-1) dt
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
      inputs: dt and v (T, B, I), B and C (T, B, N), starts (T, B) bool: the state is zero before step t.
      chunk_size: steps of which all states are in memory at once.
      impl: "scan", "parallel", or "auto": the loop on a CPU, otherwise the parallel form.

    Returns:
      The state after the last step, and ys (T, B, I).
    """
    if impl == "auto":
        impl = "scan" if jax.default_backend() == "cpu" else "parallel"
    steps = len(inputs[0])
    if steps == 1:  # acting: a loop of one step would only cost its overhead
        h, y = _step(A, h, [x[0] for x in inputs])
        return h, y[None]
    chunk = _loop if impl == "scan" else jax.checkpoint(_parallel)
    if steps <= chunk_size:
        return chunk(A, h, inputs)
    # Padded with zeros: no start, and a time step of 0 leaves the state as it is.
    pad = lambda a: jnp.pad(a, [(0, -steps % chunk_size)] + [(0, 0)] * (a.ndim - 1))  # noqa: E731
    chunks = jax.tree.map(lambda a: pad(a).reshape(-1, chunk_size, *a.shape[1:]), inputs)
    h, ys = jax.lax.scan(lambda h, inputs: chunk(A, h, inputs), h, chunks)
    return h, ys.reshape(-1, *ys.shape[2:])[:steps]


def _parallel(A, h, inputs):
    dt, v, write, read, starts = inputs
    decay = jnp.exp(dt[:, :, None] * A)
    hs = linear_scan(decay, v[:, :, None] * write[..., None], h, starts, 0.0, "parallel")
    return hs[-1], jnp.einsum("tbni,tbn->tbi", hs, read)


def _advance(A, h, inputs):
    """The decay of a step, what is left of the state, and the new state, (B, N, I) each."""
    dt, v, write, _, start = inputs
    decay = jnp.exp(dt[:, None] * A)
    left = decay * reset(h, jnp.zeros_like(h), start)
    return decay, left, left + v[:, None] * write[..., None]


def _step(A, h, inputs):
    *_, h = _advance(A, h, inputs)
    return h, (h * inputs[3][..., None]).sum(axis=1)


@jax.custom_vjp
def _loop(A, h, inputs):
    return jax.lax.scan(lambda h, inputs: _step(A, h, inputs), h, inputs)


def _loop_backward(residuals, cotangents):
    A, h, inputs = residuals
    d_h, d_ys = cotangents

    def forward(h, inputs):
        _, left, h = _advance(A, h, inputs)
        return h, left

    def backward(carry, x):
        g, d_A = carry
        left, (dt, v, write, read, start), d_y = x
        h = left + v[:, None] * write[..., None]
        g = g + d_y[:, None] * read[..., None]
        g_left = g * left
        d_dt, d_v = (g_left * A).sum(axis=1), (g * write[..., None]).sum(axis=1)
        d_write, d_read = jnp.einsum("bni,bi->bn", g, v), jnp.einsum("bni,bi->bn", h, d_y)
        g_before = reset(jnp.exp(dt[:, None] * A) * g, jnp.zeros_like(g), start)
        return (g_before, d_A + g_left * dt[:, None]), (d_dt, d_v, d_write, d_read)

    _, lefts = jax.lax.scan(forward, h, inputs)
    (d_h, d_A), d_inputs = jax.lax.scan(backward, (d_h, jnp.zeros_like(h)), (lefts, inputs, d_ys), reverse=True)
    return d_A.sum(axis=0), d_h, (*d_inputs, None)


_loop.defvjp(lambda A, h, inputs: (_loop(A, h, inputs), (A, h, inputs)), _loop_backward)
