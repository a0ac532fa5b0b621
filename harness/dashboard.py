"""Looking at runs from their files: a dashboard in the terminal, and plots of learning curves."""

import contextlib
import dataclasses
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro

from harness.errors import UsageError
from harness.metrics import GREEDY, METRICS_FILE, RETURN, SAMPLED, interval, iqm, read_metrics
from harness.options import Experiment
from harness.run_dir import CONFIG_FILE, is_running

MAX_POINTS = 400  # reports that a curve of the dashboard is drawn from, about
LOCK_SECONDS = 3.0  # between two looks at a run's lock, which --resume must find free
REFRESHES_PER_SECOND = 2

# --- The numbers of a run ------------------------------------------------------------------------


class History:
    """What a run has reported, by metric.

    Args:
      run_dir: the run's directory.
      config: the fields of the run's config.
      about: "script" and "final_step" of its config.json.
      read: whether to read the run's file now.

    Attributes:
      series: metric -> [(step, values (S,)), ...].
      step: of the last report.
      state: "running", "complete", "stopped", or "" if that is not known.
    """

    def __init__(self, run_dir, config: dict, about: dict, read: bool = True):
        self.run_dir = Path(run_dir)
        self.config = config
        self.about = about
        self.series = defaultdict(list)
        self.step = 0
        self.bytes = 0  # of the run's file, read so far
        self.state = ""
        if read:
            self.poll()

    def add(self, record: dict) -> None:
        """Take in a report: {"step": ..., metric: a number or one per seed, ...}."""
        self.step = record["step"]
        for name, value in record.items():
            if "/" in name:
                values = np.atleast_1d(np.asarray(value, float))
                self.series[name].append((self.step, values))

    def poll(self, until: float = math.inf) -> None:
        """Read the reports that are new in the run's file, up to `until` seconds of training."""
        path = self.run_dir / METRICS_FILE
        if path.exists() and path.stat().st_size < self.bytes:  # the run went back to a checkpoint
            self.series.clear()
            self.bytes = 0
        for record in read_metrics(path, self.bytes):
            if record["time"] <= until:
                self.bytes += record.pop("bytes")
                self.add(record)

    def has_more(self) -> bool:
        """Whether the run's file has reports that have not been read."""
        return bool(read_metrics(self.run_dir / METRICS_FILE, self.bytes))

    def values(self, name):
        """The values of a metric, (reports, S); of many reports about MAX_POINTS, evenly spaced."""
        series = self.series[name]
        if not series:
            return np.empty((0, 1))
        every = max(1, len(series) // MAX_POINTS)
        chosen = series[::-every][::-1]  # includes the last report
        return np.array([values for _, values in chosen])

    def last(self, name):
        """The mean over seeds in the last report of a metric; nan if there is none."""
        if not self.series[name]:
            return math.nan
        _, values = self.series[name][-1]
        return mean_of_finite(values)


def load(run_dir: Path, read: bool = True) -> History:
    """The history of a run, from its files.

    Raises:
      UsageError: there is no such run.
    """
    try:
        saved = json.loads((run_dir / CONFIG_FILE).read_text())
        about = {key: saved[key] for key in ("script", "final_step")}
        return History(run_dir, saved["config"], about, read)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"no run in {str(run_dir)!r}: {error}") from None


