"""Where a run's numbers go: console, file, TensorBoard, Weights & Biases, Neptune, dashboard.

    with make_logger(config, run_dir) as logger:
        logger.log({"charts/episodic_return": np.array([21.0, 19.5])}, step=8192)

A metric is a scalar, or an array with one value per seed. "Nothing to report" (no episode has
ended yet) is a missing name, or nan for the seeds concerned; it is never a zero.

To add a backend, write a class with the methods of `Backend` and enter it in `make_logger`, and the
library that it needs in `LIBRARIES`. `Memory` keeps reports for a notebook.

`python loggers.py` shows runs from their files, while they run or later, several side by side:

    python loggers.py runs/a runs/b                   # the dashboard
    python loggers.py runs/* --plot curves.png        # learning curves, seeds aggregated
"""

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import queue
import re
import shutil
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from harness.errors import Diverged, UsageError, import_optional
from harness.metrics import (
    GREEDY,
    METRICS_FILE,
    RETURN,
    SAMPLED,
    Report,
    as_json,
    parse_record,
    read_metrics,
    scalars,
)
from harness.output import warn
from harness.run_dir import CONFIG_FILE, VIDEOS_FOLDER
from harness.text import duration, fitted


class Backend(Protocol):
    """One destination for the numbers of a run.

    Exceptions are allowed: `Logger` reports the first one and drops the backend.
    A backend that shows videos also has a method `video(path, step)`; the path is that of a .gif.
    """

    def log(self, metrics: dict, step: int) -> None:
        """Take in arrays by name, scalars () or one value per seed (S,); `step` is per seed."""

    def close(self) -> None:
        """Write what is not written yet; called once, at the end."""


class Logger:
    """Several backends as one.

    A failing backend never stops training; it is reported once and disabled.

    Attributes:
      diverged: index of a seed that met nan or inf -> what happened. Its metrics are nan from then
        on.
    """

    def __init__(self, backends=(), diverged=()):
        self.backends = list(backends)
        self.diverged: dict[int, str] = dict(diverged)

    def log(self, metrics: dict, step: int) -> None:
        """Log `metrics` at `step` environment steps (per seed).

        Raises:
          Diverged: `metrics` is a `Report` after which no seed has finite losses. As long as one
            has, the others are reported and left out.
        """
        if isinstance(metrics, Report) and metrics.first_nonfinite:
            self._check_finite(metrics.first_nonfinite)
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

    def _check_finite(self, first_nonfinite: dict) -> None:
        names = list(first_nonfinite)
        updates = np.stack(list(first_nonfinite.values()))  # (losses, S), 0 where finite
        num_seeds = updates.shape[1]
        for seed in np.flatnonzero(updates.any(axis=0)).tolist():
            if seed in self.diverged:
                continue
            own = updates[:, seed]
            first = own[own > 0].min()
            culprits = [name for name, update in zip(names, own, strict=True) if update == first]
            verb = "is" if len(culprits) == 1 else "are"
            self.diverged[seed] = f"{', '.join(culprits)} {verb} nan or inf in update {first}"
            if len(self.diverged) < num_seeds:
                warn(f"seed_{seed} diverged and is left out: {self.diverged[seed]}")
        if len(self.diverged) == num_seeds:
            *_, last = self.diverged.values()
            advice = "a lower learning rate, a lower max_grad_norm, or smaller rewards"
            raise Diverged(f"training diverged: {last}; start again with {advice}")

    def video(self, path: Path, step: int) -> None:
        """Hand the .gif of an evaluation after `step` environment steps to the backends."""
        self._each("video", path, step)

    def close(self) -> None:
        """Flush and close; logging afterwards does nothing."""
        self._each("close")
        self.backends = []

    def _each(self, method, *args):
        for backend in list(self.backends):
            try:
                if method != "video" or hasattr(backend, "video"):
                    getattr(backend, method)(*args)
            except Exception as error:
                self.backends.remove(backend)
                name = type(getattr(backend, "backend", backend)).__name__
                warn(f"{name} stopped: {error!r}; training continues without it")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def memory_in_use() -> float:
    """Bytes in use on the accelerator if there is one, otherwise by this process."""
    import jax
    import psutil

    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


