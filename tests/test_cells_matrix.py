"""Matrix memories: equal to independent implementations, step by step equal to chunks, and what the papers promise."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells import make_cell
from memory_cells.parts import chunkwise
from memory_cells.parts.chunkwise import delta_memory, gated_memory, linear_memory, unit_lower_inverse

ORACLES = Path(__file__).parent / "oracles"
CELLS = ["mlstm", "xlstm", "linear_attention", "retnet", "deltanet", "gated_deltanet"]


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
            elif rule == "delta":  # Gated DeltaNet (2412.06464), section 3.1, transposed
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
        carry, inputs, starts = rule_inputs(rule, 70)  # three chunks of 23 and a step, or two of 35
        _, ys = RULES[rule](carry, *inputs, starts, impl)
        expected = reference(rule, inputs, np.asarray(starts))
        # The paper's equation of the mLSTM has no guard against division by zero, 1e-6 in units of exp(m).
        np.testing.assert_allclose(ys, expected, rtol=2e-5 if rule == "gated" else 1e-9, atol=1e-11)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_broken_step_breaks_the_rest_of_its_episode_and_nothing_else(rule, poison):
    """In whichever of the inputs that are stored it is, and also where one chunk has steps of two episodes."""
    carry, inputs, starts = rule_inputs(rule, 70)
    inputs = [x.astype(jnp.float32) for x in inputs]
    starts = starts.at[:, 0].set(False).at[17, 0].set(True)
    memory = jax.jit(RULES[rule])
    last, expected = memory(carry, *inputs, starts)
    for index in range(1, len(inputs)):
        broken = [x.at[6, 0].set(poison) if i == index else x for i, x in enumerate(inputs)]
        broken_last, ys = memory(carry, *broken, starts)
        sees = jnp.zeros(starts.shape, bool).at[6:17, 0].set(True)
        np.testing.assert_array_equal(jnp.isnan(ys).all(axis=(2, 3)), sees)
        np.testing.assert_array_equal(ys[~sees], expected[~sees])
        jax.tree.map(np.testing.assert_array_equal, broken_last, last)
        broken_last, _ = memory(carry, *broken, starts.at[17, 0].set(False))
        assert all(jnp.isnan(leaf[0]).all() for leaf in jax.tree.leaves(broken_last))


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


def test_unit_lower_inverse_of_three_seeds_compiles():
    """Differentiated, with an axis for each half, it ended the process that compiled it: a bug of XLA's in JAX 0.11."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from memory_cells.parts.chunkwise import unit_lower_inverse
a = np.tril(np.random.default_rng(0).normal(size=(3, 2, 4, 32, 32)), -1) / 8
gradient = jax.jit(jax.vmap(jax.grad(lambda a: unit_lower_inverse(a).sum())))(jnp.float32(a))
inverse = np.linalg.inv(np.eye(32) + a).swapaxes(-1, -2)
np.testing.assert_allclose(gradient, -inverse @ np.ones((32, 32)) @ inverse, atol=1e-3)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- The cells -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CELLS if name != "xlstm"])  # which has mlstm's
def test_pieces_and_chunks_have_the_gradients_of_single_steps(name, monkeypatch):
    monkeypatch.setattr(chunkwise, "CACHED", 0)
    rng = np.random.default_rng(0)  # three pieces or chunks of 25 steps and two steps, or two of 38 and a step
    xs, starts = jnp.asarray(rng.normal(size=(77, 2, 8)), jnp.float32), jnp.asarray(rng.random((77, 2)) < 0.1)
    cell = make_cell(name, 8)
    carry = cell.initialize_carry(jax.random.key(0), (2, 8))
    params = jax.jit(cell.init)(jax.random.key(0), carry, xs[0])
    perturb = lambda leaf: leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params, carry = jax.tree.map(perturb, (params, carry))

    def loss(impl, params, carry, xs):
        last, ys = make_cell(name, 8, impl=impl).apply(params, carry, xs, starts, method="sequence")
        return (ys * jnp.arange(1.0, 9)).sum() + sum(jnp.tanh(leaf).sum() for leaf in jax.tree.leaves(last))

    grad = lambda impl: jax.jit(jax.grad(partial(loss, impl), argnums=(0, 1, 2)))(params, carry, xs)  # noqa: E731
    expected = grad("scan")
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    close = lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * scale, rtol=1e-3)  # noqa: E731
    jax.tree.map(close, grad("auto"), expected)
    jax.tree.map(close, grad("parallel"), expected)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected[0]))


