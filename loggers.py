"""Where a run's numbers go: console, file, TensorBoard, Weights & Biases, Neptune and a dashboard behind one `Logger`.

    with make_logger(config, run_dir) as logger:
        logger.log({"charts/episodic_return": np.array([21.0, 19.5])}, step=8192)

A metric is a scalar, or an array with one value per seed. "Nothing to report" (no episode ended yet) is a missing key,
or nan for the seeds concerned: it is never a zero.

Runs can be looked at from their files, while they run or later, several side by side:

    python loggers.py runs/a runs/b                   # the dashboard
    python loggers.py runs/* --plot curves.png        # learning curves, seeds aggregated
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import queue
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import numpy as np
import tyro

from experiment import CONFIG_FILE, LOCK_FILE, METRICS_FILE, Diverged, Experiment, UsageError, launch

RETURN, GREEDY = "charts/episodic_return", "eval/episodic_return"


def warn(text: str) -> None:
    """Say it on the terminal, if that can be: the disk that is full may be the one stderr goes to."""
    with contextlib.suppress(OSError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Backend(Protocol):
    """One destination. `metrics` maps names to arrays: scalars () or per-seed values (S,)."""

    def log(self, metrics: dict, step: int) -> None: ...

    def close(self) -> None: ...


class Logger:
    """Several backends as one. A backend that fails is named once, dropped, and never stops the training.

    Attributes:
      diverged: index of a seed that met nan or inf -> what happened; its metrics are nan from then on.
    """

    def __init__(self, backends=(), diverged=()):
        self.backends = list(backends)
        self.diverged: dict[int, str] = dict(diverged)

    def log(self, metrics: dict, step: int) -> None:
        """Report `metrics` at `step` environment steps (per seed)."""
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        if "charts/SPS" in metrics:
            metrics["system/memory_mb"] = np.asarray(memory_in_use() / 2**20)
        if self.diverged:
            lost = list(self.diverged)
            for name, value in metrics.items():
                if value.ndim:
                    metrics[name] = value.astype(float)
                    metrics[name][lost] = np.nan
        self._each("log", metrics, step)

    def check_finite(self, finite: dict, updates: int, num_updates: int) -> None:
        """Notice seeds that met nan or inf in the `num_updates` updates after the first `updates`.

        Args:
          finite: for each metric, for how many of those updates its sum over them stayed finite, (S,).

        Raises:
          Diverged: no seed is left. As long as one is, the others are reported and left out.
        """
        names = [name for name in finite if name.startswith("losses/")]
        counts = np.stack([finite[name] for name in names])
        for seed in np.flatnonzero((counts < num_updates).any(axis=0)).tolist():
            if seed not in self.diverged:
                first = counts[:, seed].min()
                culprits = [name for name, count in zip(names, counts[:, seed], strict=True) if count == first]
                verb = "is" if len(culprits) == 1 else "are"
                self.diverged[seed] = f"{', '.join(culprits)} {verb} nan or inf in update {updates + first + 1}"
                if len(self.diverged) < counts.shape[1]:
                    warn(f"seed_{seed} diverged and is left out: {self.diverged[seed]}")
        if len(self.diverged) == counts.shape[1]:
            *_, last = self.diverged.values()
            advice = "start again with a lower learning rate, a lower max_grad_norm, or smaller rewards"
            raise Diverged(f"training diverged: {last}; {advice}")

    def close(self) -> None:
        """Flush and close; logging afterwards does nothing."""
        self._each("close")
        self.backends = []

    def _each(self, method, *args):
        for backend in list(self.backends):
            try:
                getattr(backend, method)(*args)
            except Exception as error:
                self.backends.remove(backend)
                name = type(getattr(backend, "backend", backend)).__name__
                warn(f"{name} stopped: {error!r}; the run does not need it")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def memory_in_use() -> float:
    """Bytes: of the accelerator where there is one, of the process otherwise."""
    import jax
    import psutil

    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


class Background:
    """Runs a backend in a thread of its own, so that one that hangs (network, full disk) hangs alone."""

    def __init__(self, backend: Backend, capacity: int = 1000, patience: float = 30.0):
        self.backend, self.patience, self.error = backend, patience, None
        self.queue: queue.Queue = queue.Queue(capacity)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        try:
            while (item := self.queue.get()) is not None:
                self.backend.log(*item)
            self.backend.close()
        except Exception as error:
            self.error = error

    def log(self, metrics, step):
        if self.error:
            raise self.error
        try:
            self.queue.put_nowait((metrics, step))
        except queue.Full:
            raise TimeoutError(f"{self.queue.maxsize} reports are waiting, it does not keep up") from None

    def close(self):
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(None)
        self.thread.join(self.patience)
        if self.error:
            raise self.error
        if self.thread.is_alive():
            raise TimeoutError(f"it did not finish within {self.patience:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics over seeds


def iqm(values):
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter (arXiv 2108.13264)."""
    count = np.shape(values)[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(axis=-1)


def interval(values, statistic=iqm, resamples: int = 2000):
    """95 % bootstrap interval (percentiles) of a statistic of the values (S,): low, high."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    return tuple(np.percentile(statistic(draws), [2.5, 97.5]).tolist())


def scalars(metrics: dict) -> dict[str, float]:
    """Metrics as plain numbers: the mean over seeds under the metric's name, the seeds' under `name/seed_i`.

    Returns of several seeds also have `name/iqm` and its interval, `name/iqm_low` and `name/iqm_high`.
    """
    flat = {}
    for name, value in metrics.items():
        finite = value[np.isfinite(value)]
        if finite.size:
            flat[name] = float(finite.mean())
        if value.size > 1:
            flat |= {f"{name}/seed_{i}": float(x) for i, x in enumerate(value) if math.isfinite(x)}
            if finite.size > 1 and name in (RETURN, GREEDY):
                low, high = interval(finite)
                flat |= {f"{name}/iqm": float(iqm(finite)), f"{name}/iqm_low": low, f"{name}/iqm_high": high}
    return flat


def summarize(sums: dict, num_updates: int) -> dict:
    """The means to report, from sums per seed (S,) over `num_updates` updates.

    `charts/episodic_*` are sums over the `charts/episodes` that ended. Where none ended there is no mean: nan for that
    seed, and no key if so for all.
    """
    episodes = np.asarray(sums["charts/episodes"])
    report = {"charts/episodes": episodes}
    for name, total in sums.items():
        if name.startswith("charts/episodic_") and episodes.any():
            report[name] = np.divide(total, episodes, out=np.full(episodes.shape, np.nan), where=episodes > 0)
        elif not name.startswith("charts/episod"):
            report[name] = np.asarray(total) / num_updates
    return report


def summarize_episodes(episodes) -> dict:
    """The means to report of an evaluation: `episodes.returns` and `.lengths` are (S, episodes)."""
    return {
        GREEDY: np.asarray(episodes.returns).mean(axis=1),
        "eval/episodic_length": np.asarray(episodes.lengths).mean(axis=1),
    }


def describe(episodes, diverged=()) -> str:
    """One line about evaluation episodes whose returns are (S, episodes); the seeds in `diverged` are left out."""
    returns = np.delete(np.asarray(episodes.returns), list(diverged), axis=0)
    text = f"greedy return over {returns.shape[1]} episodes: "
    if len(returns) == 1:
        low, high = interval(returns[0], lambda draws: draws.mean(axis=-1))
        return text + f"{returns.mean():.2f} (95 % interval {low:.2f} to {high:.2f})"
    means = returns.mean(axis=1)
    low, high = interval(means)
    seeds = " ".join(f"{mean:.2f}" for mean in means)
    bounds = f"95 % interval {low:.2f} to {high:.2f}"
    text += f"median of {len(means)} seeds {np.median(means):.2f}, IQM {iqm(means):.2f} ({bounds}); the seeds: {seeds}"
    return text + (f" ({len(diverged)} diverged)" if diverged else "")


# ---------------------------------------------------------------------------------------------------------------------
# Backends


class Console:
    """One line per report, for reading along; a column shows the mean over seeds (± their standard deviation)."""

    COLUMNS = {  # heading: (metric, format)
        "SPS": ("charts/SPS", "{:,.0f}"),
        "return": (RETURN, "{:.2f}"),
        "length": ("charts/episodic_length", "{:.0f}"),
        "entropy": ("losses/entropy", "{:.3f}"),
        "value loss": ("losses/value_loss", "{:.2g}"),
        "approx kl": ("losses/approx_kl", "{:.4f}"),
        "epsilon": ("charts/epsilon", "{:.2f}"),
        "alpha": ("losses/alpha", "{:.3f}"),
        "td loss": ("losses/td_loss", "{:.2g}"),
        "q value": ("losses/q_values", "{:.2f}"),
        "greedy return": (GREEDY, "{:.2f}"),
    }
    ALWAYS = (
        RETURN,
        "charts/episodic_length",
        GREEDY,
    )  # a report may be without them; other columns are as in the first

    def __init__(self, config, final_step):
        self.final_step = final_step
        self.width = 14 if config.num_seeds == 1 else 19
        self.columns = None

    def log(self, metrics, step):
        if "charts/compile_seconds" in metrics:
            print(f"compiled in {metrics['charts/compile_seconds']:.1f} s", flush=True)
        if self.columns is None and not metrics.keys().isdisjoint(name for name, _ in self.COLUMNS.values()):
            present = self.ALWAYS + tuple(metrics)
            self.columns = {heading: column for heading, column in self.COLUMNS.items() if column[0] in present}
            self._print(f"{'step':>12}", list(self.columns))
        cells = [self._cell(metrics.get(name), form) for name, form in (self.columns or {}).values()]
        if any(cells):
            self._print(f"{step:>12,} {step / self.final_step:>4.0%}", cells)

    def _cell(self, value, form):
        finite = np.ravel(value)[np.isfinite(np.ravel(value))] if value is not None else ()
        if not len(finite):
            return ""
        spread = f" ± {form.format(finite.std())}" if len(finite) > 1 else ""
        return form.format(finite.mean()) + spread

    def _print(self, head, cells):
        print(f"{head:<17}" + "".join(f"{cell:>{self.width}}" for cell in cells), flush=True)

    def close(self):
        sys.stdout.flush()


class File:
    """JSON lines, written at every report: the record of the run.

    {"step": 8192, "time": 3.1, "charts/SPS": 50212.0, "charts/episodic_return": [21.0, null]}
    `time` is in seconds of training, per-seed metrics are lists, and nan or inf are null. What cannot be written (full
    disk) is kept and tried again at the next report.
    """

    def __init__(self, run_dir):
        self.path = Path(run_dir) / METRICS_FILE
        past = read_metrics(self.path)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed in close()
        self.start = time.perf_counter() - (past[-1]["time"] if past else 0.0)
        self.waiting, self.warned = b"", False

    def log(self, metrics, step):
        record = {"step": step, "time": round(time.perf_counter() - self.start, 3)}
        record |= {name: _json(value.tolist()) for name, value in metrics.items()}
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            self._write()
            self.warned = False
        except OSError as error:
            if not self.warned:
                warn(f"{METRICS_FILE}: {error.strerror}; will try again at every report")
            self.warned = True

    def _write(self):
        size, rest = os.fstat(self.file.fileno()).st_size, self.waiting
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError:
            os.truncate(self.path, size)  # a disk that fills up may have taken a part of a line
            raise
        self.waiting = b""

    def close(self):
        self._write()
        self.file.close()


def _json(value):
    """nan and inf are not JSON: readers other than Python's would stop at them."""
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


class TensorBoard:
    """Event files with the names of `scalars`, and the config as text.

    In a run that is gone on with they are written anew from the record: a killed process leaves them with gaps, and
    with reports that come again.
    """

    def __init__(self, run_dir, config, about):
        from tensorboardX import SummaryWriter

        if (Path(run_dir) / METRICS_FILE).exists():
            for old in Path(run_dir).glob("events.out.tfevents.*"):
                old.unlink()
        self.run_dir, self.writer = run_dir, SummaryWriter(str(run_dir))
        rows = "\n".join(f"|{name}|{value}|" for name, value in (dataclasses.asdict(config) | about).items())
        self.writer.add_text("config", f"|field|value|\n|-|-|\n{rows}")
        past = read_metrics(Path(run_dir) / METRICS_FILE)
        for record in past:
            metrics = {name: np.asarray(value, float) for name, value in record.items() if "/" in name}
            self.log(metrics, record["step"], time.time() - past[-1]["time"] + record["time"])

    def log(self, metrics, step, walltime=None):
        if shutil.disk_usage(self.run_dir).free < 2**20:  # tensorboardX's own thread would die, and then hang
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, value in scalars(metrics).items():
            self.writer.add_scalar(name, value, step, walltime)

    def close(self):
        self.writer.close()


class WandB:
    """Weights & Biases; its own environment variables (WANDB_PROJECT, WANDB_ENTITY, ...) hold.

    Offline it writes to `<run>/wandb/offline-run-*`, which `wandb sync` sends.
    """

    def __init__(self, run_dir, config, about):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "memory-rl"),
            name=Path(run_dir).name,
            id=about["id"],
            resume="allow" if config.wandb_mode == "online" else None,
            dir=run_dir,
            mode=config.wandb_mode,
            config=dataclasses.asdict(config) | {"about": about},
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, metrics, step):
        self.run.log(scalars(metrics), step=step)

    def close(self):
        self.run.finish()