class Background:
    """Runs a backend in a thread, so that training does not wait for a network or a full disk.

    Args:
      capacity: how many reports may wait; the next one is an error.
      patience: how many seconds `close` waits.
    """

    def __init__(self, backend: Backend, capacity: int = 1000, patience: float = 30.0):
        self.backend = backend
        self.patience = patience
        self.error = None
        self.queue: queue.Queue = queue.Queue(capacity)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        try:
            while (item := self.queue.get()) is not None:
                method, *args = item
                getattr(self.backend, method)(*args)
            self.backend.close()
        except Exception as error:
            self.error = error

    def log(self, metrics, step):
        self._put("log", metrics, step)

    def video(self, path, step):
        if hasattr(self.backend, "video"):
            self._put("video", path, step)

    def _put(self, *item):
        if self.error:
            raise self.error
        try:
            self.queue.put_nowait(item)
        except queue.Full:
            waiting = f"{self.queue.maxsize} reports are waiting"
            raise TimeoutError(f"{waiting}: it is too slow") from None

    def close(self):
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(None)
        self.thread.join(self.patience)
        if self.error:
            raise self.error
        if self.thread.is_alive():
            raise TimeoutError(f"it did not finish within {self.patience:.0f} s")


# --- Backends ------------------------------------------------------------------------------------


class Console:
    """One line per report and one per evaluation, of at most 80 characters.

    Columns show the mean over seeds; returns also have its standard deviation. What has no room
    here is in the run's file.
    """

    WIDTH = 80
    COLUMNS = (  # heading, metric, format, digits; the most important first
        ("SPS", "charts/SPS", "{:,.0f}", 9),
        ("return", RETURN, "{:.2f}", 8),
        ("length", "charts/episodic_length", "{:.0f}", 6),
        ("epsilon", "charts/epsilon", "{:.2f}", 4),
        ("alpha", "losses/alpha", "{:.3f}", 7),
        ("value loss", "losses/value_loss", "{:.2g}", 8),
        ("td loss", "losses/td_loss", "{:.2g}", 8),
        ("entropy", "losses/entropy", "{:.3f}", 7),
        ("approx kl", "losses/approx_kl", "{:.4f}", 7),
        ("q value", "losses/q_values", "{:.2f}", 8),
    )
    ALWAYS = (RETURN, "charts/episodic_length")  # the first report may not have them yet
    EVALUATIONS = {"greedy": GREEDY, "sampled": SAMPLED}

    def __init__(self, config, final_step):
        self.final_step = final_step
        self.num_seeds = config.num_seeds
        self.step_width = max(7, len(f"{final_step:,}"))
        self.columns = []
        self.began = None  # (seconds, step) of the first report

    def log(self, metrics, step):
        if "charts/compile_seconds" in metrics:
            print(f"compiled in {metrics['charts/compile_seconds']:.1f} s", flush=True)
        head = f"{step:>{self.step_width},} {step / max(1, self.final_step):>4.0%}"
        row = f"{head} {self._time_left(step):>8}"
        if not self.columns and any(name in metrics for _, name, *_ in self.COLUMNS):
            self._choose_columns({*self.ALWAYS, *metrics}, len(row))
        cells = [
            f" {self._cell(metrics.get(name), form, digits, name == RETURN):>{width}}"
            for _, name, form, digits, width in self.columns
        ]
        if any(cell.strip() for cell in cells):
            print(row + "".join(cells), flush=True)
        evaluated = [
            f"{policy} {self._cell(metrics[name], '{:.2f}', 8, spread=True)}"
            for policy, name in self.EVALUATIONS.items()
            if np.isfinite(metrics.get(name, np.nan)).any()
        ]
        if evaluated:
            print(f"{head} eval: {', '.join(evaluated)}", flush=True)

    def _time_left(self, step):
        now = time.perf_counter()
        began, first = self.began = self.began or (now, step)
        if step <= first:
            return ""
        return duration((now - began) / (step - first) * max(0, self.final_step - step))

    def _choose_columns(self, present, used):
        """Choose those that fit, and print their headings."""
        for heading, name, form, digits in self.COLUMNS:
            spread = len(" ± ") + 7 if name == RETURN and self.num_seeds > 1 else 0
            width = max(len(heading), digits + spread)
            if name in present and used + 1 + width <= self.WIDTH:
                used += 1 + width
                self.columns.append((heading, name, form, digits, width))
        headings = "".join(f" {heading:>{width}}" for heading, *_, width in self.columns)
        print(f"{'step':>{self.step_width}} {'left':>13}{headings}", flush=True)

    def _cell(self, value, form, digits, spread=False):
        values = np.ravel(np.nan if value is None else value)
        finite = values[np.isfinite(values)]
        if not finite.size:
            return ""
        mean = fitted(finite.mean(), form, digits)
        return f"{mean} ± {fitted(finite.std(), form, 7)}" if finite.size > 1 and spread else mean

    def close(self):
        print(end="", flush=True)


