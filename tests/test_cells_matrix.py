"""Matrix memories: equal to independent implementations, step by step equal to chunks, and what the papers promise."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells import make_cell
from memory_cells.chunkwise import delta_memory, gated_memory, linear_memory, unit_lower_inverse

ORACLES = Path(__file__).parent / "oracles"
CELLS = ["mlstm"]


def time_major(x):
    return jnp.asarray(x).swapaxes(0, 1)


def l2_normalise(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


# --- The recurrences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_delta_memory_equals_transformers(impl):
    """transformers 5.23, qwen3_next: torch_recurrent_gated_delta_rule, from a state that is not zero."""
    z = np.load(ORACLES / "linear_recurrences.npz")
    q, k = l2_normalise(z["gd_q"]) * z["gd_q"].shape[-1] ** -0.5, l2_normalise(z["gd_k"])
    inputs = [time_major(x) for x in (q, k, z["gd_v"], z["gd_b"], z["gd_g"])]
    starts = jnp.zeros(inputs[0].shape[:2], bool)
    state, ys = delta_memory(z["gd_S0"], *inputs, starts, impl)
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["gd_o"], atol=1e-6)
    np.testing.assert_allclose(state, z["gd_S"], atol=1e-6)


@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_delta_and_linear_memory_equal_flash_linear_attention(impl):
    """flash-linear-attention, naive forms: delta rule (keys and queries of unit length) and retention."""
    z = np.load(ORACLES / "linear_recurrences.npz")
    q, k, v, beta = (z[f"gd_{name}"] for name in "qkvb")
    starts, zeros = jnp.zeros(beta.shape[1::-1], bool), jnp.zeros_like(z["gd_S0"])
    inputs = [time_major(x) for x in (l2_normalise(q) / 2, l2_normalise(k), v, beta)]
    _, ys = delta_memory(zeros, *inputs, None, starts, impl)
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["dn_o"], atol=1e-6)
    log_decay = np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(3))), beta.shape).astype(np.float32)
    _, ys = linear_memory(zeros, *(time_major(x) for x in (q / 2, k, v, log_decay)), starts, impl)
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["rt_o"], rtol=1e-5, atol=3e-6)


def reference(rule, inputs, starts):
    """The recurrences as the papers write them, one step after another, in float64; y (T, B, heads, dv)."""
    inputs = [np.asarray(x, np.float64) for x in inputs]
    steps, *_ = inputs[2].shape
    ys = np.zeros(inputs[2].shape)
    for b, h in np.ndindex(*ys.shape[1:3]):
        for t in range(steps):
            row = [x[t, b, h] for x in inputs]
            q, k, v = row[:3]
            if starts[t, b] or t == 0:
                memory, normaliser = np.zeros((len(k), len(v))), np.zeros(len(k))
            if rule == "linear":
                memory = np.exp(row[3]) * memory + np.outer(k, v)
                ys[t, b, h] = memory.T @ q
            elif rule == "delta":  # Gated DeltaNet (2412.06464), equation 10, transposed
                beta, decay = row[3], np.exp(row[4])
                memory = decay * (np.eye(len(k)) - beta * np.outer(k, k)) @ memory + beta * np.outer(k, v)
                ys[t, b, h] = memory.T @ q
            else:  # mLSTM without the stabiliser
                f, i = np.exp(row[3]), np.exp(row[4])
                memory, normaliser = f * memory + i * np.outer(k, v), f * normaliser + i * k
                ys[t, b, h] = memory.T @ q / max(abs(normaliser @ q), 1)
    return ys


RULES = {"linear": linear_memory, "delta": delta_memory, "gated": gated_memory}


def rule_inputs(rule, steps, seed=0):
    rng = np.random.default_rng(seed)
    shape = (steps, 2, 3)
    q, k, v = rng.normal(size=(*shape, 4)), l2_normalise(rng.normal(size=(*shape, 4))), rng.normal(size=(*shape, 5))
    log_decay = -np.exp(rng.normal(size=shape) - 2)
    beta, log_i = 2 * rng.random(shape), rng.normal(size=shape)
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
        carry, inputs, starts = rule_inputs(rule, 70)  # three chunks of 23 and a step
        _, ys = RULES[rule](carry, *inputs, starts, impl)
        expected = reference(rule, inputs, np.asarray(starts))
        # The paper's equation of the mLSTM has no guard against division by zero, 1e-6 in units of exp(m).
        np.testing.assert_allclose(ys, expected, rtol=2e-5 if rule == "gated" else 1e-9, atol=1e-11)


def test_gated_memory_equals_the_authors():
    """PyPI xlstm 2.0.6, parallel_stabilized_simple; (B, heads, T, ...)."""
    z = np.load(ORACLES / "linear_recurrences.npz")
    q, k, v, i, f = (jnp.moveaxis(jnp.asarray(z[f"ml_{name}"]), 2, 0) for name in "qkvif")
    carry = jnp.zeros((2, 2, 4, 5)), jnp.zeros((2, 2))
    log_f, starts = jax.nn.log_sigmoid(f[..., 0]), jnp.zeros((len(q), 2), bool)
    _, hs = gated_memory(carry, q, k / 2, v, log_f, i[..., 0], starts)
    expected = jnp.moveaxis(jnp.asarray(z["ml_h"]), 2, 0)
    np.testing.assert_allclose(hs, expected, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("shift", [-40.0, 60.0])
def test_gated_memory_is_stable_for_gates_of_any_size(shift):
    """Where the normaliser is above its floor a common factor of all input gates cancels, however large."""
    carry, (q, k, v, log_f, log_i), starts = rule_inputs("gated", 40)
    q, k = jnp.abs(q) + 1, jnp.abs(k) + 1  # n . q well above 1 for log_i of 0
    gradient = jax.grad(lambda log_i: gated_memory(carry, q, k, v, log_f, log_i, starts)[1].sum())(log_i + shift)
    assert jnp.isfinite(gradient).all()
    if shift > 0:
        ys = gated_memory(carry, q, k, v, log_f, log_i + shift, starts)[1]
        np.testing.assert_allclose(ys, gated_memory(carry, q, k, v, log_f, log_i + 10, starts)[1], atol=1e-4)


def test_a_broken_memory_ends_where_an_episode_starts_inside_a_chunk():
    for rule, memory in RULES.items():
        carry, inputs, starts = rule_inputs(rule, 20)
        starts = jnp.zeros_like(starts).at[7].set(True)
        broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), carry)
        last, ys = memory(broken, *inputs, starts)
        assert jnp.isnan(ys[:7]).all()
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((last, ys[7:])))


@pytest.mark.parametrize("size", [1, 2, 7, 16, 32])
def test_unit_lower_inverse(size):
    """Also in the worst case of the delta rule, equal keys and strength 2: powers of such a matrix lose all digits."""
    rng = np.random.default_rng(0)
    for a in (np.tri(size, k=-1) * rng.normal(size=(3, 1, size, size)), 2.0 * np.tri(size, k=-1)):
        a = jnp.asarray(a, jnp.float32)
        inverse = unit_lower_inverse(a)
        expected = np.linalg.inv(np.eye(size) + np.asarray(a, np.float64))
        np.testing.assert_allclose(inverse, expected, atol=2e-6 * np.abs(expected).max())
    direct = lambda a: jnp.sin(jnp.linalg.inv(jnp.eye(size) + a)).sum()  # noqa: E731
    gradient = jax.grad(lambda a: jnp.sin(unit_lower_inverse(a)).sum())(a)
    np.testing.assert_allclose(jnp.tril(gradient, -1), jnp.tril(jax.grad(direct)(a), -1), atol=1e-3)


# --- The cells -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_chunks_have_the_gradients_of_single_steps(name):
    rng = np.random.default_rng(0)
    xs, starts = jnp.asarray(rng.normal(size=(41, 2, 8)), jnp.float32), jnp.asarray(rng.random((41, 2)) < 0.1)
    cell = make_cell(name, 8)
    carry = cell.initialize_carry(jax.random.key(0), (2, 8))
    params = jax.jit(cell.init)(jax.random.key(0), carry, xs[0])
    perturb = lambda leaf: leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params, carry = jax.tree.map(perturb, (params, carry))

    def loss(impl, params, carry, xs):
        last, ys = make_cell(name, 8, impl=impl).apply(params, carry, xs, starts, method="sequence")
        return (ys * jnp.arange(1.0, 9)).sum() + sum(jnp.tanh(leaf).sum() for leaf in jax.tree.leaves(last))

    grad = lambda impl: jax.jit(jax.grad(partial(loss, impl), argnums=(0, 1, 2)))(params, carry, xs)  # noqa: E731
    actual, expected = grad("parallel"), grad("scan")
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * scale, rtol=1e-3), actual, expected)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "multiple of num_heads, got 8 and 3"),
        ({"conv_width": 1}, "conv_width to be 0 or at least 2, got 1"),
        ({"impl": "chunks"}, "impl to be one of auto, scan, parallel, got 'chunks'"),
    ],
)
def test_cells_refuse(options, message):
    for name in CELLS:
        with pytest.raises(ValueError, match=f"{name} needs .*{message}"):
            make_cell(name, 8, **options)
