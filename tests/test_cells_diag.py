"""Diagonal linear recurrences: the shared scan against autodiff, every cell against its paper or its authors' code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory_cells import ORACLES, B, H, T, assert_close, sequence, setup

from memory_cells import make_cell, s5
from memory_cells.linear_scan import linear_scan

FAMILY = ["lru", "mingru", "s5"]


def perturbed(cell, inputs, seed=0, scale=0.3):
    """Parameters away from their initial values, which may hide errors (zeros, symmetries); inputs and starts."""
    rng = np.random.default_rng(seed)
    xs, starts = rng.normal(size=(T, B, inputs)), rng.random((T, B)) < 0.1
    carry = cell.initialize_carry(jax.random.key(0), (B, inputs))
    params = cell.init(jax.random.key(seed), carry, jnp.zeros((B, inputs)))["params"]
    params = jax.tree.map(lambda p: np.asarray(p + scale * rng.normal(size=p.shape), np.float64), params)
    return params, xs, starts


def run_float64(cell, params, xs, starts):
    """The cell's outputs in float64, from the initial carry."""
    with jax.enable_x64(True):
        carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
        params = {"params": jax.tree.map(jnp.asarray, params)}
        return np.asarray(sequence(cell, params, carry, jnp.asarray(xs), jnp.asarray(starts))[1])


def recur(decay, inputs, starts):
    """h_t = decay_t h_(t-1) + inputs_t with h := 0 before a start, in numpy."""
    h, hs = np.zeros_like(inputs[0]), []
    for a, b, start in zip(np.broadcast_to(decay, inputs.shape), inputs, starts, strict=True):
        h = a * np.where(start.reshape(-1, *[1] * (h.ndim - 1)), 0, h) + b
        hs.append(h)
    return np.stack(hs)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