class File:
    """JSON lines, written at every report: the record of the run.

    {"step": 8192, "time": 3.1, "charts/SPS": 50212.0, "charts/episodic_return": [21.0, null]}
    `time` is in seconds of training, metrics of several seeds are lists, and nan or inf are null.
    A report that cannot be written because the disk is full is retried at the next report.
    """

    def __init__(self, run_dir):
        self.path = Path(run_dir) / METRICS_FILE
        self._repair_end()
        past = read_metrics(self.path)
        trained = past[-1]["time"] if past else 0.0
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed in close()
        self.start = time.perf_counter() - trained
        self.waiting = b""  # lines that could not be written yet
        self.warned = False

    def _repair_end(self):
        """Cut off an unfinished last line: the next report would become a part of it."""
        if not self.path.exists():
            return
        complete, end, rest = self.path.read_bytes().rpartition(b"\n")
        if rest and parse_record(rest):
            with open(self.path, "ab") as file:
                file.write(b"\n")  # it is all that was missing
        elif rest:
            os.truncate(self.path, len(complete + end))
            warn(f"{str(self.path)!r}: the last line was not finished and is left out")

    def log(self, metrics, step):
        if not self.path.exists() and self.path.parent.exists():
            warn(f"{METRICS_FILE} was deleted; it begins again at step {step:,}")
            self.file.close()
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed in close()
        record = {"step": step, "time": round(time.perf_counter() - self.start, 3)}
        record |= {name: as_json(value) for name, value in metrics.items()}
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            self._write()
            self.warned = False
        except OSError as error:
            if not self.warned:
                warn(f"{METRICS_FILE}: {error.strerror}; it is retried at every report")
            self.warned = True

    def _write(self):
        size = os.fstat(self.file.fileno()).st_size
        rest = self.waiting
        try:
            while rest:
                num_written = self.file.write(rest)
                rest = rest[num_written:]
        except OSError:
            os.truncate(self.path, size)  # part of a line may have been written
            raise
        self.waiting = b""

    def close(self):
        self._write()
        self.file.close()


LIBRARIES = {  # backend: its module, and what to pass to `pip install` if it has another name
    "tensorboard": ("tensorboardX", None),
    "wandb": ("wandb", None),
    "neptune": ("neptune", "neptune<2"),
    "dashboard": ("rich.live", None),
}


def library(name: str):
    """The module that a backend needs; UsageError if it is not installed."""
    module, package = LIBRARIES[name]
    return import_optional(module, f"logger {name}", package)


class TensorBoard:
    """Event files with the names of `scalars`, and the config as text.

    The event files of a process that was killed may have gaps, and may end with reports that the
    resumed run will make again. A resumed run rewrites them from metrics.jsonl, if that has all
    their steps; otherwise it continues them, and what will be made again is marked as void.
    """

    TABLES = ("sources", "packages")  # facts about a run that fill a page of their own

    def __init__(self, run_dir, config, about, step):
        tensorboard = library("tensorboard")
        self.run_dir = Path(run_dir).absolute()  # "s3:x" would be an address
        old = [path for path in self.run_dir.glob(EVENT_FILES) if path.is_file()]
        past = read_metrics(self.run_dir / METRICS_FILE)
        seen = {reported for path in old for reported in event_steps(path)}
        first_again = 0 if step is None else step + 1
        kept = {reported for reported in seen if reported < first_again}
        is_covered = kept <= {record["step"] for record in past} and not (seen and step is None)
        if is_covered:
            for path in old:
                path.unlink()
        void = None if is_covered else first_again
        suffix = "" if is_covered else f".{len(old)}"  # the name has but the second
        self.writer = tensorboard.SummaryWriter(
            str(self.run_dir), purge_step=void, filename_suffix=suffix
        )
        tables = {name: about[name] for name in self.TABLES if isinstance(about.get(name), dict)}
        rest = {name: value for name, value in about.items() if name not in tables}
        for name, facts in ({"config": dataclasses.asdict(config), "about": rest} | tables).items():
            rows = "\n".join(f"|{cell(name)}|{cell(value)}|" for name, value in facts.items())
            self.writer.add_text(name, f"|name|value|\n|-|-|\n{rows}")
        if is_covered:
            self._repeat(past)
            films = (self.run_dir / VIDEOS_FOLDER).glob("*.gif")
            films = [path for path in films if path.stem.isdecimal() and path.is_file()]
            for path in sorted(films, key=lambda path: int(path.stem)):
                if int(path.stem) < first_again:
                    self._show_again(path)

    def _show_again(self, path):
        try:
            self.video(path, int(path.stem))
        except (OSError, struct.error):
            warn(f"{str(path)!r} is damaged, TensorBoard does without it")

    def _repeat(self, past):
        """Write past reports, as if training had been without a pause until now."""
        now = time.time()
        for record in past:
            metrics = {
                name: np.asarray(value, float) for name, value in record.items() if "/" in name
            }
            seconds_ago = past[-1]["time"] - record["time"]
            self.log(metrics, record["step"], now - seconds_ago)

    def log(self, metrics, step, walltime=None):
        # tensorboardX hangs when the disk is full. If the directory is gone, `Run` says so.
        if self.run_dir.exists() and shutil.disk_usage(self.run_dir).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, value in scalars(metrics).items():
            self.writer.add_scalar(name, value, step, walltime)

    def video(self, path, step):
        """Among the images, which may move; `add_video` would encode the frames again."""
        from tensorboardX.proto.summary_pb2 import Summary

        content = path.read_bytes()
        width, height = struct.unpack("<HH", content[6:10])
        image = Summary.Image(
            encoded_image_string=content,
            width=width,
            height=height,
            colorspace=3,
        )
        value = Summary.Value(tag="eval/video", image=image)
        self.writer.file_writer.add_summary(Summary(value=[value]), step)

    def close(self):
        self.writer.close()