def mean_of_finite(values) -> float:
    """The mean of the values that are not nan or inf; nan if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.mean(finite)) if finite.size else math.nan


# --- The dashboard -------------------------------------------------------------------------------


def sparkline(values, width: int, low: float, high: float) -> str:
    """Values (N,) as a line of at most `width` blocks, from `low` to `high`.

    Values that share a block are averaged; blocks without a finite value are left empty.
    """
    values = np.asarray(values, float)
    groups = np.array_split(values, min(width, len(values))) if len(values) else []
    means = [mean_of_finite(group) for group in groups]
    scale = 7 / (high - low) if high > low else 0.0
    heights = [None if math.isnan(mean) else round((mean - low) * scale) for mean in means]
    return "".join(" " if height is None else "▁▂▃▄▅▆▇█"[height] for height in heights)


class Sparkline:
    """A `sparkline` for `rich`, as wide as the table lets it be when it is drawn."""

    def __init__(self, values, low: float, high: float):
        self.values = values
        self.low = low
        self.high = high

    def __rich_measure__(self, console, options):
        from rich.measure import Measurement

        return Measurement(8, options.max_width)

    def __rich_console__(self, console, options):
        from rich.text import Text

        line = sparkline(self.values, options.max_width, self.low, self.high)
        yield Text(line, style="cyan", no_wrap=True)


def draw(history: History):
    """A run as a panel of `rich`, as wide as the terminal allows."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    step = history.step
    total = history.about["final_step"]
    progress = Table.grid(expand=True, padding=(0, 2, 0, 0))
    progress.add_column(ratio=1)
    progress.add_column(no_wrap=True)
    progress.add_row(ProgressBar(total=total, completed=step), f"{step / total:.0%}")

    curves = Table.grid(expand=True, padding=(0, 1, 0, 0))
    curves.add_column(no_wrap=True)
    curves.add_column(ratio=1)
    curves.add_column(justify="right", no_wrap=True)
    for row in [
        *curve_rows(history, "return", RETURN),
        *curve_rows(history, "greedy return", GREEDY),
        *curve_rows(history, "sampled return", SAMPLED),
    ]:
        curves.add_row(*row)

    return Panel(
        Group(
            progress,
            Text(" · ".join(facts(history)), style="dim"),
            curves,
            Text.from_markup(" · ".join(losses(history))),
        ),
        title=f"[bold]{history.config['env']}[/bold] {history.run_dir.name}",
        title_align="left",
        subtitle=history.state or None,
        subtitle_align="right",
    )


def facts(history: History) -> list[str]:
    """Steps, speed, time left, memory and time to compile, as far as they are known."""
    total = history.about["final_step"]
    speed = history.last("charts/SPS")
    memory = history.last("system/memory_mb")
    compiled = history.last("charts/compile_seconds")
    result = [f"{history.step:,} of {total:,} steps"]
    if math.isfinite(speed):
        left = int((total - history.step) * history.config["num_seeds"] / speed)
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        result.append(f"{speed:,.0f} steps/s")
        result.append(f"{hours}:{minutes:02}:{seconds:02} left")
    if math.isfinite(memory):
        result.append(f"{memory:,.0f} MB")
    if math.isfinite(compiled):
        result.append(f"compiled in {compiled:.1f} s")
    return result


def curve_rows(history: History, heading: str, metric: str) -> list[tuple]:
    """Rows (name, curve, last value) for the seeds of a run, and for their interquartile mean."""
    values = history.values(metric)
    if not np.isfinite(values).any():
        return []
    low = np.nanmin(values)
    high = np.nanmax(values)
    if history.config["num_seeds"] == 1:
        last = f"[bold]{history.last(metric):.2f}"
        return [(f"[bold]{heading}", Sparkline(values[:, 0], low, high), last)]

    rows = []
    for seed, curve in enumerate(values.T):
        last = f"{curve[-1]:.2f}" if math.isfinite(curve[-1]) else "-"
        rows.append((f"{heading} seed_{seed}", Sparkline(curve, low, high), last))
    final = values[-1][np.isfinite(values[-1])]
    if len(final):
        finite = [row[np.isfinite(row)] for row in values]
        middle = [iqm(row) if row.size else math.nan for row in finite]
        bounds = "[{:.2f}, {:.2f}]".format(*interval(final))
        last = f"[bold]{iqm(final):.2f}[/bold] {bounds}"
        rows.append((f"[bold]{heading} IQM", Sparkline(middle, low, high), last))
    return rows


def losses(history: History) -> list[str]:
    """The name and last value of every loss."""
    return [
        f"{name.partition('/')[2].replace('_', ' ')} [bold]{history.last(name):.3g}[/bold]"
        for name in sorted(history.series)
        if name.startswith("losses/")
    ]


