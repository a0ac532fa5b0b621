"""Diagonal linear recurrences: the shared scan against autodiff, every cell against its paper or its authors' code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory_cells import ORACLES, B, H, T, assert_close, run_oracle, sequence, setup

from memory_cells import make_cell, s5
from memory_cells.parts.linear_scan import linear_scan

FAMILY = ["lru", "mingru", "s5", "ffm", "rtu", "mamba"]


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
    cell = cell.clone(**{"rtu": {"nonlinear": False}, "mamba": {"chunk_size": 8}}.get(name, {}))
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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lru", {"impl": "tree"}, "lru needs impl to be one of auto, scan, parallel, got 'tree'"),
        ("lru", {"state_size": -1}, "state_size to be 0 or more, got -1"),
        ("lru", {"r_min": 0.9, "r_max": 0.5}, "0 <= r_min < r_max <= 1, got 0.9 and 0.5"),
        ("lru", {"max_phase": 7.0}, "max_phase to be above 0 and at most 2 pi, got 7.0"),
        ("mingru", {"conv_width": 1}, "mingru needs conv_width to be 0 or at least 2, got 1"),
        ("s5", {"state_size": 10, "num_blocks": 2}, "multiple of 2 num_blocks, got 10 and 2"),
        ("s5", {"dt_min": 0.0}, "0 < dt_min <= dt_max, got 0.0 and 1.0"),
        ("ffm", {"context_size": 0}, "of at least 1, got 32 and 0"),
        ("ffm", {"min_period": 2000.0}, "0 < min_period <= max_period, got 2000.0 and 1024.0"),
        ("ffm", {"spacing": "even"}, "spacing to be linear or log, got 'even'"),
        ("rtu", {"activation": "gelu"}, "activation to be one of tanh, relu, got 'gelu'"),
        ("rtu", {"impl": "parallel"}, "a parallel form only with nonlinear=False"),
        ("mamba", {"conv_width": 0}, "mamba needs conv_width to be at least 2, got 0"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_cell(name, H, **options)


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


# --- FFM -------------------------------------------------------------------------------------------------------------


def test_ffm_equals_the_authors():
    """proroklab/ffm, standalone PyTorch version, memory_size 6, context_size 4, 7 outputs."""
    z = np.load(ORACLES / "ffm.npz")
    kernel, bias, cuts = z["pre.weight"].T, z["pre.bias"], (6, 13, 19)
    names = ("input", "through", "input_gate", "output_gate")
    params = {
        name: {"kernel": k, "bias": b}
        for name, k, b in zip(names, np.split(kernel, cuts, axis=1), np.split(bias, cuts), strict=True)
    }
    mix = z["mix.weight"].T.reshape(6, 4, 2, 7)  # theirs alternates real and imaginary parts
    params["mix"] = {"kernel": np.moveaxis(mix, 2, 0).reshape(48, 7), "bias": z["mix.bias"]}
    params |= {"a": z["ffa.a"].ravel(), "b": z["ffa.b"].ravel()}
    cell = make_cell("ffm", 7, memory_size=6, context_size=4)
    np.testing.assert_allclose(run_oracle(cell, params, z["x"]), z["y"], atol=3e-6)
    xs = jnp.asarray(z["x"]).swapaxes(0, 1)
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    last, _ = sequence(cell, {"params": params}, carry, xs, jnp.zeros(xs.shape[:2], bool))
    np.testing.assert_allclose(last, z["s"][:, -1], atol=2e-6)


def test_ffm_starts_as_the_authors_do():
    cell = make_cell("ffm", H, spacing="linear", min_period=1.0)
    p = cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(0), (1, H)), jnp.zeros((1, H)))["params"]
    limit = np.log(np.finfo(np.float64).max) / 1024 - 0.01
    np.testing.assert_allclose(p["a"], np.linspace(-limit + 0.01, np.log(0.01) / 1024, 32), rtol=1e-4)
    np.testing.assert_allclose(2 * np.pi / p["b"], np.linspace(1, 1024, 4), rtol=1e-5)


def test_ffm_impulse_decays_and_turns():
    """A single input leaves magnitude |u| exp(a t) and phase b t in the memory."""
    cell = make_cell("ffm", H)
    params, xs, _ = perturbed(cell, H, scale=0.0)
    params["input"]["bias"] *= 0.0
    xs[1:] = 0.0
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    last, _ = sequence(cell, {"params": params}, carry, jnp.asarray(xs, jnp.float32), jnp.zeros(xs.shape[:2], bool))
    u = dense(params["input"], xs[0]) * sigmoid(dense(params["input_gate"], xs[0]))
    expected = u[..., None] * np.exp((T - 1) * (params["a"][:, None] + 1j * params["b"]))
    np.testing.assert_allclose(last, expected, atol=1e-5)


# --- RTU -------------------------------------------------------------------------------------------------------------


def rtu_reference(p, xs, starts, nonlinear, f):
    r, phi = np.exp(-np.exp(p["nu"])), np.exp(p["theta"])
    scale = np.sqrt(1 - r**2)
    h1 = h2 = np.zeros((B, len(r)))
    ys = []
    for x, start in zip(xs, starts[..., None], strict=True):
        h1, h2 = np.where(start, 0, h1), np.where(start, 0, h2)
        p_t = r * np.cos(phi) * h1 - r * np.sin(phi) * h2 + scale * dense(p["input_1"], x)
        q_t = r * np.cos(phi) * h2 + r * np.sin(phi) * h1 + scale * dense(p["input_2"], x)
        h1, h2 = (f(p_t), f(q_t)) if nonlinear else (p_t, q_t)
        ys.append(np.concatenate([h1, h2] if nonlinear else [f(h1), f(h2)], axis=-1))
    return np.stack(ys)


@pytest.mark.parametrize("nonlinear", [True, False])
def test_rtu_equals_the_paper(nonlinear):
    for activation, f in (("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0))):
        cell = make_cell("rtu", H, nonlinear=nonlinear, activation=activation)
        params, xs, starts = perturbed(cell, 5)
        expected = rtu_reference(params, xs, starts, nonlinear, f)
        np.testing.assert_allclose(run_float64(cell, params, xs, starts), expected, atol=1e-10)


def test_rtu_backpropagation_equals_real_time_recurrent_learning():
    """The sensitivities dh/dnu and dh/dtheta, carried forward, give the gradients that backpropagation gives.

    In the authors' code dphi/dtheta = phi is missing, which is worth a factor of phi in theta's gradient.
    """
    cell = make_cell("rtu", H, nonlinear=False, activation="tanh")
    p, xs, starts = perturbed(cell, 5)
    weights = np.random.default_rng(1).normal(size=(T, B, H))
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    inputs = dense(p["input_1"], xs) + 1j * dense(p["input_2"], xs)
    scale = np.sqrt(1 - np.abs(decay) ** 2)
    h, by_nu, by_theta, expected = 0.0, 0.0, 0.0, {"nu": 0.0, "theta": 0.0}
    for x, start, weight in zip(inputs, starts[..., None], weights, strict=True):
        h, by_nu, by_theta = (np.where(start, 0, old) for old in (h, by_nu, by_theta))
        by_theta = decay * by_theta + 1j * np.exp(p["theta"]) * decay * h
        by_nu = decay * by_nu + np.exp(p["nu"]) * (-decay * h + np.abs(decay) ** 2 / scale * x)
        h = decay * h + scale * x
        slope = weight * (1 - np.tanh(np.concatenate([h.real, h.imag], axis=-1)) ** 2)
        for name, sensitivity in (("nu", by_nu), ("theta", by_theta)):
            parts = slope * np.concatenate([sensitivity.real, sensitivity.imag], axis=-1)
            expected[name] = expected[name] + parts.reshape(B, 2, -1).sum((0, 1))

    with jax.enable_x64(True):
        carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
        arguments = carry, jnp.asarray(xs), jnp.asarray(starts)
        loss = lambda p: (weights * cell.apply({"params": p}, *arguments, method="sequence")[1]).sum()  # noqa: E731
        actual = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, p))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-9)


# --- Mamba -----------------------------------------------------------------------------------------------------------


def test_mamba_equals_transformers():
    """transformers 5.23.0, MambaMixer with hidden_size 12, state_size 4, expand 2, time_step_rank 3."""
    z = np.load(ORACLES / "mamba.npz")
    kernel = lambda w: {"kernel": w.T}  # noqa: E731
    inputs, gate = np.split(z["in_proj.weight"], 2)
    dt_in, write, read = np.split(z["x_proj.weight"], (3, 7))
    params = {name: kernel(w) for name, w in {"input": inputs, "gate": gate, "dt_in": dt_in}.items()}
    params |= {"write": kernel(write), "read": kernel(read), "output": kernel(z["out_proj.weight"])}
    params["dt_out"] = kernel(z["dt_proj.weight"]) | {"bias": z["dt_proj.bias"]}
    params["conv"] = {"kernel": z["conv1d.weight"][:, 0].T, "bias": z["conv1d.bias"]}
    params |= {"A_log": z["A_log"], "D": z["D"]}
    cell = make_cell("mamba", 12, state_size=4, dt_rank=3)
    np.testing.assert_allclose(run_oracle(cell, params, z["x"]), z["y"], atol=1e-6)


def test_mamba_time_steps_start_between_0_001_and_0_1():
    cell = make_cell("mamba", 64)
    carry = cell.initialize_carry(jax.random.key(0), (1, 64))
    bias = cell.init(jax.random.key(0), carry, jnp.zeros((1, 64)))["params"]["dt_out"]["bias"]
    dt = np.log1p(np.exp(bias))
    assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1
