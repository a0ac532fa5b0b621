"""Retention: equal to the paper in float64, and it knows distances only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import init, initialised, run, sequence

from memory_cells import make_cell


def test_retnet_equals_the_papers_equations():
    """The recurrent form (2307.08621, section 2), with complex numbers for the rotation."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        xs = rng.normal(size=(40, 2, 8))
        starts = rng.random((40, 2)) < 0.1
        cell = make_cell("retnet", 8, num_heads=2, conv_width=0)
        carry = cell.initialize_carry(None, (2, 8))
        params = init(cell, jax.random.key(0), carry, jnp.asarray(xs[0]))
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        _, ys = run(cell, params, jnp.asarray(xs), jnp.asarray(starts))
        names = ("qkv", "gate", "output")
        kernel = {name: np.asarray(params["params"][name]["kernel"]) for name in names}

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
                    _, past_k, past_v = np.split(xs[s, b] @ kernel["qkv"], 3)
                    turned = as_complex(q[rows]) * np.exp(1j * theta * (t - s))
                    weight = (turned * as_complex(past_k[rows]).conj()).sum().real / 2
                    decay = (1 - 2.0 ** (-5 - head)) ** (t - s)
                    read = read + decay * weight * past_v[rows]
                reads.append((read - read.mean()) / np.sqrt(read.var() + 1e-5))
            gate = x @ kernel["gate"]
            gated = gate / (1 + np.exp(-gate)) * np.concatenate(reads)
            np.testing.assert_allclose(ys[t, b], gated @ kernel["output"], rtol=1e-9, atol=1e-10)


def test_retnet_knows_distances_only():
    """An episode that began 1000 steps ago with nothing stored is as good as a new one."""
    cell, params, (memory, count, buffer), xs = initialised("retnet")
    starts = jnp.zeros((12, 2), bool)
    old = memory, count + 1000, buffer
    (_, last, _), late = sequence(cell, params, old, xs, starts)
    _, expected = run(cell, params, xs)
    np.testing.assert_allclose(late, expected, atol=1e-4)
    assert (last == 1012).all()
    (_, last, _), _ = sequence(cell, params, old, xs, starts.at[4, 1].set(True))
    np.testing.assert_array_equal(last, [1012, 8])


def test_retnet_refuses():
    with pytest.raises(ValueError, match="hidden_size / num_heads to be even, got 12 and 4"):
        make_cell("retnet", 12)
