"""Attention memories: the window is exact however a sequence is cut, nothing hidden is read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import (
    WINDOWED,
    B,
    H,
    dense,
    layer_norm,
    sequence,
    setup_windowed,
    sigmoid,
    softmax,
)

T = 70
REACH = 10  # of two blocks that each see 5 steps back


# --- References, one step of one environment at a time --------------------------------------------


def reference_gtrxl_block(params, history):
    """The output at the last of the inputs in `history`, at most M + 1 of them."""
    x = history[-1]
    normed = layer_norm(params["attention_norm"], np.stack(history), 1e-5)
    p = params["attention"]
    project = lambda name, x: np.einsum("...i,ihd->...hd", x, p[name]["kernel"])  # noqa: E731
    q = project("query", normed[-1])
    k = project("key", normed)
    v = project("value", normed)
    heads, d = q.shape
    attended = np.zeros_like(q)
    for head in range(heads):
        scores = []
        for s in range(len(history)):
            distance = len(history) - 1 - s
            angles = distance / 10000 ** (np.arange(0, len(x), 2) / len(x))
            r = project("position", np.concatenate([np.sin(angles), np.cos(angles)]))
            content = (q[head] + p["content_bias"][head]) @ k[s, head]
            position = (q[head] + p["position_bias"][head]) @ r[head]
            scores.append((content + position) / d**0.5)
        attended[head] = softmax(np.array(scores)) @ v[:, head]

    def gate(g, x, y):
        w = lambda name, x: x @ g[name]["kernel"]  # noqa: E731
        r = sigmoid(w("w_r", y) + w("u_r", x))
        z = sigmoid(w("w_z", y) + w("u_z", x) - g["bias"])
        return (1 - z) * x + z * np.tanh(w("w_h", y) + w("u_h", r * x))

    attended = np.einsum("hd,hdo->o", attended, p["out"]["kernel"])
    x = gate(params["attention_gate"], x, np.maximum(attended, 0))
    hidden = np.maximum(dense(params["mlp_in"], layer_norm(params["mlp_norm"], x, 1e-5)), 0)
    return gate(params["mlp_gate"], x, np.maximum(dense(params["mlp_out"], hidden), 0))


def reference_gpt2_block(params, history, rotary):
    """The output at the last of the inputs in `history`, at most C of them."""
    x = history[-1]
    normed = layer_norm(params["attention_norm"], np.stack(history), 1e-5)

    def project(name, x):
        return np.einsum("...i,ihd->...hd", x, params[name]["kernel"]) + params[name]["bias"]

    q = project("query", normed[-1])
    k = project("key", normed)
    v = project("value", normed)
    heads, d = q.shape
    half = d // 2
    attended = np.zeros_like(q)
    for head in range(heads):
        scores = []
        for s in range(len(history)):
            # In complex numbers, a rotation is the product with exp(i * distance * frequency).
            angles = rotary * (len(history) - 1 - s) / 10000 ** (np.arange(half) / half)
            pair = lambda x: x[:half] + 1j * x[half:]  # noqa: E731
            product = pair(q[head]) * np.exp(1j * angles) * pair(k[s, head]).conj()
            scores.append(product.real.sum() / d**0.5)
        attended[head] = softmax(np.array(scores)) @ v[:, head]
    x = x + np.einsum("hd,hdo->o", attended, params["out"]["kernel"]) + params["out"]["bias"]
    hidden = dense(params["mlp_in"], layer_norm(params["mlp_norm"], x, 1e-5))
    hidden = 0.5 * hidden * (1 + np.tanh((2 / np.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return x + dense(params["mlp_out"], hidden)


def reference(name, params, xs, starts):
    params = jax.tree.map(np.asarray, params["params"])
    ys = np.zeros((T, B, H))
    for env in range(B):
        for t in range(T):
            if t == 0 or starts[t, env]:
                streams = [[], []]  # inputs of both blocks, in this episode
            x = dense(params["embed"], xs[t, env])
            if name == "gpt2 learned":
                x = x + params["positions"][min(len(streams[0]), 19)]
            for index, stream in enumerate(streams):
                stream.append(x)
                block = params[f"block_{index}"]
                if name == "gtrxl":
                    x = reference_gtrxl_block(block, stream[-6:])
                else:
                    x = reference_gpt2_block(block, stream[-6:], rotary=name == "gpt2")
            ys[t, env] = x if name == "gtrxl" else layer_norm(params["norm"], x, 1e-5)
    return ys


@pytest.mark.parametrize("name", WINDOWED)
def test_equals_a_plain_loop_over_steps_and_heads(name):
    with jax.enable_x64(True):
        cell, params, carry, xs, starts = setup_windowed(name, "float64")
        expected = reference(name, params, np.asarray(xs), np.asarray(starts))
        close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
        last, ys = sequence(cell, params, carry, xs, starts)
        close(ys, expected)
        # pieces shorter than the window, longer than it, and longer than a chunk
        chunk_carry, chunks = carry, []
        for chunk in (slice(0, 3), slice(3, 4), slice(4, 12), slice(12, T)):
            chunk_carry, chunk_ys = sequence(cell, params, chunk_carry, xs[chunk], starts[chunk])
            chunks.append(chunk_ys)
        close(jnp.concatenate(chunks), expected)
        jax.tree.map(close, chunk_carry, last)


# --- The window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gtrxl", "gpt2"])
def test_reach_is_exact(name):
    cell, params, carry, xs, _ = setup_windowed(name)

    @jax.jit
    @jax.grad
    def gradient(xs):
        _, ys = sequence(cell, params, carry, xs, jnp.zeros((T, B), bool))
        return ys[-1].sum()

    by_xs = gradient(xs)
    assert (by_xs[: T - 1 - REACH] == 0).all()
    assert (jnp.abs(by_xs[T - 1 - REACH :]).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", WINDOWED)
def test_broken_inputs_reach_those_who_see_them_and_nobody_else(name, poison):
    cell, params, carry, xs, starts = setup_windowed(name)
    _, expected = sequence(cell, params, carry, xs, starts)
    last, ys = sequence(cell, params, carry, xs.at[38].set(poison), starts)
    broken = jnp.isnan(ys).any(axis=-1)
    sees = jnp.zeros((T, B), bool).at[38 : 38 + REACH + 1].set(True)
    sees = sees.at[40:, 2].set(False)  # environment 2 starts at 40
    np.testing.assert_array_equal(broken, sees)
    np.testing.assert_array_equal(ys[~sees], expected[~sees])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_broken_carry_before_a_start_reaches_no_gradient(name):
    cell, params, carry, xs, starts = setup_windowed(name)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), carry)
    starts = starts.at[0].set(True)

    @jax.jit
    @jax.grad
    def gradient(params, carry):
        _, ys = sequence(cell, params, carry, xs[:3], starts[:3])
        return ys.sum()

    actual = gradient(params, broken)
    jax.tree.map(np.testing.assert_array_equal, actual, gradient(params, carry))
