"""Where a run's numbers go: console, file and TensorBoard behind one `Logger`.

    with make_logger(("console", "file"), run_dir, config) as logger:
        logger.log({"charts/episodic_return": np.array([21.0, 19.5])}, step=8192)

A metric is a scalar, or an array with one value per seed. "Nothing to report" (no episode ended yet) is a missing key,
or nan for the seeds concerned: it is never a zero.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np

METRICS_FILE = "metrics.jsonl"


class Backend(Protocol):
    """One destination. `metrics` maps names to scalars or per-seed arrays (S,)."""

    def log(self, metrics: dict, step: int) -> None: ...

    def close(self) -> None: ...


class Logger:
    """Several backends as one. A backend that fails is named once, dropped, and never stops the training."""

    def __init__(self, backends=(), run_dir=None):
        self.backends = list(backends)
        self.run_dir = run_dir

    def log(self, metrics: dict, step: int) -> None:
        """Report `metrics` at `step` environment steps (per seed)."""
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        self._each("log", metrics, step)

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
                print(f"warning: {type(backend).__name__} stopped: {error!r}; the run goes on", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.close()
        if error is KeyboardInterrupt:
            print(f"\ninterrupted; what was logged is in {self.run_dir}", file=sys.stderr)


class Console:
    """One line per report, for reading along; a column shows the mean over seeds (± their standard deviation)."""

    COLUMNS = {  # heading: (metric, format)
        "SPS": ("charts/SPS", "{:,.0f}"),
        "return": ("charts/episodic_return", "{:.2f}"),
        "length": ("charts/episodic_length", "{:.0f}"),
        "entropy": ("losses/entropy", "{:.3f}"),
        "value loss": ("losses/value_loss", "{:.2g}"),
        "approx kl": ("losses/approx_kl", "{:.4f}"),
        "greedy return": ("eval/episodic_return", "{:.2f}"),
    }

    def __init__(self, total_steps: int, num_seeds: int):
        self.total_steps = total_steps
        self.width = 14 if num_seeds == 1 else 19
        self.started = False

    def log(self, metrics, step):
        if not self.started:
            self._print(f"{'step':>12}", list(self.COLUMNS))
            self.started = True
        cells = [self._cell(metrics.get(name), form) for name, form in self.COLUMNS.values()]
        if any(cells):
            self._print(f"{step:>12,} {step / self.total_steps:>4.0%}", cells)

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
    """JSON lines, flushed at every report: the record of the run.

    {"step": 8192, "time": 3.1, "charts/SPS": 50212.0, "charts/episodic_return": [21.0, null]}
    `time` is in seconds since the start, per-seed metrics are lists, and nan or inf are null.
    """

    def __init__(self, run_dir):
        self.file = open(Path(run_dir) / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        self.start = time.perf_counter()

    def log(self, metrics, step):
        record = {"step": step, "time": round(time.perf_counter() - self.start, 3)}
        record |= {name: _json(value.tolist()) for name, value in metrics.items()}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


def _json(value):
    """nan and inf are not JSON: readers other than Python's would stop at them."""
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


class TensorBoard:
    """Event files: `name` is the mean over seeds, `name/seed_i` the seeds when there are several."""

    def __init__(self, run_dir, config):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(run_dir))
        rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(config).items())
        self.writer.add_text("config", f"|field|value|\n|-|-|\n{rows}")

    def log(self, metrics, step):
        for name, value in metrics.items():
            finite = value[np.isfinite(value)]
            if finite.size:
                self.writer.add_scalar(name, finite.mean(), step)
            if value.size > 1:
                for seed, entry in enumerate(value):
                    if np.isfinite(entry):
                        self.writer.add_scalar(f"{name}/seed_{seed}", entry, step)

    def close(self):
        self.writer.close()


BACKENDS = ("console", "file", "tensorboard")


def make_logger(names, run_dir, config) -> Logger:
    """The logger of a run: `names` from BACKENDS, writing into `run_dir`."""
    make = {
        "console": lambda: Console(config.total_steps, config.num_seeds),
        "file": lambda: File(run_dir),
        "tensorboard": lambda: TensorBoard(run_dir, config),
    }
    return Logger([make[name]() for name in dict.fromkeys(names)], run_dir)


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
        "eval/episodic_return": np.asarray(episodes.returns).mean(axis=1),
        "eval/episodic_length": np.asarray(episodes.lengths).mean(axis=1),
    }


def describe(episodes) -> str:
    """One line about evaluation episodes whose returns are (S, episodes)."""
    means = np.asarray(episodes.returns).mean(axis=1)
    text = f"greedy return over {episodes.returns.shape[1]} episodes: {np.median(means):.2f}"
    if len(means) > 1:
        text += f" (median of {len(means)} seeds: {' '.join(f'{mean:.2f}' for mean in means)})"
    return text