class Neptune:
    """Neptune (client 1.x); its own environment variables (NEPTUNE_PROJECT, NEPTUNE_API_TOKEN, ...) hold.

    Offline it writes to `<run>/.neptune/offline`, which `neptune sync --path <run> --offline-only` sends.
    """

    def __init__(self, run_dir, config, about):
        os.environ["NEPTUNE_DATA_DIRECTORY"] = str(Path(run_dir) / ".neptune")
        import neptune
        from neptune.utils import stringify_unsupported

        logging.getLogger("neptune").setLevel(logging.ERROR)
        quiet = dict.fromkeys(("capture_stdout", "capture_stderr", "capture_hardware_metrics", "git_ref"), False)
        self.run = neptune.init_run(
            mode=config.neptune_mode, name=Path(run_dir).name, custom_run_id=about["id"], source_files=[], **quiet
        )
        self.run["config"] = stringify_unsupported(dataclasses.asdict(config))
        self.run["about"] = stringify_unsupported(about)

    def log(self, metrics, step):
        for name, value in scalars(metrics).items():
            # A series cannot have fields below it.
            self.run[name if "/seed_" in name or "/iqm" in name else f"{name}/mean"].append(value, step=step)

    def close(self):
        self.run.stop()


class Dashboard:
    """The live screen of `draw`, for terminals."""

    def __init__(self, run_dir, config, about):
        from rich.live import Live

        self.history = History(run_dir, dataclasses.asdict(config), about)
        self.live = Live(get_renderable=lambda: draw(self.history), refresh_per_second=2)
        self.live.start()

    def log(self, metrics, step):
        self.history.add({"step": step} | {name: value.tolist() for name, value in metrics.items()})

    def close(self):
        self.live.stop()


