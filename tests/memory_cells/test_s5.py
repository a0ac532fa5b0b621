"""S5: equal to the paper in float64, initialised as HiPPO, stable."""

import numpy as np
import pytest
from memory_helpers import (
    H,
    dense,
    gelu,
    layer_norm,
    perturbed,
    recur,
    run_float64,
    sigmoid,
)

from memory_cells import make_cell, s5


def s5_reference(p, xs, starts):
    us = layer_norm(p["normalise"], dense(p["embed"], xs), 1e-6)
    continuous = np.minimum(p["lambda_re"], -1e-4) + 1j * p["lambda_im"]
    decay = np.exp(continuous * np.exp(p["log_dt"]))
    inputs = (decay - 1) / continuous * (us @ (p["B"][0] + 1j * p["B"][1]))
    hs = recur(decay, inputs, starts)
    v = gelu(2 * (hs @ (p["C"][0] + 1j * p["C"][1])).real + p["d"] * us)
    return dense(p["output"]["value"], v) * sigmoid(dense(p["output"]["gate"], v))


def test_s5_equals_the_paper():
    cell = make_cell("s5", H, state_size=12, num_blocks=2)
    params, xs, starts = perturbed(cell, 5)
    expected = s5_reference(params, xs, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-10)


def test_s5_starts_as_hippo():
    """One state of each conjugate pair reproduces the normal part of HiPPO-LegS, a real system."""
    size = 8
    n = np.arange(size)
    hippo = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    normal = hippo + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5))
    eigenvalues, vectors = s5.hippo(size)
    np.testing.assert_allclose(normal @ vectors, vectors * eigenvalues, atol=1e-12)
    np.testing.assert_allclose(
        2 * (vectors * eigenvalues @ vectors.conj().T).real, normal, atol=1e-12
    )


def test_s5_stays_stable_whatever_its_parameters():
    cell = make_cell("s5", H)
    params, _, _ = perturbed(cell, H)
    params["lambda_re"] = np.full_like(params["lambda_re"], 0.5)
    xs = np.ones((3000, 1, H))
    starts = np.zeros((3000, 1), bool)
    assert np.abs(run_float64(cell, params, xs, starts)).max() < 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 10, "num_blocks": 2}, "multiple of 2 num_blocks, got 10 and 2"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max, got 0.0 and 1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("s5", H, **options)
