"""Looking at runs from their files: a dashboard in the terminal, and plots of learning curves."""

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

import numpy as np
import tyro

from harness.errors import UsageError, import_optional
from harness.history import History, load, mean_of_finite
from harness.metrics import GREEDY, RETURN, SAMPLED, interval, iqm
from harness.options import is_folder
from harness.output import warn
from harness.plots import label_of, plot
from harness.run_dir import is_running
from harness.text import clean, duration, shorten

LOCK_SECONDS = 3.0  # between two looks at a run's lock, which --resume must find free
REFRESHES_PER_SECOND = 2
CURVES = {"return": RETURN, "greedy return": GREEDY, "sampled return": SAMPLED}
MAX_SEEDS = 8  # that have a curve of their own
MAX_LOSSES = 24

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


def draw(history: History, label: str = ""):
    """A run as a panel of `rich`, as wide as the terminal allows.

    Args:
      label: what tells the run from others beside it.
    """
    import_optional("rich", "the dashboard")
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    progress = Table.grid(expand=True, padding=(0, 2, 0, 0))
    progress.add_column(ratio=1)
    progress.add_column(no_wrap=True)
    bar = ProgressBar(total=1.0, completed=history.progress)
    progress.add_row(bar, Text(f"{history.progress:.0%}"))

    curves = Table.grid(expand=True, padding=(0, 1, 0, 0))
    curves.add_column(no_wrap=True)
    curves.add_column(ratio=1)
    curves.add_column(justify="right", no_wrap=True)
    for heading, metric in CURVES.items():
        for name, curve, last, style in curve_rows(history, heading, metric):
            curves.add_row(Text(name, style), curve, Text(last, style))

    parts = [progress, Text(" · ".join(facts(history)), style="dim"), curves, losses(history)]
    if label:
        parts.insert(1, Text(label))
    name = shorten(history.run_dir.name, 100)
    return Panel(
        Group(*parts),
        title=Text.assemble((shorten(history.config["env"], 100), "bold"), f" {name}"),
        title_align="left",
        subtitle=history.state or None,
        subtitle_align="right",
    )


def facts(history: History) -> list[str]:
    """Steps, speed, time left, memory and time to compile, as far as they are known."""
    speed = history.last("charts/SPS")
    memory = history.last("system/memory_mb")
    compiled = history.last("charts/compile_seconds")
    left = history.seconds_left()
    result = [f"{history.step:,} of {history.about['final_step']:,} steps"]
    if math.isfinite(speed):
        result.append(f"{speed:,.0f} steps/s")
    if left > 0:
        result.append(f"{duration(left)} left")
    if math.isfinite(memory):
        result.append(f"{memory:,.0f} MB")
    if math.isfinite(compiled):
        result.append(f"compiled in {compiled:.1f} s")
    return result


def curve_rows(history: History, heading: str, metric: str) -> list[tuple]:
    """Rows (name, curve, last value, style) for the seeds of a run, and for all of them.

    The row of several seeds is their interquartile mean, without diverged seeds.
    """
    values = history.values(metric)
    if not np.isfinite(values).any():
        return []
    low = np.nanmin(values)
    high = np.nanmax(values)
    if history.config["num_seeds"] == 1:
        curve = Sparkline(values[:, 0], low, high)
        return [(heading, curve, f"{history.last(metric):.2f}", "bold")]

    rows = []
    for seed, curve in enumerate(values.T[:MAX_SEEDS]):
        last = f"{curve[-1]:.2f}" if math.isfinite(curve[-1]) else "-"
        rows.append((f"{heading} seed_{seed}", Sparkline(curve, low, high), last, ""))
    if values.shape[1] > MAX_SEEDS:
        rows.append((f"and {values.shape[1] - MAX_SEEDS} more seeds", "", "", "dim"))
    final = values[-1][np.isfinite(values[-1])]
    if len(final):
        finite = [row[np.isfinite(row)] for row in values]
        middle = [iqm(row) if row.size else math.nan for row in finite]
        bounds = "[{:.2f}, {:.2f}]".format(*interval(final))
        last = f"{iqm(final):.2f} {bounds}"
        rows.append((f"{heading} IQM", Sparkline(middle, low, high), last, "bold"))
    return rows


def losses(history: History):
    """The name and last value of every loss, as a text of `rich`."""
    from rich.text import Text

    names = sorted(name for name in history.series if name.startswith("losses/"))
    pieces = []
    for name in names[:MAX_LOSSES]:
        shown = shorten(name.partition("/")[2].replace("_", " "), 40)
        pieces.append(Text.assemble(f"{shown} ", (f"{history.last(name):.3g}", "bold")))
    if len(names) > MAX_LOSSES:
        pieces.append(Text(f"and {len(names) - MAX_LOSSES:,} more"))
    return Text(" · ").join(pieces)


def watch(histories: list[History], speed: float = 0.0) -> None:
    """Show runs side by side until all of them have ended.

    Args:
      speed: if not 0, replay the runs from their beginning, this many times faster.
    """
    import_optional("rich", "the dashboard")
    from rich.columns import Columns
    from rich.console import Console as Terminal
    from rich.live import Live

    terminal = Terminal()
    side_by_side = terminal.width >= 152
    width = max(76, terminal.width // len(histories)) if side_by_side else None
    labels = [label_of(history, histories) if histories[1:] else "" for history in histories]

    def screen():
        panels = [draw(*run) for run in zip(histories, labels, strict=True)]
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
            if not any(running) and not any(history.has_more for history in histories):
                break
            time.sleep(1 / REFRESHES_PER_SECOND)


# --- The command line ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Look:
    """Look at runs: a dashboard of several side by side, or a plot of their learning curves."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # directories of runs, finished or running
    plot: str = ""  # draw learning curves to this .png, instead of showing the dashboard
    metric: str = ""  # with --plot: what to draw; empty: the greedy return, if there is one
    speed: float = 0.0  # replay the runs in the dashboard from their beginning, this much faster


def main(config: Look) -> None:
    """Do what `python loggers.py` is asked for.

    Raises:
      UsageError: an option is not valid, or none of the directories has a run.
    """
    if not config.run_dirs:
        raise UsageError("name the directories of one or more runs, as in runs/*")
    if not 0 <= config.speed < math.inf:
        raise UsageError(f"speed must be 0 or a finite number above it, got {config.speed}")
    path = Path(config.plot)
    if config.plot and not (path.suffix == ".png" and is_folder(path.parent)):
        raise UsageError(f"plot must be a .png in a folder that exists, got {config.plot!r}")
    if config.plot and config.speed:
        raise UsageError("speed replays runs in the dashboard, it does not go with plot")
    if config.metric and not config.plot:
        raise UsageError(f"metric ({config.metric!r}) is for --plot; the dashboard shows all")
    histories = load_all(config.run_dirs, read=not config.speed)
    if not config.plot:
        return watch(histories, config.speed)
    plot(histories, config.plot, config.metric)
    print(f"figure: {clean(config.plot)}")


def load_all(run_dirs, read: bool) -> list[History]:
    """The runs in these directories, each once; what is no run is named once and left out.

    Raises:
      UsageError: none of them is a run.
    """
    histories = []
    strays = []
    for run_dir in {os.path.realpath(path): path for path in run_dirs}.values():
        try:
            histories.append(load(run_dir, read))
        except UsageError as error:
            strays.append(str(error))
    more = f"; and {len(strays) - 3:,} more" if len(strays) > 3 else ""
    named = "; ".join(strays[:3]) + more
    if not histories:
        raise UsageError(named)
    if strays:
        warn(f"left out: {named}")
    return histories
