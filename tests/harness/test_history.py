"""The numbers of a run are read from files of any version, and of anybody."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import make_run, write_records

from harness.errors import UsageError
from harness.history import MAX_METRICS, load
from harness.metrics import GREEDY, RETURN


def test_a_run_that_went_back_is_read_again(tmp_path):
    run_dir = make_run(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    history = load(run_dir)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:10]))
    history.poll()
    assert history.step == 1000 and len(history.series[RETURN]) == 10
    assert history.values(RETURN).shape == (10, 3)
    assert history.values("losses/no such").shape == (0, 1)


def test_reports_are_read_up_to_a_time(tmp_path):
    history = load(make_run(tmp_path / "run"), read=False)
    history.poll(until=1.2)  # reports at 0, 0.5 and 1 second
    assert history.step == 300 and history.has_more
    history.poll()
    assert history.step == 3000 and not history.has_more


def test_the_time_left_is_that_of_the_speed_so_far(tmp_path):
    history = load(make_run(tmp_path / "run", reports=21))
    assert history.seconds_left() == 900 * 10.0 / 2000  # 0.5 seconds for 100 steps
    assert np.isnan(load(make_run(tmp_path / "begun", reports=1)).seconds_left())


def test_old_names_of_metrics_are_read(tmp_path):
    records = [{"step": 1, "time": 1.0, "eval/episodic_return": [1.0, 2.0, 3.0]}]
    run_dir = write_records(make_run(tmp_path / "run"), records)
    assert load(run_dir).last(GREEDY) == 2.0


def test_curves_are_by_seed_without_gaps_and_diverged_seeds(tmp_path):
    run_dir = make_run(tmp_path / "run", seed=5)
    values = [[1.0, 1.0, None], [2.0, None, 2.0], [3.0, 3.0, None]]
    losses = [[0.0, 0.0, 0.0], [0.0, None, 0.0], [0.0, 0.0, None]]
    rows = enumerate(zip(values, losses, strict=True))
    records = [
        {"step": i, "time": i, RETURN: value, "losses/x": loss, "charts/SPS": 7.0}
        for i, (value, loss) in rows
    ]
    history = load(write_records(run_dir, records))
    assert history.diverged() == {2}
    curves = history.curves(RETURN)
    assert curves.keys() == {5, 6}
    assert curves[6][0].tolist() == [0, 2] and curves[6][1].tolist() == [1.0, 3.0]
    assert [key for key in history.curves("charts/SPS")] == [range(5, 8)]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1.0, None, 3.0], 1),
        ([1.0, 2.0], 0),  # of three seeds
        ([1e39, -1e39, 2.0], 1),  # larger than any float32: nan
        (None, 0),
        (5, 1),
    ],
)
def test_what_is_no_metric_is_left_out(values, kept, tmp_path):
    run_dir = make_run(tmp_path / "run")
    write_records(run_dir, [{"step": 1, "time": 1.0, "a/b": values}, {"step": 0, "time": 2.0}])
    history = load(run_dir)
    assert len(history.series["a/b"]) == kept and history.step == 1
    assert not np.isinf(history.values("a/b")).any()


def test_a_million_names_do_not_make_a_million_metrics(tmp_path):
    metrics = {f"a/{i}": 1.0 for i in range(2 * MAX_METRICS)}
    run_dir = write_records(make_run(tmp_path / "run"), [{"step": 1, "time": 1.0} | metrics])
    assert len(load(run_dir).series) == MAX_METRICS


def with_field(**field):
    return lambda saved: saved | {"config": saved["config"] | field}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda saved: [], "must have an object, got []"),
        (lambda saved: {}, "has no script"),
        (
            lambda saved: saved | {"script": ["x"]},
            'script in config.json must be a string, got ["x"]',
        ),
        (
            lambda saved: saved | {"final_step": "3"},
            'must be a whole number of at least 0, got "3"',
        ),
        (lambda saved: saved | {"final_step": 10**30}, "must be a whole number of at least 0"),
        (
            lambda saved: saved | {"config": None},
            "config in config.json must be an object, got null",
        ),
        (lambda saved: saved | {"config": {"seed": 1}}, "has no config.env"),
        (
            with_field(num_seeds=0),
            "config.num_seeds in config.json must be a whole number of at least 1",
        ),
        (with_field(seed=True), "must be a whole number of at least 0, got true"),
        (
            with_field(env_kwargs=None),
            "config.env_kwargs in config.json must be an object, got null",
        ),
        (with_field(mask="x"), 'config.mask in config.json must be a list, got "x"'),
        (lambda saved: "{" * 10, "is not JSON"),
        (lambda saved: "[" * 100_000, "nested too deeply"),
        (lambda saved: "1" * 5000, "Exceeds the limit"),
    ],
)
def test_a_config_of_anybody_is_refused_in_a_sentence(change, reason, tmp_path):
    path = make_run(tmp_path / "run") / "config.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UsageError) as refused:
        load(path.parent)
    sentence = str(refused.value)
    assert sentence.startswith("no run in '") and reason in sentence and len(sentence) < 400


def test_sources_of_any_kind_are_read(tmp_path):
    about = {"sources": {"a.py": ["x"], "b.py": "1"}}
    history = load(make_run(tmp_path / "run", about=about))
    assert history.about["sources"] == {"b.py": "1"}
    assert load(make_run(tmp_path / "other", about={"sources": 3})).about["sources"] == {}


def test_pipes_do_not_keep_a_reader_waiting(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "metrics.jsonl").unlink()
    os.mkfifo(run_dir / "metrics.jsonl")
    assert load(run_dir).step == 0
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    os.mkfifo(run_dir / "config.json")
    with pytest.raises(UsageError, match="config.json is not a file"):
        load(run_dir)
