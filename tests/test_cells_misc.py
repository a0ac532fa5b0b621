"""Stable Hadamard memory and differentiable neural computer: equal to oracles, and what their theory says."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memory_cells import dnc, make_cell, shm
from memory_cells.parts.carry import episode_steps

ORACLES = Path(__file__).parent / "oracles"
B = 3


def run(cell, params, xs):
    """A sequence (T, B, D) from the initial carry, without starts."""
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    return jax.jit(partial(cell.apply, method="sequence"))(params, carry, xs, jnp.zeros(xs.shape[:2], bool))


# --- Stable Hadamard memory ------------------------------------------------------------------------------------------


def shm_reference(params, clip, xs, starts, rows):
    """Step by step from the paper, in numpy and float64; one environment, from the initial carry."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    memories, ys = [], []
    for x, start, row in zip(np.asarray(xs, np.float64), starts, rows, strict=True):
        if start:
            memory = np.zeros((p["theta"].shape[1],) * 2)
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        k, q = (np.maximum(x @ p[name]["kernel"], 0) for name in ("key", "query"))
        k, q = k / (1e-5 + k.sum()), q / (1e-5 + q.sum())
        strength = 1 / (1 + np.exp(-x @ p["strength"]["kernel"]))
        calibration = 1 + np.tanh(np.outer(p["theta"][row], x @ p["calibration"]["kernel"]))
        memory = np.clip(calibration * memory + np.outer(strength * (x @ p["value"]["kernel"]), k), -clip, clip)
        memories.append(memory)
        ys.append((memory @ q) @ p["output"]["kernel"] + p["output"]["bias"])
    return np.array(memories), np.array(ys)


def test_shm_equals_the_authors():
    """thaihungle/SHM, shm.py, which always draws row 0: as good as a table of one row."""
    z = np.load(ORACLES / "shm.npz")
    names = {"key": "key", "query": "query", "value": "value", "calibration": "vc_net", "strength": "eta"}
    params = {ours: {"kernel": z[f"{theirs}.weight"].T} for ours, theirs in names.items()}
    params["theta"] = z["theta_matrix"][:1]
    params["norm"] = {"scale": z["norm.weight"], "bias": z["norm.bias"]}
    params["output"] = {"kernel": z["out.weight"].T, "bias": z["out.bias"]}
    cell = make_cell("shm", 8, memory_size=12, num_theta=1, clip=1e30)
    (memory, _), ys = run(cell, {"params": params}, jnp.asarray(z["x"]).swapaxes(0, 1))
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["y"], atol=1e-6)
    np.testing.assert_allclose(memory, z["S"][:, -1], atol=1e-6)


def shm_problem(steps, dtype=jnp.float32):
    """A cell with weights so large that the clip acts, inputs and starts."""
    rng = np.random.default_rng(0)
    cell = make_cell("shm", 6, memory_size=4, num_theta=7, clip=2.0)
    xs = jnp.asarray(rng.normal(size=(steps, B, 5)), dtype)
    starts = jnp.asarray(rng.random((steps, B)) < 0.05).at[0].set(True)
    carry = cell.initialize_carry(jax.random.key(0), (B, 5))
    params = cell.init(jax.random.key(0), carry, xs[0])
    return cell, jax.tree.map(lambda p: jnp.asarray(p + rng.normal(size=p.shape), dtype), params), carry, xs, starts


def test_shm_equals_the_paper_step_by_step():
    with jax.enable_x64(True):
        cell, params, carry, xs, starts = shm_problem(70, jnp.float64)
        steps = episode_steps(carry[1], starts)
        rows = shm.random_rows(steps, 7)
        (memory, count), ys = jax.jit(partial(cell.apply, method="sequence"))(params, carry, xs, starts)
        steps, rows, starts, memory, count, ys = jax.device_get((steps, rows, starts, memory, count, ys))
    for env in range(B):
        expected_steps = [t - max(s for s in range(t + 1) if starts[s, env]) for t in range(70)]
        np.testing.assert_array_equal(steps[:, env], expected_steps)
        assert count[env] == expected_steps[-1] + 1
        memories, expected = shm_reference(params["params"], 2.0, xs[:, env], starts[:, env], rows[:, env])
        assert 0.02 < (np.abs(memories) == 2.0).mean() < 0.5
        np.testing.assert_allclose(ys[:, env], expected, atol=1e-10)
        np.testing.assert_allclose(memory[env], memories[-1], atol=1e-10)


def test_shm_parallel_form_equals_the_scan(monkeypatch):
    monkeypatch.setattr(shm, "CHUNK", 8)
    cell, params, (memory, count), xs, starts = shm_problem(20)
    starts = starts.at[0].set(False)

    @partial(jax.jit, static_argnums=0)
    def outcome(impl, params, carry, xs, starts):
        def loss(params, carry, xs):
            last, ys = cell.clone(impl=impl).apply(params, carry, xs, starts, method="sequence")
            return (ys * jnp.arange(1.0, 7)).mean() + last[0].sum(), (last, ys)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, carry, xs)

    used = memory + 0.5, count + 9
    scan, parallel = (outcome(impl, params, used, xs, starts) for impl in ("scan", "parallel"))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5 * (1 + np.abs(e).max())), parallel, scan)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(scan[0][0]))

    starts = starts.at[3].set(True)
    for impl in ("scan", "parallel"):
        _, ((memory, _), ys) = outcome(impl, params, (memory * jnp.nan, count), xs.at[:3].set(jnp.nan), starts)
        assert jnp.isfinite(memory).all() and jnp.isfinite(ys[3:]).all() and jnp.isnan(ys[:3]).all()


