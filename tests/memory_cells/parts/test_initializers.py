"""Fresh parameters: of the size that the papers or the authors' code give them."""

import math

import numpy as np
import pytest
from memory_helpers import fresh_parameters

from memory_cells import make_cell

SMALL = math.sqrt(2 / (5 * 64))
# cell: its options, and the root mean square of fresh parameters, for 64 features.
SCALES = {
    # Real and imaginary part share a variance of 1 / H in B, and of 2 / (2 P) in C.
    "s5": ({"state_size": 32}, {"B": 128**-0.5, "C": 32**-0.5}),
    "lru": ({"state_size": 32}, {"B": 128**-0.5, "C": 32**-0.5}),
    "gpt2": (
        {},
        {
            "block_0/query/kernel": 0.02,
            "block_0/mlp_in/kernel": 0.02,
            "block_1/out/kernel": 0.01,  # 0.02 by the root of 2 L, for two blocks
            "block_1/mlp_out/kernel": 0.01,
        },
    ),
    "xlstm": (
        {},
        {
            "layers_0/up/kernel": SMALL,
            "layers_0/down/kernel": 0.125,  # 2 / (L sqrt(H)), for two blocks
            "layers_1/inputs/kernel_z": SMALL,
            "ffns_1/up/kernel": SMALL,
            "ffns_1/down/kernel": 0.125,
        },
    ),
    "mamba": (
        {"state_size": 2},
        {
            "dt_out/kernel": 0.5 / 3**0.5,
            "conv/kernel": 0.5 / 3**0.5,
            "A_log": math.log(2) / 2**0.5,  # of 1 and 2
        },
    ),
    "dnc": ({}, {"interface_kernel": 0.125, "inputs_i/bias": 0.0, "inputs_f/bias": 1.0}),
    "lstm": ({}, {"input_i/bias": 0.0, "input_f/bias": 1.0, "input_o/bias": 0.0}),
    "gru": ({"retain_bias": 1.0}, {"input_r/bias": 0.0, "input_z/bias": 1.0}),
}


def find(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


@pytest.mark.parametrize("name", SCALES)
def test_parameters_start_at_their_scale(name):
    options, scales = SCALES[name]
    params = fresh_parameters(make_cell(name, 64, **options), 64)
    for path, scale in scales.items():
        weights = find(params, path)
        np.testing.assert_allclose(np.sqrt(np.mean(weights**2)), scale, rtol=0.1, err_msg=path)
