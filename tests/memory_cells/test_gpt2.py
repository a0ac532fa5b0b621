"""GPT-2: equal to transformers'; rotary positions work in episodes of any length."""

import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import ORACLES, H, run, sequence, setup_windowed, time_major

from memory_cells import make_cell


def test_rotary_positions_do_not_tire():
    """A million steps later in an episode, outputs are the same: places in the window count."""
    cell, params, carry, xs, starts = setup_windowed("gpt2")
    starts = jnp.zeros_like(starts)
    (caches, age), _ = sequence(cell, params, carry, xs, starts)
    _, expected = sequence(cell, params, (caches, age), xs, starts)
    _, old = sequence(cell, params, (caches, age + 1e6), xs, starts)
    np.testing.assert_array_equal(old, expected)


def gpt2_oracle():
    """transformers' GPT2Model(inputs_embeds=x): our parameters, inputs and outputs, time-major."""
    z = np.load(ORACLES / "gpt2.npz")
    norm = lambda name: {"scale": z[f"{name}.weight"], "bias": z[f"{name}.bias"]}  # noqa: E731
    dense = lambda name: {"kernel": z[f"{name}.weight"], "bias": z[f"{name}.bias"]}  # noqa: E731
    params = {"positions": z["wpe.weight"], "norm": norm("ln_f")}
    for index in range(2):
        theirs = f"h.{index}"
        kernels = np.split(z[f"{theirs}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(z[f"{theirs}.attn.c_attn.bias"], 3)
        out = dense(f"{theirs}.attn.c_proj")
        block = {
            "attention_norm": norm(f"{theirs}.ln_1"),
            "out": out | {"kernel": out["kernel"].reshape(2, 8, 16)},
            "mlp_norm": norm(f"{theirs}.ln_2"),
            "mlp_in": dense(f"{theirs}.mlp.c_fc"),
            "mlp_out": dense(f"{theirs}.mlp.c_proj"),
        }
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            block[name] = {"kernel": kernel.reshape(16, 2, 8), "bias": bias.reshape(2, 8)}
        params[f"block_{index}"] = block
    return {"params": params}, time_major(z["x"]), time_major(z["y"])


def oracle_cell(context_length):
    options = {"num_heads": 2, "positions": "learned", "num_positions": 64}
    return make_cell("gpt2", 16, context_length=context_length, **options)


def test_gpt2_equals_transformers():
    params, xs, expected = gpt2_oracle()
    cell = oracle_cell(20)
    used, ys = run(cell, params, xs)
    np.testing.assert_allclose(ys, expected, atol=3e-6)

    # also after another episode, and not if the window is one step too short
    starts = jnp.zeros(xs.shape[:2], bool)
    used, _ = run(cell, params, 1.0 + xs)
    _, ys = sequence(cell, params, used, xs, starts.at[0].set(True))
    np.testing.assert_allclose(ys, expected, atol=3e-6)
    _, ys = run(oracle_cell(19), params, xs)
    np.testing.assert_allclose(ys[:-1], expected[:-1], atol=3e-6)
    assert np.abs(ys[-1] - expected[-1]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "gpt2 needs hidden_size to be a multiple of num_heads, got 8 and 0"),
        ({"num_heads": 8}, "hidden_size to be an even multiple of num_heads, got 8 and 8"),
        ({"context_length": 1}, "gpt2 needs context_length to be at least 2, got 1"),
        ({"num_positions": 0}, "gpt2 needs num_positions to be at least 1, got 0"),
        (
            {"positions": "rotray"},
            "gpt2 needs positions to be 'rotary' or 'learned', got 'rotray'",
        ),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("gpt2", H, **options)