# --- The scan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["scan", "parallel"])
@pytest.mark.parametrize("kind", ["real", "complex", "constant"])
def test_linear_scan_equals_a_plain_scan(kind, impl):
    """Values and gradients, also those of the carry and of a learned initial state."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape) * (kind != "real")  # noqa: E731
    a = 0.5 * (draw(2, 4) if kind == "constant" else draw(17, B, 2, 4))
    b, carry, initial = draw(17, B, 2, 4), draw(B, 2, 4), draw(2, 4)
    starts = jnp.asarray(rng.random((17, B)) < 0.2).at[0, 0].set(True).at[-1, 1].set(True)
    weights = rng.normal(size=b.shape)

    def plain(a, b, carry, starts, initial):
        def step(h, inputs):
            a, b, start = inputs
            h = a * jnp.where(start[:, None, None], initial, h) + b
            return h, h

        return jax.lax.scan(step, carry, (jnp.broadcast_to(a, b.shape), b, starts))[1]

    def loss(scan, a, b, carry, initial):
        hs = scan(a, b, carry, starts, initial)
        return (weights * (hs.real + hs.imag**2)).sum(), hs

    with jax.enable_x64(True):
        arguments = [jnp.asarray(array if kind != "real" else array.real) for array in (a, b, carry, initial)]
        gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4), has_aux=True), static_argnums=0)
        assert_close(gradient(partial(linear_scan, impl=impl), *arguments), gradient(plain, *arguments), 1e-12)


@partial(jax.jit, static_argnums=0)
def outputs_and_gradients(cell, params, carry, xs, starts, weights):
    """(last carry, ys), and the gradients for params, carry and xs of a loss in which `weights` are those of ys."""

    def loss(params, carry, xs):
        last, ys = cell.apply(params, carry, xs, starts, method="sequence")
        total = (weights * ys).sum() + sum(jnp.tanh(leaf.real).sum() for leaf in jax.tree.leaves(last))
        return total, (last, ys)

    gradients, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, carry, xs)
    return outputs, gradients


def case(name, impl):
    cell, params, carry, xs, starts = setup(name)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(T, B, H)), jnp.float32)
    return cell.clone(impl=impl), params, carry, xs, starts, weights


@pytest.mark.parametrize("name", FAMILY)
def test_parallel_and_scan_agree(name):
    outputs, gradients = outputs_and_gradients(*case(name, "parallel"))
    expected_outputs, expected_gradients = outputs_and_gradients(*case(name, "scan"))
    assert_close(outputs, expected_outputs)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=3e-6 * scale, rtol=1e-4), gradients, expected_gradients
    )
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected_gradients))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("impl", ["scan", "parallel"])
def test_starts_cut_exactly(name, impl):
    """Whatever the impl: no gradient across a start, and no inf from a broken carry, in values or gradients."""
    cell, params, carry, xs, starts, weights = case(name, impl)
    starts, weights = starts.at[20].set(True), weights.at[:20].set(0.0)
    (_, ys), (_, by_carry, by_xs) = outputs_and_gradients(cell, params, carry, xs, starts, weights)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(by_carry)) and (by_xs[:20] == 0).all()

    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), carry)
    (_, broken_ys), _ = outputs_and_gradients(cell, params, broken, xs, starts, weights)
    np.testing.assert_array_equal(ys[20:], broken_ys[20:])
    _, gradients = outputs_and_gradients(cell, params, broken, xs, starts.at[0].set(True), weights)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# --- LRU -------------------------------------------------------------------------------------------------------------


def lru_reference(p, xs, starts):
    us = layer_norm(xs, 1e-6) * p["normalise"]["scale"] + p["normalise"]["bias"]
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    hs = recur(decay, np.exp(p["gamma"]) * (us @ (p["B"][0] + 1j * p["B"][1])), starts)
    v = gelu((hs @ (p["C"][0] + 1j * p["C"][1])).real + p["d"] * us)
    return dense(p["output"]["value"], v) * sigmoid(dense(p["output"]["gate"], v))


def test_lru_equals_the_paper():
    cell = make_cell("lru", H, state_size=6)
    params, xs, starts = perturbed(cell, H)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), lru_reference(params, xs, starts), atol=1e-10)


def test_lru_starts_inside_its_ring():
    cell = make_cell("lru", 64, r_min=0.5, r_max=0.8, max_phase=1.0)
    carry = cell.initialize_carry(jax.random.key(0), (1, 64))
    p = cell.init(jax.random.key(0), carry, jnp.zeros((1, 64)))["params"]
    radius, phase = np.exp(-np.exp(p["nu"])), np.exp(p["theta"])
    assert radius.min() >= 0.5 and radius.max() <= 0.8 and np.ptp(radius) > 0.2
    assert phase.min() > 0.0 and phase.max() <= 1.0 and np.ptp(phase) > 0.7
    np.testing.assert_allclose(np.exp(p["gamma"]), np.sqrt(1 - radius**2), rtol=1e-4)


def test_lru_impulse_response():
    """Without its nonlinear ends the cell is a linear filter: y_t = Re(C lambda^t B x_0)."""
    cell = make_cell("lru", H, norm=False, glu=False)
    p, xs, starts = perturbed(cell, H)
    xs[1:], starts[:] = 0.0, False
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    b = np.exp(p["gamma"]) * (xs[0] @ (p["B"][0] + 1j * p["B"][1]))
    expected = (decay ** np.arange(T)[:, None, None] * b @ (p["C"][0] + 1j * p["C"][1])).real
    expected[0] += p["d"] * xs[0]
    np.testing.assert_allclose(run_float64(cell, p, xs, starts), expected, atol=1e-10)


# --- minGRU ----------------------------------------------------------------------------------------------------------


def test_mingru_equals_another_implementation():
    """PyPI minGRU-pytorch 0.2.1, minGRU(6): candidate and gate from one matrix."""
    z = np.load(ORACLES / "mingru.npz")
    w_n, w_z = np.split(z["mg_w"], 2)
    params = {"params": {"input_n": {"kernel": w_n.T}, "input_z": {"kernel": w_z.T}}}
    cell, xs = make_cell("mingru", 6, conv_width=0), jnp.asarray(z["mg_x"].swapaxes(0, 1))
    for impl in ("scan", "parallel"):
        carry = z["mg_h0"][:, 0], ()
        _, ys = sequence(cell.clone(impl=impl), params, carry, xs, jnp.zeros(xs.shape[:2], bool))
        np.testing.assert_allclose(ys.swapaxes(0, 1), z["mg_y"], atol=2e-6)


# --- S5 --------------------------------------------------------------------------------------------------------------


def s5_reference(p, xs, starts):
    us = layer_norm(dense(p["embed"], xs), 1e-6) * p["normalise"]["scale"] + p["normalise"]["bias"]
    continuous, dt = np.minimum(p["lambda_re"], -1e-4) + 1j * p["lambda_im"], np.exp(p["log_dt"])
    decay = np.exp(continuous * dt)
    hs = recur(decay, (decay - 1) / continuous * (us @ (p["B"][0] + 1j * p["B"][1])), starts)
    v = gelu(2 * (hs @ (p["C"][0] + 1j * p["C"][1])).real + p["d"] * us)
    return dense(p["output"]["value"], v) * sigmoid(dense(p["output"]["gate"], v))


def test_s5_equals_the_paper():
    cell = make_cell("s5", H, state_size=12, num_blocks=2)
    params, xs, starts = perturbed(cell, 5)
    np.testing.assert_allclose(run_float64(cell, params, xs, starts), s5_reference(params, xs, starts), atol=1e-10)


def test_s5_starts_as_hippo():
    """One state of each conjugate pair reproduces the full real system that HiPPO-LegS' normal part is."""
    size = 8
    n = np.arange(size)
    hippo = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    normal = hippo + np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5))
    eigenvalues, vectors = s5.hippo(size)
    np.testing.assert_allclose(normal @ vectors, vectors * eigenvalues, atol=1e-12)
    np.testing.assert_allclose(2 * (vectors * eigenvalues @ vectors.conj().T).real, normal, atol=1e-12)


def test_s5_stays_stable_whatever_its_parameters():
    cell = make_cell("s5", H)
    params, _, _ = perturbed(cell, H)
    params["lambda_re"] = np.full_like(params["lambda_re"], 0.5)
    xs, starts = np.ones((3000, 1, H)), np.zeros((3000, 1), bool)
    assert np.abs(run_float64(cell, params, xs, starts)).max() < 1e6
