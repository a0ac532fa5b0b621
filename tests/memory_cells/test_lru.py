"""Linear recurrent unit: equal to the paper in float64, and initialised on its ring."""

import numpy as np
import pytest
from memory_helpers import (
    H,
    T,
    dense,
    fresh_parameters,
    gelu,
    layer_norm,
    perturbed,
    recur,
    run_float64,
    sigmoid,
)

from memory_cells import make_cell


def lru_reference(p, xs, starts):
    us = layer_norm(p["normalise"], xs, 1e-6)
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    hs = recur(decay, np.exp(p["gamma"]) * (us @ (p["B"][0] + 1j * p["B"][1])), starts)
    v = gelu((hs @ (p["C"][0] + 1j * p["C"][1])).real + p["d"] * us)
    return dense(p["output"]["value"], v) * sigmoid(dense(p["output"]["gate"], v))


def test_lru_equals_the_paper():
    cell = make_cell("lru", H, state_size=6)
    params, xs, starts = perturbed(cell, H)
    expected = lru_reference(params, xs, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-10)


def test_lru_starts_inside_its_ring():
    p = fresh_parameters(make_cell("lru", 64, r_min=0.5, r_max=0.8, max_phase=1.0), 64)
    radius = np.exp(-np.exp(p["nu"]))
    phase = np.exp(p["theta"])
    assert radius.min() >= 0.5 and radius.max() <= 0.8 and np.ptp(radius) > 0.2
    assert phase.min() > 0.0 and phase.max() <= 1.0 and np.ptp(phase) > 0.7
    np.testing.assert_allclose(np.exp(p["gamma"]), np.sqrt(1 - radius**2), rtol=1e-4)


def test_lru_impulse_response():
    """Without its nonlinear ends, the cell is a linear filter: y_t = Re(C lambda^t B x_0)."""
    cell = make_cell("lru", H, norm=False, glu=False)
    p, xs, starts = perturbed(cell, H)
    xs[1:] = 0.0
    starts[:] = False
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    b = np.exp(p["gamma"]) * (xs[0] @ (p["B"][0] + 1j * p["B"][1]))
    powers = decay ** np.arange(T)[:, None, None]
    expected = (powers * b @ (p["C"][0] + 1j * p["C"][1])).real
    expected[0] += p["d"] * xs[0]
    np.testing.assert_allclose(run_float64(cell, p, xs, starts), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "tree"}, "lru needs impl to be one of auto, scan, parallel, got 'tree'"),
        ({"state_size": -1}, "state_size to be 0 or more, got -1"),
        ({"r_min": 0.9, "r_max": 0.5}, "0 <= r_min < r_max <= 1, got 0.9 and 0.5"),
        ({"max_phase": 7.0}, "max_phase to be above 0 and at most 2 pi, got 7.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("lru", H, **options)
