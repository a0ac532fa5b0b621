"""Retention: equal to the paper in float64, and it knows distances only."""

import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import (
    H,
    dense,
    initialised,
    layer_norm,
    perturbed,
    run,
    run_float64,
    sequence,
    short_conv,
    silu,
    split_heads,
)

from memory_cells import make_cell


def retnet_reference(p, xs, starts):
    """2307.08621, section 2, behind a convolution: a sum over all earlier steps, of two heads.

    In complex numbers, the rotation is a product with exp(i theta t).
    """
    us = silu(short_conv(p["conv"], xs, starts))
    q, k, v = (split_heads(x, 2) for x in np.split(dense(p["qkv"], us), 3, axis=-1))
    q, k = (x[..., :2] + 1j * x[..., 2:] for x in (q, k))
    theta = 10000.0 ** (-np.arange(2) / 2)
    reads = np.zeros_like(v)
    for t, b, head in np.ndindex(*v.shape[:3]):
        first = max([s for s in range(t + 1) if starts[s, b]], default=0)
        for s in range(first, t + 1):
            turned = q[t, b, head] * np.exp(1j * theta * (t - s))
            weight = (turned * k[s, b, head].conj()).sum().real / np.sqrt(4)
            reads[t, b, head] += (1 - 2.0 ** (-5 - head)) ** (t - s) * weight * v[s, b, head]
    reads = layer_norm({"scale": 1, "bias": 0}, reads, 1e-5).reshape(xs.shape[:2] + (H,))
    return dense(p["output"], silu(dense(p["gate"], us)) * reads)


def test_retnet_equals_the_papers_equations():
    cell = make_cell("retnet", H, num_heads=2)
    params, xs, starts = perturbed(cell, 5, scale=1.0)
    expected = retnet_reference(params, xs, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-9)


def test_retnet_knows_distances_only():
    """An episode that began 1000 steps ago with nothing stored is as good as a new one."""
    cell, params, (memory, count, buffer), xs = initialised("retnet")
    starts = jnp.zeros((12, 2), bool)
    old = memory, count + 1000, buffer
    (_, last, _), late = sequence(cell, params, old, xs, starts)
    _, expected = run(cell, params, xs)
    np.testing.assert_allclose(late, expected, atol=1e-4)
    assert (last == 1012).all()
    (_, last, _), _ = sequence(cell, params, old, xs, starts.at[4, 1].set(True))
    np.testing.assert_array_equal(last, [1012, 8])


def test_retnet_refuses():
    with pytest.raises(ValueError, match="hidden_size / num_heads to be even, got 12 and 4"):
        make_cell("retnet", 12)
