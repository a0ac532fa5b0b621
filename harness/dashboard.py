"""Looking at runs from their files: a dashboard in the terminal, and figures of learning curves."""

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
from harness.metrics import GREEDY, METRICS_FILE, RETURN, interval, iqm, read_metrics
from harness.options import Experiment
from harness.run_dir import CONFIG_FILE, is_running


class History:
    """What was reported of one run, by metric, for drawing."""

    def __init__(self, run_dir, config: dict, about: dict, read: bool = True):
        """`config`: the fields of the run's config; `about`: what else its config.json says."""
        self.run_dir, self.config, self.about = Path(run_dir), config, about
        self.series = defaultdict(list)  # metric -> [(step, values of the seeds), ...]
        self.step, self.bytes, self.state = 0, 0, ""
        if read:
            self.poll()

    def add(self, record: dict) -> None:
        """One report: {"step": ..., metric: value or values of the seeds}."""
        self.step = record["step"]
        for name, value in record.items():
            if "/" in name:
                self.series[name].append((self.step, np.atleast_1d(np.asarray(value, float))))

    def poll(self, until: float = math.inf) -> None:
        """Read what is new in the run's file, up to `until` seconds of training."""
        path = self.run_dir / METRICS_FILE
        if path.exists() and path.stat().st_size < self.bytes:  # the run went back to a checkpoint
            self.series.clear()
            self.bytes = 0
        records = [record for record in read_metrics(path, self.bytes) if record["time"] <= until]
        for record in records:
            self.bytes += record.pop("bytes")
            self.add(record)

    def values(self, name):
        """Of the reports, of about 400 evenly spaced ones if there are more: (reports, seeds)."""
        series = self.series[name]
        chosen = series[:: -max(1, len(series) // 400)][::-1]
        return np.array([value for _, value in chosen]) if series else np.empty((0, 1))

    def last(self, name):
        """The mean over seeds of the last report, nan if there is none."""
        values = self.series[name][-1][1] if self.series[name] else np.array([np.nan])
        return (
            float(np.mean(values[np.isfinite(values)])) if np.isfinite(values).any() else math.nan
        )


def load(run_dir: Path, read: bool = True) -> History:
    """The history of a run, from its files.

    Raises:
      UsageError: there is none.
    """
    try:
        about = json.loads((run_dir / CONFIG_FILE).read_text())
        return History(
            run_dir, about["config"], {key: about[key] for key in ("script", "final_step")}, read
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"no run in {str(run_dir)!r}: {error}") from None


def sparkline(values, width: int, low: float, high: float) -> str:
    """Values (N,) as a line of at most `width` blocks; where several share a block it shows their mean."""
    values = np.asarray(values, float)
    groups = np.array_split(values, min(width, len(values))) if len(values) else []
    means = [
        np.mean(group[np.isfinite(group)]) if np.isfinite(group).any() else math.nan
        for group in groups
    ]
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(
        " " if math.isnan(mean) else "▁▂▃▄▅▆▇█"[round((mean - low) * scale)] for mean in means
    )


def draw(history: History):
    """One run as a panel of `rich`, as wide as the terminal lets it be."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    config, step = history.config, history.step
    total, seeds = history.about["final_step"], config["num_seeds"]
    speed, memory, compiled = map(
        history.last, ("charts/SPS", "system/memory_mb", "charts/compile_seconds")
    )

    progress = Table.grid(expand=True, padding=(0, 2, 0, 0))
    progress.add_column(ratio=1)
    progress.add_column(no_wrap=True)
    progress.add_row(ProgressBar(total=total, completed=step), f"{step / total:.0%}")
    facts = [f"{step:,} of {total:,} steps"]
    if math.isfinite(speed):
        left = int((total - step) * seeds / speed)
        facts += [
            f"{speed:,.0f} steps/s",
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
        ]
    facts += [f"{memory:,.0f} MB"] if math.isfinite(memory) else []
    facts += [f"compiled in {compiled:.1f} s"] if math.isfinite(compiled) else []

    class Curves:
        """Sparklines need to know how wide they may be; the table measures before it draws."""

        def __init__(self, values, low, high):
            self.values, self.low, self.high = values, low, high

        def __rich_measure__(self, console, options):
            from rich.measure import Measurement

            return Measurement(8, options.max_width)

        def __rich_console__(self, console, options):
            yield Text(
                sparkline(self.values, options.max_width, self.low, self.high),
                style="cyan",
                no_wrap=True,
            )

    curves = Table.grid(expand=True, padding=(0, 1, 0, 0))
    curves.add_column(no_wrap=True)
    curves.add_column(ratio=1)
    curves.add_column(justify="right", no_wrap=True)
    for heading, name in (("return", RETURN), ("greedy return", GREEDY)):
        values = history.values(name)
        if not np.isfinite(values).any():
            continue
        low, high = np.nanmin(values), np.nanmax(values)
        final = values[-1][np.isfinite(values[-1])]
        if seeds > 1:
            for seed in range(seeds):
                text = f"{values[-1, seed]:.2f}" if math.isfinite(values[-1, seed]) else "-"
                curves.add_row(f"{heading} seed_{seed}", Curves(values[:, seed], low, high), text)
            if len(final):
                bounds = " [{:.2f}, {:.2f}]".format(*interval(final))
                middle = [
                    iqm(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan
                    for row in values
                ]
                curves.add_row(
                    f"[bold]{heading} IQM",
                    Curves(middle, low, high),
                    f"[bold]{iqm(final):.2f}[/bold]{bounds}",
                )
        else:
            curves.add_row(
                f"[bold]{heading}",
                Curves(values[:, 0], low, high),
                f"[bold]{history.last(name):.2f}",
            )

    losses = [
        f"{name.partition('/')[2].replace('_', ' ')} [bold]{history.last(name):.3g}[/bold]"
        for name in sorted(history.series)
        if name.startswith("losses/")
    ]
    parts = [
        progress,
        Text(" · ".join(facts), style="dim"),
        curves,
        Text.from_markup(" · ".join(losses)),
    ]
    title = f"[bold]{config['env']}[/bold] {history.run_dir.name}"
    return Panel(
        Group(*parts),
        title=title,
        subtitle=history.state or None,
        title_align="left",
        subtitle_align="right",
    )


def watch(histories: list[History], speed: float = 0.0) -> None:
    """Show runs side by side until all have ended; with `speed`, from their beginning, that many times faster."""
    from rich.columns import Columns
    from rich.console import Console as Terminal
    from rich.live import Live

    terminal, began, checked = Terminal(), time.monotonic(), -math.inf
    width = max(76, terminal.width // len(histories)) if terminal.width >= 152 else None

    def screen():
        return Columns(
            [draw(history) for history in histories],
            width=width,
            padding=(0, 0),
            expand=width is None,
        )

    live = Live(get_renderable=screen, console=terminal, refresh_per_second=2)
    with live, contextlib.suppress(KeyboardInterrupt):
        while True:
            elapsed = time.monotonic() - began
            if (
                elapsed - checked > 3
            ):  # seldom: whoever wants to resume a run must find its lock free
                running, checked = [is_running(history.run_dir) for history in histories], elapsed
            for history, alive in zip(histories, running, strict=True):
                history.poll(elapsed * speed if speed else math.inf)
                complete = history.step >= history.about["final_step"]
                history.state = "running" if alive else "complete" if complete else "stopped"
            behind = any(
                read_metrics(history.run_dir / METRICS_FILE, history.bytes) for history in histories
            )
            if not behind and not any(running):
                break
            time.sleep(0.5)


def plot(histories: list[History], path: str, metric: str = GREEDY) -> None:
    """Learning curves: a panel per environment, a line per kind of run, its seeds aggregated (IQM, 95 % interval)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = defaultdict(lambda: defaultdict(list))
    for history in histories:
        config = history.config
        task = [config["env"], *(f"{k}={v}" for k, v in config["env_kwargs"].items())]
        task += ["--mask", *map(str, config["mask"])] if config["mask"] else []
        panels[" ".join(task)][label(history, histories)].append(history)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 4 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, runs in sorted(lines.items()):
            curves = [curve for run in runs for curve in seed_curves(run, metric)]
            if not curves:
                raise UsageError(f"{metric!r} has no finite value in the runs of {name}")
            steps = max((steps for steps, _ in curves), key=len)
            steps = steps[
                steps <= min(own[-1] for own, _ in curves)
            ]  # as far as all of them have come
            values = np.array([np.interp(steps, *curve) for curve in curves]).T
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


def seed_curves(history: History, metric: str) -> list:
    """Steps and values of every seed, where it has any: of a report in which no episode ended, it has none."""
    steps = np.array([step for step, _ in history.series[metric]])
    curves = np.array([values for _, values in history.series[metric]]).T
    return [
        (steps[finite], curve[finite]) for curve in curves if (finite := np.isfinite(curve)).any()
    ]


def label(history: History, among: list[History]) -> str:
    """The script, its memory, and those options of the algorithm that are not the same in all runs."""
    config, words = history.config, [history.about["script"]]
    words += [config["cell"]] if "cell" in config else []
    ignored = {field.name for field in dataclasses.fields(Experiment)} | {
        "env",
        "env_kwargs",
        "mask",
        "cell",
    }
    for name, value in config.items():
        if name not in ignored and any(value != other.config.get(name, value) for other in among):
            words.append(f"{name}={value}")
    return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Look:
    """Look at runs: a live dashboard of several side by side, or a figure of their learning curves."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs, finished or running
    plot: str = ""  # draw learning curves to this .png, instead of the dashboard
    metric: str = GREEDY  # what to draw there
    speed: float = (
        0.0  # replay the runs in the dashboard from their beginning, this many times faster
    )


def main(config: Look) -> None:
    if not config.run_dirs:
        raise UsageError("name the directories of one or more runs, as in runs/*")
    if config.plot and not (config.plot.endswith(".png") and Path(config.plot).parent.is_dir()):
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
