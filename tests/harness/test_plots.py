"""Learning curves: a line per experiment, each seed counted once."""

import numpy as np
import pytest
from helpers import make_run, write_records
from PIL import Image

from harness.errors import UsageError
from harness.history import load
from harness.metrics import GREEDY, RETURN, SAMPLED
from harness.plots import at_common_steps, figure_of, plot

RECORD = {"step": 100, "time": 1.0}


def drawn(runs, metric=""):
    """(panel, label) -> the line drawn, of the runs in these directories."""
    return {
        (axis.get_title(), text.get_text()): line
        for axis in figure_of([load(run) for run in runs], metric).axes
        for text, line in zip(axis.get_legend().get_texts(), axis.lines, strict=True)
    }


def labels(runs, metric=""):
    return [label for _, label in drawn(runs, metric)]


def test_seeds_of_an_experiment_are_counted_once(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "gru0", seeds=1, level=100),
        make_run(tmp_path / "gru1", seeds=1, seed=1, level=200),
        make_run(tmp_path / "gru0to2", seeds=3, level=300),
    ]
    ((name, line),) = drawn(runs).items()
    assert name == ("gymnax::CartPole-v1", "rppo gru (3)")
    # Of the third run, whose seeds end at 290, 291 and 292, only the last one counts.
    ends = [100 * 29 / 30, 200 * 29 / 30, 300 * 29 / 30 + 2]
    assert line.get_ydata()[-1] == pytest.approx(np.mean(ends))
    warnings = capsys.readouterr().err.splitlines()
    for seed, warning in enumerate(warnings):
        where = f"left out of '{runs[2]}', counted in '{runs[seed]}'"
        assert warning == f"warning: seed {seed} of 'rppo gru': {where}"
    assert len(warnings) == 2


def test_of_two_runs_of_a_seed_the_longer_one_counts(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "stopped", seeds=1, reports=3, level=0),
        make_run(tmp_path / "complete", seeds=1, level=100),
    ]
    (line,) = drawn(runs).values()
    assert line.get_xdata()[-1] == 3000 and line.get_ydata()[-1] > 90
    assert f"left out of '{runs[0]}', counted in '{runs[1]}'" in capsys.readouterr().err


def test_experiments_are_not_mixed(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "a", seeds=1),
        make_run(tmp_path / "b", seeds=1, total=6000, reports=60),
        make_run(tmp_path / "c", seeds=1, env="other", learning_rate=0.1),
        make_run(tmp_path / "d", seeds=1, script="ppo", hidden_size=16),
        make_run(tmp_path / "e", seeds=1, seed=1, total=6000, about={"extended": [7]}, reports=40),
    ]
    lines = drawn(runs)
    assert [*lines] == [
        ("gymnax::CartPole-v1", "ppo gru (1)"),
        ("gymnax::CartPole-v1", "rppo gru total_steps=3000 (1)"),
        ("gymnax::CartPole-v1", "rppo gru total_steps=6000 (1)"),
        ("gymnax::CartPole-v1", "rppo gru total_steps=6000 extended=[7] (1)"),
        ("other", "rppo gru (1)"),
    ]
    ends = [line.get_xdata()[-1] for line in lines.values()]
    assert ends == [3000, 3000, 6000, 4000, 3000]  # the shorter one does not cut the longer one
    assert capsys.readouterr().err == ""


def test_versions_of_the_code_that_differ_are_named(tmp_path, capsys):
    runs = [
        make_run(
            tmp_path / f"seed{seed}", seeds=1, seed=seed, about={"sources": {"replay.py": code}}
        )
        for seed, code in enumerate("ab")
    ]
    assert labels(runs) == ["rppo gru (2)"]
    warning = "warning: the runs of 'rppo gru' were made with different versions of replay.py\n"
    assert capsys.readouterr().err == warning


def test_a_single_evaluation_is_a_point(tmp_path):
    runs = [make_run(tmp_path / "one", reports=1), make_run(tmp_path / "two", reports=2, cell="s5")]
    one, two = drawn(runs).values()
    assert one.get_marker() == "o" and one.get_xdata().tolist() == [100]
    assert two.get_marker() == "" and two.get_xdata().tolist() == [100, 200]


