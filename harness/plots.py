"""Learning curves of runs: a panel per environment, a line per experiment (identity.py)."""

import textwrap
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from harness import identity
from harness.errors import UsageError, did_you_mean, import_optional
from harness.history import RENAMED, History
from harness.metrics import GREEDY, RETURN, SAMPLED, interval, iqm
from harness.output import warn
from harness.text import clean, listing, shorten

DEFAULT_METRICS = (GREEDY, SAMPLED, RETURN)
DASHES = ("-", "--", ":", "-.")


class Line(NamedTuple):
    """The curve of an experiment: (n,) arrays over common steps."""

    name: str
    count: str  # of seeds
    steps: np.ndarray
    middle: np.ndarray  # interquartile mean over the seeds
    low: np.ndarray
    high: np.ndarray


def plot(histories: list[History], path: str, metric: str = "") -> None:
    """Draw learning curves (`figure_of`) into a .png.

    Raises:
      UsageError: no run has the metric, or `path` cannot be written.
    """
    figure = figure_of(histories, metric)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: more panels than fit into a picture
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path!r} cannot be written: {reason}") from None


def figure_of(histories: list[History], metric: str = ""):
    """A figure of matplotlib with the learning curves of these runs.

    A line is the interquartile mean over the seeds of all runs of one experiment, with the 95 %
    interval, as far as all of them have come. What is left out is named on stderr.

    Args:
      metric: empty for the greedy return, or the closest to it that the runs have.

    Raises:
      UsageError: no run has the metric.
    """
    matplotlib = import_optional("matplotlib.figure", "--plot", "matplotlib")
    metric = RENAMED.get(metric, metric) or default_metric(histories)
    panels = lines_by_panel(histories, metric)
    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    legend = max(sum(line_label(line).count("\n") + 1 for line in own) for own in panels.values())
    size = (1.5 + 4.5 * columns, (3.8 + 0.17 * legend) * rows)
    figure = matplotlib.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    names = sorted({line.name for lines in panels.values() for line in lines})
    looks = {name: look(number) for number, name in enumerate(names)}
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(axis, title, lines, looks)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{clean(metric)}\nIQM of (n) seeds, 95 % interval", parse_math=False)
    return figure


