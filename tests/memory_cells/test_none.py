"""No memory: a dense layer with tanh, of one step only."""

import jax.numpy as jnp
import numpy as np
from memory_helpers import H, dense, perturbed, run

from memory_cells import make_cell


def test_none_is_a_dense_layer():
    cell = make_cell("none", H)
    params, xs, starts = perturbed(cell, 5)
    carry, ys = run(cell, {"params": params}, jnp.asarray(xs), jnp.asarray(starts))
    np.testing.assert_allclose(ys, np.tanh(dense(params["dense"], xs)), atol=1e-5)
    assert carry == ()
