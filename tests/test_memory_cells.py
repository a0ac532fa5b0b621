"""Every memory: step form, sequence form and chunks agree under resets, nothing leaks across them, oracles agree."""

import sys
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells import CELLS, MaskedRNN, detach, make_cell, take
from memory_cells.masked_rnn import MemoryCell
from memory_cells.parts.carry import reset

ORACLES = Path(__file__).parent / "oracles"
T, B, D, H = 40, 3, 8, 8
LEARNED = [f"{name} x1 learned" for name, cell in CELLS.items() if "learned_carry" in cell.__dataclass_fields__]


def one_worker(names):
    """Parameters whose tests run in one process, which has then traced and compiled most of what they need."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


MEMORIES, LEARNED = one_worker([*CELLS, "gru x2"]), one_worker([*LEARNED, "lstm x2 learned"])
# One for each way to read a sequence and each kind of carry: what MaskedRNN adds does not ask which memory it is.
KINDS = one_worker(["none", "gru", "lstm x2 learned", "s5", "shm", "xlstm", "gated_deltanet", "gtrxl", "dnc"])


def build(name):
    kind, _, rest = name.partition(" x")
    layers, _, learned = rest.partition(" ")
    return make_cell(kind, H, int(layers or 1), **({"learned_carry": True} if learned else {}))


@partial(jax.jit, static_argnums=0, static_argnames="method")  # jitted: operation by operation it compiles for longer
def init(module, key, *args, method="__call__"):
    return module.init(key, *args, method=method)


@partial(jax.jit, static_argnums=0, static_argnames=("burn_in", "bptt"))
def remember(memory, params, carry, xs, starts, **how):
    return memory.apply(params, carry, xs, starts, **how)


@partial(jax.jit, static_argnums=0)
def sequence(cell, params, carry, xs, starts):
    return cell.apply(params, carry, xs, starts, method="sequence")


@partial(jax.jit, static_argnums=0)
def gradients(cell, params, carry, xs, starts, weights):
    """Of the weighted sum of a sequence's outputs, with respect to params, carry and xs."""
    outputs = lambda *inputs: sequence(cell, *inputs, starts)[1]  # noqa: E731
    return jax.grad(lambda *inputs: (outputs(*inputs) * weights).sum(), argnums=(0, 1, 2))(params, carry, xs)


@cache
def setup(name, seed=0, inputs=D, dtype="float32"):
    """A cell with perturbed parameters (zero weights would make tests vacuous), a used carry, inputs and starts."""
    cell, rng = build(name), np.random.default_rng(seed)
    xs = jnp.asarray(rng.normal(size=(T, B, inputs)), dtype)
    starts = rng.random((T, B)) < 0.08
    starts[0, 0] = starts[-1, 1] = starts[5, 2] = True
    starts = jnp.asarray(starts)
    carry = cell.initialize_carry(jax.random.key(0), (B, inputs))
    params = init(cell, jax.random.key(seed), carry, xs[:2], starts[:2], method="sequence")
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), dtype), params)
    warm = jnp.asarray(rng.normal(size=(9, B, inputs)), dtype)
    carry, _ = sequence(cell, params, carry, warm, jnp.zeros((9, B), bool))
    return cell, params, carry, xs, starts


