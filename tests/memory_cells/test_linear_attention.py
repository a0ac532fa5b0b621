"""Linear attention: equal to the paper in float64, and it reads means.

`parts/test_chunkwise.py` has its recurrence.
"""

import jax.numpy as jnp
import numpy as np
from memory_helpers import (
    H,
    dense,
    initialised,
    perturbed,
    run,
    run_float64,
    short_conv,
    silu,
    split_heads,
)

from memory_cells import make_cell


def linear_attention_reference(p, xs, starts):
    """2006.16236, equation 9, a sum over all earlier steps; behind a convolution, of two heads."""
    us = silu(short_conv(p["conv"], xs, starts))
    q, k, v = (split_heads(x, 2) for x in np.split(dense(p["qkv"], us), 3, axis=-1))
    q, k = (np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1 for x in (q, k))
    ys = np.zeros_like(v)
    for t, b, head in np.ndindex(*v.shape[:3]):
        first = max([s for s in range(t + 1) if starts[s, b]], default=0)
        weights = k[first : t + 1, b, head] @ q[t, b, head]
        ys[t, b, head] = weights @ v[first : t + 1, b, head] / (weights.sum() + 1e-6)
    return dense(p["output"], ys.reshape(xs.shape[:2] + (H,)))


def test_linear_attention_equals_the_paper():
    cell = make_cell("linear_attention", H, num_heads=2)
    params, xs, starts = perturbed(cell, 5)
    expected = linear_attention_reference(params, xs, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-9)


def test_linear_attention_reads_means():
    """The same input at every step gives the same output, however long the episode."""
    cell, params, _, xs = initialised("linear_attention", conv_width=0)
    _, ys = run(cell, params, jnp.broadcast_to(xs[0], (200, 2, 8)))
    np.testing.assert_allclose(ys, jnp.broadcast_to(ys[0], ys.shape), atol=1e-5)
