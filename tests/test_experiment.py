"""Resuming, divergence, signals, seeds: what a run survives, and what the user is told."""

import contextlib
import importlib
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS, command_line, disk, last_line, records, tiny

import experiment
from algorithms import ppo
from experiment import Run, RunError, UsageError, seed_keys, show, vmap_seeds
from harness.checkpoints import Checkpoints
from harness.metrics import read_metrics
from harness.run_dir import is_running, load_config, open_run_dir
from loggers import Logger, event_steps

CONFIG = tiny(ppo)
PPO = ppo.__file__


def in_updates(config, total, every, **changes):
    """The config of a run of `total` updates, with an evaluation after `every` ones."""
    steps = config.steps_per_update
    return replace(config, total_steps=total * steps, eval_every=every * steps, **changes)


def main_in(folder, module, config, **changes):
    """Run a script's `main` in a folder, to be made there, with the run in `run`.

    The config is part of a compiled program: with relative paths runs in other folders share it.
    """
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        module.main(replace(config, run_dir="run", **changes))


def final_leaves(run_dir, module, config):
    like = jax.eval_shape(lambda: module.init(config, seed_keys(config)))
    state, step, _ = Checkpoints(run_dir).restore(like)

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return step, [np.asarray(plain(leaf)) for leaf in jax.tree.leaves(state)]


def assert_same_bits(actual, expected):
    assert all(a.tobytes() == e.tobytes() for a, e in zip(actual, expected, strict=True))


def stop_after(monkeypatch, update):
    """Let runs stop after this update, as a signal would."""
    next_chunk = Run.next_chunk

    def stop(run, state):
        run.signal = signal.SIGTERM if int(state.updates[0]) == update else None
        return next_chunk(run, state)

    monkeypatch.setattr(Run, "next_chunk", stop)


# --- Resuming ------------------------------------------------------------------------------------


# What else must be continued exactly: priorities, and the statistics that replay is scaled with.
NORMALIZED = {"terminal_every": 5, "normalize_obs": True, "normalize_reward": True}
ALSO = {
    "drqn": {"prioritized": True, "env_kwargs": NORMALIZED, "num_devices": 4},
    "sac": {"env_kwargs": NORMALIZED},
    "rppo": {"num_devices": 2},
    "rpqn": {"num_devices": 4},
}
FULL = {"mask": ("1",), "critic_obs": "full", "env_kwargs": NORMALIZED}
ATARI = {"env": "gxm::Gymnasium/ALE/Breakout-v5", "env_kwargs": {"max_num_frames_per_episode": 40}}


