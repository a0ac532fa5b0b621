"""`linear_scan`: values and gradients are those of a plain scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import B, assert_close

from memory_cells.parts.linear_scan import linear_scan


@pytest.mark.parametrize("impl", ["scan", "parallel"])
@pytest.mark.parametrize("kind", ["real", "complex", "constant"])
def test_linear_scan_equals_a_plain_scan(kind, impl):
    """Values and gradients, also those of the carry and of a learned initial state."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape) + 1j * rng.normal(size=shape) * (kind != "real")

    a = 0.5 * (draw(2, 4) if kind == "constant" else draw(17, B, 2, 4))
    b = draw(17, B, 2, 4)
    carry = draw(B, 2, 4)
    initial = draw(2, 4)
    starts = jnp.asarray(rng.random((17, B)) < 0.2).at[0, 0].set(True).at[-1, 1].set(True)
    weights = rng.normal(size=b.shape)

    def plain(a, b, carry, starts, initial):
        def step(h, inputs):
            a, b, start = inputs
            h = a * jnp.where(start[:, None, None], initial, h) + b
            return h, h

        _, hs = jax.lax.scan(step, carry, (jnp.broadcast_to(a, b.shape), b, starts))
        return hs

    def loss(scan, a, b, carry, initial):
        hs = scan(a, b, carry, starts, initial)
        return (weights * (hs.real + hs.imag**2)).sum(), hs

    with jax.enable_x64(True):
        arrays = [a, b, carry, initial]
        arrays = [jnp.asarray(array if kind != "real" else array.real) for array in arrays]
        gradient = jax.grad(loss, argnums=(1, 2, 3, 4), has_aux=True)
        gradient = jax.jit(gradient, static_argnums=0)
        actual = gradient(partial(linear_scan, impl=impl), *arrays)
        assert_close(actual, gradient(plain, *arrays), 1e-12)