def plain(value):
    """The value with its text as UTF-8 can hold it; a path may be of bytes that are not."""
    if isinstance(value, dict):
        return {plain(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


EVENT_FILES = "events.out.tfevents.*"


def cell(value) -> str:
    """A value as the text of a cell in a table of TensorBoard's."""
    return str(plain(value)).replace("|", "\\|").replace("\n", " ")


def event_steps(path: Path):
    """The steps of the scalars in an event file, up to its end or to what is broken in it.

    A record is 8 bytes of length, 4 of a checksum, the event, and 4 of another checksum.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", head[:8])
            if size > path.stat().st_size:
                return
            try:
                event = Event.FromString(file.read(size))
            except DecodeError:
                return
            file.seek(4, os.SEEK_CUR)
            if any(value.HasField("simple_value") for value in event.summary.value):
                yield event.step


class WandB:
    """Weights & Biases, configured by its environment variables (WANDB_PROJECT, WANDB_ENTITY, ...).

    Offline it writes to `<run>/wandb/offline-run-*`, which `wandb sync` uploads.
    """

    def __init__(self, run_dir, config, about):
        wandb = library("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "memory-rl"),
            name=plain(Path(run_dir).name),
            id=about["id"],
            resume="allow" if config.wandb_mode == "online" else None,
            dir=run_dir,
            mode=config.wandb_mode,
            config=plain(dataclasses.asdict(config) | {"about": about}),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, metrics, step):
        self.run.log(scalars(metrics), step=step)

    def video(self, path, step):
        video = library("wandb").Video(str(path), format="gif")
        self.run.log({"eval/video": video}, step=step)

    def close(self):
        self.run.finish()


class Neptune:
    """Neptune (client 1.x), configured by its environment variables (NEPTUNE_PROJECT, ...).

    The hosted service has ended, and its data were deleted after 2026-03-05. What works is a server
    of one's own (NEPTUNE_API_TOKEN names it), and offline mode, which needs none: it writes to
    `<run>/.neptune/offline`, which `neptune sync --path <run> --offline-only` uploads to a server.
    """

    def __init__(self, run_dir, config, about):
        os.environ["NEPTUNE_DATA_DIRECTORY"] = str(Path(run_dir) / ".neptune")
        neptune = library("neptune")
        from neptune.utils import stringify_unsupported

        logging.getLogger("neptune").setLevel(logging.ERROR)
        self.run = neptune.init_run(
            mode=config.neptune_mode,
            name=plain(Path(run_dir).name),
            custom_run_id=about["id"],
            source_files=[],
            capture_stdout=False,
            capture_stderr=False,
            capture_hardware_metrics=False,
            git_ref=False,
        )
        self.run["config"] = stringify_unsupported(plain(dataclasses.asdict(config)))
        self.run["about"] = stringify_unsupported(plain(about))

    def log(self, metrics, step):
        for name, value in scalars(metrics).items():
            # A series cannot have fields below it, so the mean needs a name beside "seed_0".
            is_below = "/seed_" in name or "/iqm" in name
            path = name if is_below else f"{name}/mean"
            self.run[path].append(value, step=step)

    def close(self):
        self.run.stop()


class Dashboard:
    """The live screen of harness/dashboard.py, for terminals."""

    def __init__(self, run_dir, config, about):
        Live = library("dashboard").Live

        from harness.dashboard import History, draw

        self.history = History(run_dir, dataclasses.asdict(config), about)
        self.live = Live(get_renderable=lambda: draw(self.history), refresh_per_second=2)
        self.live.start()

    def log(self, metrics, step):
        values = {name: value.tolist() for name, value in metrics.items()}
        self.history.add({"step": step} | values)

    def close(self):
        self.live.stop()


class Memory:
    """Keeps the reports, for a notebook: `Logger([memory])`, and then `memory.series(metric)`.

    Attributes:
      records: the reports as they came, {"step": step, metric: array, ...}.
    """

    def __init__(self):
        self.records = []

    def log(self, metrics, step):
        self.records.append({"step": step} | metrics)

    def series(self, name):
        """The steps (reports,), and the values of a metric, (reports,) or (reports, S)."""
        reports = [record for record in self.records if name in record]
        steps = np.array([record["step"] for record in reports])
        return steps, np.array([record[name] for record in reports])

    def close(self):
        """Keep everything."""


# --- Making a logger -----------------------------------------------------------------------------


def check_keys(config) -> None:
    """Refuse a config whose loggers lack a library or an API key, before a run is begun.

    Raises:
      UsageError: names what is missing.
    """
    for name in config.log:
        if name in LIBRARIES:
            library(name)
    if "wandb" in config.log and config.wandb_mode == "online":
        wandb = library("wandb")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it prints where it found one
                has_key = wandb.login(prompt=False, verify=False)
        except wandb.errors.AuthenticationError as error:
            raise UsageError(f"wandb has no API key that it can use: {error}") from None
        if not has_key:
            ways = "run `wandb login`, set WANDB_API_KEY, or choose --wandb-mode offline"
            raise UsageError(f"wandb has no API key: {ways}")
    if "neptune" in config.log and config.neptune_mode != "offline":
        for variable in ("NEPTUNE_API_TOKEN", "NEPTUNE_PROJECT"):
            if not os.environ.get(variable):
                ways = "set it, or choose --neptune-mode offline"
                raise UsageError(f"neptune needs {variable}: {ways}")


def make_logger(config, run_dir, diverged=(), step: int | None = None) -> Logger:
    """The logger of a run: the backends of `config.log`, writing into `run_dir`.

    "console" and "dashboard" both write to the terminal. With "dashboard", only the dashboard does,
    or only the console where the output is not a terminal.

    Args:
      diverged: of a resumed run, `Logger.diverged` when it was saved, as pairs.
      step: of a resumed run, the step of its checkpoint; None if it has none.

    Raises:
      UsageError: a backend cannot start.
    """
    path = Path(run_dir) / CONFIG_FILE
    about = json.loads(path.read_text()) if path.exists() else {}
    about.pop("config", None)
    about["id"] = re.sub(r"[^\w-]+", "-", str(about.get("id", Path(run_dir).name)))  # names files
    names = set(config.log)
    if "dashboard" in names:
        names -= {"console", "dashboard"}
        names |= {"dashboard" if sys.stdout and sys.stdout.isatty() else "console"}
    make = {
        "console": lambda: Console(config, about.get("final_step", config.total_steps)),
        "file": lambda: File(run_dir),  # repairs the record that TensorBoard reads
        "tensorboard": lambda: Background(TensorBoard(run_dir, config, about, step)),
        "wandb": lambda: Background(WandB(run_dir, config, about), patience=300.0),
        "neptune": lambda: Background(Neptune(run_dir, config, about), patience=300.0),
        "dashboard": lambda: Dashboard(run_dir, config, about),
    }
    backends = []
    for name, make_backend in make.items():
        if name not in names:
            continue
        try:
            backends.append(make_backend())
        except Exception as error:
            reason = str(error) or repr(error)
            raise UsageError(f"logger {name} cannot start: {reason}") from None
    return Logger(backends, diverged)


if __name__ == "__main__":
    from harness.dashboard import Look, main
    from harness.options import launch

    launch(main, Look)
