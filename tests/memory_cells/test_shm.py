"""Stable Hadamard memory: equal to the authors and to the paper, in both forms, and bounded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import ORACLES, B, initial_carry, run, sequence, time_major

from memory_cells import make_cell, shm
from memory_cells.parts.carry import episode_steps


def reference(params, clip, xs, starts, rows):
    """Step by step as in the paper, in float64; one environment, from the initial carry."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    memories, ys = [], []
    for x, start, row in zip(np.asarray(xs, np.float64), starts, rows, strict=True):
        if start:
            memory = np.zeros((p["theta"].shape[1],) * 2)
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        k, q = (np.maximum(x @ p[name]["kernel"], 0) for name in ("key", "query"))
        k = k / (1e-5 + k.sum())
        q = q / (1e-5 + q.sum())
        strength = 1 / (1 + np.exp(-x @ p["strength"]["kernel"]))
        calibration = 1 + np.tanh(np.outer(p["theta"][row], x @ p["calibration"]["kernel"]))
        written = np.outer(strength * (x @ p["value"]["kernel"]), k)
        memory = np.clip(calibration * memory + written, -clip, clip)
        memories.append(memory)
        ys.append((memory @ q) @ p["output"]["kernel"] + p["output"]["bias"])
    return np.array(memories), np.array(ys)


def test_shm_equals_the_authors():
    """thaihungle/SHM, shm.py, which always draws row 0: as good as a table of one row."""
    z = np.load(ORACLES / "shm.npz")
    names = {
        "key": "key",
        "query": "query",
        "value": "value",
        "calibration": "vc_net",
        "strength": "eta",
    }
    params = {ours: {"kernel": z[f"{theirs}.weight"].T} for ours, theirs in names.items()}
    params["theta"] = z["theta_matrix"][:1]
    params["norm"] = {"scale": z["norm.weight"], "bias": z["norm.bias"]}
    params["output"] = {"kernel": z["out.weight"].T, "bias": z["out.bias"]}
    cell = make_cell("shm", 8, memory_size=12, num_theta=1, clip=1e30)
    (memory, _), ys = run(cell, {"params": params}, time_major(z["x"]))
    np.testing.assert_allclose(time_major(ys), z["y"], atol=1e-6)
    np.testing.assert_allclose(memory, z["S"][:, -1], atol=1e-6)


def problem(steps, dtype=jnp.float32):
    """A cell with weights so large that the clip acts, its initial carry, inputs and starts."""
    rng = np.random.default_rng(0)
    cell = make_cell("shm", 6, memory_size=4, num_theta=7, clip=2.0)
    xs = jnp.asarray(rng.normal(size=(steps, B, 5)), dtype)
    starts = jnp.asarray(rng.random((steps, B)) < 0.05).at[0].set(True)
    carry = initial_carry(cell, xs)
    params = cell.init(jax.random.key(0), carry, xs[0])
    params = jax.tree.map(lambda p: jnp.asarray(p + rng.normal(size=p.shape), dtype), params)
    return cell, params, carry, xs, starts


def test_shm_equals_the_paper_step_by_step():
    with jax.enable_x64(True):
        cell, params, carry, xs, starts = problem(70, jnp.float64)
        steps = episode_steps(carry[1], starts)
        rows = shm.random_rows(steps, 7)
        (memory, count), ys = sequence(cell, params, carry, xs, starts)
        outcome = jax.device_get((steps, rows, starts, memory, count, ys))
        steps, rows, starts, memory, count, ys = outcome
    for env in range(B):
        expected_steps = [t - max(s for s in range(t + 1) if starts[s, env]) for t in range(70)]
        np.testing.assert_array_equal(steps[:, env], expected_steps)
        assert count[env] == expected_steps[-1] + 1
        one_env = xs[:, env], starts[:, env], rows[:, env]
        memories, expected = reference(params["params"], 2.0, *one_env)
        assert 0.02 < (np.abs(memories) == 2.0).mean() < 0.5
        np.testing.assert_allclose(ys[:, env], expected, atol=1e-10)
        np.testing.assert_allclose(memory[env], memories[-1], atol=1e-10)


def test_shm_parallel_form_equals_the_scan(monkeypatch):
    monkeypatch.setattr(shm, "CHUNK", 8)
    cell, params, (memory, count), xs, starts = problem(20)
    starts = starts.at[0].set(False)

    @partial(jax.jit, static_argnums=0)
    def outcome(impl, params, carry, xs, starts):
        def loss(params, carry, xs):
            cell_of_impl = cell.clone(impl=impl)
            last, ys = cell_of_impl.apply(params, carry, xs, starts, method="sequence")
            return (ys * jnp.arange(1.0, 7)).mean() + last[0].sum(), (last, ys)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, carry, xs)

    used = memory + 0.5, count + 9
    scan = outcome("scan", params, used, xs, starts)
    parallel = outcome("parallel", params, used, xs, starts)
    close = lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5 * (1 + np.abs(e).max()))  # noqa: E731
    jax.tree.map(close, parallel, scan)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(scan[0][0]))

    starts = starts.at[3].set(True)
    for impl in ("scan", "parallel"):
        broken = memory * jnp.nan, count
        _, ((memory, _), ys) = outcome(impl, params, broken, xs.at[:3].set(jnp.nan), starts)
        assert jnp.isfinite(memory).all()
        assert jnp.isfinite(ys[3:]).all() and jnp.isnan(ys[:3]).all()


def test_shm_without_calibration_is_a_running_sum():
    cell, params, carry, xs, _ = problem(20)
    cell = cell.clone(clip=1e6)
    params["params"]["theta"] = jnp.zeros_like(params["params"]["theta"])
    (one, _), _ = run(cell, params, xs[:1])
    (memory, _), _ = run(cell, params, jnp.repeat(xs[:1], 20, axis=0))
    np.testing.assert_allclose(memory, 20 * one, rtol=1e-5)


def test_shm_rows_are_a_function_of_the_episodes_step():
    rows = np.asarray(shm.random_rows(jnp.arange(4096.0).reshape(-1, 2), 128)).ravel()
    counts = np.bincount(rows, minlength=128)
    assert len(counts) == 128
    assert counts.min() > 10 and counts.max() < 60  # 32 expected, standard deviation 5.6
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.05
    cell, params, (memory, count), xs, _ = problem(4)
    late = memory, jnp.full_like(count, 2.0**20 - 2)
    (_, count), _ = sequence(cell, params, late, xs, jnp.zeros((4, B), bool))
    np.testing.assert_array_equal(count, 2.0)  # starts again before float32 runs out of integers


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
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cell("shm", 8, **options)