def stepwise(cell, params, carry, xs, starts):
    """The reference: a Python loop over single steps."""
    initial = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    initial = jax.tree.map(lambda i, c: i.astype(c.dtype), initial, carry)
    step = jax.jit(cell.apply)
    ys = []
    for x, start in zip(xs, starts, strict=True):
        carry, y = step(params, reset(carry, initial, start), x)
        ys.append(y)
    return carry, jnp.stack(ys)


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_array_less(np.abs(a - e), tolerance * (1 + np.abs(e)) + 1e-30), actual, expected
    )


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_step_sequence_and_chunks_agree(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        cell, params, carry, xs, starts = setup(name, dtype=dtype)
        expected = stepwise(cell, params, carry, xs, starts)
        assert expected[1].dtype == dtype
        assert_close(sequence(cell, params, carry, xs, starts), expected, tolerance)
        chunk_carry, chunks = carry, []
        for chunk in (slice(0, 9), slice(9, 10), slice(10, T)):
            chunk_carry, ys = sequence(cell, params, chunk_carry, xs[chunk], starts[chunk])
            chunks.append(ys)
        assert_close((chunk_carry, jnp.concatenate(chunks)), expected, tolerance)


def plain_scan(project, step, params, carry, xs, starts, initial):
    """What `recurrent_scan` computes, in the way that leaves its gradient to jax."""

    def body(carry, inputs):
        x, start = inputs
        carry = reset(carry, initial, start)
        return step(carry, x, project(params, carry))

    return jax.lax.scan(body, carry, (xs, starts))


@pytest.mark.parametrize("name", ["gru", "lstm x1 learned", "slstm", "slstm x1 learned", "gru x2"])
def test_gradients_of_recurrent_scan_are_those_of_a_plain_scan(name, monkeypatch):
    cell, params, carry, xs, starts = setup(name)

    def loss(params, carry, xs):
        last, ys = cell.apply(params, carry, xs, starts, method="sequence")
        return (ys * jnp.arange(1.0, H + 1)).sum() + sum(jnp.tanh(leaf).sum() for leaf in jax.tree.leaves(last))

    actual = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, carry, xs)
    module = sys.modules[f"memory_cells.{name.partition(' ')[0]}"]
    monkeypatch.setattr(module, "recurrent_scan", plain_scan)
    expected = jax.jit(jax.grad(lambda *args: loss(*args), argnums=(0, 1, 2)))(params, carry, xs)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * scale, rtol=1e-4), actual, expected)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected[0]))


@pytest.mark.parametrize("name", MEMORIES)
def test_nothing_before_a_start_matters_after_it(name):
    cell, params, carry, xs, starts = setup(name)
    starts = starts.at[17].set(True)  # in the middle of a chunk, whatever its length
    _, ys = sequence(cell, params, carry, xs, starts)
    other_carry = jax.tree.map(lambda leaf: 1e3 * leaf + 7.0, carry)
    _, other = sequence(cell, params, other_carry, xs.at[:17].add(1e3), starts)
    np.testing.assert_array_equal(ys[17:], other[17:])
    if name != "none":
        assert (jnp.abs(ys[:17] - other[:17]) > 1e-3).any()

    weights = jax.random.normal(jax.random.key(0), ys.shape).at[:17].set(0.0)
    _, by_carry, by_xs = gradients(cell, params, carry, xs, starts, weights)
    assert (by_xs[:17] == 0).all() and (by_xs[17:] != 0).any()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(by_carry))


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_broken_does_not_survive_a_start(name, poison):
    cell, params, carry, xs, starts = setup(name)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, poison), carry)
    starts = starts.at[0].set(True).at[17].set(True)
    last, ys = sequence(cell, params, broken, xs, starts)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((last, ys)))
    broken_last, broken_ys = sequence(cell, params, carry, xs.at[:17].set(poison), starts)
    jax.tree.map(np.testing.assert_array_equal, (broken_last, broken_ys[17:]), (last, ys[17:]))
    last, y = sequence(cell, params, broken, xs[:1], starts[:1])  # the form used for acting
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((last, y)))


@pytest.mark.parametrize("name", MEMORIES)
def test_carry_at_a_start_is_the_initial_carry(name):
    cell, params, carry, xs, starts = setup(name)
    everywhere = jnp.ones((1, B), bool)
    initial = cell.initialize_carry(jax.random.key(0), (B, D))
    expected = sequence(cell, params, initial, xs[:1], jnp.zeros((1, B), bool))
    assert_close(sequence(cell, params, carry, xs[:1], everywhere), expected, 1e-6)


