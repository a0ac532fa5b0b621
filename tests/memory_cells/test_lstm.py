"""Long short-term memory: equal to PyTorch's."""

import numpy as np
from memory_helpers import ORACLES, run_oracle

from memory_cells import make_cell


def test_lstm_equals_pytorch():
    z = np.load(ORACLES / "lstm.npz")
    kernels = np.split(z["weight_ih_l0"], 4)
    recurrent = np.split(z["weight_hh_l0"], 4)
    biases = np.split(z["bias_ih_l0"] + z["bias_hh_l0"], 4)
    params = {}
    for name, w, u, b in zip("ifgo", kernels, recurrent, biases, strict=True):
        params |= {f"input_{name}": {"kernel": w.T, "bias": b}, f"hidden_{name}": u.T}
    np.testing.assert_allclose(run_oracle(make_cell("lstm", 5), params, z["x"]), z["y"], atol=1e-6)
