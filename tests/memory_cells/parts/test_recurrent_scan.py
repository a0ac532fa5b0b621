"""`recurrent_scan`: its gradients are those of a plain scan."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import H, setup

from memory_cells.parts.carry import reset


def plain_scan(project, step, params, carry, xs, starts, initial):
    """What `recurrent_scan` computes, with the gradient left to JAX."""

    def body(carry, inputs):
        x, start = inputs
        carry = reset(carry, initial, start)
        return step(carry, x, project(params, carry))

    return jax.lax.scan(body, carry, (xs, starts))


@pytest.mark.parametrize("name", ["gru", "lstm x1 learned", "slstm", "slstm x1 learned", "gru x2"])
def test_gradients_of_recurrent_scan_are_those_of_a_plain_scan(name, monkeypatch):
    cell, params, carry, xs, starts = setup(name)

    def loss(params, carry, xs):
        last, ys = cell.apply(params, carry, xs, starts, method="sequence")
        total = (ys * jnp.arange(1.0, H + 1)).sum()
        return total + sum(jnp.tanh(leaf).sum() for leaf in jax.tree.leaves(last))

    actual = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, carry, xs)
    module = sys.modules[f"memory_cells.{name.partition(' ')[0]}"]
    monkeypatch.setattr(module, "recurrent_scan", plain_scan)
    # Another function for JAX, which would reuse the first trace otherwise.
    expected = jax.jit(jax.grad(lambda *args: loss(*args), argnums=(0, 1, 2)))(params, carry, xs)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    close = lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * scale, rtol=1e-4)  # noqa: E731
    jax.tree.map(close, actual, expected)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected[0]))