@partial(jax.jit, static_argnums=0)
def sequence(cell, params, carry, xs, starts):
    return cell.apply(params, carry, xs, starts, method="sequence")


def run(cell, params, xs, starts=None):
    """From the initial carry; xs (T, B, D)."""
    starts = jnp.zeros(xs.shape[:2], bool) if starts is None else starts
    return sequence(cell, params, cell.initialize_carry(jax.random.key(0), xs.shape[1:]), xs, starts)[1]


def test_xlstm_equals_the_authors():
    """PyPI xlstm 2.0.6, xLSTMBlockStack of an mLSTM and an sLSTM block, E = 32, 4 heads, vanilla backends."""
    z = np.load(ORACLES / "xlstm_stack.npz")
    dense = lambda name: {"kernel": z[name].T}  # noqa: E731
    scale = lambda name: 1.0 + z[name]  # noqa: E731
    blocks = lambda name: z[name].swapaxes(1, 2)  # noqa: E731

    prefix = "blocks.0.xlstm."
    mlstm = {"up": dense(prefix + "proj_up.weight"), "down": dense(prefix + "proj_down.weight")}
    mlstm |= {f"kernel_{name}": blocks(f"{prefix}{name}_proj.weight") for name in "qkv"}
    conv = prefix + "conv1d.conv."
    mlstm["conv"] = {"kernel": z[conv + "weight"][:, 0].T, "bias": z[conv + "bias"]}
    for ours, theirs in (("input_gate", "igate"), ("forget_gate", "fgate")):
        gate = f"{prefix}mlstm_cell.{theirs}."
        mlstm[ours] = {"kernel": z[gate + "weight"].T, "bias": z[gate + "bias"]}
    mlstm |= {"norm_scale": scale(prefix + "mlstm_cell.outnorm.weight"), "skip": z[prefix + "learnable_skip"]}

    prefix = "blocks.1.xlstm."
    conv = prefix + "conv1d.conv."
    inputs = {"conv_kernel": z[conv + "weight"][:, 0].T, "conv_bias": z[conv + "bias"]}
    slstm = {"norm_scale": scale(prefix + "group_norm.weight"), "inputs": inputs}
    recurrent = z[prefix + "slstm_cell._recurrent_kernel_"].reshape(4, 4, 8, 8)  # head, gate, out, in
    biases = z[prefix + "slstm_cell._bias_"].reshape(4, 32)
    # Their attribute fgate feeds the input gate's slot and igate the forget gate's.
    for slot, (name, theirs) in enumerate(zip("ifzo", ("fgate", "igate", "zgate", "ogate"), strict=True)):
        inputs |= {f"kernel_{name}": blocks(f"{prefix}{theirs}.weight"), f"bias_{name}": biases[slot]}
        slstm[f"hidden_{name}"] = recurrent[:, slot].swapaxes(1, 2)

    gate, up = np.split(z["blocks.1.ffn.proj_up.weight"].T, 2, axis=1)
    ffn = {"norm": {"scale": scale("blocks.1.ffn_norm.weight")}, "gate": {"kernel": gate}, "up": {"kernel": up}}
    params = {
        "layers_0": mlstm,
        "layers_1": slstm,
        "norms_0": {"scale": scale("blocks.0.xlstm_norm.weight")},
        "norms_1": {"scale": scale("blocks.1.xlstm_norm.weight")},
        "ffns_1": ffn | {"down": dense("blocks.1.ffn.proj_down.weight")},
        "output_norm": {"scale": scale("post_blocks_norm.weight")},
    }
    ys = run(make_cell("xlstm", 32), {"params": params}, time_major(z["x"]))
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["y"], atol=3e-6)