def look(number: int) -> dict:
    """Of a line: ten colours, and for more lines other dashes."""
    return {"color": f"C{number % 10}", "linestyle": DASHES[number // 10 % len(DASHES)]}


def draw_panel(axis, title: str, lines: list[Line], looks: dict) -> None:
    """One environment, with its legend beneath."""
    for line in lines:
        is_point = len(line.steps) == 1
        axis.plot(line.steps, line.middle, marker="o" if is_point else "", **looks[line.name])
        color = looks[line.name]["color"]
        if is_point:
            axis.vlines(line.steps, line.low, line.high, color=color, alpha=0.4)
        else:
            axis.fill_between(line.steps, line.low, line.high, color=color, alpha=0.2, lw=0)
    axis.set_title(textwrap.fill(title, 50), fontsize=10, parse_math=False)
    axis.set(xlabel="environment steps", xlim=(0, None))
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5}
    legend = axis.legend(axis.lines, [""] * len(lines), frameon=False, fontsize=8, **place)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(line_label(line))


def line_label(line: Line) -> str:
    return textwrap.fill(f"{line.name} ({line.count})", 60, subsequent_indent="  ")


def default_metric(histories: list[History]) -> str:
    """Of the returns, the one that most runs have; the greedy one if there is a choice."""
    return max(DEFAULT_METRICS, key=lambda name: sum(bool(run.curves(name)) for run in histories))


def lines_by_panel(histories: list[History], metric: str) -> dict[str, list[Line]]:
    """The title of every panel, and its lines.

    Raises:
      UsageError: no run has the metric.
    """
    drawn = [run for run in histories if run.curves(metric)]
    if not drawn:
        names = sorted({name for run in histories for name in run.series} - {metric})
        hint = did_you_mean(metric, {name.partition("/")[2]: name for name in names[:1000]})
        hint = did_you_mean(metric, names[:1000]) or hint
        owner = f"{str(histories[0].run_dir)!r} has" if len(histories) == 1 else "the runs have"
        there = listing(names, 40, 60) or "none yet"
        raise UsageError(f"{owner} no values of {metric!r}{hint}; metrics: {there}")
    without = [str(run.run_dir) for run in histories if not run.curves(metric)]
    if without:
        warn(f"left out, without values of {metric!r}: {listing(without)}")

    panels = defaultdict(lambda: defaultdict(list))  # title -> experiment -> runs
    for run in drawn:
        panels[title_of(run)][run.experiment].append(run)
    result = {}
    for title, experiments in panels.items():
        among = [run for runs in experiments.values() for run in runs]
        lines = [line_of(runs, label_of(runs[0], among), metric) for runs in experiments.values()]
        result[title] = sorted(lines, key=lambda line: line.name)
    return result


def line_of(runs: list[History], name: str, metric: str) -> Line:
    """The line of the runs of one experiment; of a seed in two runs, the longer curve counts."""
    changed = identity.versions_differ_in([run.about.get("sources", {}) for run in runs])
    if changed:
        warn(f"the runs of {name!r} were made with different versions of {listing(changed)}")
    owners = {}
    curves = {}
    twice = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.step, reverse=True):
        for seed, curve in run.curves(metric).items():
            owner = owners.setdefault(seed, run)
            curves.setdefault(seed, curve)
            if owner is not run:
                twice[run.run_dir, owner.run_dir].append(seed)
    for (run_dir, owner), seeds in twice.items():
        which = f"seed{'s' * (len(seeds) > 1)} {listing(seeds)}"
        warn(f"{which} of {name!r}: left out of {str(run_dir)!r}, counted in {str(owner)!r}")

    begin = max(steps[0] for steps, _ in curves.values())
    for seed in [seed for seed, (steps, _) in curves.items() if steps[-1] < begin]:
        warn(f"left out of {name!r}: seed {seed}, which ends before the others have values")
        del curves[seed]
    end, shortest = min((steps[-1], seed) for seed, (steps, _) in curves.items())
    if end < 0.9 * max(steps[-1] for steps, _ in curves.values()):
        warn(f"{name!r} is drawn up to step {end:,}, where {str(owners[shortest].run_dir)!r} ends")
    steps, values = at_common_steps(list(curves.values()))
    low, high = np.transpose([interval(row) for row in values])
    lost = {identity.seeds_of(run.config)[index] for run in runs for index in run.diverged()}
    lost -= curves.keys()
    count = f"{len(curves)}, {len(lost)} diverged" if lost else f"{len(curves)}"
    return Line(name, count, steps, iqm(values), low, high)


def title_of(history: History) -> str:
    """The environment of a run, with its options and mask."""
    config = history.config
    words = [config["env"]]
    words += [f"{name}={config['env_kwargs'][name]}" for name in sorted(config["env_kwargs"])]
    if config["mask"]:
        words += ["--mask", *map(str, config["mask"])]
    return shorten(" ".join(words), 200)


def label_of(history: History, among: list[History]) -> str:
    """The script, its memory, and the options that are not the same in all its runs among these."""
    config = history.config
    script = history.about["script"]
    words = [script, config["cell"]] if "cell" in config else [script]
    siblings = [run.config for run in among if run.about["script"] == script]
    for name in identity.differing_fields(siblings):
        if name in config and name not in ("env", "env_kwargs", "mask", "cell"):
            words.append(f"{name}={short_value(config[name])}")
    return shorten(" ".join(map(str, words)), 300)


def short_value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}={value[name]}" for name in sorted(value)) + "}"
    return shorten(value, 60)


def at_common_steps(curves: list):
    """Curves where all of them have values: steps (n,), values (n, curves).

    The steps are those of the curve with the most points in that range.
    """
    begin = max(steps[0] for steps, _ in curves)
    end = min(steps[-1] for steps, _ in curves)
    inside = [steps[(begin <= steps) & (steps <= end)] for steps, _ in curves]
    steps = max([np.array([end]), *inside], key=len)
    return steps, np.array([np.interp(steps, *curve) for curve in curves]).T
