"""The numbers of a run, read from its files while it runs and later.

The files may be of any version of the scripts, and from anybody. What is not the number of a run is
left out; nothing in them is executed.
"""

import json
import math
import time
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import numpy as np

from harness import identity
from harness.errors import UsageError
from harness.metrics import GREEDY, GREEDY_LENGTH, METRICS_FILE, read_metrics
from harness.run_dir import CONFIG_FILE
from harness.text import shorten

MAX_METRICS = 1000  # a run has about 20; who finds more does not wait for them
MAX_POINTS = 400  # reports that a curve of the dashboard is drawn from, about
LARGEST = float(np.finfo(np.float32).max)  # runs compute in float32: they have no larger numbers

# What older versions called a metric.
RENAMED = {"eval/episodic_return": GREEDY, "eval/episodic_length": GREEDY_LENGTH}

# What a config.json must have to be looked at: field -> its type, and for numbers their range.
ABOUT = {"script": str, "final_step": range(2**63), "config": dict}
CONFIG = {
    "env": str,
    "env_kwargs": dict,
    "mask": list,
    "seed": range(2**63),
    "num_seeds": range(1, 2**31),
}
TYPES = {str: "a string", dict: "an object", list: "a list"}


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
      has_more: whether the run's file had reports later than those `poll` was asked for.
      state: "running", "complete", "stopped", or "" if that is not known.
    """

    def __init__(self, run_dir, config: dict, about: dict, read: bool = True):
        self.run_dir = Path(run_dir)
        self.config = config
        self.about = about
        self.has_more = False
        self.state = ""
        self._forget()
        if read:
            self.poll()

    def _forget(self):
        self.series = defaultdict(list)
        self.clock = []  # (seconds, step) of the first and of the last report
        self.step = 0
        self.bytes = 0  # of the run's file, read so far

    @cached_property
    def experiment(self):
        """What is equal for all runs of the same experiment."""
        return identity.experiment(self.about["script"], self.config)

    def add(self, record: dict) -> None:
        """Take in a report: {"step": ..., metric: a number or one per seed, ...}."""
        step = record.get("step")
        if not is_whole(step, range(self.step, 2**63)):
            return
        self.step = step
        seconds = number(record.get("time", time.monotonic()))
        if math.isfinite(seconds):
            self.clock = [*self.clock[:1], (seconds, self.step)]
        for name, value in record.items():
            if "/" in name:
                self._add_values(RENAMED.get(name, name), value)

    def _add_values(self, name, value):
        known = self.series.get(name)
        if not known and len(self.series) >= MAX_METRICS:
            return
        values = np.array([number(x) for x in (value if isinstance(value, list) else [value])])
        sizes = {known[0][1].size} if known else {1, self.config["num_seeds"]}
        if values.size in sizes and (isinstance(value, list) or np.isfinite(values).any()):
            self.series[name].append((self.step, values))

    def poll(self, until: float = math.inf) -> None:
        """Read the reports that are new in the run's file, up to `until` seconds of training."""
        path = self.run_dir / METRICS_FILE
        if path.exists() and path.stat().st_size < self.bytes:  # the run went back to a checkpoint
            self._forget()
        self.has_more = False
        for record in read_metrics(path, self.bytes):
            if number(record.get("time")) > until:
                self.has_more = True
                break
            self.bytes += record.pop("bytes")
            self.add(record)

    @property
    def progress(self) -> float:
        """The fraction of the run's steps that are done."""
        return self.step / max(1, self.about["final_step"])

    def seconds_left(self) -> float:
        """How long the run will take at its speed so far, with evaluations; nan if unknown."""
        if not self.clock:
            return math.nan
        (began, first), (now, last) = self.clock[0], self.clock[-1]
        remaining = max(0, self.about["final_step"] - last)
        return (now - began) / (last - first) * remaining if last > first else math.nan

    def values(self, name):
        """The values of a metric, (reports, S); of many reports about MAX_POINTS, evenly spaced."""
        series = self.series.get(name)
        if not series:
            return np.empty((0, 1))
        every = max(1, len(series) // MAX_POINTS)
        chosen = series[::-every][::-1]  # includes the last report
        return np.array([values for _, values in chosen])

    def last(self, name):
        """The mean over seeds in the last report of a metric; nan if there is none."""
        series = self.series.get(name)
        return mean_of_finite(series[-1][1]) if series else math.nan

    def diverged(self) -> set[int]:
        """The indices of the seeds whose last losses are nan or inf."""
        lost = set()
        for name, series in self.series.items():
            _, values = series[-1]
            if name.startswith("losses/") and values.size == self.config["num_seeds"]:
                lost |= set(np.flatnonzero(~np.isfinite(values)).tolist())
        return lost

    def curves(self, metric: str) -> dict:
        """The curve of every seed, steps (n,) and values (n,), by seed.

        A seed has no value in reports in which none of its episodes ended. Diverged seeds and those
        without any value are left out. A metric of the whole run, such as its speed, is one curve,
        by all seeds.
        """
        series = self.series.get(metric, [])
        steps = np.array([step for step, _ in series])
        values = np.array([values for _, values in series])
        seeds = identity.seeds_of(self.config)
        is_per_seed = values.ndim == 2 and values.shape[1] == len(seeds)
        lost = self.diverged()
        curves = {}
        for index, curve in enumerate(values.T):
            finite = np.isfinite(curve)
            if finite.any() and not (is_per_seed and index in lost):
                curves[seeds[index] if is_per_seed else seeds] = (steps[finite], curve[finite])
        return curves


def load(run_dir: Path, read: bool = True) -> History:
    """The history of a run, from its files.

    Raises:
      UsageError: there is no such run.
    """
    try:
        path = run_dir / CONFIG_FILE
        if path.exists() and not path.is_file():  # a pipe would keep its reader waiting
            raise ValueError(f"{CONFIG_FILE} is not a file")
        saved = json.loads(path.read_bytes())
        check_fields(saved, ABOUT)
        check_fields(saved["config"], CONFIG, "config.")
        about = {name: saved[name] for name in ("script", "final_step")}
        sources = saved.get("sources")
        sources = sources.items() if isinstance(sources, dict) else ()
        about["sources"] = {name: hashed for name, hashed in sources if isinstance(hashed, str)}
        config = saved["config"]
        if saved.get("extended"):  # its schedules first aimed at a smaller total_steps
            config["extended"] = saved["extended"]
        history = History(run_dir, config, about, read)
        assert history.experiment  # a config that is nested too deeply shows here
    except OSError as error:
        reason = f"{CONFIG_FILE}: {error.strerror}"
    except json.JSONDecodeError as error:
        reason = f"{CONFIG_FILE} is not JSON ({error})"
    except RecursionError:
        reason = f"{CONFIG_FILE} is nested too deeply"
    except ValueError as error:
        reason = shorten(error, 200)
    else:
        return history
    raise UsageError(f"no run in {str(run_dir)!r}: {reason}") from None


def check_fields(value, fields: dict, prefix: str = "") -> None:
    """Refuse a value of a config.json that is no object, or whose fields are not of these types.

    Raises:
      ValueError: names the field, its value and what is valid.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{CONFIG_FILE} must have an object, got {shorten(json.dumps(value), 40)}")
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"{CONFIG_FILE} has no {prefix}{name}")
        entry = value[name]
        is_valid = is_whole(entry, kind) if isinstance(kind, range) else isinstance(entry, kind)
        if not is_valid:
            wanted = TYPES.get(kind) or f"a whole number of at least {kind.start}"
            got = shorten(json.dumps(entry), 40)
            raise ValueError(f"{prefix}{name} in {CONFIG_FILE} must be {wanted}, got {got}")


def is_whole(value, valid: range) -> bool:
    """Whether a value read from JSON is a whole number in this range, written without a point."""
    return type(value) is int and value in valid


def number(value) -> float:
    """A value read from JSON as a number; nan for what is none."""
    is_number = type(value) in (int, float) and abs(value) <= LARGEST
    return float(value) if is_number else math.nan


def mean_of_finite(values) -> float:
    """The mean of the values that are not nan or inf; nan if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.mean(finite)) if finite.size else math.nan
