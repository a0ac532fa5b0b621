"""The wrapper: burn-in, sequences of different lengths, truncated backpropagation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import B, D, H, T, assert_close, init, setup

from memory_cells import MaskedRNN, MemoryCell, take

# One memory per way to read a sequence and per kind of carry: what the wrapper adds does not depend
# on the memory.
KINDS = ["none", "gru", "lstm x2 learned", "s5", "shm", "xlstm", "gated_deltanet", "gtrxl", "dnc"]
KINDS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in KINDS]


@partial(jax.jit, static_argnums=0, static_argnames=("burn_in", "bptt"))
def remember(memory, params, carry, xs, starts, **how):
    return memory.apply(params, carry, xs, starts, **how)


def setup_masked(name, dtype="float32"):
    """As `setup`, for the memory in its wrapper."""
    cell, params, carry, xs, starts = setup(name, dtype=dtype)
    params = {"params": {"cell": params["params"]}} if params else {}
    return MaskedRNN(cell), params, carry, xs, starts


@pytest.mark.parametrize("name", KINDS)
def test_masked_rnn_burn_in(name):
    memory, params, carry, xs, starts = setup_masked(name)
    last, ys = remember(memory, params, carry, xs, starts)
    burnt_last, burnt = remember(memory, params, carry, xs, starts, burn_in=10)
    assert_close((burnt_last, burnt), (last, ys[10:]))

    @jax.jit
    @jax.grad
    def gradient(xs):
        return remember(memory, params, carry, xs, starts, burn_in=10)[1].sum()

    by_xs = gradient(xs)
    assert (by_xs[:10] == 0).all() and (by_xs[10:] != 0).any()


@pytest.mark.parametrize("name", KINDS)
def test_masked_rnn_sequences_of_different_lengths(name):
    with jax.enable_x64(True):
        memory, params, carry, xs, starts = setup_masked(name, "float64")
        run = partial(remember, memory)
        long = jnp.array([0])
        short = jnp.array([1, 2])
        end = 17  # of the short sequences
        valid = jnp.arange(T)[:, None] < jnp.array([T, end, end])
        poisoned = jnp.where(valid[..., None], xs, jnp.nan)  # padding must not be read at all
        last, ys = run(params, carry, poisoned, starts, valid=valid)
        expected_last, expected = run(params, carry, xs, starts)
        long_expected = take(expected_last, long), expected[:, long]
        assert_close((take(last, long), ys[:, long]), long_expected, 1e-10)
        short_carry = take(carry, short)
        short_expected = run(params, short_carry, xs[:end, short], starts[:end, short])
        assert_close((take(last, short), ys[:end, short]), short_expected, 1e-10)
        assert (ys[end:, short] == 0).all()

        @jax.jit
        @jax.grad
        def gradient(params):
            return run(params, carry, poisoned, starts, valid=valid)[1].sum()

        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))
        after_burn_in = run(params, carry, poisoned, starts, valid=valid, burn_in=20)
        assert_close(after_burn_in, (last, ys[20:]), 1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_masked_rnn_truncated_bptt(name):
    memory, _, carry, xs, _ = setup_masked(name)
    starts = jnp.zeros((T, B), bool)
    params = init(memory, jax.random.key(0), carry, xs, starts)
    params = jax.tree.map(lambda p: p + 0.1, params)
    expected = remember(memory, params, carry, xs, starts)
    assert_close(remember(memory, params, carry, xs, starts, bptt=10), expected)

    def reach(bptt):
        @jax.jit
        @jax.grad
        def gradient(xs):
            return remember(memory, params, carry, xs, starts, bptt=bptt)[1][-1].sum()

        return gradient(xs)

    gradient = reach(10)
    assert (gradient[:30] == 0).all() and (gradient[30:] != 0).any()
    if name != "none":
        assert (reach(0)[29] != 0).any()
    with pytest.raises(ValueError, match=r"bptt \(7\) must divide the sequence length \(40\)"):
        remember(memory, params, carry, xs, starts, bptt=7)


def test_a_cell_needs_only_the_two_methods_of_the_readme():
    class Leaky(MemoryCell):
        decay: float = 0.9

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((*input_shape[:-1], self.features), jnp.float32)

        @nn.compact
        def __call__(self, carry, x):
            carry = self.decay * carry + nn.Dense(self.features)(x)
            return carry, carry

    memory = MaskedRNN(Leaky(H))
    xs = jnp.ones((6, B, D))
    starts = jnp.zeros((6, B), bool).at[3].set(True)
    carry = memory.initialize_carry((B, D))
    params = init(memory, jax.random.key(0), carry, xs, starts)
    _, ys = remember(memory, params, carry, xs, starts)
    np.testing.assert_allclose(ys[:3], ys[3:], rtol=1e-6)
    assert (jnp.abs(ys[2]) > jnp.abs(ys[0])).all()


def test_a_carry_may_hold_any_dtype():
    class Counter(MemoryCell):
        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros(input_shape[0], jnp.int32), jnp.zeros(input_shape[0], jnp.bfloat16)

        @nn.compact
        def __call__(self, carry, x):
            count, mean = carry
            scale = self.param("scale", nn.initializers.ones, (), jnp.bfloat16)
            carry = count + 1, (mean + scale * x.mean()).astype(jnp.bfloat16)
            return carry, jnp.tile(count[:, None], self.features)

    memory = MaskedRNN(Counter(H))
    starts = jnp.zeros((3, B), bool).at[2].set(True)
    carry = memory.initialize_carry((B, D))
    params = init(memory, jax.random.key(0), carry, jnp.ones((3, B, D)), starts)
    assert params["params"]["cell"]["scale"].dtype == jnp.bfloat16
    (count, mean), ys = remember(memory, params, carry, jnp.ones((3, B, D)), starts)
    assert (count.dtype, mean.dtype) == (jnp.int32, jnp.bfloat16)
    np.testing.assert_array_equal(ys[:, 0, 0], [0, 1, 0])
