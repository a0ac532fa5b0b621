"""Runs are shown from their files, while they run and later."""

import gc
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from helpers import ROOT, make_run, write_records

from harness.dashboard import MAX_LOSSES, MAX_SEEDS, Look, draw, main, sparkline
from harness.errors import UsageError
from harness.history import load
from harness.options import launch


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
    assert "0:00:05 left" in flat  # of 1,000 steps: every 100 steps have taken 0.5 seconds
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


def test_values_of_any_size_have_sparklines():
    assert sparkline([-3e38, 3e38], 8, -3e38, 3e38) == "▁█"


def test_names_are_shown_as_text(tmp_path):
    name = "a[gru]b [/foo] \x1b[31m"
    run_dir = make_run(tmp_path / name.replace("/", "|"), env=name)
    write_records(run_dir, [{"step": 1, "time": 1.0, f"losses/{name}": 1.0}])
    text = show(draw(load(run_dir), name), 160)
    title, *_, loss, _ = text.splitlines()
    assert " a[gru]b [/foo] \\x1b[31m a[gru]b [|foo] \\x1b[31m ─" in title
    assert "a[gru]b [/foo] \\x1b[31m 1 " in loss
    assert "\x1b" not in text.replace(name, "")


def test_many_seeds_and_losses_are_counted(tmp_path):
    run_dir = make_run(tmp_path / "run", seeds=MAX_SEEDS + 5)
    record = {"step": 1, "time": 1.0, "eval/greedy_return": [*range(MAX_SEEDS + 5)]}
    write_records(run_dir, [record | {f"losses/x{i:02}": 1.0 for i in range(MAX_LOSSES + 7)}])
    text = show(draw(load(run_dir)), 100)
    assert f"seed_{MAX_SEEDS - 1} " in text and f"seed_{MAX_SEEDS} " not in text
    assert "and 5 more seeds" in text and "and 7 more " in text


def test_a_run_of_no_steps_and_no_speed_is_shown(tmp_path):
    run_dir = make_run(tmp_path / "run", seeds=1, total=0)
    write_records(run_dir, [{"step": 0, "time": 1.0, "charts/SPS": 0.0}] * 2)
    text = show(draw(load(run_dir)), 80)
    assert "0 of 0 steps" in text and "0 steps/s" in text and "left" not in text


# --- The command line ----------------------------------------------------------------------------


def look(*run_dirs, **options):
    """What `python loggers.py` does, in this process."""
    main(Look(run_dirs, **options))


def test_runs_are_shown_from_their_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    look(make_run(tmp_path / "a"), make_run(tmp_path / "b", hidden_size=16, reports=12))
    lines = capsys.readouterr().out.splitlines()
    assert any(" a ─" in line and " b ─" in line for line in lines)  # side by side
    assert any("rppo gru hidden_size=8 " in line and "hidden_size=16 " in line for line in lines)
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


def test_a_replayed_run_ends(tmp_path, capsys):
    look(make_run(tmp_path / "run", reports=30), speed=1e6)
    assert "3,000 of 3,000 steps" in capsys.readouterr().out


def test_strays_among_runs_are_named_once_and_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").symlink_to(run)
    look(*sorted(tmp_path.iterdir()), run)
    output, errors = capsys.readouterr()
    assert output.count("╭") == 1  # the run, once
    empty = f"no run in '{tmp_path / 'empty'}': config.json: No such file or directory"
    notes = f"no run in '{tmp_path / 'notes.txt'}': config.json: Not a directory"
    assert errors == f"warning: left out: {empty}; {notes}\n"
    shutil.rmtree(run)
    with pytest.raises(UsageError, match="^no run in .*empty.*; no run in .*; and 1 more$"):
        look(*sorted(tmp_path.iterdir()), tmp_path / "gone")


def test_curves_are_drawn_into_a_file(tmp_path, capsys):
    curves = tmp_path / "curves.png"
    look(make_run(tmp_path / "run"), plot=str(curves), metric="charts/SPS")
    assert capsys.readouterr().out == f"figure: {curves}\n"
    assert curves.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"speed": -1.0}, "speed must be 0 or a finite number above it, got -1.0"),
        ({"speed": float("nan")}, "speed must be 0 or a finite number above it, got nan"),
        ({"speed": float("inf")}, "speed must be 0 or a finite number above it, got inf"),
        ({"plot": "no/x.png"}, "plot must be a .png in a folder that exists, got 'no/x.png'"),
        ({"plot": "x.doc"}, "plot must be a .png in a folder that exists, got 'x.doc'"),
        ({"plot": "x.png", "speed": 2.0}, "speed replays runs in the dashboard"),
        ({"metric": "charts/SPS"}, "metric ('charts/SPS') is for --plot"),
    ],
)
def test_impossible_options_are_refused(options, sentence, tmp_path):
    with pytest.raises(UsageError) as refused:
        look(tmp_path, **options)
    assert sentence in str(refused.value)


def test_no_runs_are_refused():
    with pytest.raises(UsageError, match="name the directories of one or more runs"):
        look()


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        ("rich", {}, "the dashboard needs rich, which is not installed: pip install rich"),
        ("matplotlib.figure", {"plot": "x.png"}, "--plot needs matplotlib, which is not installed"),
    ],
)
def test_missing_libraries_are_named(module, options, sentence, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as refused:
        look(make_run(tmp_path / "run"), **options)
    assert sentence in str(refused.value)


def test_errors_on_the_terminal_are_text(capsys, monkeypatch):
    def fail(config):
        raise UsageError(f"no {config.plot}")

    monkeypatch.setattr(sys, "argv", ["loggers.py", "run", "--plot", "\x1b[31m\n.png"])
    with pytest.raises(SystemExit, match="2"):
        launch(fail, Look)
    gc.enable()  # launch disables it
    assert capsys.readouterr().err == "error: no \\x1b[31m\\n.png\n"
