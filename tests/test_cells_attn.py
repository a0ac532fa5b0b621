"""Attention memories: the window is exact however a sequence is cut, nothing hidden is read, oracles agree."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells import make_cell
from memory_cells.gtrxl import Gate, RelativeAttention
from memory_cells.parts.band_attention import append, band_attention, newest, skew, start_times

ORACLES = Path(__file__).parent / "oracles"
T, B, D, H = 70, 3, 6, 8  # longer than two chunks of 32 steps
QKV = ("query", "key", "value")
REACH = 10  # of two blocks that each see 5 steps back
CELLS = {
    "gtrxl": partial(make_cell, "gtrxl", H, num_heads=2, memory_length=5),
    "gpt2": partial(make_cell, "gpt2", H, num_heads=2, context_length=6),
    "gpt2 learned": partial(make_cell, "gpt2", H, num_heads=2, context_length=6, positions="learned", num_positions=20),
}


@partial(jax.jit, static_argnums=0)
def sequence(cell, params, carry, xs, starts):
    return cell.apply(params, carry, xs, starts, method="sequence")


def setup(name):
    """A cell with perturbed parameters, its initial carry, inputs, and starts that also leave long episodes."""
    cell, rng = CELLS[name](), np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(size=(T, B, D)))
    starts = jnp.zeros((T, B), bool).at[jnp.array([0, 3, 4, 40, T - 1]), jnp.array([0, 1, 1, 2, 0])].set(True)
    carry = cell.initialize_carry(jax.random.key(0), (B, D))
    params = cell.init(jax.random.key(0), carry, xs[0])
    return cell, jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), params), carry, xs, starts


# --- References, one step of one environment at a time ---------------------------------------------------------------


def layer_norm(params, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_gtrxl_block(params, history):
    """The output at the last of the inputs in `history`, at most M + 1 of them."""
    x, normed, p = history[-1], layer_norm(params["attention_norm"], np.stack(history)), params["attention"]
    project = lambda name, x: np.einsum("...i,ihd->...hd", x, p[name]["kernel"])  # noqa: E731
    q, k, v = project("query", normed[-1]), project("key", normed), project("value", normed)
    heads, d = q.shape
    attended = np.zeros_like(q)
    for head in range(heads):
        scores = []
        for s in range(len(history)):
            distance = len(history) - 1 - s
            angles = distance / 10000 ** (np.arange(0, len(x), 2) / len(x))
            r = project("position", np.concatenate([np.sin(angles), np.cos(angles)]))
            content = (q[head] + p["content_bias"][head]) @ k[s, head]
            scores.append((content + (q[head] + p["position_bias"][head]) @ r[head]) / d**0.5)
        attended[head] = softmax(np.array(scores)) @ v[:, head]

    def gate(g, x, y):
        w = lambda name, x: x @ g[name]["kernel"]  # noqa: E731
        r, z = sigmoid(w("w_r", y) + w("u_r", x)), sigmoid(w("w_z", y) + w("u_z", x) - g["bias"])
        return (1 - z) * x + z * np.tanh(w("w_h", y) + w("u_h", r * x))

    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    x = gate(params["attention_gate"], x, np.maximum(np.einsum("hd,hdo->o", attended, p["out"]["kernel"]), 0))
    hidden = np.maximum(dense("mlp_in", layer_norm(params["mlp_norm"], x)), 0)
    return gate(params["mlp_gate"], x, np.maximum(dense("mlp_out", hidden), 0))


def reference_gpt2_block(params, history, rotary):
    x, normed = history[-1], layer_norm(params["attention_norm"], np.stack(history))
    project = lambda name, x: np.einsum("...i,ihd->...hd", x, params[name]["kernel"]) + params[name]["bias"]  # noqa: E731
    q, k, v = project("query", normed[-1]), project("key", normed), project("value", normed)
    heads, d = q.shape
    attended = np.zeros_like(q)
    for head in range(heads):
        scores = []
        for s in range(len(history)):
            # As complex numbers: turning by the distance is multiplication by exp(i * distance * frequency).
            angles = rotary * (len(history) - 1 - s) / 10000 ** (np.arange(d // 2) / (d // 2))
            pair = lambda x: x[: d // 2] + 1j * x[d // 2 :]  # noqa: E731
            scores.append((pair(q[head]) * np.exp(1j * angles) * pair(k[s, head]).conj()).real.sum() / d**0.5)
        attended[head] = softmax(np.array(scores)) @ v[:, head]
    x = x + np.einsum("hd,hdo->o", attended, params["out"]["kernel"]) + params["out"]["bias"]
    hidden = layer_norm(params["mlp_norm"], x) @ params["mlp_in"]["kernel"] + params["mlp_in"]["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh((2 / np.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return x + hidden @ params["mlp_out"]["kernel"] + params["mlp_out"]["bias"]


def reference(name, params, xs, starts):
    params = jax.tree.map(np.asarray, params["params"])
    ys = np.zeros((T, B, H))
    for env in range(B):
        for t in range(T):
            if t == 0 or starts[t, env]:
                streams = [[], []]  # inputs of both blocks, in this episode
            x = xs[t, env] @ params["embed"]["kernel"] + params["embed"]["bias"]
            if name == "gpt2 learned":
                x = x + params["positions"][min(len(streams[0]), 19)]
            for index, stream in enumerate(streams):
                stream.append(x)
                block = params[f"block_{index}"]
                if name == "gtrxl":
                    x = reference_gtrxl_block(block, stream[-6:])
                else:
                    x = reference_gpt2_block(block, stream[-6:], rotary=name == "gpt2")
            ys[t, env] = x if name == "gtrxl" else layer_norm(params["norm"], x)
    return ys


@pytest.mark.parametrize("name", CELLS)
def test_equals_a_plain_loop_over_steps_and_heads(name):
    with jax.enable_x64(True):
        cell, params, carry, xs, starts = setup(name)
        expected = reference(name, params, np.asarray(xs), np.asarray(starts))
        last, ys = sequence(cell, params, carry, xs, starts)
        np.testing.assert_allclose(ys, expected, rtol=1e-10, atol=1e-10)
        # pieces shorter than the window, longer than it, and longer than a chunk
        chunk_carry, chunks = carry, []
        for chunk in (slice(0, 3), slice(3, 4), slice(4, 12), slice(12, T)):
            chunk_carry, chunk_ys = sequence(cell, params, chunk_carry, xs[chunk], starts[chunk])
            chunks.append(chunk_ys)
        np.testing.assert_allclose(jnp.concatenate(chunks), expected, rtol=1e-10, atol=1e-10)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), chunk_carry, last)


# --- The window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gtrxl", "gpt2"])
def test_reach_is_exact(name):
    cell, params, carry, xs, _ = setup(name)
    gradient = jax.grad(lambda xs: sequence(cell, params, carry, xs, jnp.zeros((T, B), bool))[1][-1].sum())(xs)
    assert (gradient[: T - 1 - REACH] == 0).all()
    assert (jnp.abs(gradient[T - 1 - REACH :]).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", CELLS)
def test_broken_inputs_reach_those_who_see_them_and_nobody_else(name, poison):
    cell, params, carry, xs, starts = setup(name)
    _, expected = sequence(cell, params, carry, xs, starts)
    last, ys = sequence(cell, params, carry, xs.at[38].set(poison), starts)
    broken = jnp.isnan(ys).any(axis=-1)
    sees = jnp.zeros((T, B), bool).at[38 : 38 + REACH + 1].set(True).at[40:, 2].set(False)  # environment 2 starts at 40
    np.testing.assert_array_equal(broken, sees)
    np.testing.assert_array_equal(ys[~sees], expected[~sees])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


@pytest.mark.parametrize("name", CELLS)
def test_a_broken_carry_before_a_start_reaches_no_gradient(name):
    cell, params, carry, xs, starts = setup(name)
    broken, starts = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), carry), starts.at[0].set(True)
    loss = lambda params, carry: sequence(cell, params, carry, xs[:3], starts[:3])[1].sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    actual, expected = gradient(params, broken), gradient(params, carry)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_rotary_positions_do_not_tire():
    """After a million steps of an episode, outputs are what they were: positions only count within the window."""
    cell, params, carry, xs, starts = setup("gpt2")
    starts = jnp.zeros_like(starts)
    (caches, age), _ = sequence(cell, params, carry, xs, starts)
    _, expected = sequence(cell, params, (caches, age), xs, starts)
    _, old = sequence(cell, params, (caches, age + 1e6), xs, starts)
    np.testing.assert_array_equal(old, expected)


# --- Band attention --------------------------------------------------------------------------------------------------


def attention_problem(length, steps):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    starts = jnp.asarray(rng.random((steps, 2)) < 0.05)
    began = start_times(jnp.asarray([3.0, length + 5.0]), starts)
    rows = length + steps
    return normal(2, 2, steps, 4), normal(2, 2, rows, 4), normal(2, 2, rows, 3), began, normal(2, 2, steps, length + 1)


def full_attention(queries, keys, values, began, by_distance):
    """All scores at once, by pairs."""
    length = keys.shape[-2] - queries.shape[-2]
    t, s = np.arange(queries.shape[-2])[:, None], np.arange(keys.shape[-2])
    in_band = (t <= s) & (s <= t + length)
    visible = in_band & (s - length >= began[..., None])
    scores = queries @ keys.swapaxes(-1, -2) + by_distance[..., t, np.clip(s - t, 0, length)]
    return jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf)) @ values


@pytest.mark.parametrize(("length", "steps"), [(4, 70), (40, 41), (40, 7), (7, 1)])
def test_band_attention_equals_full_attention_with_its_gradients(length, steps):
    queries, keys, values, began, by_distance = attention_problem(length, steps)
    loss = lambda f, *inputs: jnp.sin(f(*inputs[:3], began, inputs[3])).sum()  # noqa: E731
    inputs = queries, keys, values, by_distance
    actual = jax.jit(jax.value_and_grad(partial(loss, band_attention), range(4)))(*inputs)
    expected = jax.value_and_grad(partial(loss, full_attention), range(4))(*inputs)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), actual, expected)


def test_band_attention_takes_memory_linear_in_time():
    def peak(steps):
        gradient = jax.grad(lambda *inputs: band_attention(*inputs).sum(), range(3))
        return jax.jit(gradient).lower(*attention_problem(16, steps)).compile().memory_analysis().temp_size_in_bytes

    assert peak(4096) < 2.2 * peak(2048)


def test_memory_keeps_the_newest_rows_of_the_episode():
    xs = jnp.array([[[1.0], [2.0]]] * 3)
    memory = jnp.array([[[-4.0], [-3.0], [-2.0], [-1.0]]] * 3)
    starts = jnp.zeros((2, 3), bool).at[0, 1].set(True)
    began = start_times(jnp.asarray([9.0, 9.0, 1.0]), starts)
    np.testing.assert_array_equal(began, [[-9, -9], [0, 0], [-1, -1]])
    rows = append(memory, xs, began)
    np.testing.assert_array_equal(newest(rows, began)[..., 0], [[-2, -1, 1, 2], [0, 0, 1, 2], [0, -1, 1, 2]])


def test_skew():
    x = jnp.array([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(skew(x, 4), [[1, 2, 3, 0], [0, 4, 5, 6]])


# --- GTrXL -----------------------------------------------------------------------------------------------------------


def test_relative_attention_equals_transformer_xl():
    """kimiyoung/transformer-xl, RelPartialLearnableMultiHeadAttn with pre-layer-norm and a band mask."""
    z = np.load(ORACLES / "transformer_xl_attention.npz")
    heads, d = z["u"].shape
    rows = np.concatenate([z["mem"], z["w"]]).swapaxes(0, 1)
    kernel = lambda w: w.T.reshape(-1, heads, d)  # noqa: E731
    params = {name: {"kernel": kernel(w)} for name, w in zip(QKV, np.split(z["qkv"], 3), strict=True)}
    params |= {"position": {"kernel": kernel(z["rn"])}, "out": {"kernel": z["on"].T.reshape(heads, d, -1)}}
    params |= {"content_bias": z["u"], "position_bias": z["v"]}
    normed = layer_norm({"scale": z["lw"], "bias": z["lb"]}, rows)
    began = jnp.full(z["w"].shape[1::-1], -len(z["mem"]))
    ys = RelativeAttention(heads, d).apply({"params": params}, jnp.asarray(normed), began)
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["o"], atol=1e-6)


def test_a_closed_gate_passes_the_stream():
    x, y = jax.random.normal(jax.random.key(0), (2, 5, H))
    for bias, changed in ((2.0, 0.3), (20.0, 1e-6)):
        gate = Gate(bias)
        out = gate.apply(gate.init(jax.random.key(1), x, y), x, y)
        assert jnp.abs(out - x).mean() < changed


def test_attention_to_a_single_step_is_its_value():
    attention, x = RelativeAttention(2, 4), jax.random.normal(jax.random.key(0), (B, 1, H))
    rows = jnp.concatenate([jnp.ones((B, 3, H)), x], axis=1)  # three slots that nothing was written to in this episode
    params = attention.init(jax.random.key(1), rows, jnp.zeros((B, 1)))
    expected = jnp.einsum("bti,ihd,hdo->bto", x, *(params["params"][name]["kernel"] for name in ("value", "out")))
    np.testing.assert_allclose(attention.apply(params, rows, jnp.zeros((B, 1))), expected, atol=1e-6)


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


def gpt2_oracle():
    """transformers GPT2Model(inputs_embeds=x): its inputs and outputs, time-major, and the parameters in our names."""
    z = np.load(ORACLES / "gpt2.npz")
    norm = lambda name: {"scale": z[f"{name}.weight"], "bias": z[f"{name}.bias"]}  # noqa: E731
    dense = lambda name: {"kernel": z[f"{name}.weight"], "bias": z[f"{name}.bias"]}  # noqa: E731
    params = {"positions": z["wpe.weight"], "norm": norm("ln_f")}
    for index in range(2):
        theirs = f"h.{index}"
        kernels = np.split(z[f"{theirs}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(z[f"{theirs}.attn.c_attn.bias"], 3)
        block = {
            name: {"kernel": kernel.reshape(16, 2, 8), "bias": bias.reshape(2, 8)}
            for name, kernel, bias in zip(QKV, kernels, biases, strict=True)
        }
        out = dense(f"{theirs}.attn.c_proj")
        block["out"] = out | {"kernel": out["kernel"].reshape(2, 8, 16)}
        block |= {"attention_norm": norm(f"{theirs}.ln_1"), "mlp_norm": norm(f"{theirs}.ln_2")}
        block |= {"mlp_in": dense(f"{theirs}.mlp.c_fc"), "mlp_out": dense(f"{theirs}.mlp.c_proj")}
        params[f"block_{index}"] = block
    return {"params": params}, jnp.asarray(z["x"]).swapaxes(0, 1), z["y"].swapaxes(0, 1)


def test_gpt2_equals_transformers():
    params, xs, expected = gpt2_oracle()
    cell = make_cell("gpt2", 16, num_heads=2, context_length=20, positions="learned", num_positions=64)
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    starts = jnp.zeros(xs.shape[:2], bool)
    _, ys = sequence(cell, params, carry, xs, starts)
    np.testing.assert_allclose(ys, expected, atol=3e-6)
    # also after another episode, and not if the window is one step too short
    used, _ = sequence(cell, params, carry, 1.0 + xs, starts)
    _, ys = sequence(cell, params, used, xs, starts.at[0].set(True))
    np.testing.assert_allclose(ys, expected, atol=3e-6)
    shorter = make_cell("gpt2", 16, num_heads=2, context_length=19, positions="learned", num_positions=64)
    _, ys = sequence(shorter, params, shorter.initialize_carry(jax.random.key(0), xs.shape[1:]), xs, starts)
    np.testing.assert_allclose(ys[:-1], expected[:-1], atol=3e-6)
    assert np.abs(ys[-1] - expected[-1]).max() > 1e-3


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gtrxl", {"num_heads": 3}, "gtrxl needs hidden_size to be a multiple of num_heads, got 8 and 3"),
        ("gtrxl", {"memory_length": 0}, "gtrxl needs memory_length to be at least 1, got 0"),
        ("gtrxl", {"num_blocks": 0}, "gtrxl needs num_blocks to be at least 1, got 0"),
        ("gtrxl", {"mlp_factor": -1}, "gtrxl needs mlp_factor to be at least 1, got -1"),
        ("gpt2", {"num_heads": 0}, "gpt2 needs hidden_size to be a multiple of num_heads, got 8 and 0"),
        ("gpt2", {"num_heads": 8}, "needs hidden_size to be an even multiple of num_heads, got 8 and 8"),
        ("gpt2", {"context_length": 1}, "gpt2 needs context_length to be at least 2, got 1"),
        ("gpt2", {"num_positions": 0}, "gpt2 needs num_positions to be at least 1, got 0"),
        ("gpt2", {"positions": "rotray"}, "gpt2 needs positions to be 'rotary' or 'learned', got 'rotray'"),
    ],
)
def test_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_cell(name, H, **options)