@pytest.mark.parametrize(
    ("script", "update", "changes"),  # between two evaluations, or at one
    [
        *((script, 5, ALSO.get(script, {})) for script in SCRIPTS),
        ("ppo", 3, {}),
        ("rppo", 5, FULL),
        ("rsac", 5, FULL),
        pytest.param("dqn", 5, ATARI, marks=pytest.mark.slow),
    ],
)
def test_resuming_is_as_if_nothing_had_happened(
    script, update, changes, tmp_path, monkeypatch, capsys
):
    """N updates + save + load + N updates equal 2 N updates bit for bit, and so do the logs."""
    module = importlib.import_module(f"algorithms.{script}")
    log = ("file", "tensorboard") if script == "ppo" else ("file",)
    config = tiny(module, num_seeds=2, log=log, log_every=2, **changes)
    config = in_updates(config, 6, 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main_in(whole, module, config)

    with monkeypatch.context() as patches, pytest.raises(SystemExit) as stopped:
        stop_after(patches, update)
        main_in(broken, module, config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "continue from there with --resume run" in capsys.readouterr().err
    # What a killed run wrote after its checkpoint.
    with open(broken / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 999, "time": 9, "losses/grad_norm": [1, 1]}\n{"step": 10')

    main_in(broken, module, config, resume="run")
    assert records(broken / "run") == records(whole / "run")
    events = [sorted((folder / "run").glob("events*")) for folder in (broken, whole)]
    (resumed_events, whole_events) = ([{*event_steps(file)} for file in files] for files in events)
    assert resumed_events == whole_events and len(resumed_events) == ("tensorboard" in log)
    step, expected = final_leaves(whole / "run", module, config)
    resumed_step, actual = final_leaves(broken / "run", module, config)
    assert step == resumed_step == config.total_steps
    assert_same_bits(actual, expected)

    main_in(broken, module, config, resume="run")  # there is nothing left to do
    assert "the run was complete" in capsys.readouterr().out
    assert records(broken / "run") == records(whole / "run")


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    config = in_updates(CONFIG, 2, 1, log=("file",))
    run_dir = tmp_path / "run"
    open_run_dir(replace(config, run_dir=str(run_dir)))[1].release()
    # Killed after it had logged its first evaluation, before it had written its first checkpoint.
    logged = '{"step": 32, "time": 1, "eval/greedy_return": [1]}\n{"st'
    (run_dir / "metrics.jsonl").write_text(logged)
    main_in(tmp_path, ppo, config, resume="run")
    assert [line["step"] for line in records(run_dir)] == [32, 32, 64, 64]
    shutil.rmtree(run_dir / "checkpoints")
    message = "the checkpoints of .* are gone, there is nothing to continue from"
    with pytest.raises(UsageError, match=message):
        main_in(tmp_path, ppo, config, resume="run")
    assert len(records(run_dir)) == 4  # and they are still there


# --- Faults --------------------------------------------------------------------------------------


def test_evaluations_are_filmed_and_training_does_not_notice(tmp_path):
    from PIL import Image

    config = in_updates(replace(CONFIG, env="test::Drawn", num_seeds=2), 4, 2)
    main_in(tmp_path / "plain", ppo, config)
    main_in(tmp_path / "filmed", ppo, config, eval_video=True)
    assert not (tmp_path / "plain" / "run" / "videos").exists()
    leaves = [final_leaves(tmp_path / name / "run", ppo, config) for name in ("plain", "filmed")]
    assert_same_bits(leaves[0][1], leaves[1][1])
    steps = [config.steps_per_update * update for update in (2, 4)]
    paths = [tmp_path / "filmed" / "run" / "videos" / f"{step}.gif" for step in steps]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)
    with Image.open(paths[1]) as film:
        assert film.n_frames == 5 and film.size == (300, 200)
        film.seek(4)
        assert film.convert("RGB").getpixel((0, 0)) == (160,) * 3


def test_a_video_that_fails_is_named_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no screen")

    monkeypatch.setattr(experiment, "write_gif", fail)
    config = in_updates(replace(CONFIG, env="test::Drawn"), 4, 2, eval_video=True)
    main_in(tmp_path, ppo, config)
    warning = "warning: no more videos: no screen; training continues without them\n"
    assert capsys.readouterr().err == warning
    assert len(Checkpoints(tmp_path / "run").steps()) == 2


def test_videos_that_cannot_be_drawn_are_refused_before_anything_begins(tmp_path):
    config = replace(CONFIG, eval_video=True, run_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="test::.* cannot be drawn: its library has no renderer"):
        Run(config, ppo.init)
    assert not (tmp_path / "run").exists()


def break_seeds(monkeypatch, seeds, update):
    """Make the parameters of some seeds nan before the given update, counted from 1."""
    compiled_updates = experiment.compiled_updates

    def break_leaf(leaf):
        return leaf.at[jnp.array(seeds)].set(jnp.nan)

    def broken(update_one, state, env, num_updates):
        done = int(state.updates[0])
        if not done < update <= done + num_updates:
            return compiled_updates(update_one, state, env, num_updates)
        state, *before = compiled_updates(update_one, state, env, update - 1 - done)
        state = state.replace(params=jax.tree.map(break_leaf, state.params))
        rest = done + num_updates - update + 1
        state, *after = compiled_updates(update_one, state, env, rest)
        return state, *jax.tree.map(jnp.add, before, after)

    monkeypatch.setattr(experiment, "compiled_updates", broken)


def test_a_diverged_run_stops_with_the_update_the_metric_and_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    config = in_updates(CONFIG, 20, 10, log_every=5, log=("file",))
    break_seeds(monkeypatch, [0], 13)
    with pytest.raises(RunError) as stopped:
        main_in(tmp_path, ppo, config)
    story = "training diverged: losses/approx_kl, .* are nan or inf in update 13"
    advice = "; start again with a lower learning .*; the last checkpoint is of step 320"
    last_good = ", the last good one: look at it with --evaluate run"
    assert re.fullmatch(story + advice + last_good, str(stopped.value))
    step, leaves = final_leaves(tmp_path / "run", ppo, config)
    assert step == 320 and all(np.isfinite(leaf).all() for leaf in leaves)


def test_the_update_named_is_the_first_even_if_later_ones_are_finite():
    """A loss that overflows once and clips its gradient to 0 leaves finite parameters."""
    config = in_updates(CONFIG, 20, 20, learning_rate=1e18, max_grad_norm=1e18)
    state, env, finite = ppo.init(config, seed_keys(config)), config.make_env(), []
    for _ in range(6):  # one update at a time
        state, sums, _ = experiment.compiled_updates(ppo.update, state, env, 1)
        losses = [value for name, value in sums.items() if name.startswith("losses/")]
        finite.append(bool(np.isfinite(losses).all()))
    bad = finite.index(False) + 1
    with pytest.raises(RunError, match=f"nan or inf in update {bad};"):
        ppo.train(ppo.init(config, seed_keys(config)), env, Logger(), 6 * config.steps_per_update)


def test_a_diverged_seed_is_reported_and_the_others_continue(tmp_path, monkeypatch, capsys):
    config = in_updates(CONFIG, 8, 4, num_seeds=3, log_every=2, log=("file",))
    healthy, whole, broken = (tmp_path / name for name in ("healthy", "whole", "broken"))
    main_in(healthy, ppo, config)
    break_seeds(monkeypatch, [1], 4)
    main_in(whole, ppo, config)
    output = capsys.readouterr()
    assert output.err.count("seed_1 diverged and is left out: ") == 1
    assert " in update 4\n" in output.err
    assert "median of 2 seeds" in output.out and "(1 diverged)" in output.out
    lines = zip(records(healthy / "run"), records(whole / "run"), strict=True)
    for expected, line in lines:
        assert line.keys() == expected.keys()
        for name, values in line.items():
            if isinstance(values, list):
                assert values[::2] == expected[name][::2], name
                was_none = values[1] != values[1] or expected[name][1] is None
                assert (values[1] is None) == (line["step"] > 64 or was_none)

    # Stopped and continued: the seed is still left out, and not reported again.
    with monkeypatch.context() as patches, pytest.raises(SystemExit):
        stop_after(patches, 6)
        main_in(broken, ppo, config)
    capsys.readouterr()
    main_in(broken, ppo, config, resume="run")
    assert records(broken / "run") == records(whole / "run")
    output = capsys.readouterr()
    assert "diverged and is left out" not in output.err and "(1 diverged)" in output.out
    config = replace(config, evaluate=str(broken / "run"))
    show(config, config.make_env(), ppo.init, ppo.evaluate)
    assert "median of 2 seeds" in capsys.readouterr().out


def test_when_no_seed_is_left_the_run_stops():
    config = replace(CONFIG, num_seeds=2)
    state = ppo.init(config, seed_keys(config))
    state = state.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    with pytest.raises(RunError, match="training diverged: .* in update 1; start again"):
        ppo.train(state, config.make_env(), Logger(), config.steps_per_update)


@pytest.mark.parametrize("how", ["deleted", "emptied", "replaced"])
def test_a_run_whose_directory_is_gone_ends_with_a_sentence(how, tmp_path, monkeypatch, capfd):
    next_chunk = Run.next_chunk

    def delete_first(run, state):
        if int(state.updates[0]) == 1:
            shutil.rmtree("run")
            if how != "deleted":
                Path("run").mkdir()
            if how == "replaced":
                Path("run", "config.json").touch()
        return next_chunk(run, state)

    monkeypatch.setattr(Run, "next_chunk", delete_first)
    config = in_updates(CONFIG, 4, 2, log_every=1, log=("file", "tensorboard"))
    with pytest.raises(RunError, match="the run directory 'run' was deleted or moved"):
        main_in(tmp_path, ppo, config)
    errors = capfd.readouterr().err  # where JAX 0.9 warns of programs from its cache
    assert "Traceback" not in errors and "Exception" not in errors
    assert not list(tmp_path.glob("run/checkpoints"))


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path):
    with disk(tmp_path, "size=1m"):
        config = replace(CONFIG, log=("file",), hidden_size=64, keep_checkpoints=40)
        config = in_updates(config, 40, 1)
        message = r"cannot be written to .* \(. MiB free\): No space left .* with --resume "
        with pytest.raises(RunError, match=message):
            main_in(tmp_path, ppo, config)
        lines = records(tmp_path / "run")
        step, leaves = final_leaves(tmp_path / "run", ppo, config)
        assert leaves and step == lines[-1]["step"] - config.steps_per_update


# --- Signals and kills ---------------------------------------------------------------------------


def start(script, *args):
    """A run of a script in a process of its own."""
    command = [sys.executable, str(Path(PPO).with_name(f"{script}.py")), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("script", "number"), [("ppo", signal.SIGINT), ("drqn", signal.SIGTERM)])
def test_signals_save_first(script, number, tmp_path):
    run_dir = tmp_path / "run"
    args = ("--total-steps", 100_000_000, "--run-dir", run_dir, "--log", "console", "file")
    process = start(script, *command_line(script), *args)
    for line in process.stdout:  # the heading, then reports: training is on
        if "%" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    # The last line: jax 0.9 logs what it thinks of programs from the compilation cache before it.
    message = r"stopped; the last checkpoint is of step [\d,]+, continue .* --resume .*/run"
    assert re.fullmatch(message, last_line(errors))
    assert "Traceback" not in errors
    steps = Checkpoints(run_dir).steps()
    assert steps and records(run_dir)[-1]["step"] == steps[-1]


def test_the_first_signal_stops_a_run_and_the_second_ends_it(tmp_path, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(experiment, "end_at_once", ended.append)
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, log=("file",), run_dir="run")
    with pytest.raises(SystemExit) as stopped, Run(config, ppo.init) as run:
        run._answer(signal.SIGTERM)  # nothing is trained yet
        assert ended == [signal.SIGTERM]
        assert run.next_chunk(run.state) > 0
        run._answer(signal.SIGINT)
        run._answer(signal.SIGINT)  # at the same moment: sent twice
        assert ended == [signal.SIGTERM] and run.signal == signal.SIGINT
        assert run.next_chunk(run.state) == 0
        time.sleep(0.11)
        run._answer(signal.SIGTERM)
        assert ended == [signal.SIGTERM] * 2
    assert stopped.value.code == 128 + signal.SIGINT
    lines = capfd.readouterr().err.split()
    assert lines.count("interrupted;") == 2 and lines.count("stopping") == 1
    assert "the last checkpoint is of step 0" in " ".join(lines)


def test_a_second_signal_ends_a_run_that_is_busy_at_once(tmp_path):
    """In an evaluation of hours; a terminal that is lost ends nothing."""
    run_dir = tmp_path / "run"
    busy = ("--eval-episodes", 100_000_000, "--eval-every", 1, "--log", "console", "file")
    process = start("ppo", *command_line("ppo"), *busy, "--run-dir", run_dir)
    for line in process.stdout:
        if "%" in line:
            break
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("stopping at the next report; press Ctrl-C") for line in lines)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM
    assert last_line(errors) == "interrupted; there is no checkpoint yet"
    assert records(run_dir) and not is_running(run_dir)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("script", SCRIPTS)