def initial_leaves(tree):
    """The leaves of learned initial carries among parameters."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key.startswith("initial_")]


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_carry_comes_in_where_an_episode_starts(name):
    cell, params, carry, xs, _ = setup(name)
    from_step = init(cell, jax.random.key(0), carry, xs[0])
    assert jax.tree.structure(params) == jax.tree.structure(from_step)
    assert all((leaf == 0).all() for leaf in initial_leaves(from_step))

    never = jnp.zeros((T, B), bool)
    once = never.at[0].set(True)
    initial_carry = partial(cell.apply, method="initial_carry_like")
    expected = sequence(cell, params, initial_carry(params, xs), xs, never)
    assert_close(sequence(cell, params, carry, xs, once), expected)
    memory = MaskedRNN(cell)
    masked = memory.apply({"params": {"cell": params["params"]}}, carry, xs, once, valid=jnp.ones((T, B), bool))
    assert_close(masked, expected)

    weights = expected[1]  # as good as any
    gradient = lambda starts: initial_leaves(gradients(cell, params, carry, xs, starts, weights)[0])  # noqa: E731
    assert initial_leaves(params) and all((leaf == 0).all() for leaf in gradient(never))
    initial, by_params = jax.vjp(lambda params: initial_carry(params, xs), params)
    expected = initial_leaves(*by_params(gradients(cell, params, initial, xs, never, weights)[1]))
    assert all((leaf != 0).any() for leaf in expected)
    assert_close(gradient(once), expected, 1e-4)


@pytest.mark.parametrize("name", MEMORIES)
def test_environments_are_independent(name):
    cell, params, carry, xs, starts = setup(name)
    last, ys = sequence(cell, params, carry, xs, starts)
    chosen = jnp.array([2, 0])
    some = sequence(cell, params, take(carry, chosen), xs[:, chosen], starts[:, chosen])
    assert_close(some, (take(last, chosen), ys[:, chosen]))


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("inputs", [D, 5])
def test_shapes_dtypes_and_parameters(name, inputs):
    cell, params, carry, xs, starts = setup(name, inputs=inputs)
    initial = cell.initialize_carry(jax.random.key(0), (B, inputs))
    last, ys = sequence(cell, params, initial, xs, starts)
    assert ys.shape == (T, B, H) and ys.dtype == jnp.float32
    signature = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert signature(initial) == signature(last)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(initial))

    key = jax.random.key(3)
    from_step = init(cell, key, initial, xs[0])
    from_sequence = init(cell, key, initial, xs, starts, method="sequence")
    jax.tree.map(np.testing.assert_array_equal, from_step, from_sequence)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(from_step))


@pytest.mark.parametrize("name", MEMORIES)
def test_flax_drives_every_cell(name):
    with jax.enable_x64(True):
        cell, params, _, xs, starts = setup(name, dtype="float64")
        initial = cell.initialize_carry(jax.random.key(0), (B, D))
        ys = nn.RNN(build(name), time_major=True).apply({"params": {"cell": params["params"]}}, xs)
        assert_close(ys, sequence(cell, params, initial, xs, jnp.zeros_like(starts))[1], 1e-10)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("length", [1024, pytest.param(8192, marks=pytest.mark.slow)])
def test_long_sequences_have_bounded_gradients(name, length):
    cell, params, carry, _, _ = setup(name)
    params = init(cell, jax.random.key(0), carry, jnp.zeros((B, D)))
    xs = jax.random.normal(jax.random.key(1), (length, B, D))
    starts = jnp.zeros((length, B), bool)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, xs):
        last, ys = sequence(cell, params, carry, xs, starts)
        return ys.mean(), last

    by_both, last = run(params, xs)
    assert all(jnp.isfinite(leaf).all() and jnp.abs(leaf).max() < 1e4 for leaf in jax.tree.leaves(by_both))
    assert all(jnp.abs(leaf).max() < 1e5 for leaf in jax.tree.leaves(last))


# --- MaskedRNN -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_masked_rnn_burn_in(name):
    cell, _, carry, xs, starts = setup(name)
    memory = MaskedRNN(cell)
    params = init(memory, jax.random.key(0), carry, xs, starts)
    last, ys = remember(memory, params, carry, xs, starts)
    burnt_last, burnt = remember(memory, params, carry, xs, starts, burn_in=10)
    assert_close((burnt_last, burnt), (last, ys[10:]))
    gradient = jax.jit(jax.grad(lambda xs: remember(memory, params, carry, xs, starts, burn_in=10)[1].sum()))(xs)
    assert (gradient[:10] == 0).all() and (gradient[10:] != 0).any()


@pytest.mark.parametrize("name", KINDS)
def test_masked_rnn_sequences_of_different_lengths(name):
    with jax.enable_x64(True):
        cell, params, carry, xs, starts = setup(name, dtype="float64")
        memory, params = MaskedRNN(cell), {"params": {"cell": params["params"]}} if params else {}
        run = partial(remember, memory)
        short = jnp.array([1, 2])
        valid = jnp.arange(T)[:, None] < jnp.array([T, 17, 17])
        poisoned = jnp.where(valid[..., None], xs, jnp.nan)  # padding must not be read at all
        last, ys = run(params, carry, poisoned, starts, valid=valid)
        expected_last, expected = run(params, carry, xs, starts)
        assert_close(
            (take(last, jnp.array([0])), ys[:, 0]), (take(expected_last, jnp.array([0])), expected[:, 0]), 1e-10
        )
        expected_last, expected = run(params, take(carry, short), xs[:17, short], starts[:17, short])
        assert_close((take(last, short), ys[:17, short]), (expected_last, expected), 1e-10)
        assert (ys[17:, short] == 0).all()
        gradient = jax.jit(jax.grad(lambda params: run(params, carry, poisoned, starts, valid=valid)[1].sum()))(params)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        after_burn_in = run(params, carry, poisoned, starts, valid=valid, burn_in=5)
        assert_close(after_burn_in, (last, ys[5:]), 1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_masked_rnn_truncated_bptt(name):
    cell, _, carry, xs, _ = setup(name)
    memory, starts = MaskedRNN(cell), jnp.zeros((T, B), bool)
    params = init(memory, jax.random.key(0), carry, xs, starts)
    params = jax.tree.map(lambda p: p + 0.1, params)
    assert_close(remember(memory, params, carry, xs, starts, bptt=10), remember(memory, params, carry, xs, starts))

    def reach(bptt):
        return jax.jit(jax.grad(lambda xs: remember(memory, params, carry, xs, starts, bptt=bptt)[1][-1].sum()))(xs)

    gradient = reach(10)
    assert (gradient[:30] == 0).all() and (gradient[30:] != 0).any()
    if name != "none":
        assert (reach(0)[29] != 0).any()
    with pytest.raises(ValueError, match=r"bptt \(7\) must divide the sequence length \(40\)"):
        remember(memory, params, carry, xs, starts, bptt=7)


def test_detach_cuts_the_gradient():
    cell, params, carry, xs, starts = setup("gru")
    run = lambda carry, f: sequence(cell, params, f(carry), xs, jnp.zeros_like(starts))[1].sum()  # noqa: E731
    assert (jax.grad(run)(carry, lambda c: c) != 0).any()
    assert (jax.grad(run)(carry, detach) == 0).all()


# --- Oracles ---------------------------------------------------------------------------------------------------------


def run_oracle(cell, params, x):
    """Batch-first inputs of another library through our cell, from the initial carry."""
    xs = jnp.asarray(x).swapaxes(0, 1)
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    _, ys = sequence(cell, {"params": params}, carry, xs, jnp.zeros(xs.shape[:2], bool))
    return ys.swapaxes(0, 1)


def test_gru_equals_pytorch():
    z = np.load(ORACLES / "gru.npz")
    w_r, w_z, w_n = (w.T for w in np.split(z["weight_ih_l0"], 3))
    u_r, u_z, u_n = (w.T for w in np.split(z["weight_hh_l0"], 3))
    b, c = np.split(z["bias_ih_l0"], 3), np.split(z["bias_hh_l0"], 3)
    params = {
        "input_r": {"kernel": w_r, "bias": b[0] + c[0]},
        "input_z": {"kernel": w_z, "bias": b[1] + c[1]},
        "input_n": {"kernel": w_n, "bias": b[2]},
        "hidden_r": u_r,
        "hidden_z": u_z,
        "hidden_n": u_n,
        "hidden_bias_n": c[2],
    }
    np.testing.assert_allclose(run_oracle(make_cell("gru", 5), params, z["x"]), z["y"], atol=1e-6)


def test_lstm_equals_pytorch():
    z = np.load(ORACLES / "lstm.npz")
    kernels, recurrent = np.split(z["weight_ih_l0"], 4), np.split(z["weight_hh_l0"], 4)
    biases = np.split(z["bias_ih_l0"] + z["bias_hh_l0"], 4)
    params = {}
    for name, w, u, b in zip("ifgo", kernels, recurrent, biases, strict=True):
        params |= {f"input_{name}": {"kernel": w.T, "bias": b}, f"hidden_{name}": u.T}
    np.testing.assert_allclose(run_oracle(make_cell("lstm", 5), params, z["x"]), z["y"], atol=1e-6)


def test_slstm_equals_the_authors():
    """PyPI xlstm 2.0.6, sLSTMLayer(embedding_dim=16, num_heads=4, conv1d_kernel_size=4, backend="vanilla")."""
    z = np.load(ORACLES / "slstm_layer.npz")
    # Their attribute fgate feeds the input gate's slot and igate the forget gate's.
    kernels = {"i": "fgate", "f": "igate", "z": "zgate", "o": "ogate"}
    recurrent = z["slstm_cell/_recurrent_kernel_"].reshape(4, 4, 4, 4)  # head, gate, out, in
    biases = z["slstm_cell/_bias_"].reshape(4, 16)
    inputs = {"conv_kernel": z["conv1d/conv/weight"][:, 0].T, "conv_bias": z["conv1d/conv/bias"]}
    params = {"norm_scale": 1.0 + z["group_norm/weight"]}
    for slot, name in enumerate("ifzo"):
        inputs |= {f"kernel_{name}": z[f"{kernels[name]}/weight"].swapaxes(1, 2), f"bias_{name}": biases[slot]}
        params[f"hidden_{name}"] = recurrent[:, slot].swapaxes(1, 2)
    params["inputs"] = inputs
    np.testing.assert_allclose(run_oracle(make_cell("slstm", 16), params, z["x"]), z["y"], atol=3e-6)


def test_slstm_forget_bias_starts_as_the_authors_do():
    cell = make_cell("slstm", 16)
    carry = cell.initialize_carry(jax.random.key(0), (1, 16))
    params = cell.init(jax.random.key(0), carry, jnp.zeros((1, 16)))["params"]
    expected = np.load(ORACLES / "slstm_layer.npz")["initial_bias"].reshape(4, 16)
    for slot, name in enumerate("ifzo"):
        np.testing.assert_allclose(params["inputs"][f"bias_{name}"], expected[slot], atol=1e-5)


# --- The registry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slstmm", 8), r"unknown cell 'slstmm' \(did you mean 'slstm'\?\); valid cells: gru, lstm, slstm, "),
        (("gru", 8, 1, {"retain_bais": 1.0}), r"has no option 'retain_bais' \(did you mean 'retain_bias'\?\)"),
        (("none", 8, 1, {"heads": 1}), "cell 'none' has no option 'heads'; it has none"),
        (("slstm", 10), "multiple of num_heads, got 10 and 4"),
        (("slstm", 8, 1, {"num_heads": 0}), "multiple of num_heads, got 8 and 0"),
        (("slstm", 8, 1, {"conv_width": 1}), "conv_width to be 0 or at least 2, got 1"),
        (("slstm", 8, 1, {"num_heads": "four"}), "option num_heads of cell 'slstm' must be int, got 'four'"),
    ],
)
def test_make_cell_refuses(arguments, message):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        make_cell(*positional, **options)


def test_options_reach_the_cell():
    assert make_cell("slstm", 8, num_heads=2, conv_width=0).num_heads == 2
    params = make_cell("lstm", 8, forget_bias=3.0).init(jax.random.key(0), (jnp.zeros((1, 8)),) * 2, jnp.zeros((1, 8)))
    assert (params["params"]["input_f"]["bias"] == 3.0).all()


def test_a_cell_needs_only_the_two_methods_of_the_readme():
    class Leaky(MemoryCell):
        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((*input_shape[:-1], self.features))

        @nn.compact
        def __call__(self, carry, x):
            carry = 0.9 * carry + nn.Dense(self.features)(x)
            return carry, carry

    memory = MaskedRNN(Leaky(H))
    xs, starts = jnp.ones((6, B, D)), jnp.zeros((6, B), bool).at[3].set(True)
    carry = memory.initialize_carry((B, D))
    params = memory.init(jax.random.key(0), carry, xs, starts)
    _, ys = memory.apply(params, carry, xs, starts)
    np.testing.assert_allclose(ys[:3], ys[3:], rtol=1e-6)
    assert (jnp.abs(ys[2]) > jnp.abs(ys[0])).all()
