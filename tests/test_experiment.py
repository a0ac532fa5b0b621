"""Run directories, resuming, diverging, and what the user is told when something is wrong."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Checkpoints
from conftest import SCRIPTS, command_line, last_line, tiny

from algorithms import ppo, rppo
from experiment import Run, RunError, UsageError, load_config, open_run_dir, provenance, seed_keys, show, vmap_seeds
from loggers import Logger, read_metrics

CONFIG = tiny(ppo)
PPO = ppo.__file__


def records(run_dir, *without):
    """The metrics of a run, less what is never the same twice."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    varying = {"time", "charts/SPS", "system/memory_mb", "charts/compile_seconds"}
    lines = [{name: value for name, value in line.items() if name not in varying} for line in lines]
    return [line for line in lines if len(line) > 1]  # not those about compiling


def final_leaves(run_dir, module, config):
    like = jax.eval_shape(lambda: module.init(config, seed_keys(config)))
    state, step, _ = Checkpoints(run_dir).restore(like)
    keys = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return step, [np.asarray(keys(leaf)) for leaf in jax.tree.leaves(state)]


# --- Run directories -------------------------------------------------------------------------------------------------


def test_a_run_directory_holds_the_config_and_where_it_comes_from(tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path / "a" / "run"), log=("file",))
    path, lock = open_run_dir(config)
    assert load_config(str(path), ppo.Config) == config
    saved = json.loads((path / "config.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(PPO).parent)
    if head.returncode == 0:
        assert saved["git"]["commit"] == head.stdout.strip() and isinstance(saved["git"]["dirty"], bool)
    assert saved["packages"]["jax"] == jax.__version__ and saved["machine"]["devices"]
    (tmp_path / "x.py").write_text("")
    assert provenance(tmp_path / "x.py")["git"] == {"commit": None, "dirty": None}  # not under version control
    lock.release()


def test_a_run_without_a_name_gets_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {str(open_run_dir(CONFIG)[0]) for _ in range(5)}  # started in the same second
    assert len(names) == 5 and all(name.startswith("runs/test-Counting__ppo__seed0__") for name in names)


def test_unusable_run_directories(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path, "exists"), (tmp_path / "file" / "run", "cannot be written: Not a directory")):
        with pytest.raises(UsageError, match=message):
            open_run_dir(replace(CONFIG, run_dir=str(path)))
    taken, lock = open_run_dir(replace(CONFIG, run_dir=str(tmp_path / "taken")))
    with pytest.raises(UsageError, match="exists; choose another with --run-dir"):
        open_run_dir(replace(CONFIG, run_dir=str(taken)))
    with pytest.raises(UsageError, match="is in use by another process"):
        open_run_dir(replace(CONFIG, resume=str(taken), run_dir=str(taken)))
    lock.release()
    open_run_dir(replace(CONFIG, resume=str(taken), run_dir=str(taken)))[1].release()
    (tmp_path / "empty").mkdir()  # what a process that was killed at once may leave
    open_run_dir(replace(CONFIG, run_dir=str(tmp_path / "empty")))[1].release()


def test_run_directories_without_permission(tmp_path):
    if os.geteuid():
        tmp_path.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("root may write everywhere but to a read-only disk, and may not mount one here")
    try:
        with pytest.raises(UsageError, match="cannot be written: (Permission denied|Read-only file system)"):
            open_run_dir(replace(CONFIG, run_dir=str(tmp_path / "run")))
    finally:
        tmp_path.chmod(0o700) if os.geteuid() else subprocess.run(["umount", "-l", tmp_path], check=True)


def test_configs_that_do_not_fit(tmp_path):
    run_dir = tmp_path / "run"
    open_run_dir(replace(CONFIG, run_dir=str(run_dir)))[1].release()
    with pytest.raises(UsageError, match=r"is a run of ppo.py, not of rppo.py"):
        load_config(str(run_dir), rppo.Config)
    with pytest.raises(UsageError, match="no run in 'nowhere': .*No such file"):
        load_config("nowhere", ppo.Config)
    with pytest.raises(UsageError, match=r"was trained with gamma = 0.99, not with 0.9"):
        open_run_dir(replace(CONFIG, resume=str(run_dir), gamma=0.9))
    with pytest.raises(UsageError, match=r"was trained with num_seeds = 1, not with 2"):
        show(replace(CONFIG, evaluate=str(run_dir), num_seeds=2), CONFIG.make_env(), ppo.init, ppo.evaluate)
    saved = json.loads((run_dir / "config.json").read_text())
    for part, name, value, message in (
        ("sources", "ppo.py", "0", r"was begun with another version of ppo.py; it was made at commit"),
        ("packages", "jax", "0.5.0", r"was begun with jax 0.5.0, not .*: install that, or start a new run"),
    ):
        other = saved | {part: saved[part] | {name: value}, "git": {"commit": "abc", "dirty": True}}
        (run_dir / "config.json").write_text(json.dumps(other))
        with pytest.raises(UsageError, match=message):
            open_run_dir(replace(CONFIG, resume=str(run_dir), run_dir=str(run_dir)))
    saved["config"]["old_option"] = 1
    (run_dir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="another version of ppo.py: its config differs in old_option"):
        load_config(str(run_dir), ppo.Config)
    saved["config"].pop("old_option")
    saved["config"]["env"] = "gymnax::Pendulum-v1"
    (run_dir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="is not valid here: gymnax::Pendulum-v1 has no option"):
        load_config(str(run_dir), ppo.Config)
    (run_dir / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json is damaged"):
        load_config(str(run_dir), ppo.Config)


# --- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "stop_after"),  # updates: between two evaluations, or at one
    [(script, 5) for script in SCRIPTS] + [("ppo", 3)],
)
def test_resuming_is_as_if_nothing_had_happened(script, stop_after, tmp_path, monkeypatch, capsys):
    """N updates + save + load + N updates equal 2 N updates bit for bit, and so do the logs."""
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module, num_seeds=2, log=("file",), log_every=2)
    config = replace(config, total_steps=6 * config.steps_per_update, eval_every=3 * config.steps_per_update)
    whole, broken = (replace(config, run_dir=str(tmp_path / name)) for name in ("whole", "broken"))
    module.main(whole)

    next_chunk = Run.next_chunk

    def stop(run, state):  # what a signal does, at a chosen moment
        if int(state.updates[0]) == stop_after:
            run.signal = signal.SIGTERM
        return next_chunk(run, state)

    monkeypatch.setattr(Run, "next_chunk", stop)
    with pytest.raises(SystemExit) as stopped:
        module.main(broken)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"go on from there with --resume {broken.run_dir}" in capsys.readouterr().err
    monkeypatch.setattr(Run, "next_chunk", next_chunk)
    with open(Path(broken.run_dir) / "metrics.jsonl", "a") as file:  # what a killed run wrote after its checkpoint
        file.write('{"step": 999, "time": 9, "losses/grad_norm": [1, 1]}\n{"step": 10')

    module.main(replace(broken, resume=broken.run_dir))
    assert records(broken.run_dir) == records(whole.run_dir)
    (step, expected), (resumed_step, actual) = (final_leaves(c.run_dir, module, config) for c in (whole, broken))
    assert step == resumed_step == config.total_steps
    assert all(a.tobytes() == e.tobytes() for a, e in zip(actual, expected, strict=True))

    module.main(replace(broken, resume=broken.run_dir))  # there is nothing left to do
    assert "the run was complete" in capsys.readouterr().out
    assert records(broken.run_dir) == records(whole.run_dir)


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path / "run"), log=("file",), total_steps=2 * CONFIG.steps_per_update)
    config = replace(config, eval_every=CONFIG.steps_per_update)
    open_run_dir(config)[1].release()
    # Killed after it had logged its first evaluation, before it had written its first checkpoint.
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 32, "time": 1, "eval/episodic_return": [1]}\n{"st')
    ppo.main(replace(config, resume=config.run_dir))
    assert [line["step"] for line in records(config.run_dir)] == [32, 32, 64, 64]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match="the checkpoints of .* are gone, there is nothing to go on from"):
        ppo.main(replace(config, resume=config.run_dir))
    assert len(records(config.run_dir)) == 4  # and they are still there


