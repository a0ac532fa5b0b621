"""Gated recurrent unit: equal to PyTorch's."""

import numpy as np
from memory_helpers import ORACLES, run_oracle

from memory_cells import make_cell


def test_gru_equals_pytorch():
    z = np.load(ORACLES / "gru.npz")
    w_r, w_z, w_n = (w.T for w in np.split(z["weight_ih_l0"], 3))
    u_r, u_z, u_n = (w.T for w in np.split(z["weight_hh_l0"], 3))
    b = np.split(z["bias_ih_l0"], 3)
    c = np.split(z["bias_hh_l0"], 3)
    params = {
        "input_r": {"kernel": w_r, "bias": b[0] + c[0]},
        "input_z": {"kernel": w_z, "bias": b[1] + c[1]},
        "input_n": {"kernel": w_n, "bias": b[2]},
        "hidden_r": u_r,
        "hidden_z": u_z,
        "hidden_n": u_n,
        "hidden_bias_n": c[2],
    }
    np.testing.assert_allclose(run_oracle(make_cell("gru", 5), params, z["x"]), z["y"], atol=1e-6)
