"""The numbers of a run: means of reports, statistics over seeds, and the file that keeps them."""

import json
import math
import sys
from pathlib import Path

import numpy as np

from harness.output import warn

METRICS_FILE = "metrics.jsonl"
RETURN = "charts/episodic_return"
GREEDY = "eval/greedy_return"  # of the most likely actions
SAMPLED = "eval/sampled_return"  # of actions drawn from the policy
GREEDY_LENGTH = "eval/greedy_length"
SAMPLED_LENGTH = "eval/sampled_length"


class Report(dict):
    """The means of several updates, by metric; values have one entry per seed, (S,).

    Attributes:
      step: environment steps of each seed after these updates.
      first_nonfinite: for each loss the update, counted from 1, in which it first was nan or inf;
        0 for the seeds (S,) where it stayed finite.
    """

    def __init__(self, means: dict, step: int, first_nonfinite: dict | None = None):
        super().__init__(means)
        self.step = step
        self.first_nonfinite = first_nonfinite or {}


def summarize(sums: dict, finite: dict, first: int, count: int, steps_per_update: int) -> Report:
    """The report of the `count` updates that follow the first `first` ones.

    `charts/episodic_*` are divided by the number of episodes that ended, `charts/episodes`. Where
    no episode ended there is no mean: nan for that seed, and no entry if so for all seeds.

    Args:
      sums: each metric summed over the updates, (S,).
      finite: for each metric the number of updates before its sum became nan or inf.
    """
    episodes = np.asarray(sums["charts/episodes"]).astype(int)
    means = {"charts/episodes": episodes}
    for name, total in sums.items():
        if name.startswith("charts/episodic_") and episodes.any():
            nothing = np.full(episodes.shape, np.nan)
            means[name] = np.divide(total, episodes, out=nothing, where=episodes > 0)
        elif not name.startswith("charts/episod"):
            means[name] = np.asarray(total) / count
    losses = {name: np.asarray(n) for name, n in finite.items() if name.startswith("losses/")}
    first_nonfinite = {name: np.where(n < count, first + n + 1, 0) for name, n in losses.items()}
    return Report(means, (first + count) * steps_per_update, first_nonfinite)


def evaluated_policies(config) -> tuple[str, ...]:
    """The policies that evaluations of a run follow; the last one chooses the best checkpoint."""
    choices = {"greedy": ("greedy",), "sample": ("sampled",), "both": ("greedy", "sampled")}
    return choices[getattr(config, "eval_policy", "greedy")]


def summarize_episodes(episodes, policy: str = "greedy") -> dict:
    """The means of an evaluation: returns, lengths and reports of `episodes` are (S, episodes)."""
    values = {"return": episodes.returns, "length": episodes.lengths} | episodes.reports
    return {f"eval/{policy}_{name}": np.asarray(x).mean(axis=1) for name, x in values.items()}


def iqm(values):
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter.

    Recommended for few seeds by Agarwal et al. 2021, arXiv 2108.13264.
    """
    count = np.shape(values)[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(axis=-1)


def interval(values, statistic=iqm, resamples: int = 2000):
    """The 95 % bootstrap interval (percentiles) of a statistic of the values (S,): low, high."""
    resamples = min(resamples, max(100, 10**6 // len(values)))  # many values need fewer
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    return tuple(np.percentile(statistic(draws), [2.5, 97.5]).tolist())


def scalars(metrics: dict) -> dict[str, float]:
    """Metrics as plain numbers: the mean over seeds as `name`, each seed's value as `name/seed_i`.

    Returns of several seeds also have `name/iqm`, and its interval as `name/iqm_low` and
    `name/iqm_high`.
    """
    flat = {}
    for name, value in metrics.items():
        finite = value[np.isfinite(value)]
        if finite.size:
            flat[name] = float(finite.mean())
        if value.size > 1:
            flat |= {f"{name}/seed_{i}": float(x) for i, x in enumerate(value) if math.isfinite(x)}
            if finite.size > 1 and name in (RETURN, GREEDY, SAMPLED):
                low, high = interval(finite)
                flat |= {
                    f"{name}/iqm": float(iqm(finite)),
                    f"{name}/iqm_low": low,
                    f"{name}/iqm_high": high,
                }
    return flat


def statistics(episodes, diverged=()) -> dict:
    """Statistics of evaluation episodes, returns (S, episodes), without the `diverged` seeds.

    One seed: the mean of its episodes, with its interval. Several: the means of the seeds, their
    median, and their interquartile mean, with its interval.
    """
    returns = np.delete(np.asarray(episodes.returns, float), list(diverged), axis=0)
    means = returns.mean(axis=1)
    if len(means) == 1:
        bounds = interval(returns[0], lambda draws: draws.mean(axis=-1))
        return {"mean": float(means[0]), "interval": bounds}
    return {
        "means": means.tolist(),
        "median": float(np.median(means)),
        "iqm": float(iqm(means)),
        "interval": interval(means),
    }


def describe(episodes, diverged=(), policy: str = "greedy") -> str:
    """One line about evaluation episodes, returns (S, episodes), without the `diverged` seeds."""
    result = statistics(episodes, diverged)
    low, high = result["interval"]
    bounds = f"(95 % interval {low:.2f} to {high:.2f})"
    text = f"{policy} return over {episodes.returns.shape[1]} episodes: "
    more = ""
    for name, values in episodes.reports.items():
        mean = np.delete(np.asarray(values), list(diverged), axis=0).mean()
        more += f"; {name.replace('_', ' ')} {mean:.2f}"
    if diverged:
        more += f" ({len(diverged)} diverged)"
    if "mean" in result:
        return text + f"{result['mean']:.2f} {bounds}{more}"
    means = result["means"]
    text += f"median of {len(means)} seeds {result['median']:.2f}, "
    text += f"IQM {result['iqm']:.2f} {bounds}; "
    text += "the seeds: " + " ".join(f"{mean:.2f}" for mean in means)
    return text + more


def as_json(value):
    """Arrays and numbers as JSON has them: lists, and None for nan and inf, which it lacks."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, start: int = 0) -> list[dict]:
    """The records of a metrics file from byte `start` on, without an unfinished last line.

    Lines that are not records are left out; the first ones of a file are named in a warning.
    "bytes" of a record is its size, with that of the broken lines before it.
    """
    path = Path(path)
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(start)
        *lines, _ = file.read().split(b"\n")  # after the last line end: nothing, or unfinished
    records, broken, size = [], [], 0
    for index, line in enumerate(lines):
        size += len(line) + 1
        record = parse_record(line)
        if record is None:
            broken.append(index)
        else:
            records.append(record | {"bytes": size})
            size = 0
    if broken and path.absolute() not in NAMED:
        NAMED.add(path.absolute())
        with open(path, "rb") as file:
            first = file.read(start).count(b"\n") + broken[0] + 1
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        warn(f"{str(path)!r}: line {first} is broken and left out{more}")
    return records


NAMED: set[Path] = set()  # files whose broken lines have been named


def parse_record(line: bytes) -> dict | None:
    """The record in a line of a metrics file, None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step, time = record.get("step"), record.get("time")
    if type(step) is not int or not 0 <= step < 2**63:
        return None
    if not is_number(time) or not math.isfinite(time):
        return None
    for name, value in record.items():
        values = value if isinstance(value, list) else [value]
        if "/" in name and not all(entry is None or is_number(entry) for entry in values):
            return None
    return record


def is_number(value) -> bool:
    """Whether a value from JSON is a number that a float can hold."""
    is_small = isinstance(value, int) and abs(value) <= sys.float_info.max
    return is_small or isinstance(value, float)
