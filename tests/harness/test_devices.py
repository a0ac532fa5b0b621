"""One run on several devices and in several processes: the same learning, the same numbers."""

import dataclasses
import importlib
import select
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ALGORITHMS,
    SCRIPTS,
    command_line,
    last_line,
    records,
    start,
    tiny,
)

from algorithms import dqn, ppo, rppo
from experiment import UsageError, evaluate_as, mean_over_devices
from harness import devices
from harness.devices import ONE_PART, Parts, divide, part_of, parts_of, why_not
from loggers import Logger


def trained(module, config, updates=2):
    """The state and the last report of a few updates."""
    env, state = start(config, module)
    state = module.warmup(state, env, Logger())
    return module.train(state, env, Logger(), updates * config.steps_per_update)


def values(array):
    """What each device holds of an array, by its part."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    parts = {}
    for shard in array.addressable_shards:
        place = tuple((part.start, part.stop) for part in shard.index)
        parts.setdefault(place, []).append(np.asarray(shard.data))
    return parts


# --- How a run is divided ------------------------------------------------------------------------


def test_seeds_are_divided_first_and_environments_next():
    config = tiny(ppo, num_seeds=6)
    assert [parts_of(config, n) for n in (1, 2, 3, 4)] == [(1, 1), (2, 1), (3, 1), (2, 2)]
    assert divide(dataclasses.replace(config, num_devices=4)) == Parts(2, 2)


def test_by_default_seeds_are_divided_and_environments_of_recurrent_rollouts(monkeypatch):
    assert divide(tiny(ppo, num_devices=0, num_seeds=2)) == ONE_PART  # a machine of one core
    monkeypatch.setattr(devices, "cores_of_all", lambda: 2)
    for script in SCRIPTS:
        module = importlib.import_module(f"algorithms.{script}")
        assert divide(tiny(module, num_devices=0, num_seeds=4)) == Parts(2, 1)
        reads_rollouts = script in ("rppo", "rppo_continuous", "rpqn")
        expected = Parts(1, 2) if reads_rollouts else ONE_PART
        assert divide(tiny(module, num_devices=0)) == expected
    odd = {"num_envs": 3, "num_minibatches": 1, "num_devices": 0}
    assert divide(tiny(rppo, **odd)) == ONE_PART  # three environments do not make two parts
    assert divide(tiny(ppo, num_devices=0, num_seeds=3)) == Parts(3, 1)  # more than cores
    monkeypatch.setattr(devices, "cores_of_all", lambda: 3)
    assert divide(tiny(ppo, num_devices=0, num_seeds=2)) == Parts(2, 1)


@pytest.mark.parametrize(
    ("num_seeds", "cores", "first"),
    [(4, 2, 2), (5, 2, 5), (6, 4, 6), (64, 8, 8), (10, 1, 1), (2, 8, 8), (1, 2, 2), (11, 2, 2)],
)
def test_the_number_of_devices_that_is_tried_first(num_seeds, cores, first):
    assert devices.counts_for_cores(num_seeds, cores, available=100)[0] == first


@pytest.mark.parametrize(
    ("module", "changes", "reason"),
    [
        (ppo, {"num_devices": 8}, "num_devices is 8, and jax finds 4 here"),
        (ppo, {"num_devices": 3}, r"3 cannot be used: num_envs \(4\) of each seed would be di"),
        (ppo, {"num_devices": 4, "num_seeds": 2, "num_envs": 3}, r"num_envs \(3\) of each"),
        (dqn, {"num_devices": 4, "batch_size": 6}, r"batch_size \(6\) of each seed would be"),
        (rppo, {"num_devices": 4}, r"1/4, where num_minibatches \(2\) must divide num_envs \(1\)"),
    ],
)
def test_what_cannot_be_divided_is_refused(module, changes, reason):
    with pytest.raises(UsageError, match=reason):
        divide(tiny(module, **changes))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_part_is_a_run_with_a_part_of_the_environments(script):
    """Its schedules are those of the whole run."""
    module = importlib.import_module(f"algorithms.{script}")
    config = module.Config(num_devices=2)
    assert not why_not(config, Parts(1, 2)) or config.num_envs == 1
    part = part_of(config, 2)
    assert part.num_envs == config.num_envs // 2
    if config.num_envs > 1:
        assert part.num_updates == config.num_updates
        assert part.progress(7) == config.progress(7)


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_devices_that_share_a_seed_learn_the_same_from_their_own_environments(script):
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module, num_seeds=2, num_devices=4)
    state, report = trained(module, config)
    for name in devices.OF_ALL:
        for leaf in jax.tree.leaves(getattr(state, name, ())):
            held = values(leaf)
            assert len(held) == 2  # seeds
            for copies in held.values():
                assert len(copies) == 2 and copies[0].tobytes() == copies[1].tobytes(), name
    # Every environment ends an episode after five steps, wherever it is.
    assert report["charts/episodes"][0] == report["charts/episodes"][1] > 0
    assert (report["charts/episodic_length"] == 5).all()
    inputs = state.inputs.obs if hasattr(state, "inputs") else state.obs
    assert len(values(inputs)) == 4 and inputs.shape[:2] == (2, config.num_envs)
    finite = [np.isfinite(value).all() for name, value in report.items() if "losses" in name]
    assert finite and all(finite)


@pytest.mark.parametrize("module", [ppo, rppo, dqn])
def test_seeds_on_devices_of_their_own_learn_as_on_one(module):
    states, reports = zip(
        *(trained(module, tiny(module, num_seeds=2, num_devices=n)) for n in (1, 2)),
        strict=True,
    )
    for one, two in zip(*map(jax.tree.leaves, (s.params for s in states)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    for name, one in reports[0].items():
        if name.startswith("losses/"):
            np.testing.assert_allclose(one, reports[1][name], rtol=1e-4, atol=1e-6)


def test_the_programs_of_devices_are_compiled_once():
    config = tiny(ppo, num_seeds=2, num_devices=2, log_every=1)
    env, parts = config.make_env(), divide(config)
    state, _ = trained(ppo, config, updates=1)
    evaluate_as("greedy", ppo.evaluate, state, env, 4, parts)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name)
    )
    try:
        state, _ = ppo.train(state, env, Logger(), 3 * config.steps_per_update)
        evaluate_as("greedy", ppo.evaluate, state, env, 4, parts)
        assert not [name for name in compiled if "compile" in name]
        jax.jit(lambda x: x + 1)(1.0)
        assert [name for name in compiled if "compile" in name]
    finally:
        jax.monitoring.clear_event_listeners()


def test_means_over_devices():
    parts = jnp.arange(6.0).reshape(2, 3)
    mean = jax.vmap(mean_over_devices, axis_name="devices")(parts)
    np.testing.assert_array_equal(mean, [parts.mean(axis=0)] * 2)
    assert mean_over_devices(parts) is parts  # on one device


# --- Processes -----------------------------------------------------------------------------------


def run_of_two(script, *args):
    """Two processes of one run that have met.

    On two busy cores 2 of 73 starts with jaxlib 0.9.2 did not: the first process lost the answer
    of its own coordination service, for which jax waits five minutes. Such a pair starts again.
    """
    for _ in range(3):
        both = start_two(script, *args)
        heard, _, _ = select.select([both[0].stdout], [], [], 60)
        if heard:
            return both
        for process in both:
            process.kill()
            process.communicate()
    raise AssertionError("two processes did not meet, three times")


def start_two(script, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id")
    command = [sys.executable, str(ALGORITHMS / f"{script}.py"), *map(str, args), *flags]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen([*command, str(i)], stdout=pipe, stderr=pipe, text=True) for i in range(2)
    ]


def test_two_processes_are_one_with_two_devices_and_end_together(tmp_path):
    args = [*command_line("ppo"), "--num-devices", 2, "--log", "console", "file"]
    short = ("--total-steps", 320, "--eval-every", 160)
    one = [sys.executable, str(ALGORITHMS / "ppo.py"), *map(str, (*args, *short))]
    subprocess.run([*one, "--run-dir", tmp_path / "one"], check=True, capture_output=True)
    both = run_of_two("ppo", *args, *short, "--run-dir", tmp_path / "two")
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "saved to" in outputs[0][0] and "step" not in outputs[1][0]  # the first one speaks
    assert records(tmp_path / "one") == records(tmp_path / "two")

    # One of them is lost.
    run_dir = tmp_path / "long"
    long = ("--total-steps", 10**8, "--eval-every", 160, "--run-dir", run_dir)
    by_default = ("--num-devices", 0, "--num-seeds", 4)  # divided among both
    both = run_of_two("ppo", *args, *long, *by_default)
    evaluations = (line for line in both[0].stdout if "eval:" in line)
    assert next(evaluations, "") and next(evaluations, "")  # a checkpoint follows each
    both[1].send_signal(signal.SIGKILL)
    _, errors = both[0].communicate(timeout=60)
    assert both[0].returncode == 1
    told = "error: another process of this run is gone; the last checkpoint is of step"
    assert last_line(errors).startswith(told) and "--resume" in last_line(errors)
    both[1].communicate()


def test_resuming_on_other_devices_says_that_it_is_not_exact(tmp_path, capsys):
    config = tiny(ppo, num_seeds=2, num_devices=2, log=("file",), run_dir=str(tmp_path / "run"))
    ppo.main(config)
    assert "warning" not in capsys.readouterr().err
    resumed = dataclasses.replace(config, resume=config.run_dir, run_dir="", num_devices=1)
    ppo.main(dataclasses.replace(resumed, total_steps=2 * config.total_steps))
    assert "now on 1: numbers will differ from those of an uninter" in capsys.readouterr().err
    assert records(tmp_path / "run")[-1]["step"] == 2 * config.total_steps


@pytest.mark.parametrize(
    ("script", "env"),
    [
        ("ppo_continuous", "mujoco::InvertedPendulum-v5"),
        ("ppo", "gxm::Gymnasium/ALE/Pong-v5"),
    ],
)
def test_devices_take_turns_on_the_host(script, env):
    module = importlib.import_module(f"algorithms.{script}")
    counts = []
    for num_devices in (1, 2):
        config = tiny(module, num_seeds=2, num_devices=num_devices, env=env, env_kwargs={})
        state, _ = trained(module, config)
        counts.append(jax.device_get(state.env_state.episode_return))
    np.testing.assert_allclose(*counts, rtol=1e-5)