def test_retnet_equals_the_papers_equations():
    """Retention in its recurrent form (2307.08621, section 2), in float64, with complex numbers for the rotation."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        xs, starts = rng.normal(size=(40, 2, 8)), rng.random((40, 2)) < 0.1
        cell = make_cell("retnet", 8, num_heads=2, conv_width=0)
        params = jax.jit(cell.init)(jax.random.key(0), cell.initialize_carry(None, (2, 8)), jnp.asarray(xs[0]))
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        ys = run(cell, params, jnp.asarray(xs), jnp.asarray(starts))
        kernel = {name: np.asarray(params["params"][name]["kernel"]) for name in ("qkv", "gate", "output")}

    as_complex = lambda x: x[:2] + 1j * x[2:]  # noqa: E731
    theta = 10000.0 ** (-np.arange(2) / 2)
    for b in range(2):
        for t, x in enumerate(xs[:, b]):
            q, k, v = np.split(x @ kernel["qkv"], 3)
            reads = []
            for head, rows in enumerate((slice(0, 4), slice(4, 8))):
                first = max([s for s in range(t + 1) if starts[s, b]], default=0)
                read = 0.0
                for s in range(first, t + 1):
                    past_k, past_v = (np.split(xs[s, b] @ kernel["qkv"], 3)[i][rows] for i in (1, 2))
                    turned = as_complex(q[rows]) * np.exp(1j * theta * (t - s))
                    weight = (turned * as_complex(past_k).conj()).sum().real / 2
                    read = read + (1 - 2.0 ** (-5 - head)) ** (t - s) * weight * past_v
                reads.append((read - read.mean()) / np.sqrt(read.var() + 1e-5))
            gate = x @ kernel["gate"]
            expected = (gate / (1 + np.exp(-gate)) * np.concatenate(reads)) @ kernel["output"]
            np.testing.assert_allclose(ys[t, b], expected, rtol=1e-9, atol=1e-10)


def initialised(name, seed=0, **options):
    """A cell of 8 features, its parameters, the initial carry of 2 environments and 12 inputs."""
    cell, xs = make_cell(name, 8, **options), jax.random.normal(jax.random.key(seed + 1), (12, 2, 8))
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    return cell, jax.jit(cell.init)(jax.random.key(seed), carry, xs[0]), carry, xs


def test_retnet_knows_distances_only():
    """An episode that began 1000 steps ago with nothing stored is as good as a new one."""
    cell, params, (memory, count, buffer), xs = initialised("retnet")
    starts = jnp.zeros((12, 2), bool)
    (_, last, _), late = sequence(cell, params, (memory, count + 1000, buffer), xs, starts)
    np.testing.assert_allclose(late, run(cell, params, xs), atol=1e-4)
    assert (last == 1012).all()
    (_, last, _), _ = sequence(cell, params, (memory, count + 1000, buffer), xs, starts.at[4, 1].set(True))
    np.testing.assert_array_equal(last, [1012, 8])


def test_linear_attention_reads_means():
    """The same input at every step, from the 4th step on also behind the convolution: the same output, however long."""
    cell, params, _, xs = initialised("linear_attention", conv_width=0)
    ys = run(cell, params, jnp.broadcast_to(xs[0], (200, 2, 8)))
    np.testing.assert_allclose(ys, jnp.broadcast_to(ys[0], ys.shape), atol=1e-5)


def test_delta_rule_replaces():
    """Strength 1: writing twice under a key leaves the second value; other orthogonal keys are untouched."""
    keys, values = jnp.eye(4)[jnp.array([0, 1, 2, 1, 3, 0, 1, 2, 3])], jax.random.normal(jax.random.key(0), (9, 5))
    beta = jnp.array([1, 1, 1, 1, 1, 0, 0, 0, 0.0])  # the last four steps only read
    add_axes = lambda x: x[:, None, None]  # noqa: E731
    args = [add_axes(x) for x in (keys, keys, values, beta)]
    for impl in ("scan", "parallel"):
        _, ys = delta_memory(jnp.zeros((1, 1, 4, 5)), *args, None, jnp.zeros((9, 1), bool), impl)
        np.testing.assert_allclose(ys[5:, 0, 0], values[jnp.array([0, 3, 2, 4])], atol=1e-6)
        np.testing.assert_allclose(ys[3, 0, 0], values[3], atol=1e-6)


def test_deltanet_of_strength_two_can_reflect():
    """beta = 2 turns what is stored under a key into its negative; beta = 1 can at most clear it."""
    key, value = jnp.eye(4)[:1], jnp.ones((1, 4))
    state = (key.T @ value)[None, None]
    as_step = lambda x: x[:, None, None]  # noqa: E731
    starts = jnp.zeros((1, 1), bool)
    read = lambda beta: delta_memory(  # noqa: E731
        state, as_step(key), as_step(key), as_step(0 * value), jnp.full((1, 1, 1), beta), None, starts
    )[1]
    np.testing.assert_allclose(read(2.0), -jnp.ones((1, 1, 1, 4)))
    np.testing.assert_allclose(read(1.0), jnp.zeros((1, 1, 1, 4)))
    for name in ("deltanet", "gated_deltanet"):
        with pytest.raises(ValueError, match=f"{name} needs beta_scale to be 1 or 2, got 3"):
            make_cell(name, 8, beta_scale=3)


def test_mlstm_does_not_depend_on_its_stabiliser():
    """The same memory under another m: only what guards the division against zero is different."""
    cell, params, carry, xs = initialised("mlstm")
    starts = jnp.zeros((12, 2), bool)
    carry, _ = sequence(cell, params, carry, 3 * xs, starts)
    (memory, m), buffer = carry
    shifted = (memory * jnp.exp(-3.0), m + 3.0), buffer
    _, expected = sequence(cell, params, carry, xs, starts)
    np.testing.assert_allclose(sequence(cell, params, shifted, xs, starts)[1], expected, atol=1e-4)


def test_gates_start_as_the_authors_do():
    params = initialised("xlstm")[1]["params"]
    np.testing.assert_allclose(params["layers_0"]["forget_gate"]["bias"], np.linspace(3, 6, 4), rtol=1e-6)
    assert (params["layers_0"]["forget_gate"]["kernel"] == 0).all() and (params["layers_0"]["skip"] == 1).all()
    expected = np.tile(5 - 12 * np.array([0.0, 1.0]) ** 1.6, 4)
    np.testing.assert_allclose(params["layers_1"]["inputs"]["bias_f"], expected, rtol=1e-6)
    params = initialised("gated_deltanet")[1]["params"]
    assert (params["log_A"] > np.log(0.01)).all() and (params["log_A"] < np.log(16)).all()
    steps = jax.nn.softplus(params["alpha"]["bias"])
    assert (steps > 0.99e-3).all() and (steps < 1.01e-1).all()


def test_xlstm_refuses():
    for options, message in (
        ({"pattern": "msx"}, "word of the letters m and s, got 'msx'"),
        ({"pattern": ""}, "word of the letters m and s, got ''"),
        ({"ffn_factor": 0.0}, "ffn_factor to be greater than 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cell("xlstm", 8, **options)
    with pytest.raises(ValueError, match="hidden_size / num_heads to be even, got 12 and 4"):
        make_cell("retnet", 12)


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
