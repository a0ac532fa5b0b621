"""Memories with a choice of `impl`: all forms give the same numbers, gradients and resets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import B, H, T, assert_close, init, setup

from memory_cells import make_cell
from memory_cells.parts import chunkwise

DIAGONAL = ["lru", "mingru", "s5", "ffm", "rtu", "mamba"]
MATRIX = ["mlstm", "linear_attention", "retnet", "deltanet", "gated_deltanet"]  # xlstm has mlstm's


# --- Diagonal recurrences: loop and associative scan ----------------------------------------------


@partial(jax.jit, static_argnums=0)
def outputs_and_gradients(cell, params, carry, xs, starts, weights):
    """The last carry and ys, and gradients with respect to params, carry and xs.

    In the loss, `weights` are those of ys.
    """

    def loss(params, carry, xs):
        last, ys = cell.apply(params, carry, xs, starts, method="sequence")
        total = (weights * ys).sum()
        total = total + sum(jnp.tanh(leaf.real).sum() for leaf in jax.tree.leaves(last))
        return total, (last, ys)

    gradients, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, carry, xs)
    return outputs, gradients


def case(name, impl):
    cell, params, carry, xs, starts = setup(name)
    options = {"rtu": {"nonlinear": False}, "mamba": {"chunk_size": 8}}.get(name, {})
    cell = cell.clone(impl=impl, **options)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(T, B, H)), jnp.float32)
    return cell, params, carry, xs, starts, weights


@pytest.mark.parametrize("name", DIAGONAL)
def test_parallel_and_scan_agree(name):
    outputs, gradients = outputs_and_gradients(*case(name, "parallel"))
    expected_outputs, expected_gradients = outputs_and_gradients(*case(name, "scan"))
    assert_close(outputs, expected_outputs)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
    close = lambda a, e: np.testing.assert_allclose(a, e, atol=3e-6 * scale, rtol=1e-4)  # noqa: E731
    jax.tree.map(close, gradients, expected_gradients)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected_gradients))


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_starts_cut_exactly(name, impl):
    """No gradient crosses a start, and no inf of a broken carry, in values or gradients."""
    cell, params, carry, xs, starts, weights = case(name, impl)
    starts = starts.at[20].set(True)
    weights = weights.at[:20].set(0.0)
    outputs, gradients = outputs_and_gradients(cell, params, carry, xs, starts, weights)
    _, ys = outputs
    _, by_carry, by_xs = gradients
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(by_carry)) and (by_xs[:20] == 0).all()

    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), carry)
    (_, broken_ys), _ = outputs_and_gradients(cell, params, broken, xs, starts, weights)
    np.testing.assert_array_equal(ys[20:], broken_ys[20:])
    starts = starts.at[0].set(True)
    _, gradients = outputs_and_gradients(cell, params, broken, xs, starts, weights)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# --- Matrix memories: steps, chunks and pieces ----------------------------------------------------


@pytest.mark.parametrize("name", MATRIX)
def test_pieces_and_chunks_have_the_gradients_of_single_steps(name, monkeypatch):
    monkeypatch.setattr(chunkwise, "CACHED", 0)
    rng = np.random.default_rng(0)
    # Three pieces or chunks of 25 steps and two steps, or two of 38 and a step.
    xs = jnp.asarray(rng.normal(size=(77, 2, 8)), jnp.float32)
    starts = jnp.asarray(rng.random((77, 2)) < 0.1)
    cell = make_cell(name, 8)
    carry = cell.initialize_carry(jax.random.key(0), (2, 8))
    params = init(cell, jax.random.key(0), carry, xs[0])
    perturb = lambda leaf: leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params, carry = jax.tree.map(perturb, (params, carry))

    def loss(impl, params, carry, xs):
        cell = make_cell(name, 8, impl=impl)
        last, ys = cell.apply(params, carry, xs, starts, method="sequence")
        total = (ys * jnp.arange(1.0, 9)).sum()
        return total + sum(jnp.tanh(leaf).sum() for leaf in jax.tree.leaves(last))

    def gradient(impl):
        return jax.jit(jax.grad(partial(loss, impl), argnums=(0, 1, 2)))(params, carry, xs)

    expected = gradient("scan")
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    close = lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * scale, rtol=1e-3)  # noqa: E731
    jax.tree.map(close, gradient("auto"), expected)
    jax.tree.map(close, gradient("parallel"), expected)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected[0]))
