"""Options of memories: each one changes what it should, and impossible values are refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells import CELLS, MemoryCell, make_cell

SIZE = 16  # with 4 heads of 2, depth would change nothing

# Another value for every option that changes the numbers; `impl` does not, see `test_impls.py`.
OTHER = {
    "gru": {"retain_bias": 1.0, "learned_carry": True},
    "lstm": {"forget_bias": 0.0, "learned_carry": True},
    "slstm": {"num_heads": 2, "conv_width": 2, "depth": 1.0, "learned_carry": True},
    "mlstm": {"num_heads": 2, "conv_width": 2, "num_blocks": 2},
    "xlstm": {"pattern": "s", "num_heads": 2, "conv_width": 2, "ffn_factor": 9.0},
    "gtrxl": {
        "num_heads": 2,
        "num_blocks": 1,
        "memory_length": 2,
        "gate_bias": 0.0,
        "mlp_factor": 1,
    },
    "gpt2": {"num_heads": 2, "num_blocks": 1, "context_length": 3, "positions": "learned"},
    "s5": {
        "state_size": 12,
        "num_blocks": 2,
        "dt_min": 0.5,
        "dt_max": 0.1,
        "norm": False,
        "glu": False,
        "learned_carry": True,
    },
    "shm": {"memory_size": 8, "num_theta": 3, "clip": 0.01},
    "dnc": {
        "controller_size": 8,
        "num_slots": 4,
        "slot_size": 4,
        "num_reads": 1,
        "forget_bias": 0.0,
    },
    "ffm": {
        "memory_size": 8,
        "context_size": 3,
        "min_period": 1.0,
        "max_period": 16.0,
        "spacing": "linear",
        "learned_carry": True,
    },
    "lru": {
        "state_size": 6,
        "r_min": 0.1,
        "r_max": 0.95,
        "max_phase": 1.0,
        "norm": False,
        "glu": False,
        "learned_carry": True,
    },
    "mingru": {"conv_width": 2, "learned_carry": True},
    "mamba": {"state_size": 4, "expand": 1, "dt_rank": 2, "conv_width": 2},
    "linear_attention": {"num_heads": 2, "conv_width": 0},
    "retnet": {"num_heads": 2, "conv_width": 0},
    "deltanet": {"num_heads": 2, "conv_width": 0, "beta_scale": 2},
    "gated_deltanet": {"num_heads": 2, "conv_width": 0, "beta_scale": 2},
    "rtu": {
        "nonlinear": False,
        "activation": "tanh",
        "r_min": 0.1,
        "r_max": 0.95,
        "max_phase": 1.0,
        "learned_carry": True,
    },
    "none": {},
}
NUMBERS_STAY = {"impl", "chunk_size"}


def options_of(name):
    """The options of a cell and their defaults."""
    inherited = {field.name for field in dataclasses.fields(MemoryCell)}
    fields = dataclasses.fields(CELLS[name])
    return {field.name: field.default for field in fields if field.name not in inherited}


def program(name, **options):
    """How fresh parameters and the outputs of five inputs are computed, without computing them."""
    cell = make_cell(name, SIZE, **options)
    starts = jnp.zeros((5, 1), bool)

    def outcome(key, xs):
        carry = cell.initialize_carry(None, xs.shape[1:])
        return cell.init_with_output(key, carry, xs, starts, method="sequence")

    traced = jax.make_jaxpr(outcome)(jax.random.key(0), jnp.zeros((5, 1, SIZE)))
    constants = [np.asarray(x).tobytes() for x in traced.consts]
    return re.sub("0x[0-9a-f]+", "", str(traced)), constants


@pytest.mark.parametrize("name", CELLS)
def test_every_option_changes_something(name):
    """Its other value is another program, which is cheaper to see than other numbers."""
    others = OTHER[name]
    not_shown = NUMBERS_STAY | ({"num_positions"} if name == "gpt2" else set())
    assert others.keys() == options_of(name).keys() - not_shown
    default = program(name)
    for option, value in others.items():
        assert program(name, **{option: value}) != default, option


def test_the_table_of_positions_has_as_many_rows_as_asked_for():
    def rows(num_positions):
        cell = make_cell("gpt2", SIZE, positions="learned", num_positions=num_positions)
        carry = cell.initialize_carry(None, (1, SIZE))
        params = jax.eval_shape(cell.init, jax.random.key(0), carry, jnp.zeros((1, SIZE)))
        return params["params"]["positions"].shape

    assert rows(3) == (3, SIZE)


# Options that may be any finite number, of either sign.
ANY_NUMBER = {("gru", "retain_bias"), ("lstm", "forget_bias")}
ANY_NUMBER |= {("dnc", "forget_bias"), ("gtrxl", "gate_bias")}
MAY_BE_ZERO = {"conv_width", "dt_rank", "depth", "r_min"}
# 0 takes as many as features.
MAY_BE_ZERO_IN = {("s5", "state_size"), ("lru", "state_size")}


def impossible():
    for name in CELLS:
        for option, default in options_of(name).items():
            if isinstance(default, bool):
                yield name, option, 2
            elif isinstance(default, str):
                yield name, option, "nothing"
            elif isinstance(default, float):
                yield from ((name, option, value) for value in (math.nan, math.inf))
                if (name, option) not in ANY_NUMBER:
                    yield name, option, -1.0
            else:
                yield name, option, -1
                yield name, option, 0.5
                if option not in MAY_BE_ZERO and (name, option) not in MAY_BE_ZERO_IN:
                    yield name, option, 0


@pytest.mark.parametrize("name", CELLS)
def test_impossible_values_are_refused_in_one_sentence(name):
    """Before anything is compiled; the sentence names the option and the value."""
    for owner, option, value in impossible():
        if owner == name:
            with pytest.raises(ValueError) as error:
                make_cell(name, SIZE, **{option: value})
            sentence = str(error.value)
            assert option in sentence and name in sentence and "\n" not in sentence
            assert str(value) in sentence


@pytest.mark.parametrize("value", [0, -3])
def test_impossible_sizes_are_refused(value):
    with pytest.raises(ValueError, match=f"needs hidden_size to be at least 1, got {value}"):
        make_cell("gru", value)
    with pytest.raises(ValueError, match=f"needs num_layers to be at least 1, got {value}"):
        make_cell("gru", 8, value)