def test_a_line_ends_with_its_shortest_run(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", reports=12, seed=3)]
    (line,) = drawn(runs).values()
    assert line.get_xdata().tolist() == [*range(100, 1300, 100)]
    warning = f"warning: 'rppo gru' is drawn up to step 1,200, where '{runs[1]}' ends\n"
    assert capsys.readouterr().err == warning


def test_runs_without_common_steps_are_not_extrapolated(tmp_path, capsys):
    late = make_run(tmp_path / "late", seeds=1)
    write_records(late, [RECORD | {"step": step, GREEDY: [1.0]} for step in (2000, 3000)])
    early = make_run(tmp_path / "early", seeds=1, seed=1, reports=5)
    (line,) = drawn([early, late]).values()
    assert line.get_xdata().tolist() == [2000, 3000] and line.get_ydata().tolist() == [1.0, 1.0]
    assert "left out of 'rppo gru': seed 1, which ends before" in capsys.readouterr().err


def test_curves_are_compared_where_all_have_values():
    curves = [
        (np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 3.0, 4.0])),
        (np.array([2, 5]), np.array([0.0, 3.0])),
    ]
    steps, values = at_common_steps(curves)
    assert steps.tolist() == [2, 3, 4]
    assert values.tolist() == [[2.0, 0.0], [3.0, 1.0], [4.0, 2.0]]


def test_diverged_seeds_are_left_out_and_counted(tmp_path):
    run = make_run(tmp_path / "run")
    write_records(
        run,
        [
            RECORD | {"step": step, GREEDY: [1.0, x, 3.0], "losses/x": [0.0, x, 0.0]}
            for step, x in ((100, 2.0), (200, None), (300, None))
        ],
    )
    ((name, line),) = drawn([run]).items()
    assert name[1] == "rppo gru (2, 1 diverged)"
    assert line.get_xdata().tolist() == [100, 200, 300] and line.get_ydata().tolist() == [2.0] * 3
    assert labels([run, make_run(tmp_path / "again", seeds=1, seed=1)]) == ["rppo gru (3)"]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ([{GREEDY: 1.0, SAMPLED: 2.0, RETURN: 3.0}], 1.0),
        ([{SAMPLED: 2.0, RETURN: 3.0}], 2.0),
        ([{"eval/episodic_return": 4.0, SAMPLED: 2.0}], 4.0),
        ([{RETURN: 3.0}], 3.0),
        ([{RETURN: 3.0}, {RETURN: 5.0, GREEDY: 1.0}], 4.0),  # what most of the runs have
    ],
)
def test_the_default_metric_is_one_that_the_runs_have(metrics, expected, tmp_path):
    runs = [
        write_records(make_run(tmp_path / f"seed{seed}", seeds=1, seed=seed), [RECORD | own])
        for seed, own in enumerate(metrics)
    ]
    (line,) = drawn(runs).values()
    assert line.get_ydata().tolist() == [expected]


def test_runs_without_the_metric_are_named_and_left_out(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "begun", reports=0, seed=3)]
    assert labels(runs) == ["rppo gru (3)"]
    warning = f"warning: left out, without values of 'eval/greedy_return': {runs[1]}\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("eval/greedy_retrun", GREEDY), ("SPS", "charts/SPS"), ("greedy_return", GREEDY)],
)
def test_an_unknown_metric_is_refused_with_those_there_are(metric, meant, tmp_path):
    with pytest.raises(UsageError) as refused:
        labels([make_run(tmp_path / "run")], metric)
    assert str(refused.value) == (
        f"'{tmp_path / 'run'}' has no values of {metric!r} (did you mean {meant!r}?); metrics: "
        "charts/SPS, charts/episodic_return, eval/greedy_return, losses/value_loss, "
        "system/memory_mb"
    )


def test_names_are_drawn_as_they_are(tmp_path):
    run = make_run(
        tmp_path / "run", script="_a$x^{$", env="\x1b[31m$\\frac", env_kwargs={"b": 1, "a": 2}
    )
    plot([load(run)], str(tmp_path / "curves.png"))  # "$" does not begin a formula
    assert [*drawn([run])] == [("\\x1b[31m$\\frac a=2 b=1", "_a$x^{$ gru (3)")]


def test_many_experiments_can_be_told_apart(tmp_path):
    runs = [make_run(tmp_path / f"{i}", seeds=1, reports=2, hidden_size=i) for i in range(25)]
    lines = drawn(runs).values()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 25


def test_the_legend_has_a_place_of_its_own(tmp_path):
    runs = [make_run(tmp_path / f"{i}", seeds=1, reports=2, hidden_size=i) for i in range(25)]
    path = tmp_path / "curves.png"
    plot([load(run) for run in runs], str(path))
    assert Image.open(path).size == (660, 885)  # 6 by 3.8 + 25 * 0.17 inches
    figure = figure_of([load(run) for run in runs])
    figure.draw_without_rendering()
    (axis,) = figure.axes
    panel = axis.get_window_extent()
    legend = axis.get_legend().get_window_extent()
    assert 0 <= legend.y0 < legend.y1 < panel.y0 and panel.height > 200


def test_a_picture_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UsageError, match="x.png' cannot be written: Is a directory"):
        plot([load(make_run(tmp_path / "run"))], str(tmp_path / "x.png"))
