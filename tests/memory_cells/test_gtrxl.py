"""GTrXL: equal to Transformer-XL's attention, with gates that start closed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import ORACLES, B, H, layer_norm, time_major

from memory_cells import make_cell
from memory_cells.gtrxl import Gate, RelativeAttention


def test_relative_attention_equals_transformer_xl():
    """kimiyoung/transformer-xl: RelPartialLearnableMultiHeadAttn, pre-layer-norm, band mask."""
    z = np.load(ORACLES / "transformer_xl_attention.npz")
    heads, d = z["u"].shape
    rows = np.concatenate([z["mem"], z["w"]]).swapaxes(0, 1)
    kernel = lambda w: {"kernel": w.T.reshape(-1, heads, d)}  # noqa: E731
    query, key, value = np.split(z["qkv"], 3)
    params = {
        "query": kernel(query),
        "key": kernel(key),
        "value": kernel(value),
        "position": kernel(z["rn"]),
        "out": {"kernel": z["on"].T.reshape(heads, d, -1)},
        "content_bias": z["u"],
        "position_bias": z["v"],
    }
    normed = layer_norm({"scale": z["lw"], "bias": z["lb"]}, rows, 1e-5)
    began = jnp.full(z["w"].shape[1::-1], -len(z["mem"]))
    ys = RelativeAttention(heads, d).apply({"params": params}, jnp.asarray(normed), began)
    np.testing.assert_allclose(time_major(ys), z["o"], atol=1e-6)


def test_a_closed_gate_passes_the_stream():
    x, y = jax.random.normal(jax.random.key(0), (2, 5, H))
    for bias, changed in ((2.0, 0.3), (20.0, 1e-6)):
        gate = Gate(bias)
        out = gate.apply(gate.init(jax.random.key(1), x, y), x, y)
        assert jnp.abs(out - x).mean() < changed


def test_attention_to_a_single_step_is_its_value():
    attention = RelativeAttention(2, 4)
    x = jax.random.normal(jax.random.key(0), (B, 1, H))
    # Before it are three slots that nothing was written to in this episode.
    rows = jnp.concatenate([jnp.ones((B, 3, H)), x], axis=1)
    began = jnp.zeros((B, 1))
    params = attention.init(jax.random.key(1), rows, began)
    kernels = (params["params"][name]["kernel"] for name in ("value", "out"))
    expected = jnp.einsum("bti,ihd,hdo->bto", x, *kernels)
    np.testing.assert_allclose(attention.apply(params, rows, began), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "gtrxl needs hidden_size to be a multiple of num_heads, got 8 and 3"),
        ({"memory_length": 0}, "gtrxl needs memory_length to be at least 1, got 0"),
        ({"num_blocks": 0}, "gtrxl needs num_blocks to be at least 1, got 0"),
        ({"mlp_factor": -1}, "gtrxl needs mlp_factor to be at least 1, got -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("gtrxl", H, **options)