def test_thirty_kills_lose_at_most_one_interval(script, tmp_path):
    """SIGKILL at random moments; the resumed run ends as the one that was left alone.

    Every second one waits until a checkpoint is being written. At least 20 come after the first
    checkpoint.
    """
    args = [*command_line(script), "--num-seeds", 2, "--log-every", 3]
    args += ["--total-steps", 800_000, "--eval-every", 20_000]
    args += ["--log", "file", "tensorboard"]
    whole, moments = tmp_path / "whole", np.random.default_rng(0)
    module = importlib.import_module(f"algorithms.{script}")
    assert start(script, *args, "--run-dir", whole).wait() == 0
    config, kills, later_kills = load_config(str(whole), module.Config), 0, 0
    _, expected = final_leaves(whole, module, config)
    while kills < 30 or later_kills < 20:
        broken, reached = tmp_path / f"broken after {kills} kills", 0
        process = start(script, *args, "--run-dir", broken)
        while True:
            try:
                enough = kills >= 30 and later_kills >= 20
                patience = None if enough else moments.uniform(1, 20)
                assert process.wait(patience) == 0, process.stderr.read()
                break
            except subprocess.TimeoutExpired:
                while kills % 2 and process.poll() is None:
                    if any((broken / "checkpoints").glob("new*")):
                        break
                    time.sleep(0.001)
                process.kill()
                process.wait()
                kills += 1
            last = max(Checkpoints(broken).steps(), default=0)
            logged = [record["step"] for record in read_metrics(broken / "metrics.jsonl")]
            assert last >= max(logged, default=0) - 20_000 and last >= reached
            reached = last
            later_kills += last > 0
            assert "damaged" not in process.stderr.read()
            has_begun = (broken / "config.json").exists()
            again = ("--resume", broken) if has_begun else (*args, "--run-dir", broken)
            process = start(script, *again)
        assert records(broken) == records(whole)
        _, actual = final_leaves(broken, module, config)
        assert_same_bits(actual, expected)


# --- Seeds ---------------------------------------------------------------------------------------


def test_seeds_have_the_keys_of_their_own_runs():
    several = seed_keys(replace(CONFIG, seed=3, num_seeds=4))
    single = seed_keys(replace(CONFIG, seed=5))
    assert several.shape == (4,) and single[0] == several[2] == jax.random.key(5)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_vmap_seeds_is_vmap(num_seeds):
    keys = jax.random.split(jax.random.key(0), num_seeds)
    tree = {"a": jnp.arange(2.0 * num_seeds).reshape(num_seeds, 2), "key": keys}

    def function(tree):
        return tree["a"].sum(), jax.random.normal(tree["key"]), 1.0

    ours, theirs = vmap_seeds(function)(tree), jax.vmap(function)(tree)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
