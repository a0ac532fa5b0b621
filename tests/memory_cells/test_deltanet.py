"""DeltaNet: the layer equals the paper in float64, the delta rule replaces and reflects.

`parts/test_chunkwise.py` compares the rule with other implementations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import (
    H,
    delta_inputs,
    delta_rule,
    dense,
    perturbed,
    rms_norm,
    run_float64,
    sigmoid,
)

from memory_cells import make_cell
from memory_cells.parts.chunkwise import delta_memory


def deltanet_reference(p, xs, starts):
    """2406.06484, sections 2 and 3.3, with beta up to 2 (2411.12537); of two heads."""
    beta = 2 * sigmoid(dense(p["beta"], xs))
    reads = delta_rule(*delta_inputs(p, xs, starts, 2), beta, np.ones_like(beta), starts)
    return dense(p["output"], rms_norm(p["norm"], reads, 1e-5).reshape(xs.shape[:2] + (H,)))


def test_deltanet_equals_the_paper():
    cell = make_cell("deltanet", H, num_heads=2, beta_scale=2)
    params, xs, starts = perturbed(cell, 5)
    expected = deltanet_reference(params, xs, starts)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-9)


def test_delta_rule_replaces():
    """Strength 1: a second write under a key replaces the first; orthogonal keys are untouched."""
    keys = jnp.eye(4)[jnp.array([0, 1, 2, 1, 3, 0, 1, 2, 3])]
    values = jax.random.normal(jax.random.key(0), (9, 5))
    beta = jnp.array([1, 1, 1, 1, 1, 0, 0, 0, 0.0])  # the last four steps only read
    inputs = [x[:, None, None] for x in (keys, keys, values, beta)]
    starts = jnp.zeros((9, 1), bool)
    for impl in ("scan", "parallel"):
        _, ys = delta_memory(jnp.zeros((1, 1, 4, 5)), *inputs, None, starts, impl)
        np.testing.assert_allclose(ys[5:, 0, 0], values[jnp.array([0, 3, 2, 4])], atol=1e-6)
        np.testing.assert_allclose(ys[3, 0, 0], values[3], atol=1e-6)


def test_deltanet_of_strength_two_can_reflect():
    """beta = 2 negates what is stored under a key; beta = 1 can at most clear it."""
    key = jnp.eye(4)[:1]
    value = jnp.ones((1, 4))
    state = (key.T @ value)[None, None]

    def read(beta):
        q = k = key[:, None, None]
        v = 0 * value[:, None, None]
        beta = jnp.full((1, 1, 1), beta)
        _, ys = delta_memory(state, q, k, v, beta, None, jnp.zeros((1, 1), bool))
        return ys

    np.testing.assert_allclose(read(2.0), -jnp.ones((1, 1, 1, 4)))
    np.testing.assert_allclose(read(1.0), jnp.zeros((1, 1, 1, 4)))


def test_deltanet_refuses():
    with pytest.raises(ValueError, match="deltanet needs beta_scale to be 1 or 2, got 3"):
        make_cell("deltanet", 8, beta_scale=3)
