"""Recurrent trace unit: equal to the paper in float64, also its real-time recurrent learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import B, H, T, dense, initial_carry, perturbed, run_float64

from memory_cells import make_cell


def rtu_reference(p, xs, starts, nonlinear, f):
    r = np.exp(-np.exp(p["nu"]))
    phi = np.exp(p["theta"])
    scale = np.sqrt(1 - r**2)
    h1 = h2 = np.zeros((B, len(r)))
    ys = []
    for x, start in zip(xs, starts[..., None], strict=True):
        h1 = np.where(start, 0, h1)
        h2 = np.where(start, 0, h2)
        p_t = r * np.cos(phi) * h1 - r * np.sin(phi) * h2 + scale * dense(p["input_1"], x)
        q_t = r * np.cos(phi) * h2 + r * np.sin(phi) * h1 + scale * dense(p["input_2"], x)
        h1, h2 = (f(p_t), f(q_t)) if nonlinear else (p_t, q_t)
        ys.append(np.concatenate([h1, h2] if nonlinear else [f(h1), f(h2)], axis=-1))
    return np.stack(ys)


@pytest.mark.parametrize("nonlinear", [True, False])
def test_rtu_equals_the_paper(nonlinear):
    for activation, f in (("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0))):
        cell = make_cell("rtu", H, nonlinear=nonlinear, activation=activation)
        params, xs, starts = perturbed(cell, 5)
        expected = rtu_reference(params, xs, starts, nonlinear, f)
        np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-10)


def test_rtu_backpropagation_equals_real_time_recurrent_learning():
    """The sensitivities dh/dnu and dh/dtheta, carried forward, give the same gradients.

    In the authors' code dphi/dtheta = phi is missing, a factor of phi in the gradient of theta.
    """
    cell = make_cell("rtu", H, nonlinear=False, activation="tanh")
    p, xs, starts = perturbed(cell, 5)
    weights = np.random.default_rng(1).normal(size=(T, B, H))
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    inputs = dense(p["input_1"], xs) + 1j * dense(p["input_2"], xs)
    scale = np.sqrt(1 - np.abs(decay) ** 2)
    h = by_nu = by_theta = 0.0
    expected = {"nu": 0.0, "theta": 0.0}
    for x, start, weight in zip(inputs, starts[..., None], weights, strict=True):
        h, by_nu, by_theta = (np.where(start, 0, old) for old in (h, by_nu, by_theta))
        by_theta = decay * by_theta + 1j * np.exp(p["theta"]) * decay * h
        by_nu = decay * by_nu + np.exp(p["nu"]) * (-decay * h + np.abs(decay) ** 2 / scale * x)
        h = decay * h + scale * x
        slope = weight * (1 - np.tanh(np.concatenate([h.real, h.imag], axis=-1)) ** 2)
        for name, sensitivity in (("nu", by_nu), ("theta", by_theta)):
            parts = slope * np.concatenate([sensitivity.real, sensitivity.imag], axis=-1)
            expected[name] = expected[name] + parts.reshape(B, 2, -1).sum((0, 1))

    with jax.enable_x64(True):
        xs = jnp.asarray(xs)
        arguments = initial_carry(cell, xs), xs, jnp.asarray(starts)

        @jax.jit
        @jax.grad
        def gradient(p):
            _, ys = cell.apply({"params": p}, *arguments, method="sequence")
            return (weights * ys).sum()

        actual = gradient(jax.tree.map(jnp.asarray, p))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation to be one of tanh, relu, got 'gelu'"),
        ({"impl": "parallel"}, "a parallel form only with nonlinear=False"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("rtu", H, **options)