def test_shm_without_calibration_is_a_running_sum():
    cell, params, carry, xs, _ = shm_problem(20)
    cell = cell.clone(clip=1e6)
    params["params"]["theta"] = jnp.zeros_like(params["params"]["theta"])
    (one, _), _ = run(cell, params, xs[:1])
    (memory, _), _ = run(cell, params, jnp.repeat(xs[:1], 20, axis=0))
    np.testing.assert_allclose(memory, 20 * one, rtol=1e-5)


def test_shm_rows_are_a_function_of_the_episodes_step():
    rows = np.asarray(shm.random_rows(jnp.arange(4096.0).reshape(-1, 2), 128)).ravel()
    counts = np.bincount(rows, minlength=128)
    assert len(counts) == 128 and counts.min() > 10 and counts.max() < 60  # 32 expected, standard deviation 5.6
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.05
    cell, params, (memory, count), xs, _ = shm_problem(4)
    late = memory, jnp.full_like(count, 2.0**20 - 2)
    (_, count), _ = cell.apply(params, late, xs, jnp.zeros((4, B), bool), method="sequence")
    np.testing.assert_array_equal(count, 2.0)  # begins again before float32 runs out of integers


def test_shm_stays_bounded():
    cell = make_cell("shm", 8)
    carry = cell.initialize_carry(jax.random.key(0), (B, 8))
    params = cell.init(jax.random.key(0), carry, jnp.ones((B, 8)))

    @jax.jit
    def outcome(params, xs):
        def loss(params):
            (memory, _), ys = run(cell, params, xs)
            return ys.mean(), memory

        return jax.grad(loss, has_aux=True)(params)

    random = jax.random.normal(jax.random.key(1), (1024, B, 8))
    for xs in (random, jnp.broadcast_to(random[:1], random.shape)):
        gradient, memory = outcome(params, xs)
        assert all(jnp.abs(leaf).max() < 1e3 for leaf in jax.tree.leaves(gradient))
        assert jnp.abs(memory).max() <= 100.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "shm needs memory_size to be greater than 0, got 0"),
        ({"clip": -1.0}, "shm needs clip to be greater than 0, got -1.0"),
        ({"impl": "fast"}, "shm needs impl to be one of auto, scan, parallel, got 'fast'"),
    ],
)
def test_shm_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("shm", 8, **options)


# --- Differentiable neural computer ----------------------------------------------------------------------------------


def test_dnc_equals_pypi_dnc(monkeypatch):
    """PyPI dnc 1.1.0, one step per call; it differs from the paper in what it applies to the interface."""
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
    part = lambda name: z[f"p_rnn_layer_memory_shared.{name}"].T  # noqa: E731
    names = ("read_keys", "read_strengths", "write_key", "write_strength", "erase_vector", "write_vector")
    names += ("free_gates", "allocation_gate", "write_gate", "read_modes")
    kernel, bias = (
        np.concatenate([part(f"{name}_transform.{kind}") for name in names], axis=-1) for kind in ("weight", "bias")
    )
    modes = slice(-6, None)  # theirs are backward, forward, content
    order = lambda x: x[..., modes].reshape(*x.shape[:-1], 2, 3)[..., [0, 2, 1]].reshape(*x.shape[:-1], 6)  # noqa: E731
    kernel[..., modes], bias[..., modes] = order(kernel), order(bias)
    params = {"interface_kernel": kernel, "interface_bias": bias}
    params["output"] = {"kernel": z["p_output.weight"].T, "bias": z["p_output.bias"]}
    lstm = [np.split(z[f"p_lstm_layer_0.{name}"], 4) for name in ("weight_ih_l0", "weight_hh_l0")]
    biases = np.split(z["p_lstm_layer_0.bias_ih_l0"] + z["p_lstm_layer_0.bias_hh_l0"], 4)
    for gate, w, u, b in zip("ifgo", *lstm, biases, strict=True):
        params |= {f"inputs_{gate}": {"kernel": w.T[:5], "bias": b}, f"hidden_{gate}": np.concatenate([u.T, w.T[5:]])}
    cell = make_cell("dnc", 5, controller_size=16, num_slots=8, slot_size=6)
    _, ys = run(cell, {"params": params}, jnp.asarray(z["x"]).swapaxes(0, 1))
    np.testing.assert_allclose(ys.swapaxes(0, 1), z["y"], atol=1e-6)


def test_dnc_keeps_its_invariants():
    cell = make_cell("dnc", 8, controller_size=16, num_slots=6, slot_size=4)
    xs = 3 * jax.random.normal(jax.random.key(0), (500, B, 5))
    carry = cell.initialize_carry(jax.random.key(0), (B, 5))
    params = cell.init(jax.random.key(1), carry, xs[0])
    params = jax.tree.map(lambda p: 3 * p, params)
    states = jax.jit(lambda carry, xs: jax.lax.scan(lambda c, x: (cell.apply(params, c, x)[0],) * 2, carry, xs)[1])
    s = jax.tree.map(np.asarray, states(carry, xs))
    for weights in (s.write_weights, s.read_weights, s.precedence, s.links, s.links.swapaxes(-1, -2)):
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
    np.testing.assert_allclose(dnc.allocation(jnp.asarray(usage, jnp.float32)), expected, atol=1e-6)


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
