"""What holds for every memory, whatever it computes.

Step form, sequence form and chunks agree under resets, nothing leaks across a reset, gradients stay
bounded.
"""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import (
    WINDOWED,
    B,
    D,
    H,
    T,
    assert_close,
    build,
    init,
    sequence,
    setup,
)

from memory_cells import CELLS, MaskedRNN, take
from memory_cells.parts.carry import reset


def one_worker(names):
    """Parameters whose tests run in one process, where they share compiled programs."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


HAVE_LEARNED = [
    name for name, cell in CELLS.items() if "learned_carry" in cell.__dataclass_fields__
]
MEMORIES = one_worker([*CELLS, "gru x2"])
LEARNED = one_worker([*(f"{name} x1 learned" for name in HAVE_LEARNED), "lstm x2 learned"])


@partial(jax.jit, static_argnums=0)
def gradients(cell, params, carry, xs, starts, weights):
    """Of the weighted sum of a sequence's outputs, with respect to params, carry and xs."""

    def loss(params, carry, xs):
        _, ys = sequence(cell, params, carry, xs, starts)
        return (ys * weights).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(params, carry, xs)


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


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_step_sequence_and_chunks_agree(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        cell, params, carry, xs, starts = setup(name, dtype=dtype)
        expected = stepwise(cell, params, carry, xs, starts)
        assert expected[1].dtype == dtype
        assert_close(sequence(cell, params, carry, xs, starts), expected, tolerance)
        chunk_carry, chunks = carry, []
        # Of 9 steps and of 1 step by turns, which other tests compile, too.
        for start, end in pairwise([0, 9, 10, 19, 20, 29, 30, 39, T]):
            chunk = slice(start, end)
            chunk_carry, ys = sequence(cell, params, chunk_carry, xs[chunk], starts[chunk])
            chunks.append(ys)
        assert_close((chunk_carry, jnp.concatenate(chunks)), expected, tolerance)


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
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if path[-1].key.startswith("initial_")]


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
    masked = jax.jit(MaskedRNN(cell).apply)
    masked_params = {"params": {"cell": params["params"]}}
    everywhere = jnp.ones((T, B), bool)
    assert_close(masked(masked_params, carry, xs, once, valid=everywhere), expected)

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
    chosen = jnp.array([2, 0, 2])  # without environment 1; in a batch of the same size
    some = sequence(cell, params, take(carry, chosen), xs[:, chosen], starts[:, chosen])
    assert_close(some, (take(last, chosen), ys[:, chosen]))


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("inputs", [D, 5])
def test_shapes_dtypes_and_parameters(name, inputs):
    cell = build(name)
    xs = jnp.zeros((T, B, inputs))
    starts = jnp.zeros((T, B), bool)
    initial = cell.initialize_carry(jax.random.key(0), (B, inputs))
    key = jax.random.key(3)
    from_step = init(cell, key, initial, xs[0])
    from_sequence = init(cell, key, initial, xs[:2], starts[:2], method="sequence")
    jax.tree.map(np.testing.assert_array_equal, from_step, from_sequence)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(from_step))

    last, ys = jax.eval_shape(partial(sequence, cell), from_step, initial, xs, starts)
    assert ys.shape == (T, B, H) and ys.dtype == jnp.float32
    signature = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert signature(initial) == signature(last)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(initial))


def forms():
    """Every memory in all its forms: with an associative scan, and with a learned carry.

    In chunks they go by default; their single steps are those for acting.
    """
    for name in [*CELLS, "lstm x2", *(f"{name} x1 learned" for name in HAVE_LEARNED)]:
        yield name, build(name)
    for name in ("s5", "lru", "mingru", "ffm", "mamba", "shm"):
        yield f"{name} parallel", build(name).clone(impl="parallel")
    yield "rtu parallel", build("rtu").clone(impl="parallel", nonlinear=False)
    yield "gpt2 learned", WINDOWED["gpt2 learned"]()


@pytest.mark.parametrize("cell", [pytest.param(cell, id=name) for name, cell in forms()])
def test_everything_is_float32_also_under_x64(cell):
    """JAX_ENABLE_X64=1 changes no dtype: parameters, carries, outputs and gradients."""
    memory = MaskedRNN(cell)

    def everything(key, xs, starts):
        initial = memory.initialize_carry(xs.shape[1:])
        params = memory.init(key, initial, xs[:1], starts[:1])

        def loss(params, carry, xs):
            carry, ys = memory.apply(params, carry, xs, starts)
            return ys.sum(), (carry, ys)

        gradients = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, initial, xs)
        step = memory.apply(params, initial, xs[:1], starts[:1])
        return initial, params, gradients, step

    xs = jax.ShapeDtypeStruct((70, B, D), jnp.float32)  # more than a chunk
    starts = jax.ShapeDtypeStruct((70, B), bool)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(everything, jax.random.key(0), xs, starts)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(shapes)}
    assert dtypes <= {"float32", "complex64"}


@pytest.mark.parametrize("name", MEMORIES)
def test_flax_drives_every_cell(name):
    cell, params, _, xs, starts = setup(name)
    initial = cell.initialize_carry(jax.random.key(0), (B, D))
    rnn = nn.RNN(build(name), time_major=True)
    ys = jax.jit(rnn.apply)({"params": {"cell": params["params"]}}, xs)
    expected = sequence(cell, params, initial, xs, jnp.zeros_like(starts))[1]
    assert_close(ys, expected)


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
    leaves = jax.tree.leaves(by_both)
    assert all(jnp.isfinite(leaf).all() and jnp.abs(leaf).max() < 1e4 for leaf in leaves)
    assert all(jnp.abs(leaf).max() < 1e5 for leaf in jax.tree.leaves(last))