def watch(histories: list[History], speed: float = 0.0) -> None:
    """Show runs side by side until all of them have ended.

    Args:
      speed: if not 0, replay the runs from their beginning, this many times faster.
    """
    from rich.columns import Columns
    from rich.console import Console as Terminal
    from rich.live import Live

    terminal = Terminal()
    side_by_side = terminal.width >= 152
    width = max(76, terminal.width // len(histories)) if side_by_side else None

    def screen():
        panels = [draw(history) for history in histories]
        return Columns(panels, width=width, padding=(0, 0), expand=not side_by_side)

    live = Live(
        get_renderable=screen,
        console=terminal,
        refresh_per_second=REFRESHES_PER_SECOND,
    )
    began = time.monotonic()
    checked = -math.inf
    with live, contextlib.suppress(KeyboardInterrupt):
        while True:
            elapsed = time.monotonic() - began
            if elapsed - checked > LOCK_SECONDS:
                running = [is_running(history.run_dir) for history in histories]
                checked = elapsed
            for history, alive in zip(histories, running, strict=True):
                history.poll(elapsed * speed if speed else math.inf)
                complete = history.step >= history.about["final_step"]
                history.state = "running" if alive else "complete" if complete else "stopped"
            if not any(running) and not any(history.has_more() for history in histories):
                break
            time.sleep(1 / REFRESHES_PER_SECOND)


# --- Plots ---------------------------------------------------------------------------------------


def plot(histories: list[History], path: str, metric: str = GREEDY) -> None:
    """Draw learning curves into a .png: a panel per environment, a line per kind of run.

    A line is the interquartile mean over the seeds of all its runs, with the 95 % interval, as far
    as all of them have come.

    Raises:
      UsageError: the runs of a line have no finite value of the metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = defaultdict(lambda: defaultdict(list))  # environment -> kind of run -> histories
    for history in histories:
        panels[title_of(history)][label(history, histories)].append(history)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + 4 * len(panels), 3.6),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, runs in sorted(lines.items()):
            curves = [curve for run in runs for curve in seed_curves(run, metric)]
            if not curves:
                raise UsageError(f"{metric!r} has no finite value in the runs of {name}")
            steps, values = at_common_steps(curves)
            low, high = zip(*map(interval, values), strict=True)
            (line,) = axis.plot(steps, iqm(values), label=f"{name} ({len(curves)})")
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
        axis.set(title=title, xlabel="environment steps")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    axes[0, 0].set_ylabel(f"{metric}\nIQM of (n) seeds, 95 % interval")
    figure.savefig(path, dpi=110)


def title_of(history: History) -> str:
    """The environment of a run, with its options and mask."""
    config = history.config
    words = [config["env"]]
    words += [f"{name}={value}" for name, value in config["env_kwargs"].items()]
    if config["mask"]:
        words += ["--mask", *map(str, config["mask"])]
    return " ".join(words)


def label(history: History, among: list[History]) -> str:
    """The script, its memory, and the algorithm's options that are not the same in all runs."""
    config = history.config
    words = [history.about["script"]]
    if "cell" in config:
        words.append(config["cell"])
    ignored = {field.name for field in dataclasses.fields(Experiment)}
    ignored |= {"env", "env_kwargs", "mask", "cell"}
    for name, value in config.items():
        differs = any(value != other.config.get(name, value) for other in among)
        if name not in ignored and differs:
            words.append(f"{name}={value}")
    return " ".join(words)


def seed_curves(history: History, metric: str) -> list:
    """The curve of every seed: steps (n,), values (n,).

    A seed has no value in reports in which none of its episodes ended, and none after it diverged.
    Seeds without any value are left out.
    """
    steps = np.array([step for step, _ in history.series[metric]])
    values = np.array([values for _, values in history.series[metric]])
    curves = []
    for curve in values.T:
        finite = np.isfinite(curve)
        if finite.any():
            curves.append((steps[finite], curve[finite]))
    return curves


def at_common_steps(curves: list):
    """Curves at the same steps, up to where the shortest ends: steps (n,), values (n, curves)."""
    steps = max((steps for steps, _ in curves), key=len)
    end = min(steps[-1] for steps, _ in curves)
    steps = steps[steps <= end]
    return steps, np.array([np.interp(steps, *curve) for curve in curves]).T


# --- The command line ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Look:
    """Look at runs: a dashboard of several side by side, or a plot of their learning curves."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs, finished or running
    plot: str = ""  # draw learning curves to this .png, instead of showing the dashboard
    metric: str = GREEDY  # with --plot: what to draw
    speed: float = 0.0  # replay the runs in the dashboard from their beginning, this much faster


def main(config: Look) -> None:
    """Do what `python loggers.py` is asked for.

    Raises:
      UsageError: a run, a metric or a folder does not exist.
    """
    if not config.run_dirs:
        raise UsageError("name the directories of one or more runs, as in runs/*")
    path = Path(config.plot)
    if config.plot and not (path.suffix == ".png" and path.parent.is_dir()):
        raise UsageError(f"plot must be a .png in a folder that exists, got {config.plot!r}")
    histories = [load(run_dir, read=not config.speed) for run_dir in config.run_dirs]
    if not config.plot:
        return watch(histories, config.speed)
    for history in histories:
        if not history.series[config.metric]:
            names = ", ".join(sorted(name for name, values in history.series.items() if values))
            raise UsageError(f"{history.run_dir} has no metric {config.metric!r}; it has: {names}")
    plot(histories, config.plot, config.metric)
    print(f"figure: {config.plot}")
