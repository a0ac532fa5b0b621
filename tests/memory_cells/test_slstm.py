"""sLSTM: equal to the authors' layer, with their initial forget biases."""

import numpy as np
from memory_helpers import ORACLES, fresh_parameters, run_oracle

from memory_cells import make_cell


def test_slstm_equals_the_authors():
    """PyPI xlstm 2.0.6: sLSTMLayer, 16 features, 4 heads, a convolution of width 4, vanilla."""
    z = np.load(ORACLES / "slstm_layer.npz")
    # Their attribute fgate feeds the input gate's slot and igate the forget gate's.
    kernels = {"i": "fgate", "f": "igate", "z": "zgate", "o": "ogate"}
    recurrent = z["slstm_cell/_recurrent_kernel_"].reshape(4, 4, 4, 4)  # head, gate, out, in
    biases = z["slstm_cell/_bias_"].reshape(4, 16)
    inputs = {"conv_kernel": z["conv1d/conv/weight"][:, 0].T, "conv_bias": z["conv1d/conv/bias"]}
    params = {"norm_scale": 1.0 + z["group_norm/weight"]}
    for slot, name in enumerate("ifzo"):
        inputs[f"kernel_{name}"] = z[f"{kernels[name]}/weight"].swapaxes(1, 2)
        inputs[f"bias_{name}"] = biases[slot]
        params[f"hidden_{name}"] = recurrent[:, slot].swapaxes(1, 2)
    params["inputs"] = inputs
    ys = run_oracle(make_cell("slstm", 16), params, z["x"])
    np.testing.assert_allclose(ys, z["y"], atol=3e-6)


def test_slstm_forget_bias_starts_as_the_authors_do():
    params = fresh_parameters(make_cell("slstm", 16), 16)
    expected = np.load(ORACLES / "slstm_layer.npz")["initial_bias"].reshape(4, 16)
    for slot, name in enumerate("ifzo"):
        np.testing.assert_allclose(params["inputs"][f"bias_{name}"], expected[slot], atol=1e-5)
