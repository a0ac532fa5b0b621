"""xLSTM: equal to the authors' stack of an mLSTM and an sLSTM block."""

import numpy as np
import pytest
from memory_helpers import ORACLES, fresh_parameters, run_oracle

from memory_cells import make_cell


def test_xlstm_equals_the_authors():
    """PyPI xlstm 2.0.6: xLSTMBlockStack of an mLSTM and an sLSTM block, 32 features, 4 heads."""
    z = np.load(ORACLES / "xlstm_stack.npz")
    dense = lambda name: {"kernel": z[name].T}  # noqa: E731
    scale = lambda name: {"scale": 1.0 + z[name]}  # noqa: E731
    blocks = lambda name: z[name].swapaxes(1, 2)  # noqa: E731

    prefix = "blocks.0.xlstm."
    conv = prefix + "conv1d.conv."
    mlstm = {
        "up": dense(prefix + "proj_up.weight"),
        "down": dense(prefix + "proj_down.weight"),
        "conv": {"kernel": z[conv + "weight"][:, 0].T, "bias": z[conv + "bias"]},
        "norm_scale": 1.0 + z[prefix + "mlstm_cell.outnorm.weight"],
        "skip": z[prefix + "learnable_skip"],
    }
    mlstm |= {f"kernel_{name}": blocks(f"{prefix}{name}_proj.weight") for name in "qkv"}
    for ours, theirs in (("input_gate", "igate"), ("forget_gate", "fgate")):
        gate = f"{prefix}mlstm_cell.{theirs}."
        mlstm[ours] = {"kernel": z[gate + "weight"].T, "bias": z[gate + "bias"]}

    prefix = "blocks.1.xlstm."
    conv = prefix + "conv1d.conv."
    inputs = {"conv_kernel": z[conv + "weight"][:, 0].T, "conv_bias": z[conv + "bias"]}
    slstm = {"norm_scale": 1.0 + z[prefix + "group_norm.weight"], "inputs": inputs}
    recurrent = z[prefix + "slstm_cell._recurrent_kernel_"]
    recurrent = recurrent.reshape(4, 4, 8, 8)  # head, gate, out, in
    biases = z[prefix + "slstm_cell._bias_"].reshape(4, 32)
    # Their attribute fgate feeds the input gate's slot and igate the forget gate's.
    kernels = {"i": "fgate", "f": "igate", "z": "zgate", "o": "ogate"}
    for slot, (name, theirs) in enumerate(kernels.items()):
        inputs[f"kernel_{name}"] = blocks(f"{prefix}{theirs}.weight")
        inputs[f"bias_{name}"] = biases[slot]
        slstm[f"hidden_{name}"] = recurrent[:, slot].swapaxes(1, 2)

    gate, up = np.split(z["blocks.1.ffn.proj_up.weight"].T, 2, axis=1)
    params = {
        "layers_0": mlstm,
        "layers_1": slstm,
        "norms_0": scale("blocks.0.xlstm_norm.weight"),
        "norms_1": scale("blocks.1.xlstm_norm.weight"),
        "ffns_1": {
            "norm": scale("blocks.1.ffn_norm.weight"),
            "gate": {"kernel": gate},
            "up": {"kernel": up},
            "down": dense("blocks.1.ffn.proj_down.weight"),
        },
        "output_norm": scale("post_blocks_norm.weight"),
    }
    ys = run_oracle(make_cell("xlstm", 32), params, z["x"])
    np.testing.assert_allclose(ys, z["y"], atol=3e-6)


def test_gates_start_as_the_authors_do():
    params = fresh_parameters(make_cell("xlstm", 8), 8)
    mlstm = params["layers_0"]
    np.testing.assert_allclose(mlstm["forget_gate"]["bias"], np.linspace(3, 6, 4), rtol=1e-6)
    assert (mlstm["forget_gate"]["kernel"] == 0).all() and (mlstm["skip"] == 1).all()
    expected = np.tile(5 - 12 * np.array([0.0, 1.0]) ** 1.6, 4)
    np.testing.assert_allclose(params["layers_1"]["inputs"]["bias_f"], expected, rtol=1e-6)


def test_xlstm_refuses():
    for options, message in (
        ({"pattern": "msx"}, "word of the letters m and s, got 'msx'"),
        ({"pattern": ""}, "word of the letters m and s, got ''"),
        ({"ffn_factor": 0.0}, "ffn_factor to be greater than 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cell("xlstm", 8, **options)
