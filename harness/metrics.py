"""The numbers of a run: means of reports, statistics over seeds, and the file that keeps them."""

import json
import math
from pathlib import Path

import numpy as np

METRICS_FILE = "metrics.jsonl"
RETURN = "charts/episodic_return"
GREEDY = "eval/episodic_return"


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
    episodes = np.asarray(sums["charts/episodes"])
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


def summarize_episodes(episodes) -> dict:
    """The means of an evaluation: `episodes.returns` and `.lengths` are (S, episodes)."""
    return {
        GREEDY: np.asarray(episodes.returns).mean(axis=1),
        "eval/episodic_length": np.asarray(episodes.lengths).mean(axis=1),
    }


def iqm(values):
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter.

    Recommended for few seeds by Agarwal et al. 2021, arXiv 2108.13264.
    """
    count = np.shape(values)[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(axis=-1)


def interval(values, statistic=iqm, resamples: int = 2000):
    """The 95 % bootstrap interval (percentiles) of a statistic of the values (S,): low, high."""
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
            if finite.size > 1 and name in (RETURN, GREEDY):
                low, high = interval(finite)
                flat |= {
                    f"{name}/iqm": float(iqm(finite)),
                    f"{name}/iqm_low": low,
                    f"{name}/iqm_high": high,
                }
    return flat


def describe(episodes, diverged=()) -> str:
    """One line about evaluation episodes, returns (S, episodes), without the `diverged` seeds."""
    returns = np.delete(np.asarray(episodes.returns), list(diverged), axis=0)
    text = f"greedy return over {returns.shape[1]} episodes: "
    if len(returns) == 1:
        low, high = interval(returns[0], lambda draws: draws.mean(axis=-1))
        return text + f"{returns.mean():.2f} (95 % interval {low:.2f} to {high:.2f})"
    means = returns.mean(axis=1)
    low, high = interval(means)
    text += f"median of {len(means)} seeds {np.median(means):.2f}, "
    text += f"IQM {iqm(means):.2f} (95 % interval {low:.2f} to {high:.2f}); "
    text += "the seeds: " + " ".join(f"{mean:.2f}" for mean in means)
    return text + (f" ({len(diverged)} diverged)" if diverged else "")


def read_metrics(path: Path, start: int = 0) -> list[dict]:
    """The records of a metrics file from byte `start` on, without an unfinished last line."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read().splitlines(keepends=True)
    return [json.loads(line) | {"bytes": len(line)} for line in lines if line.endswith(b"\n")]