# --- Faults ----------------------------------------------------------------------------------------------------------


def break_seeds(monkeypatch, seeds, update):
    """Make the parameters of some seeds nan before the given update, counted from 1."""
    train_chunk = ppo.train_chunk

    def broken(state, env, num_updates):
        done = int(state.updates[0])
        if not done < update <= done + num_updates:
            return train_chunk(state, env, num_updates)
        state, *before = train_chunk(state, env, update - 1 - done)
        state = state.replace(params=jax.tree.map(lambda leaf: leaf.at[jnp.array(seeds)].set(jnp.nan), state.params))
        state, *after = train_chunk(state, env, done + num_updates - update + 1)
        return state, *jax.tree.map(jnp.add, before, after)

    monkeypatch.setattr(ppo, "train_chunk", broken)


def test_a_diverged_run_stops_with_the_update_the_metric_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = replace(CONFIG, total_steps=20 * CONFIG.steps_per_update, eval_every=10 * CONFIG.steps_per_update)
    config = replace(config, log_every=5, log=("file",), run_dir=str(tmp_path / "run"))
    break_seeds(monkeypatch, [0], 13)
    with pytest.raises(RunError) as stopped:
        ppo.main(config)
    story = r"training diverged: losses/approx_kl, .* are nan or inf in update 13; start again with a lower learning .*"
    way_on = rf"; the last checkpoint is of step 320, .* look at it with --evaluate {config.run_dir}"
    assert re.fullmatch(story + way_on, str(stopped.value))
    step, leaves = final_leaves(config.run_dir, ppo, config)
    assert step == 320 and all(np.isfinite(leaf).all() for leaf in leaves)


