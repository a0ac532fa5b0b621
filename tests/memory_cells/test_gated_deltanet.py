"""Gated DeltaNet: its initial decays. `parts/test_chunkwise.py` has its oracles."""

import jax
import numpy as np
import pytest
from memory_helpers import fresh_parameters

from memory_cells import make_cell


def test_gates_start_as_the_authors_do():
    params = fresh_parameters(make_cell("gated_deltanet", 8), 8)
    assert (params["log_A"] > np.log(0.01)).all() and (params["log_A"] < np.log(16)).all()
    steps = jax.nn.softplus(params["alpha"]["bias"])
    assert (steps > 0.99e-3).all() and (steps < 1.01e-1).all()


def test_gated_deltanet_refuses():
    with pytest.raises(ValueError, match="gated_deltanet needs beta_scale to be 1 or 2, got 3"):
        make_cell("gated_deltanet", 8, beta_scale=3)