def check_keys(config) -> None:
    """Notice a missing key before there is a run.

    Raises:
      UsageError: names what is missing.
    """
    if "wandb" in config.log and config.wandb_mode == "online":
        import wandb

        if not wandb.api.api_key:
            ways = "run `wandb login`, set WANDB_API_KEY, or choose --wandb-mode offline"
            raise UsageError(f"wandb has no API key: {ways}")
    if "neptune" in config.log and config.neptune_mode != "offline":
        for variable in ("NEPTUNE_API_TOKEN", "NEPTUNE_PROJECT"):
            if not os.environ.get(variable):
                raise UsageError(f"neptune needs {variable}: set it, or choose --neptune-mode offline")


def make_logger(config, run_dir, diverged=()) -> Logger:
    """The logger of a run: the backends of `config.log`, writing into `run_dir`.

    Args:
      diverged: in a run that is gone on with, `Logger.diverged` so far.

    Raises:
      UsageError: a backend cannot start.
    """
    path = Path(run_dir) / CONFIG_FILE
    about = {k: v for k, v in json.loads(path.read_text()).items() if k != "config"} if path.exists() else {}
    about.setdefault("id", Path(run_dir).name)
    names = list(dict.fromkeys(config.log))
    if "dashboard" in names and sys.stdout.isatty():
        names = [name for name in names if name != "console"]  # they would write over each other
    elif "dashboard" in names:
        names = ["console", *(name for name in names if name not in ("console", "dashboard"))]
    make = {
        "console": lambda: Console(config, about.get("final_step", config.total_steps)),
        "tensorboard": lambda: Background(TensorBoard(run_dir, config, about)),
        "file": lambda: File(run_dir),
        "wandb": lambda: Background(WandB(run_dir, config, about), patience=300.0),
        "neptune": lambda: Background(Neptune(run_dir, config, about), patience=300.0),
        "dashboard": lambda: Dashboard(run_dir, config, about),
    }
    backends = []
    for name in sorted(names, key=list(make).index):
        try:
            backends.append(make[name]())
        except Exception as error:
            raise UsageError(f"logger {name} cannot start: {str(error) or repr(error)}") from None
    return Logger(backends, diverged)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at runs


