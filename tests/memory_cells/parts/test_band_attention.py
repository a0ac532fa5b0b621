"""Attention over a window: equal to full attention with a mask, in memory linear in time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells.parts.band_attention import append, band_attention, newest, skew, start_times


def attention_problem(length, steps):
    """Queries, keys, values, start times, and scores by distance."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    starts = jnp.asarray(rng.random((steps, 2)) < 0.05)
    began = start_times(jnp.asarray([3.0, length + 5.0]), starts)
    rows = length + steps
    queries = normal(2, 2, steps, 4)
    keys = normal(2, 2, rows, 4)
    values = normal(2, 2, rows, 3)
    by_distance = normal(2, 2, steps, length + 1)
    return queries, keys, values, began, by_distance


def full_attention(queries, keys, values, began, by_distance):
    """All scores at once, by pairs."""
    length = keys.shape[-2] - queries.shape[-2]
    t = np.arange(queries.shape[-2])[:, None]
    s = np.arange(keys.shape[-2])
    in_band = (t <= s) & (s <= t + length)
    visible = in_band & (s - length >= began[..., None])
    scores = queries @ keys.swapaxes(-1, -2) + by_distance[..., t, np.clip(s - t, 0, length)]
    return jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf)) @ values


@pytest.mark.parametrize(("length", "steps"), [(4, 70), (40, 41), (40, 7), (7, 1)])
def test_band_attention_equals_full_attention_with_its_gradients(length, steps):
    queries, keys, values, began, by_distance = attention_problem(length, steps)

    def loss(attention, queries, keys, values, by_distance):
        return jnp.sin(attention(queries, keys, values, began, by_distance)).sum()

    inputs = queries, keys, values, by_distance
    actual = jax.jit(jax.value_and_grad(partial(loss, band_attention), range(4)))(*inputs)
    expected = jax.jit(jax.value_and_grad(partial(loss, full_attention), range(4)))(*inputs)
    close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    jax.tree.map(close, actual, expected)


def test_band_attention_takes_memory_linear_in_time():
    def peak(steps):
        gradient = jax.grad(lambda *inputs: band_attention(*inputs).sum(), range(3))
        compiled = jax.jit(gradient).lower(*attention_problem(16, steps)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(4096) < 2.2 * peak(2048)


def test_memory_keeps_the_newest_rows_of_the_episode():
    xs = jnp.array([[[1.0], [2.0]]] * 3)
    memory = jnp.array([[[-4.0], [-3.0], [-2.0], [-1.0]]] * 3)
    starts = jnp.zeros((2, 3), bool).at[0, 1].set(True)
    began = start_times(jnp.asarray([9.0, 9.0, 1.0]), starts)
    np.testing.assert_array_equal(began, [[-9, -9], [0, 0], [-1, -1]])
    rows = append(memory, xs, began)
    expected = [[-2, -1, 1, 2], [0, 0, 1, 2], [0, -1, 1, 2]]
    np.testing.assert_array_equal(newest(rows, began)[..., 0], expected)


def test_skew():
    x = jnp.array([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(skew(x, 4), [[1, 2, 3, 0], [0, 4, 5, 6]])
