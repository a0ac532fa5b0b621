"""Calling numpy functions from JAX: every vmap in one call, several arrays, no thread made anew."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from env_adapters.callbacks import call_on_host

PAIR = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)


def pair(x, y):
    """Arrays (..., 2) float32 and (...) int32, of x (...) and y (...)."""
    return np.stack([x, x + y], axis=-1), y.astype(np.int32)


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit])
def test_one_call_for_all_axes_of_a_vmap(compile):
    shapes = []

    def function(x, y):
        shapes.append(x.shape)
        return pair(x, y)

    def call(x, y):
        return tuple(call_on_host(function, PAIR, x, y))

    x = jnp.arange(6.0).reshape(2, 3)
    y = jnp.float32(5)  # the same for all
    nested = compile(jax.vmap(jax.vmap(call, in_axes=(0, None)), in_axes=(0, None)))
    first, second = nested(x, y)
    np.testing.assert_array_equal(first, np.stack([x, x + 5], axis=-1))
    np.testing.assert_array_equal(second, np.full((2, 3), 5))
    assert second.dtype == jnp.int32 and shapes == [(2, 3)]


def test_what_is_returned_does_not_change_with_the_functions_memory():
    memory = np.zeros(3, np.float32)

    def function(x):
        memory[:] = x
        return (memory,)

    def call(x):
        (y,) = call_on_host(function, [jax.ShapeDtypeStruct((3,), jnp.float32)], x)
        return y

    first = call(jnp.ones(3))
    call(jnp.full(3, 2.0))
    np.testing.assert_array_equal(first, np.ones(3))


def test_python_keeps_the_state_of_the_threads_that_call():
    """Made anew in every call, it would take as long as the step of a light environment."""
    local, thread_of_call, is_new = threading.local(), [], []

    def identity(rows):
        thread_of_call.append(threading.get_ident())
        is_new.append(not hasattr(local, "seen"))
        local.seen = True
        return (rows,)

    def step(keys, _):
        # Enough to do for several threads.
        rows = jnp.concatenate([jax.random.uniform(key, (8, 6)) for key in keys])
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.arange(8))
        (rows,) = call_on_host(identity, [jax.ShapeDtypeStruct(rows.shape, jnp.float32)], rows)
        return keys, rows

    keys = jax.random.split(jax.random.key(0), 8)
    jax.block_until_ready(jax.jit(lambda keys: jax.lax.scan(step, keys, length=50))(keys))
    assert len(is_new) == 50
    if set(thread_of_call) == {threading.get_ident()}:
        pytest.skip("with a single core XLA has no threads")
    assert sum(is_new) == len(set(thread_of_call))
