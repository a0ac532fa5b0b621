"""Every destination is read back with the reader its users have; none of them can hurt a run."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from filelock import FileLock
from PIL import Image

from loggers import (
    RETURN,
    Background,
    Logger,
    describe,
    draw,
    interval,
    iqm,
    load,
    make_logger,
    read_metrics,
    scalars,
    sparkline,
    summarize,
    summarize_episodes,
)

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    log: tuple[str, ...] = ("file",)
    total_steps: int = 1000
    num_seeds: int = 3
    env: str = "gymnax::CartPole-v1"
    wandb_mode: str = "offline"
    neptune_mode: str = "offline"


METRICS = {"charts/episodic_return": np.array([20.0, np.nan, 40.0]), "charts/SPS": 1234.5}


def log_twice(names, run_dir):
    (run_dir / "config.json").write_text('{"script": "ppo", "id": "1a2b3c4d", "git": {"commit": "abc"}, "config": {}}')
    with make_logger(Config(names), run_dir) as logger:
        logger.log(METRICS, step=500)
        logger.log({"eval/episodic_return": np.array([1.0, 2.0, 3.0])}, step=1000)


# --- File ------------------------------------------------------------------------------------------------------------


def test_file_is_strict_json_lines(tmp_path):
    log_twice(("file",), tmp_path)
    refuse = pytest.fail
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [500, 1000]
    assert lines[0]["charts/episodic_return"] == [20.0, None, 40.0] and lines[0]["charts/SPS"] == 1234.5
    assert lines[0]["system/memory_mb"] > 10
    assert 0 <= lines[0]["time"] <= lines[1]["time"]


def test_file_is_complete_before_it_is_closed(tmp_path):
    logger = make_logger(Config(), tmp_path)
    logger.log(METRICS, step=500)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 500


def test_time_goes_on_in_a_run_that_is_gone_on_with(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 500, "time": 77.0}\n')
    log_twice(("file",), tmp_path)
    assert [int(record["time"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == [77] * 3


def test_a_full_disk_delays_the_record_and_loses_nothing(tmp_path, capsys):
    logger = make_logger(Config(), tmp_path)
    (file,) = logger.backends
    real, file.file = file.file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (1, 2):
        logger.log(METRICS, step)
    assert (
        capsys.readouterr().err == "warning: metrics.jsonl: No space left on device; will try again at every report\n"
    )
    file.file = real
    logger.log(METRICS, 3)
    logger.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# --- The others' own readers -----------------------------------------------------------------------------------------


def tensorboard_scalars(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_events(tmp_path):
    log_twice(("tensorboard",), tmp_path)
    events, values = tensorboard_scalars(tmp_path)
    assert values["charts/episodic_return"] == [(500, 30.0)]
    assert values["charts/episodic_return/seed_2"] == [(500, 40.0)]
    assert values["eval/episodic_return"] == values["eval/episodic_return/iqm"] == [(1000, 2.0)]
    assert "charts/episodic_return/seed_1" not in values  # nan is absent
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"CartPole-v1" in text and b"1a2b3c4d" in text


def test_tensorboard_has_no_gaps_or_doubles_after_going_on(tmp_path):
    record = tmp_path / "metrics.jsonl"
    with make_logger(Config(("file",)), tmp_path) as logger:  # a killed run: its events were never flushed
        for step in (100, 200, 300):
            logger.log({"losses/x": np.array([step / 100, np.nan])}, step)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"what was")
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:2]))  # back to the checkpoint
    with make_logger(Config(("tensorboard", "file")), tmp_path) as logger:
        for step in (300, 400):
            logger.log({"losses/x": np.array([step / 10, np.nan])}, step)
    assert len(list(tmp_path.glob("events*"))) == 1
    assert tensorboard_scalars(tmp_path)[1]["losses/x"] == [(100, 1.0), (200, 2.0), (300, 30.0), (400, 40.0)]


def test_tensorboard_gives_up_quietly_when_the_disk_is_full(tmp_path, capfd):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        logger = make_logger(Config(("tensorboard", "file")), tmp_path)
        logger.log(METRICS, 1)
        (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 2**16))
        for step in (2, 3):
            logger.log(METRICS, step)
            time.sleep(0.2)
        logger.close()
        errors = capfd.readouterr().err
        assert errors.count("\n") == 1 and "TensorBoard stopped: OSError(28, 'No space left on device')" in errors
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def wandb_inspect(*args):
    """What wandb's own tool reads in an offline run; it waits until wandb's process has written the end."""
    wandb = Path(sys.executable).with_name("wandb")
    result = subprocess.run([wandb, "leet", "inspect", "--json", *args], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wandb_offline(tmp_path):
    log_twice(("wandb",), tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-1a2b3c4d")
    records = [json.loads(line) for line in wandb_inspect("--follow", "--idle-timeout", "30s", folder).splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["_step"] for row in rows] == [500, 1000]
    assert rows[0]["charts/episodic_return"] == 30.0 and rows[0]["charts/episodic_return/seed_2"] == 40.0
    assert "charts/episodic_return/seed_1" not in rows[0]
    assert rows[1]["eval/episodic_return/iqm_low"] >= 1.0
    run = json.loads(wandb_inspect("--summary", folder))
    assert run["run_id"] == "1a2b3c4d" and run["state"] == "finished"
    assert run["config"]["env"] == "gymnax::CartPole-v1" and run["config"]["about"]["git"]["commit"] == "abc"


def test_neptune_offline(tmp_path):
    log_twice(("neptune",), tmp_path)
    import threading

    from neptune.core.components.queue.disk_queue import DiskQueue

    (folder,) = (tmp_path / ".neptune" / "offline").glob("run__*")
    queue = DiskQueue(folder, to_dict=dict, from_dict=dict, lock=threading.RLock())
    operations = []
    while element := queue.get():
        operations.append(element.obj)
    logged = {
        "/".join(o["path"]): [(v["step"], v["value"]) for v in o["values"]]
        for o in operations
        if o["type"] == "LogFloats"
    }
    assert logged["charts/episodic_return/mean"] == [(500, 30.0)]
    assert logged["charts/episodic_return/seed_2"] == [(500, 40.0)]
    assert logged["eval/episodic_return/iqm"] == [(1000, 2.0)]
    assigned = {"/".join(o["path"]): o["value"] for o in operations if o["type"].startswith("Assign")}
    assert assigned["config/env"] == "gymnax::CartPole-v1" and assigned["about/git/commit"] == "abc"


def test_console_prints_a_line_per_report(tmp_path, capsys):
    log_twice(("console",), tmp_path)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert "return" in heading and "SPS" in heading
    assert "500  50%" in first and "30.00 ± 10.00" in first and "1,234" in first and "nan" not in first
    assert "1,000 100%" in second and "2.00 ± 0.82" in second
    assert len({len(line) for line in (heading, first, second)}) == 1


def test_console_columns_never_touch(tmp_path, capsys):
    huge = {"charts/episodic_return": [-12345.67, 0.0], "losses/value_loss": [1.234e9, 1.2], "charts/SPS": 98765432.1}
    with make_logger(Config(("console",)), tmp_path) as logger:
        logger.log(huge, step=500)
    line = capsys.readouterr().out.splitlines()[1]
    assert " 98,765,432 " in line and " -6172.84 ± 6172.84 " in line and " 6.2e+08 ± 6.2e+08 " in line


# --- Faults ----------------------------------------------------------------------------------------------------------


class Broken:
    def log(self, metrics, step):
        raise OSError("quota exceeded")

    def close(self):
        raise OSError("quota exceeded")


@pytest.mark.parametrize("wrap", [lambda backend: backend, Background])
def test_a_failing_backend_is_dropped_and_the_rest_go_on(wrap, tmp_path, capsys):
    logger = make_logger(Config(), tmp_path)
    logger.backends.insert(0, wrap(Broken()))
    for step in (1, 2, 3):
        logger.log(METRICS, step)
        time.sleep(0.1)
    logger.close()
    assert capsys.readouterr().err.count("Broken stopped: OSError('quota exceeded')") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_hanging_backend_is_dropped_and_the_rest_go_on(tmp_path, capsys):
    class Hanging:
        def log(self, metrics, step):
            time.sleep(3600)

        close = log

    logger = make_logger(Config(), tmp_path)
    logger.backends += [Background(Hanging(), capacity=5), Background(Hanging(), patience=0.2)]
    began = time.perf_counter()
    for step in range(10):
        logger.log(METRICS, step)
    logger.close()
    assert time.perf_counter() - began < 5
    errors = capsys.readouterr().err
    assert "Hanging stopped: TimeoutError('5 reports are waiting, it does not keep up')" in errors
    assert "Hanging stopped: TimeoutError('it did not finish within 0 s')" in errors
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 10


def test_background_loses_nothing_and_keeps_the_order():
    seen = []
    backend = Background(SimpleNamespace(log=lambda metrics, step: seen.append(step), close=lambda: seen.append("end")))
    for step in range(500):
        backend.log({}, step)
    backend.close()
    assert seen == [*range(500), "end"]


def test_no_backend_is_a_logger_too():
    with Logger() as logger:
        logger.log(METRICS, step=1)


# --- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_iqm_is_scipys_trimmed_mean(count, rng):
    values = rng.normal(size=(6, count))
    np.testing.assert_allclose(iqm(values), scipy.stats.trim_mean(values, 0.25, axis=1))


def test_the_interval_is_scipys_percentile_bootstrap(rng):
    values = rng.normal(size=20)
    expected = scipy.stats.bootstrap((values,), lambda x, axis: iqm(x), method="percentile", n_resamples=20_000)
    np.testing.assert_allclose(interval(values, resamples=20_000), expected.confidence_interval, atol=0.02)


def test_scalars():
    flat = scalars({"eval/episodic_return": np.array([1.0, np.nan, 3.0]), "x": np.array(2.0), "y": np.array([np.nan])})
    assert flat == {
        "eval/episodic_return": 2.0,
        "eval/episodic_return/seed_0": 1.0,
        "eval/episodic_return/seed_2": 3.0,
        "eval/episodic_return/iqm": 2.0,
        "eval/episodic_return/iqm_low": 1.0,
        "eval/episodic_return/iqm_high": 3.0,
        "x": 2.0,
    }


def test_summarize_divides_sums_by_what_they_count():
    sums = {
        "losses/entropy": np.array([3.0, 6.0]),
        "charts/episodic_return": np.array([50.0, 0.0]),
        "charts/episodes": np.array([5, 0]),
    }
    report = summarize(sums, num_updates=3)
    np.testing.assert_array_equal(report["losses/entropy"], [1.0, 2.0])
    np.testing.assert_array_equal(report["charts/episodic_return"], [10.0, np.nan])
    np.testing.assert_array_equal(report["charts/episodes"], [5, 0])
    nothing = summarize(sums | {"charts/episodes": np.array([0, 0])}, num_updates=3)
    assert "charts/episodic_return" not in nothing and "losses/entropy" in nothing


def test_evaluation_in_words_and_numbers():
    episodes = SimpleNamespace(returns=np.array([[1.0, 3.0], [5.0, 7.0], [0.0, 0.0]]), lengths=np.ones((3, 2)))
    np.testing.assert_array_equal(summarize_episodes(episodes)["eval/episodic_return"], [2.0, 6.0, 0.0])
    text = "greedy return over 2 episodes: median of 3 seeds 2.00, IQM 2.67 (95 % interval 0.00 to 6.00)"
    assert describe(episodes) == text + "; the seeds: 2.00 6.00 0.00"
    healthy = "greedy return over 2 episodes: median of 2 seeds 4.00, IQM 4.00 (95 % interval 2.00 to 6.00)"
    assert describe(episodes, {2: "story"}) == healthy + "; the seeds: 2.00 6.00 (1 diverged)"
    single = SimpleNamespace(returns=np.array([[4.0, 4.0]]), lengths=np.ones((1, 2)))
    assert describe(single) == "greedy return over 2 episodes: 4.00 (95 % interval 4.00 to 4.00)"


# --- Looking at runs -------------------------------------------------------------------------------------------------


def make_run(path, seeds=3, reports=30, script="rppo", cell="gru", level=100.0, total=3000):
    """The files of a run."""
    path.mkdir()
    config = {"env": "gymnax::CartPole-v1", "mask": [], "env_kwargs": {}, "cell": cell, "seed": 0, "hidden_size": 8}
    config |= {"total_steps": total, "num_seeds": seeds, "run_dir": str(path)}
    (path / "config.json").write_text(json.dumps({"script": script, "config": config, "final_step": total}))
    with open(path / "metrics.jsonl", "w") as file:
        for i in range(reports):
            returns = [level * i / reports + seed for seed in range(seeds)]
            record = {"step": 100 * (i + 1), "time": 0.5 * i, "charts/SPS": 5000.0, "losses/value_loss": returns}
            record |= {"charts/episodic_return": [*returns[:-1], None], "eval/episodic_return": returns}
            file.write(json.dumps(record | {"system/memory_mb": 512.0}) + "\n")
    return path


def show(renderable, width):
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("seeds", [1, 5])
def test_the_dashboard_shows_everything_at_every_width(width, seeds, tmp_path):
    run_dir = make_run(tmp_path / "run", seeds, reports=20)
    text = show(draw(load(run_dir)), width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.replace("│", " ").split())
    for piece in ("gymnax::CartPole-v1", "67%", "2,000 of 3,000 steps", "5,000 steps/s", "512 MB", "value loss"):
        assert piece in flat, piece
    assert f"0:00:0{seeds // 5} left" in flat  # 1,000 steps of every seed at 5,000 steps/s
    if seeds > 1:
        assert "greedy return seed_4" in flat and "greedy return IQM" in flat and "97.00 [95.67, 98.67]" in flat
    assert "▁" in text and "█" in text


def test_the_dashboard_of_a_run_that_has_just_begun(tmp_path):
    run_dir = make_run(tmp_path / "run", reports=0)
    text = show(draw(load(run_dir)), 80)
    assert "0 of 3,000 steps" in text


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, 0, 7) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2, 0, 7) == "▁█"
    assert sparkline([1.0, np.nan, 1.0], 8, 1, 1) == "▁ ▁" and sparkline([], 8, 0, 1) == ""


def look(*args):
    command = [sys.executable, str(ROOT / "loggers.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ | {"COLUMNS": "160"})


def test_runs_are_shown_from_their_files(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", script="ppo", reports=12)]
    result = look(*runs)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(" a ─" in line and " b ─" in line for line in lines)  # side by side
    assert any("complete" in line and "stopped" in line for line in lines)


def test_a_running_run_is_followed_until_it_ends(tmp_path):
    run = make_run(tmp_path / "run", reports=30)
    whole = (run / "metrics.jsonl").read_text()
    half = len(whole) // 2  # in the middle of a line
    (run / "metrics.jsonl").write_text(whole[:half])
    with FileLock(run / ".lock"):
        command = [sys.executable, str(ROOT / "loggers.py"), str(run)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(4)
        assert process.poll() is None
        with open(run / "metrics.jsonl", "a") as file:
            file.write(whole[half:])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "3,000 of 3,000 steps" in output and "complete" in output, errors


def test_a_run_that_went_back_is_read_again(tmp_path):
    run_dir = make_run(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    history = load(run_dir)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:10]))
    history.poll()
    assert history.step == 1000 and len(history.series[RETURN]) == 10
    assert history.values(RETURN).shape == (10, 3) and history.values("losses/no such").shape == (0, 1)


def test_curves_of_any_runs(tmp_path):
    runs = [make_run(tmp_path / f"gru{i}", level=100 + i) for i in range(2)]
    runs += [make_run(tmp_path / "lstm", cell="lstm"), make_run(tmp_path / "ppo", script="ppo", seeds=1)]
    result = look(*runs, "--plot", tmp_path / "curves.png")
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "curves.png").size[0] > 400
    unfinished = make_run(tmp_path / "unfinished", reports=3)
    assert look(runs[0], unfinished, "--plot", tmp_path / "curves.png", "--metric", RETURN).returncode == 0  # with gaps
    for args in ((), (runs[0], "--plot", "no/x.png"), (runs[0], "--plot", "x.doc")):
        refused = look(*args)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    refused = look(*runs, "--plot", tmp_path / "curves.png", "--metric", "eval/return")
    assert refused.returncode == 2 and "has no metric 'eval/return'; it has: charts/SPS, " in refused.stderr
    shutil.rmtree(runs[0])
    refused = look(*runs)
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: no run in '{runs[0]}'")
