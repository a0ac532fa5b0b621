"""minGRU: equal to another implementation."""

import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import ORACLES, H, sequence, time_major

from memory_cells import make_cell


def test_mingru_equals_another_implementation():
    """PyPI minGRU-pytorch 0.2.1, minGRU(6): candidate and gate from one matrix."""
    z = np.load(ORACLES / "mingru.npz")
    w_n, w_z = np.split(z["mg_w"], 2)
    params = {"params": {"input_n": {"kernel": w_n.T}, "input_z": {"kernel": w_z.T}}}
    cell = make_cell("mingru", 6, conv_width=0)
    xs = time_major(z["mg_x"])
    for impl in ("scan", "parallel"):
        carry = z["mg_h0"][:, 0], ()
        starts = jnp.zeros(xs.shape[:2], bool)
        _, ys = sequence(cell.clone(impl=impl), params, carry, xs, starts)
        np.testing.assert_allclose(time_major(ys), z["mg_y"], atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"conv_width": 1}, "mingru needs conv_width to be 0 or at least 2, got 1")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("mingru", H, **options)
