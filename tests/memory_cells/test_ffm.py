"""Fast and forgetful memory: equal to the authors' code, and an impulse decays and turns."""

import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import (
    ORACLES,
    H,
    T,
    dense,
    fresh_parameters,
    perturbed,
    run,
    sigmoid,
    time_major,
)

from memory_cells import make_cell


def test_ffm_equals_the_authors():
    """proroklab/ffm, standalone PyTorch version, memory_size 6, context_size 4, 7 outputs."""
    z = np.load(ORACLES / "ffm.npz")
    cuts = (6, 13, 19)
    kernels = np.split(z["pre.weight"].T, cuts, axis=1)
    biases = np.split(z["pre.bias"], cuts)
    names = ("input", "through", "input_gate", "output_gate")
    params = {
        name: {"kernel": kernel, "bias": bias}
        for name, kernel, bias in zip(names, kernels, biases, strict=True)
    }
    mix = z["mix.weight"].T.reshape(6, 4, 2, 7)  # theirs alternates real and imaginary parts
    params["mix"] = {"kernel": np.moveaxis(mix, 2, 0).reshape(48, 7), "bias": z["mix.bias"]}
    params |= {"a": z["ffa.a"].ravel(), "b": z["ffa.b"].ravel()}
    cell = make_cell("ffm", 7, memory_size=6, context_size=4)
    last, ys = run(cell, {"params": params}, time_major(z["x"]))
    np.testing.assert_allclose(time_major(ys), z["y"], atol=3e-6)
    np.testing.assert_allclose(last, z["s"][:, -1], atol=2e-6)


def test_ffm_starts_as_the_authors_do():
    p = fresh_parameters(make_cell("ffm", H, spacing="linear", min_period=1.0), H)
    limit = np.log(np.finfo(np.float64).max) / 1024 - 0.01
    expected = np.linspace(-limit + 0.01, np.log(0.01) / 1024, 32)
    np.testing.assert_allclose(p["a"], expected, rtol=1e-4)
    np.testing.assert_allclose(2 * np.pi / p["b"], np.linspace(1, 1024, 4), rtol=1e-5)


def test_ffm_impulse_decays_and_turns():
    """A single input leaves magnitude |u| exp(a t) and phase b t in the memory."""
    cell = make_cell("ffm", H)
    params, xs, _ = perturbed(cell, H, scale=0.0)
    params["input"]["bias"] *= 0.0
    xs[1:] = 0.0
    last, _ = run(cell, {"params": params}, jnp.asarray(xs, jnp.float32))
    u = dense(params["input"], xs[0]) * sigmoid(dense(params["input_gate"], xs[0]))
    exponents = params["a"][:, None] + 1j * params["b"]
    expected = u[..., None] * np.exp((T - 1) * exponents)
    np.testing.assert_allclose(last, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_size": 0}, "of at least 1, got 32 and 0"),
        ({"min_period": 2000.0}, "0 < min_period <= max_period, got 2000.0 and 1024.0"),
        ({"spacing": "even"}, "spacing to be linear or log, got 'even'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("ffm", H, **options)
