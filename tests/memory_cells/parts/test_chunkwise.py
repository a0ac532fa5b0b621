"""Matrix memories: step by step and in chunks, they equal other implementations and the papers."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import ORACLES, time_major

from memory_cells.parts.chunkwise import (
    delta_memory,
    gated_memory,
    linear_memory,
    unit_lower_inverse,
)

ROOT = Path(__file__).parents[3]
RULES = {"linear": linear_memory, "delta": delta_memory, "gated": gated_memory}


def l2_normalise(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


# --- Other implementations ------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_delta_memory_equals_transformers(impl):
    """transformers 5.23, qwen3_next: torch_recurrent_gated_delta_rule, from a used state."""
    z = np.load(ORACLES / "linear_recurrences.npz")
    q = l2_normalise(z["gd_q"]) * z["gd_q"].shape[-1] ** -0.5
    k = l2_normalise(z["gd_k"])
    inputs = [time_major(x) for x in (q, k, z["gd_v"], z["gd_b"], z["gd_g"])]
    starts = jnp.zeros(inputs[0].shape[:2], bool)
    state, ys = delta_memory(z["gd_S0"], *inputs, starts, impl)
    np.testing.assert_allclose(time_major(ys), z["gd_o"], atol=1e-6)
    np.testing.assert_allclose(state, z["gd_S"], atol=1e-6)


@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_delta_and_linear_memory_equal_flash_linear_attention(impl):
    """flash-linear-attention, naive forms: delta rule (unit keys and queries) and retention."""
    z = np.load(ORACLES / "linear_recurrences.npz")
    q, k, v, beta = (z[f"gd_{name}"] for name in "qkvb")
    starts = jnp.zeros(beta.shape[1::-1], bool)
    zeros = jnp.zeros_like(z["gd_S0"])
    inputs = [time_major(x) for x in (l2_normalise(q) / 2, l2_normalise(k), v, beta)]
    _, ys = delta_memory(zeros, *inputs, None, starts, impl)
    np.testing.assert_allclose(time_major(ys), z["dn_o"], atol=1e-6)
    log_decay = np.log(1 - 2.0 ** (-5 - np.arange(3)))
    log_decay = np.broadcast_to(log_decay, beta.shape).astype(np.float32)
    inputs = [time_major(x) for x in (q / 2, k, v, log_decay)]
    _, ys = linear_memory(zeros, *inputs, starts, impl)
    np.testing.assert_allclose(time_major(ys), z["rt_o"], rtol=1e-5, atol=3e-6)


def test_gated_memory_equals_the_authors():
    """PyPI xlstm 2.0.6, parallel_stabilized_simple; (B, heads, T, ...)."""
    z = np.load(ORACLES / "linear_recurrences.npz")
    q, k, v, i, f = (jnp.moveaxis(jnp.asarray(z[f"ml_{name}"]), 2, 0) for name in "qkvif")
    carry = jnp.zeros((2, 2, 4, 5)), jnp.zeros((2, 2))
    log_f = jax.nn.log_sigmoid(f[..., 0])
    starts = jnp.zeros((len(q), 2), bool)
    _, hs = gated_memory(carry, q, k / 2, v, log_f, i[..., 0], starts)
    expected = jnp.moveaxis(jnp.asarray(z["ml_h"]), 2, 0)
    np.testing.assert_allclose(hs, expected, rtol=2e-5, atol=3e-6)


# --- The papers' equations ------------------------------------------------------------------------


def reference(rule, inputs, starts):
    """The recurrences as the papers write them, step by step in float64; y (T, B, heads, dv)."""
    inputs = [np.asarray(x, np.float64) for x in inputs]
    steps, *_ = inputs[2].shape
    ys = np.zeros(inputs[2].shape)
    for b, h in np.ndindex(*ys.shape[1:3]):
        for t in range(steps):
            row = [x[t, b, h] for x in inputs]
            q, k, v = row[:3]
            if starts[t, b] or t == 0:
                memory = np.zeros((len(k), len(v)))
                normaliser = np.zeros(len(k))
            if rule == "linear":
                memory = np.exp(row[3]) * memory + np.outer(k, v)
                ys[t, b, h] = memory.T @ q
            elif rule == "delta":  # Gated DeltaNet (2412.06464), section 3.1, transposed
                beta = row[3]
                decay = np.exp(row[4])
                kept = decay * (np.eye(len(k)) - beta * np.outer(k, k)) @ memory
                memory = kept + beta * np.outer(k, v)
                ys[t, b, h] = memory.T @ q
            else:  # mLSTM without the stabiliser
                f = np.exp(row[3])
                i = np.exp(row[4])
                memory = f * memory + i * np.outer(k, v)
                normaliser = f * normaliser + i * k
                ys[t, b, h] = memory.T @ q / max(abs(normaliser @ q), 1)
    return ys


def rule_inputs(rule, steps, seed=0):
    rng = np.random.default_rng(seed)
    shape = (steps, 2, 3)
    q = rng.normal(size=(*shape, 4))
    k = l2_normalise(rng.normal(size=(*shape, 4)))
    v = rng.normal(size=(*shape, 5))
    log_decay = -np.exp(rng.normal(size=shape) - 2)
    beta = 2 * rng.random(shape)
    log_i = rng.normal(size=shape)
    extra = {"linear": [log_decay], "delta": [beta, log_decay], "gated": [log_decay, log_i]}
    starts = rng.random((steps, 2)) < 0.08
    starts[0, 0] = starts[-1, 1] = True
    carry = jnp.zeros((2, 3, 4, 5))
    if rule == "gated":
        carry = jnp.zeros((2, 3, 4, 6)), jnp.zeros((2, 3))
    return carry, [jnp.asarray(x) for x in (q, k, v, *extra[rule])], jnp.asarray(starts)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_recurrences_equal_the_papers_equations(rule, impl):
    with jax.enable_x64(True):
        carry, inputs, starts = rule_inputs(rule, 70)  # 3 chunks of 23 and a step, or 2 of 35
        _, ys = RULES[rule](carry, *inputs, starts, impl)
        expected = reference(rule, inputs, np.asarray(starts))
        # The paper's mLSTM has no guard against division by zero, here 1e-6 in units of exp(m).
        rtol = 2e-5 if rule == "gated" else 1e-9
        np.testing.assert_allclose(ys, expected, rtol=rtol, atol=1e-11)


# --- What is broken, and large gates --------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_broken_step_breaks_the_rest_of_its_episode_and_nothing_else(rule, poison):
    """In any input that is stored, also where one chunk has steps of two episodes."""
    carry, inputs, starts = rule_inputs(rule, 70)
    inputs = [x.astype(jnp.float32) for x in inputs]
    starts = starts.at[:, 0].set(False).at[17, 0].set(True)
    memory = jax.jit(RULES[rule])
    last, expected = memory(carry, *inputs, starts)
    for index in range(1, len(inputs)):
        broken = list(inputs)
        broken[index] = broken[index].at[6, 0].set(poison)
        broken_last, ys = memory(carry, *broken, starts)
        sees = jnp.zeros(starts.shape, bool).at[6:17, 0].set(True)
        np.testing.assert_array_equal(jnp.isnan(ys).all(axis=(2, 3)), sees)
        np.testing.assert_array_equal(ys[~sees], expected[~sees])
        jax.tree.map(np.testing.assert_array_equal, broken_last, last)
        broken_last, _ = memory(carry, *broken, starts.at[17, 0].set(False))
        assert all(jnp.isnan(leaf[0]).all() for leaf in jax.tree.leaves(broken_last))


def test_a_broken_memory_ends_where_an_episode_starts_inside_a_chunk():
    for rule, memory in RULES.items():
        carry, inputs, starts = rule_inputs(rule, 20)
        starts = jnp.zeros_like(starts).at[7].set(True)
        broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), carry)
        last, ys = memory(broken, *inputs, starts)
        assert jnp.isnan(ys[:7]).all()
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((last, ys[7:])))


@pytest.mark.parametrize("shift", [-40.0, 60.0])
def test_gated_memory_is_stable_for_gates_of_any_size(shift):
    """If the normaliser is above its floor, a common factor of all input gates cancels."""
    carry, (q, k, v, log_f, log_i), starts = rule_inputs("gated", 40)
    q = jnp.abs(q) + 1  # n . q well above 1 for log_i of 0
    k = jnp.abs(k) + 1

    def reads(log_i):
        return gated_memory(carry, q, k, v, log_f, log_i, starts)[1]

    gradient = jax.grad(lambda log_i: reads(log_i).sum())(log_i + shift)
    assert jnp.isfinite(gradient).all()
    if shift > 0:
        np.testing.assert_allclose(reads(log_i + shift), reads(log_i + 10), atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_decays_of_any_size_keep_their_digits(rule):
    """Steps that forget everything do not blur those after them, which forget next to nothing.

    Their log decays are differences of two sums of 1e6, if every one is not added up by itself.
    """
    carry, inputs, starts = rule_inputs(rule, 60)
    decay = 4 if rule == "delta" else 3
    forgets = np.random.default_rng(1).random((60, 2, 3)) < 0.3
    inputs[decay] = jnp.where(forgets, -1e5, 0.01 * inputs[decay])
    inputs = [x.astype(jnp.float32) for x in inputs]
    _, ys = RULES[rule](carry, *inputs, starts, "parallel")
    _, expected = RULES[rule](carry, *inputs, starts, "scan")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ys, expected, atol=1e-5 * scale)


# --- The inverse of the delta rule ----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 16, 32])
def test_unit_lower_inverse(size):
    """Also in the worst case of the delta rule, equal keys and strength 2.

    Powers of such a matrix lose all digits.
    """
    rng = np.random.default_rng(0)
    for a in (np.tri(size, k=-1) * rng.normal(size=(3, 1, size, size)), 2.0 * np.tri(size, k=-1)):
        a = jnp.asarray(a, jnp.float32)
        inverse = unit_lower_inverse(a)
        expected = np.linalg.inv(np.eye(size) + np.asarray(a, np.float64))
        np.testing.assert_allclose(inverse, expected, atol=2e-6 * np.abs(expected).max())
    direct = lambda a: jnp.sin(jnp.linalg.inv(jnp.eye(size) + a)).sum()  # noqa: E731
    gradient = jax.grad(lambda a: jnp.sin(unit_lower_inverse(a)).sum())(a)
    np.testing.assert_allclose(jnp.tril(gradient, -1), jnp.tril(jax.grad(direct)(a), -1), atol=1e-3)


def test_unit_lower_inverse_of_three_seeds_compiles():
    """With an axis for each half, its gradient crashed the compiler: a bug of XLA in JAX 0.11."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from memory_cells.parts.chunkwise import unit_lower_inverse
a = np.tril(np.random.default_rng(0).normal(size=(3, 2, 4, 32, 32)), -1) / 8
gradient = jax.jit(jax.vmap(jax.grad(lambda a: unit_lower_inverse(a).sum())))(jnp.float32(a))
inverse = np.linalg.inv(np.eye(32) + a).swapaxes(-1, -2)
np.testing.assert_allclose(gradient, -inverse @ np.ones((32, 32)) @ inverse, atol=1e-3)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
