"""Linear attention: it reads means. `parts/test_chunkwise.py` has its recurrence."""

import jax.numpy as jnp
import numpy as np
from memory_helpers import initialised, run


def test_linear_attention_reads_means():
    """The same input at every step gives the same output, however long the episode."""
    cell, params, _, xs = initialised("linear_attention", conv_width=0)
    _, ys = run(cell, params, jnp.broadcast_to(xs[0], (200, 2, 8)))
    np.testing.assert_allclose(ys, jnp.broadcast_to(ys[0], ys.shape), atol=1e-5)
