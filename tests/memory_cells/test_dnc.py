"""Differentiable neural computer: equal to PyPI's dnc, and it keeps what its theory says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import ORACLES, B, run_oracle

from memory_cells import dnc, make_cell


def test_dnc_equals_pypi_dnc(monkeypatch):
    """PyPI dnc 1.1.0, one step per call. It parses the interface in another way than the paper."""
    parse = dnc.parse_interface

    def their_interface(*args):
        interface = parse(*args)
        return interface._replace(
            read_keys=jnp.tanh(interface.read_keys),
            write_key=jnp.tanh(interface.write_key),
            write=jnp.tanh(interface.write),
            read_strengths=interface.read_strengths - 1.0,
            write_strength=interface.write_strength - 1.0,
        )

    monkeypatch.setattr(dnc, "parse_interface", their_interface)
    monkeypatch.setattr(dnc, "norm", partial(jnp.linalg.norm, axis=-1))
    z = np.load(ORACLES / "dnc.npz")
    names = (
        "read_keys",
        "read_strengths",
        "write_key",
        "write_strength",
        "erase_vector",
        "write_vector",
        "free_gates",
        "allocation_gate",
        "write_gate",
        "read_modes",
    )

    def joined(kind):
        """The transformation to the interface, from one part for each name."""
        prefix = "p_rnn_layer_memory_shared"
        return np.concatenate([z[f"{prefix}.{name}_transform.{kind}"].T for name in names], axis=-1)

    def reorder(x):
        """Their read modes are backward, forward, content."""
        modes = x[..., -6:].reshape(*x.shape[:-1], 2, 3)[..., [0, 2, 1]]
        return np.concatenate([x[..., :-6], modes.reshape(*x.shape[:-1], 6)], axis=-1)

    params = {
        "interface_kernel": reorder(joined("weight")),
        "interface_bias": reorder(joined("bias")),
        "output": {"kernel": z["p_output.weight"].T, "bias": z["p_output.bias"]},
    }
    lstm = "p_lstm_layer_0"
    kernels = np.split(z[f"{lstm}.weight_ih_l0"], 4)
    recurrent = np.split(z[f"{lstm}.weight_hh_l0"], 4)
    biases = np.split(z[f"{lstm}.bias_ih_l0"] + z[f"{lstm}.bias_hh_l0"], 4)
    for gate, w, u, b in zip("ifgo", kernels, recurrent, biases, strict=True):
        params[f"inputs_{gate}"] = {"kernel": w.T[:5], "bias": b}
        params[f"hidden_{gate}"] = np.concatenate([u.T, w.T[5:]])
    cell = make_cell("dnc", 5, controller_size=16, num_slots=8, slot_size=6)
    np.testing.assert_allclose(run_oracle(cell, params, z["x"]), z["y"], atol=1e-6)


def test_dnc_keeps_its_invariants():
    cell = make_cell("dnc", 8, controller_size=16, num_slots=6, slot_size=4)
    xs = 3 * jax.random.normal(jax.random.key(0), (500, B, 5))
    carry = cell.initialize_carry(jax.random.key(0), (B, 5))
    params = cell.init(jax.random.key(1), carry, xs[0])
    params = jax.tree.map(lambda p: 3 * p, params)

    def step(carry, x):
        carry, _ = cell.apply(params, carry, x)
        return carry, carry

    _, states = jax.jit(partial(jax.lax.scan, step))(carry, xs)
    s = jax.tree.map(np.asarray, states)
    links = s.links, s.links.swapaxes(-1, -2)
    for weights in (s.write_weights, s.read_weights, s.precedence, *links):
        assert weights.min() >= 0 and weights.sum(axis=-1).max() <= 1 + 1e-5
    assert s.usage.min() >= 0 and s.usage.max() <= 1 + 1e-6
    assert (np.diagonal(s.links, axis1=-2, axis2=-1) == 0).all()
    assert s.write_weights.max() > 0.3 and s.links.max() > 0.03


def test_dnc_allocation_is_that_of_the_sorted_usages():
    usage = np.array([[0.3, 0.9, 0.0, 0.3, 1.0, 0.5], np.zeros(6)])
    expected = np.zeros_like(usage)
    for row, u in enumerate(1e-6 + (1 - 1e-6) * usage):
        order = np.argsort(u, kind="stable")
        for rank, slot in enumerate(order):
            expected[row, slot] = (1 - u[slot]) * np.prod(u[order[:rank]])
    actual = dnc.allocation(jnp.asarray(usage, jnp.float32))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_dnc_finds_what_it_wrote_by_content_and_by_order():
    cell = make_cell("dnc", 1, controller_size=1, num_slots=5, slot_size=3, num_reads=1)
    state = cell.initialize_carry(jax.random.key(0), (1, 1))
    vectors = jnp.eye(3)[:, None]  # (3, 1, 3)

    def access(state, write=None, key=None, mode=(0.0, 0.0, 0.0)):
        interface = dnc.Interface(
            read_keys=jnp.zeros((1, 1, 3)) if key is None else key[None],
            read_strengths=jnp.full((1, 1), 100.0),
            write_key=jnp.zeros((1, 3)),
            write_strength=jnp.ones((1, 1)),
            erase=jnp.ones((1, 3)),
            write=jnp.zeros((1, 3)) if write is None else write,
            free_gates=jnp.zeros((1, 1)),
            allocation_gate=jnp.ones((1, 1)),
            write_gate=jnp.full((1, 1), 0.0 if write is None else 1.0),
            read_modes=jnp.array(mode)[None, None],
        )
        return dnc.access(interface, state)

    backward, content, forward = np.eye(3)
    for vector in vectors:
        state = access(state, write=vector)
    found = access(state, key=vectors[1], mode=content)
    np.testing.assert_allclose(found.reads[0], vectors[1], atol=1e-4)
    np.testing.assert_allclose(access(found, mode=forward).reads[0], vectors[2], atol=1e-4)
    np.testing.assert_allclose(access(found, mode=backward).reads[0], vectors[0], atol=1e-4)


def test_dnc_refuses():
    with pytest.raises(ValueError, match="dnc needs num_slots to be at least 1, got 0"):
        make_cell("dnc", 8, num_slots=0)
