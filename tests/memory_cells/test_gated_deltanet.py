"""Gated DeltaNet: the layer equals the paper in float64, with its initial decays.

`parts/test_chunkwise.py` compares the rule with other implementations.
"""

import jax
import numpy as np
import pytest
from memory_helpers import (
    H,
    delta_inputs,
    delta_rule,
    dense,
    fresh_parameters,
    perturbed,
    rms_norm,
    run_float64,
    sigmoid,
    silu,
)

from memory_cells import make_cell


def gated_deltanet_reference(p, xs, starts):
    """2412.06464, sections 3.1 and 3.4, with the decay of Mamba-2; of two heads."""
    beta = sigmoid(dense(p["beta"], xs))
    time_step = np.log1p(np.exp(dense(p["alpha"], xs)))
    decay = np.exp(-np.exp(p["log_A"]) * time_step)
    reads = delta_rule(*delta_inputs(p, xs, starts, 2), beta, decay, starts)
    reads = rms_norm(p["norm"], reads, 1e-5).reshape(xs.shape[:2] + (H,))
    return dense(p["output"], reads * silu(dense(p["gate"], xs)))


def test_gated_deltanet_equals_the_paper():
    cell = make_cell("gated_deltanet", H, num_heads=2)
    params, xs, starts = perturbed(cell, 5)
    params["log_A"] -= 2.0  # so that memories last for some steps
    expected = gated_deltanet_reference(params, xs, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-9)


def test_gates_start_as_the_authors_do():
    params = fresh_parameters(make_cell("gated_deltanet", 8), 8)
    assert (params["log_A"] > np.log(0.01)).all() and (params["log_A"] < np.log(16)).all()
    steps = jax.nn.softplus(params["alpha"]["bias"])
    assert (steps > 0.99e-3).all() and (steps < 1.01e-1).all()


def test_gated_deltanet_refuses():
    with pytest.raises(ValueError, match="gated_deltanet needs beta_scale to be 1 or 2, got 3"):
        make_cell("gated_deltanet", 8, beta_scale=3)