def test_the_update_named_is_the_first_even_if_later_ones_are_finite():
    """A loss that overflows once and clips its gradient to 0 leaves finite parameters."""
    config = replace(CONFIG, total_steps=20 * CONFIG.steps_per_update, learning_rate=1e18, max_grad_norm=1e18)
    state, env, finite, bad = ppo.init(config, seed_keys(config)), config.make_env(), [], 0
    for _ in range(6):  # one update at a time
        state, sums, _ = ppo.train_chunk(state, env, 1)
        finite.append(all(np.isfinite(value).all() for name, value in sums.items() if name.startswith("losses/")))
    bad = finite.index(False) + 1
    with pytest.raises(RunError, match=f"nan or inf in update {bad};"):
        ppo.train(ppo.init(config, seed_keys(config)), env, Logger(), 6 * config.steps_per_update)


def test_a_diverged_seed_is_reported_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, num_seeds=3, total_steps=8 * CONFIG.steps_per_update, log_every=2, log=("file",))
    config = replace(config, eval_every=4 * CONFIG.steps_per_update)
    healthy, whole, broken = (replace(config, run_dir=str(tmp_path / name)) for name in ("healthy", "whole", "broken"))
    ppo.main(healthy)
    break_seeds(monkeypatch, [1], 4)
    ppo.main(whole)
    output = capsys.readouterr()
    assert output.err.count("seed_1 diverged and is left out: ") == 1 and " in update 4\n" in output.err
    assert "median of 2 seeds" in output.out and "(1 diverged)" in output.out
    for expected, line in zip(records(healthy.run_dir), records(whole.run_dir), strict=True):
        assert line.keys() == expected.keys()
        for name, values in line.items():
            if isinstance(values, list):
                assert values[::2] == expected[name][::2], name
                assert (values[1] is None) == (line["step"] > 64 or values[1] != values[1] or expected[name][1] is None)

    next_chunk = Run.next_chunk  # stop, and go on: the seed is still left out, and not reported again

    def stop(run, state):
        run.signal = signal.SIGTERM if int(state.updates[0]) == 6 else None
        return next_chunk(run, state)

    monkeypatch.setattr(Run, "next_chunk", stop)
    with pytest.raises(SystemExit):
        ppo.main(broken)
    monkeypatch.setattr(Run, "next_chunk", next_chunk)
    capsys.readouterr()
    ppo.main(replace(broken, resume=broken.run_dir))
    assert records(broken.run_dir) == records(whole.run_dir)
    output = capsys.readouterr()
    assert "diverged and is left out" not in output.err and "(1 diverged)" in output.out
    show(replace(config, evaluate=broken.run_dir), config.make_env(), ppo.init, ppo.evaluate)
    assert "median of 2 seeds" in capsys.readouterr().out