def read_metrics(path: Path, start: int = 0) -> list[dict]:
    """The records of a metrics file from byte `start` on; a line that is still being written is left for later."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read().splitlines(keepends=True)
    return [json.loads(line) | {"bytes": len(line)} for line in lines if line.endswith(b"\n")]


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
        return float(np.mean(values[np.isfinite(values)])) if np.isfinite(values).any() else math.nan


def load(run_dir: Path, read: bool = True) -> History:
    """The history of a run, from its files.

    Raises:
      UsageError: there is none.
    """
    try:
        about = json.loads((run_dir / CONFIG_FILE).read_text())
        return History(run_dir, about["config"], {key: about[key] for key in ("script", "final_step")}, read)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"no run in {str(run_dir)!r}: {error}") from None


def sparkline(values, width: int, low: float, high: float) -> str:
    """Values (N,) as a line of at most `width` blocks; where several share a block it shows their mean."""
    values = np.asarray(values, float)
    groups = np.array_split(values, min(width, len(values))) if len(values) else []
    means = [np.mean(group[np.isfinite(group)]) if np.isfinite(group).any() else math.nan for group in groups]
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(mean) else "▁▂▃▄▅▆▇█"[round((mean - low) * scale)] for mean in means)


def draw(history: History):
    """One run as a panel of `rich`, as wide as the terminal lets it be."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    config, step = history.config, history.step
    total, seeds = history.about["final_step"], config["num_seeds"]
    speed, memory, compiled = map(history.last, ("charts/SPS", "system/memory_mb", "charts/compile_seconds"))

    progress = Table.grid(expand=True, padding=(0, 2, 0, 0))
    progress.add_column(ratio=1)
    progress.add_column(no_wrap=True)
    progress.add_row(ProgressBar(total=total, completed=step), f"{step / total:.0%}")
    facts = [f"{step:,} of {total:,} steps"]
    if math.isfinite(speed):
        left = int((total - step) * seeds / speed)
        facts += [f"{speed:,.0f} steps/s", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
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
            yield Text(sparkline(self.values, options.max_width, self.low, self.high), style="cyan", no_wrap=True)

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
                middle = [iqm(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in values]
                curves.add_row(
                    f"[bold]{heading} IQM", Curves(middle, low, high), f"[bold]{iqm(final):.2f}[/bold]{bounds}"
                )
        else:
            curves.add_row(f"[bold]{heading}", Curves(values[:, 0], low, high), f"[bold]{history.last(name):.2f}")

    losses = [
        f"{name.partition('/')[2].replace('_', ' ')} [bold]{history.last(name):.3g}[/bold]"
        for name in sorted(history.series)
        if name.startswith("losses/")
    ]
    parts = [progress, Text(" · ".join(facts), style="dim"), curves, Text.from_markup(" · ".join(losses))]
    title = f"[bold]{config['env']}[/bold] {history.run_dir.name}"
    return Panel(Group(*parts), title=title, subtitle=history.state or None, title_align="left", subtitle_align="right")


def is_running(run_dir: Path) -> bool:
    """Whether a process holds the lock of this run."""
    from filelock import FileLock, Timeout

    if not (run_dir / LOCK_FILE).exists():
        return False
    try:
        with FileLock(run_dir / LOCK_FILE, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # may look but not touch
        return False


def watch(histories: list[History], speed: float = 0.0) -> None:
    """Show runs side by side until all have ended; with `speed`, from their beginning, that many times faster."""
    from rich.columns import Columns
    from rich.console import Console as Terminal
    from rich.live import Live

    terminal, began, checked = Terminal(), time.monotonic(), -math.inf
    width = max(76, terminal.width // len(histories)) if terminal.width >= 152 else None

    def screen():
        return Columns([draw(history) for history in histories], width=width, padding=(0, 0), expand=width is None)

    live = Live(get_renderable=screen, console=terminal, refresh_per_second=2)
    with live, contextlib.suppress(KeyboardInterrupt):
        while True:
            elapsed = time.monotonic() - began
            if elapsed - checked > 3:  # seldom: whoever wants to resume a run must find its lock free
                running, checked = [is_running(history.run_dir) for history in histories], elapsed
            for history, alive in zip(histories, running, strict=True):
                history.poll(elapsed * speed if speed else math.inf)
                complete = history.step >= history.about["final_step"]
                history.state = "running" if alive else "complete" if complete else "stopped"
            behind = any(read_metrics(history.run_dir / METRICS_FILE, history.bytes) for history in histories)
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
            steps = steps[steps <= min(own[-1] for own, _ in curves)]  # as far as all of them have come
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
    return [(steps[finite], curve[finite]) for curve in curves if (finite := np.isfinite(curve)).any()]


def label(history: History, among: list[History]) -> str:
    """The script, its memory, and those options of the algorithm that are not the same in all runs."""
    config, words = history.config, [history.about["script"]]
    words += [config["cell"]] if "cell" in config else []
    ignored = {field.name for field in dataclasses.fields(Experiment)} | {"env", "env_kwargs", "mask", "cell"}
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
    speed: float = 0.0  # replay the runs in the dashboard from their beginning, this many times faster


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


if __name__ == "__main__":
    launch(main, Look)
