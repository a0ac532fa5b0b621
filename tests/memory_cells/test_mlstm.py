"""mLSTM: its stabiliser cancels. `test_xlstm.py` compares the layer with the authors' code."""

import jax.numpy as jnp
import numpy as np
from memory_helpers import initialised, sequence


def test_mlstm_does_not_depend_on_its_stabiliser():
    """The same memory under another m: only the guard against division by zero differs."""
    cell, params, carry, xs = initialised("mlstm")
    starts = jnp.zeros((12, 2), bool)
    carry, _ = sequence(cell, params, carry, 3 * xs, starts)
    (memory, m), buffer = carry
    shifted = (memory * jnp.exp(-3.0), m + 3.0), buffer
    _, expected = sequence(cell, params, carry, xs, starts)
    _, ys = sequence(cell, params, shifted, xs, starts)
    np.testing.assert_allclose(ys, expected, atol=1e-4)
