"""Runs are shown from their files, while they run and later."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from helpers import ROOT
from PIL import Image

from harness.dashboard import draw, load, sparkline
from harness.metrics import GREEDY, RETURN


def make_run(path, seeds=3, reports=30, script="rppo", cell="gru", level=100.0, total=3000):
    """The files of a run."""
    path.mkdir()
    config = {"env": "gymnax::CartPole-v1", "mask": [], "env_kwargs": {}, "cell": cell, "seed": 0}
    config |= {"hidden_size": 8, "total_steps": total, "num_seeds": seeds, "run_dir": str(path)}
    about = {"script": script, "config": config, "final_step": total}
    (path / "config.json").write_text(json.dumps(about))
    with open(path / "metrics.jsonl", "w") as file:
        for i in range(reports):
            returns = [level * i / reports + seed for seed in range(seeds)]
            record = {
                "step": 100 * (i + 1),
                "time": 0.5 * i,
                "charts/SPS": 5000.0,
                "losses/value_loss": returns,
                "charts/episodic_return": [*returns[:-1], None],
                GREEDY: returns,
                "system/memory_mb": 512.0,
            }
            file.write(json.dumps(record) + "\n")
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
    progress = ("67%", "2,000 of 3,000 steps", "5,000 steps/s")
    for piece in ("gymnax::CartPole-v1", *progress, "512 MB", "value loss"):
        assert piece in flat, piece
    assert f"0:00:0{seeds // 5} left" in flat  # 1,000 steps of every seed at 5,000 steps/s
    if seeds > 1:
        assert "greedy return seed_4" in flat and "greedy return IQM" in flat
        assert "97.00 [95.67, 98.67]" in flat
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
    environment = os.environ | {"COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


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
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True)
        time.sleep(4)
        assert process.poll() is None
        with open(run / "metrics.jsonl", "a") as file:
            file.write(whole[half:])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "3,000 of 3,000 steps" in output and "complete" in output


def test_a_run_that_went_back_is_read_again(tmp_path):
    run_dir = make_run(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    history = load(run_dir)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:10]))
    history.poll()
    assert history.step == 1000 and len(history.series[RETURN]) == 10
    assert history.values(RETURN).shape == (10, 3)
    assert history.values("losses/no such").shape == (0, 1)


def test_curves_of_any_runs(tmp_path):
    runs = [make_run(tmp_path / f"gru{i}", level=100 + i) for i in range(2)]
    runs += [make_run(tmp_path / "lstm", cell="lstm")]
    runs += [make_run(tmp_path / "ppo", script="ppo", seeds=1)]
    curves = tmp_path / "curves.png"
    result = look(*runs, "--plot", curves)
    assert result.returncode == 0, result.stderr
    assert Image.open(curves).size[0] > 400
    unfinished = make_run(tmp_path / "unfinished", reports=3)
    with_gaps = look(runs[0], unfinished, "--plot", curves, "--metric", RETURN)
    assert with_gaps.returncode == 0
    for args in ((), (runs[0], "--plot", "no/x.png"), (runs[0], "--plot", "x.doc")):
        refused = look(*args)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    refused = look(*runs, "--plot", curves, "--metric", "eval/return")
    assert refused.returncode == 2
    assert "has no metric 'eval/return'; it has: charts/SPS, " in refused.stderr
    shutil.rmtree(runs[0])
    refused = look(*runs)
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: no run in '{runs[0]}'")
