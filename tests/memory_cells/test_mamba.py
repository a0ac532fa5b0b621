"""Mamba's mixer: equal to transformers', with its initial time steps."""

import numpy as np
import pytest
from memory_helpers import ORACLES, H, fresh_parameters, run_oracle

from memory_cells import make_cell


def test_mamba_equals_transformers():
    """transformers 5.23.0, MambaMixer with hidden_size 12, state_size 4, expand 2, rank 3."""
    z = np.load(ORACLES / "mamba.npz")
    kernel = lambda w: {"kernel": w.T}  # noqa: E731
    inputs, gate = np.split(z["in_proj.weight"], 2)
    dt_in, write, read = np.split(z["x_proj.weight"], (3, 7))
    params = {
        "input": kernel(inputs),
        "gate": kernel(gate),
        "conv": {"kernel": z["conv1d.weight"][:, 0].T, "bias": z["conv1d.bias"]},
        "dt_in": kernel(dt_in),
        "dt_out": kernel(z["dt_proj.weight"]) | {"bias": z["dt_proj.bias"]},
        "write": kernel(write),
        "read": kernel(read),
        "A_log": z["A_log"],
        "D": z["D"],
        "output": kernel(z["out_proj.weight"]),
    }
    cell = make_cell("mamba", 12, state_size=4, dt_rank=3)
    np.testing.assert_allclose(run_oracle(cell, params, z["x"]), z["y"], atol=1e-6)


def test_mamba_time_steps_start_between_0_001_and_0_1():
    bias = fresh_parameters(make_cell("mamba", 64), 64)["dt_out"]["bias"]
    dt = np.log1p(np.exp(bias))
    assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"conv_width": 0}, "mamba needs conv_width to be at least 2, got 0")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("mamba", H, **options)
