"""minGRU: equal to another implementation, and with its convolution to the paper in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import (
    ORACLES,
    H,
    dense,
    perturbed,
    recur,
    run_float64,
    sequence,
    short_conv,
    sigmoid,
    silu,
    time_major,
)

from memory_cells import make_cell


def test_mingru_equals_another_implementation():
    """PyPI minGRU-pytorch 0.2.1, minGRU(6): candidate and gate from one matrix."""
    z = np.load(ORACLES / "mingru.npz")
    w_n, w_z = np.split(z["mg_w"], 2)
    params = {"params": {"input_n": {"kernel": w_n.T}, "input_z": {"kernel": w_z.T}}}
    cell = make_cell("mingru", 6, conv_width=0)
    xs = time_major(z["mg_x"])
    for impl in ("scan", "parallel"):
        carry = z["mg_h0"][:, 0], ()
        starts = jnp.zeros(xs.shape[:2], bool)
        _, ys = sequence(cell.clone(impl=impl), params, carry, xs, starts)
        np.testing.assert_allclose(time_major(ys), z["mg_y"], atol=2e-6)


def test_mingru_behind_its_convolution_equals_the_paper():
    cell = make_cell("mingru", H)
    params, xs, starts = perturbed(cell, 5)
    us = silu(short_conv(params["conv"], xs, starts))
    z = sigmoid(dense(params["input_z"], us))
    n = dense(params["input_n"], us)
    n = np.where(n >= 0, n + 0.5, sigmoid(n))
    expected = recur(1 - z, z * n, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"conv_width": 1}, "mingru needs conv_width to be 0 or at least 2, got 1")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("mingru", H, **options)
