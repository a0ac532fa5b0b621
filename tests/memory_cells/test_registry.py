"""`make_cell`: memories by name, with their options."""

import jax
import jax.numpy as jnp
import pytest

from memory_cells import make_cell


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("slstmm", 8),
            r"unknown cell 'slstmm' \(did you mean 'slstm'\?\); valid cells: gru, lstm, slstm, ",
        ),
        (
            ("gru", 8, 1, {"retain_bais": 1.0}),
            r"has no option 'retain_bais' \(did you mean 'retain_bias'\?\)",
        ),
        (("none", 8, 1, {"heads": 1}), "cell 'none' has no option 'heads'; it has none"),
        (("slstm", 10), "multiple of num_heads, got 10 and 4"),
        (("slstm", 8, 1, {"num_heads": 0}), "multiple of num_heads, got 8 and 0"),
        (("slstm", 8, 1, {"conv_width": 1}), "conv_width to be 0 or at least 2, got 1"),
        (
            ("slstm", 8, 1, {"num_heads": "four"}),
            "option num_heads of cell 'slstm' must be int, got 'four'",
        ),
    ],
)
def test_make_cell_refuses(arguments, message):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        make_cell(*positional, **options)


def test_options_reach_the_cell():
    assert make_cell("slstm", 8, num_heads=2, conv_width=0).num_heads == 2
    cell = make_cell("lstm", 8, forget_bias=3.0)
    params = cell.init(jax.random.key(0), (jnp.zeros((1, 8)),) * 2, jnp.zeros((1, 8)))
    assert (params["params"]["input_f"]["bias"] == 3.0).all()