def test_when_no_seed_is_left_the_run_stops():
    config = replace(CONFIG, num_seeds=2)
    state = ppo.init(config, seed_keys(config))
    state = state.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    with pytest.raises(RunError, match="training diverged: .* in update 1; start again"):
        ppo.train(state, config.make_env(), Logger(), config.steps_per_update)


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        config = replace(CONFIG, run_dir=str(tmp_path / "run"), log=("file",), hidden_size=64, eval_every=1)
        config = replace(config, total_steps=40 * config.steps_per_update, keep_checkpoints=40)
        with pytest.raises(RunError, match=r"cannot be written to .* \(. MiB free\): No space left .* with --resume "):
            ppo.main(config)
        lines = records(config.run_dir)
        step, leaves = final_leaves(config.run_dir, ppo, config)
        assert leaves and step == lines[-1]["step"] - config.steps_per_update
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# --- Signals and kills -----------------------------------------------------------------------------------------------


def start(script, *args):
    """A run of a script in a process of its own."""
    command = [sys.executable, str(Path(PPO).with_name(f"{script}.py")), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("script", "number"), [("ppo", signal.SIGINT), ("drqn", signal.SIGTERM)])
def test_signals_save_first(script, number, tmp_path):
    run_dir = tmp_path / "run"
    args = (*command_line(script), "--total-steps", 100_000_000, "--run-dir", run_dir, "--log", "console", "file")
    process = start(script, *args)
    for line in process.stdout:  # the heading, then reports: training is on
        if "%" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    # The last line: jax 0.9 logs what it thinks of programs from the compilation cache before it.
    assert re.fullmatch(r"stopped; the last checkpoint is of step [\d,]+, go on .* --resume .*/run", last_line(errors))
    assert "Traceback" not in errors
    steps = Checkpoints(run_dir).steps()
    assert steps and records(run_dir)[-1]["step"] == steps[-1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("script", SCRIPTS)
def test_thirty_kills_lose_at_most_one_interval(script, tmp_path):
    """SIGKILL at random moments; the resumed run ends as the one that was left alone."""
    args = ["--env", "gymnax::CartPole-v1", "--num-seeds", "2", "--eval-episodes", "4", "--log-every", "3"]
    args += ["--total-steps", 1_000_000, "--eval-every", 20_000, "--log", "file", "tensorboard"]
    whole, module, moments = (
        tmp_path / "whole",
        importlib.import_module(f"algorithms.{script}"),
        np.random.default_rng(0),
    )
    assert start(script, *args, "--run-dir", whole).wait() == 0
    config, kills = load_config(str(whole), module.Config), 0
    _, expected = final_leaves(whole, module, config)
    while kills < 30:
        broken, reached = tmp_path / f"broken after {kills} kills", 0
        process = start(script, *args, "--run-dir", broken)
        while True:
            try:
                assert process.wait(moments.uniform(1, 12)) == 0, process.stderr.read()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            last = max(Checkpoints(broken).steps(), default=0)
            logged = [record["step"] for record in read_metrics(broken / "metrics.jsonl")]
            assert last >= max(logged, default=0) - 20_000 and last >= reached
            reached = last
            assert "damaged" not in process.stderr.read()
            again = ("--resume", broken) if (broken / "config.json").exists() else (*args, "--run-dir", broken)
            process = start(script, *again)
        assert records(broken) == records(whole)
        _, actual = final_leaves(broken, module, config)
        assert all(a.tobytes() == e.tobytes() for a, e in zip(actual, expected, strict=True))


# --- Seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_have_the_keys_of_their_own_runs():
    several, single = seed_keys(replace(CONFIG, seed=3, num_seeds=4)), seed_keys(replace(CONFIG, seed=5))
    assert several.shape == (4,) and single[0] == several[2] == jax.random.key(5)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_vmap_seeds_is_vmap(num_seeds):
    keys = jax.random.split(jax.random.key(0), num_seeds)
    tree = {"a": jnp.arange(2.0 * num_seeds).reshape(num_seeds, 2), "key": keys}
    function = lambda tree: (tree["a"].sum(), jax.random.normal(tree["key"]), 1.0)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, vmap_seeds(function)(tree), jax.vmap(function)(tree))
