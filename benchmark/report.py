"""The report of the studies: tables, figures and one page, from the files in benchmark/results.

    python benchmark/report.py            # every study that has results
    python benchmark/report.py small      # only this one
    python benchmark/report.py --check    # exit 1 if a document does not show what the files say

For each study it writes benchmark/studies/STUDY.md and the figures beside it. All studies together
are on the page runs/report/index.html. It is one file that needs no network. It is not committed,
as most of it is plotly.js (5 MB): this command makes it.

A score is a return on a scale where the `BOUNDS` of the task are 0 and 1. rliable (Agarwal et al.
2021, arXiv 2108.13264) draws the seeds of every task anew, 2,000 times, for the intervals of all
tasks together. The same files give the same bytes.

rliable and plotly are not among the requirements: pip install rliable plotly "pandas<3"
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import learning
import numpy as np
import results
from results import ROOT, NoResult
from tables import fixed, linked, markdown, notes, number, short_commit, thousands

from harness.errors import UsageError, import_optional
from harness.metrics import interval, iqm
from memory_cells import CELLS

TEMPLATE = Path(__file__).with_suffix(".html")
PAGE = ROOT / "runs" / "report" / "index.html"
# Beginning of a task's name -> the return that counts as 0, and the one that counts as 1.
# MemoryChain: always wrong and always right, so that guessing has 0.5. Pendulum: about the least
# that a policy gets, and what good agents reach.
BOUNDS = {
    "popgym-": (-1, 1),
    "memorychain-": (-1, 1),
    "cartpole": (0, 500),
    "pendulum": (-1600, -150),
}
REFERENCE = "gru"  # what the other memories are compared with
RESAMPLES = 2000
THRESHOLDS = np.linspace(0, 1, 51)  # scores at which profiles are drawn
SHARES = np.linspace(0.05, 1, 20)  # of the training, at which efficiency is drawn
SOLVED = 0.9  # what the worst seed must reach on MemoryChain

# --- Results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One memory in one script on one task of a study; without `entry` it is missing.

    Attributes:
      command: what trains it; empty if it is missing and no study file says how.
      entry: its result file.
      cost: its file of study-cost; None if there is none.
    """

    study: str
    task: str
    script: str
    memory: str
    command: str = ""
    entry: dict | None = None
    cost: dict | None = None

    @property
    def algorithm(self) -> str:
        """The script; those for continuous actions count as their twins."""
        return self.script.removesuffix("_continuous")

    @property
    def values(self) -> dict:
        return self.entry["values"]

    @property
    def costs(self) -> dict:
        return self.cost["values"] if self.cost else {}

    @property
    def returns(self) -> np.ndarray:
        """Greedy returns at the end (S,); a seed that diverged has the lowest bound of the task."""
        return self._known(self.values["returns"])

    @property
    def scores(self) -> np.ndarray:
        """`returns` on the scale from 0 to 1."""
        return score(self.task, self.returns)

    @property
    def mmer(self) -> float | None:
        """POPGym's measure, the greatest mean return of training, as a mean over seeds."""
        known = [x for x in self.values["mmer"] or [] if x is not None]
        return float(np.mean(known)) if known else None

    @property
    def diverged(self) -> int:
        """How many seeds have no return at the end."""
        return sum(x is None for x in self.values["returns"])

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps (P,) and greedy returns (S, P) during training."""
        curve = self.values["curve"]
        return np.array(curve["steps"]), self._known(curve["returns"])

    def seconds(self, steps) -> np.ndarray | None:
        """The wall-clock at these steps: compilation comes first, then the speed is constant."""
        total = self.costs.get("seconds")
        if total is None:
            return None
        compiling = self.costs.get("compile_seconds") or 0.0
        return compiling + (total - compiling) * np.asarray(steps) / self.values["steps"]

    def _known(self, returns):
        low, _ = bounds(self.task)
        returns = np.array(returns, float)
        return np.where(np.isnan(returns), low, returns)


def bounds(task: str) -> tuple[float, float]:
    """The returns that count as 0 and 1.

    Raises:
      NoResult: `BOUNDS` does not have the task.
    """
    for beginning, pair in BOUNDS.items():
        if task.startswith(beginning):
            return pair
    raise NoResult(f"the task {task} has no bounds: add it to BOUNDS in benchmark/report.py")


def score(task: str, returns):
    low, high = bounds(task)
    return (np.asarray(returns) - low) / (high - low)


def studies() -> list[str]:
    """Those that have results."""
    return sorted({path.parts[-3] for path in results.RESULTS.glob("study/*/*/*.json")})


def planned(study: str) -> dict:
    """(task, script, memory) -> command, of all settings that study.toml has for a study."""
    try:
        import study as runner
    except ModuleNotFoundError:  # without it only what was measured is known
        return {}
    settings = runner.read_studies(runner.FILE).get(study, [])
    return {(x.task, x.script, x.memory): x.reported().command for x in settings}


def read(study: str) -> list[Setting]:
    """All settings of a study, measured or missing: by task, then by memory."""
    found = {}
    for path in sorted((results.RESULTS / "study" / study).glob("*/*.json")):
        name = f"{study}/{path.parent.name}/{path.stem}"
        entry = results.load(f"study/{name}")
        cost = f"study-cost/{name}"
        values = entry["values"]
        key = (values["task"], values["script"], values["memory"])
        found[key] = Setting(
            study,
            *key,
            entry["command"],
            entry,
            results.load(cost) if results.exists(cost) else None,
        )
    wanted = planned(study)
    missing = {
        key: Setting(study, *key, command) for key, command in wanted.items() if key not in found
    }
    tasks = [*dict.fromkeys(task for task, _, _ in wanted), *learning.TASKS]

    def place(key):
        task, script, memory = key
        place_of_memory = list(CELLS).index(memory) if memory in CELLS else len(CELLS)
        place_of_task = tasks.index(task) if task in tasks else len(tasks)
        return place_of_task, script, place_of_memory, memory

    everything = found | missing
    return [everything[key] for key in sorted(everything, key=place)]


@dataclass(frozen=True)
class Comparison:
    """The memories of one algorithm in one study.

    Attributes:
      settings: (task, memory) -> setting.
    """

    study: str
    algorithm: str
    settings: dict

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.settings))

    @property
    def memories(self) -> list[str]:
        """In the order of `memory_cells`."""
        found = {memory for _, memory in self.settings}
        known = [memory for memory in CELLS if memory in found]
        return known + sorted(found - set(known))

    def has(self, task: str, memory: str) -> bool:
        setting = self.settings.get((task, memory))
        return setting is not None and setting.entry is not None

    @functools.cached_property
    def common_tasks(self) -> list[str]:
        """The tasks of the aggregates: those with which the comparison holds most results.

        Memories without results on one of them have no aggregate.
        """
        count = {task: sum(self.has(task, m) for m in self.memories) for task in self.tasks}
        ranked = sorted((task for task in self.tasks if count[task]), key=lambda t: -count[t])
        sets = [ranked[: n + 1] for n in range(len(ranked))]

        def size(tasks):
            whole = [m for m in self.memories if all(self.has(task, m) for task in tasks)]
            return len(tasks) * len(whole), len(tasks)

        best = max(sets, key=size, default=[])
        return [task for task in self.tasks if task in best]

    @property
    def compared(self) -> list[str]:
        """The memories that have aggregates."""
        has_all = [all(self.has(task, m) for task in self.common_tasks) for m in self.memories]
        return [m for m, whole in zip(self.memories, has_all, strict=True) if whole]

    @property
    def num_seeds(self) -> int:
        """As many as every compared setting has; rliable takes equally many of each."""
        return min(
            len(self.settings[t, m].returns) for t in self.common_tasks for m in self.compared
        )

    def scores(self, memory: str) -> np.ndarray:
        """Final scores (seeds, common tasks)."""
        own = [self.settings[task, memory] for task in self.common_tasks]
        return np.stack([setting.scores[: self.num_seeds] for setting in own], axis=1)

    def curves(self, memory: str) -> np.ndarray:
        """Scores at `SHARES` of the training (seeds, common tasks, shares)."""
        found = []
        for task in self.common_tasks:
            steps, returns = self.settings[task, memory].curve()
            shares = steps / steps[-1]
            rows = [np.interp(SHARES, shares, row) for row in returns[: self.num_seeds]]
            found.append(score(task, np.stack(rows)))
        return np.stack(found, axis=1)


def comparisons(settings: list[Setting]) -> list[Comparison]:
    """One for each algorithm of a study."""
    groups = {}
    for setting in settings:
        group = groups.setdefault((setting.study, setting.algorithm), {})
        group[setting.task, setting.memory] = setting
    return [Comparison(*key, group) for key, group in sorted(groups.items())]


# --- Statistics ----------------------------------------------------------------------------------


def rliable():
    """The module rliable.library.

    Raises:
      UsageError: it is missing, or pandas is too new for it.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("rliable")
        pandas = importlib.metadata.version("pandas")
        if int(pandas.split(".")[0]) > 2:
            reason = f"rliable needs arch before 8, which fails with pandas {pandas}"
            raise UsageError(f"report.py: {reason}: pip install 'pandas<3'")
    return import_optional("rliable.library", "report.py")


def estimate(scores, statistic) -> tuple:
    """A statistic of scores, and the ends of its 95 % stratified bootstrap interval.

    Args:
      scores: (seeds, tasks, ...), or a list of two such arrays, of which each is drawn anew.
      statistic: from such arrays to an array (N,).

    Returns:
      The statistic, the low and the high ends, (N,) each.
    """
    np.random.seed(0)  # rliable draws from NumPy's own generator, whatever it is given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # arch's about how rliable calls it
        points, intervals = rliable().get_interval_estimates(
            {"": scores}, statistic, reps=RESAMPLES
        )
    return points[""], *intervals[""]


def iqm_of_all(scores):
    """Interquartile mean over seeds and tasks (seeds, tasks, N) -> (N,)."""
    flat = scores.reshape(scores.shape[0] * scores.shape[1], -1)
    return iqm(flat.T)


def probability_of_improvement(x, y):
    """How often a seed of x is better than one of y, equal ones count half; mean over tasks (1,).

    rliable.metrics has the same from Mann-Whitney tests.
    """
    return np.mean(np.sign(x[:, None] - y[None]) + 1, keepdims=True).reshape(1) / 2


def profile(scores):
    """The share of seeds and tasks with a score above each threshold, (thresholds,)."""
    return (scores[..., None] > THRESHOLDS).mean(axis=(0, 1))


def statistics(comparison: Comparison, with_curves: bool = True) -> dict:
    """memory -> name of a statistic -> what `estimate` says.

    Names are iqm, better (than the reference, if it was measured), and the two that only figures
    show, profile and efficiency.
    """
    found = {}
    memories = comparison.compared
    for memory in memories:
        scores = comparison.scores(memory)
        found[memory] = {"iqm": estimate(scores, iqm_of_all)}
        if REFERENCE in memories:
            pair = [scores, comparison.scores(REFERENCE)]
            found[memory]["better"] = estimate(pair, probability_of_improvement)
        if with_curves:
            found[memory]["profile"] = estimate(scores, profile)
            found[memory]["efficiency"] = estimate(comparison.curves(memory), iqm_of_all)
    return found


def mean_with_interval(values) -> tuple[float, float, float]:
    """The mean of seeds (S,), and the ends of its 95 % bootstrap interval."""
    low, high = interval(values, lambda draws: draws.mean(axis=-1))
    return float(np.mean(values)), low, high


# --- Documents -----------------------------------------------------------------------------------

MISSING = "missing"
INTRODUCTION = """\
`python benchmark/report.py {study}` makes this document and its figures from the
[result files](../results/study/{study}). Every number links to its file, which has the command,
the commit and the machine. Brackets hold 95 % intervals. What was not measured is shown as
{missing}.
"""
TOGETHER = """\
Scores of the final greedy policies on {tasks}, {seeds} per memory. A score is 0 and 1 where the
return is

{bounds}

IQM is the mean without the lowest and the highest quarter of all seeds and tasks. The
probability of improvement says how often a seed is better than one of `{reference}`, equal ones
count half. The intervals are of rliable's stratified bootstrap with {resamples:,} draws.
"""
ALONE = """\
Mean and worst of the seeds' greedy returns over 100 episodes at the end of training. MMER is
POPGym's measure, the greatest mean return of training, as a mean over seeds. Steps per second count
all seeds. Rows with a link in the first column are of others.
"""


def bracketed(point, low, high, decimals=2) -> str:
    return f"{number(point, decimals)} ({number(low, decimals)} to {number(high, decimals)})"


def title_of(task: str) -> str:
    return learning.TASKS.get(task, {}).get("title", task)


def together(comparison: Comparison, found: dict) -> str:
    """The table of aggregates."""
    rows = []
    for memory in comparison.memories:
        lacks = [task for task in comparison.common_tasks if not comparison.has(task, memory)]
        if memory in found:
            own = found[memory]
            better = bracketed(*(x[0] for x in own["better"])) if "better" in own else MISSING
            row = [f"`{memory}`", bracketed(*(x[0] for x in own["iqm"])), better]
            row[2] = "" if memory == REFERENCE else row[2]
        else:
            text = f"{MISSING}: {len(lacks)} of {len(comparison.common_tasks)} tasks"
            row = [f"`{memory}`", text, MISSING]
        rows.append(row)
    return markdown(["`--cell`", "IQM", f"better than `{REFERENCE}`"], rows)


def alone(comparison: Comparison, task: str, here: Path) -> str:
    """The table of one task: a row for each memory, and those of others."""
    rows = []
    for memory in comparison.memories:
        setting = comparison.settings.get((task, memory))
        if setting is None:
            continue
        if setting.entry is None:
            rows.append([f"`{memory}`", *[MISSING] * 7])
            continue
        mark = f", {setting.diverged} diverged" if setting.diverged else ""
        values = setting.values
        rows.append(
            [
                f"`{memory}`",
                thousands(values["steps"]),
                f"{values['num_seeds']}{mark}",
                linked(bracketed(*mean_with_interval(setting.returns)), setting.entry, here),
                linked(number(float(setting.returns.min())), setting.entry, here),
                linked(number(setting.mmer), setting.entry, here),
                linked(fixed(setting.costs.get("steps_per_second")), setting.cost, here) or MISSING,
                linked(short_commit(setting.entry), setting.entry, here),
            ]
        )
    for other in learning.TASKS.get(task, {}).get("published", []):
        value = number(other["return"])
        is_mmer = "MMER" in other["agent"]
        name = f"[{other['agent']}]({other['source']})"
        mean = "" if is_mmer else value
        rows.append(
            [name, thousands(other["steps"]), "", mean, "", value if is_mmer else "", "", ""]
        )
    head = ["`--cell`", "steps", "seeds", "mean", "worst", "MMER", "steps per second", "measured"]
    return markdown(head, rows)


def document(study: str, found: list, here: Path) -> str:
    """The Markdown document of a study.

    Args:
      found: pairs of a comparison and its statistics.
      here: the folder of the document.
    """
    parts = [f"# Study `{study}`\n", INTRODUCTION.format(study=study, missing=MISSING)]
    for comparison, own in found:
        algorithm = comparison.algorithm
        tasks = comparison.common_tasks
        parts.append(f"## `{algorithm}`: all tasks together\n")
        scales = dict.fromkeys(bounds(task) for task in tasks)
        lines = [
            f"- {low:g} and {high:g}: "
            + "; ".join(title_of(task) for task in tasks if bounds(task) == (low, high))
            for low, high in scales
        ]
        if tasks:
            about = TOGETHER.format(
                tasks="1 task" if len(tasks) == 1 else f"{len(tasks)} tasks",
                seeds=f"{comparison.num_seeds} seeds",
                bounds="\n".join(lines),
                reference=REFERENCE,
                resamples=RESAMPLES,
            )
            parts += [about, together(comparison, own)]
            for name, text in FIGURES.items():
                path = figure_path(study, algorithm, name, Path())
                parts.append(f"![{text}, {algorithm}]({path.as_posix()})\n")
        parts += [f"## `{algorithm}`: each task alone\n", ALONE]
        for task in comparison.tasks:
            options = learning.TASKS.get(task, {}).get("options", "")
            parts.append(f"### {title_of(task)} (`{algorithm}`)\n")
            parts += [f"`{options}`\n"] if options else []
            parts.append(alone(comparison, task, here))
    entries = [s.entry for c, _ in found for s in c.settings.values() if s.entry]
    parts += ["## Where it was measured", notes(entries)]
    return "\n".join(parts)


FIGURES = {  # ending of the file: what it shows
    "iqm": "IQM of the scores and probability of improvement",
    "profiles": "Performance profiles: share of seeds and tasks above a score",
    "efficiency": "Sample efficiency: IQM of the scores during training",
}


def figure_path(study: str, algorithm: str, name: str, folder: Path) -> Path:
    return folder / f"{study}-{algorithm}-{name}.png"


# --- The page ------------------------------------------------------------------------------------


def row_of(setting: Setting) -> dict:
    """What the page knows of a setting."""
    row = {name: getattr(setting, name) for name in ("study", "task", "script", "memory")}
    row |= {"algorithm": setting.algorithm, "command": setting.command, "missing": True}
    if setting.entry is None:
        return row
    values = setting.values
    steps, returns = setting.curve()
    curve = np.array([mean_with_interval(column) for column in returns.T]).T
    seconds = setting.seconds(steps)
    mean, low, high = mean_with_interval(setting.returns)
    scores = mean_with_interval(setting.scores)
    return row | {
        "missing": False,
        "mean": mean,
        "low": low,
        "high": high,
        "median": float(np.median(setting.returns)),
        "worst": float(setting.returns.min()),
        "mmer": setting.mmer,
        "score": scores[0],
        "score_low": scores[1],
        "score_high": scores[2],
        "returns": values["returns"],
        "mmers": values["mmer"],
        "seeds": values["num_seeds"],
        "steps": values["steps"],
        "parameters": values.get("num_params"),
        "rate": values.get("learning_rate"),
        "speed": setting.costs.get("steps_per_second"),
        "seconds": setting.costs.get("seconds"),
        "solved": bool(setting.returns.min() >= SOLVED),
        "curve": {
            "steps": steps.tolist(),
            "seconds": None if seconds is None else seconds.round(2).tolist(),
            **dict(zip(("mean", "low", "high"), curve.round(4).tolist(), strict=True)),
        },
        "origin": origin(setting.entry),
        "cost_origin": origin(setting.cost) if setting.cost else None,
    }


def origin(entry: dict) -> dict:
    """Where a number comes from."""
    kept = ("command", "commit", "dirty", "date", "machine", "versions")
    path = entry["path"].relative_to(results.RESULTS).as_posix()
    return {name: entry[name] for name in kept} | {"file": f"benchmark/results/{path}"}


def aggregate_of(comparison: Comparison, memory: str, own: dict | None) -> dict:
    """What the page knows of a memory on all tasks together."""
    tasks = comparison.common_tasks
    about = {
        "study": comparison.study,
        "algorithm": comparison.algorithm,
        "memory": memory,
        "tasks": tasks,
        "lacks": [task for task in tasks if not comparison.has(task, memory)],
        "command": f"python benchmark/report.py {comparison.study}",
    }
    for name in ("iqm", "better"):
        known = own and name in own
        about[name] = [float(x[0]) for x in own[name]] if known else None
    return about


def recall_rows() -> list[dict]:
    """The supervised tasks of recall.py, by memory in the order of `memory_cells`."""
    known = [memory for memory in CELLS if results.exists(f"recall/{memory}")]
    entries = [results.load(f"recall/{memory}") for memory in known]
    return [
        {"memory": memory, "tasks": entry["values"]["tasks"], "origin": origin(entry)}
        for memory, entry in zip(known, entries, strict=True)
    ]


def page(settings: list[Setting], found: list) -> str:
    """The page, with plotly.js and all numbers in it.

    Args:
      found: pairs of a comparison and its statistics.

    Raises:
      UsageError: plotly is not installed.
    """
    from report_figures import LOOKS

    tasks = list(dict.fromkeys(setting.task for setting in settings))
    data = {
        "tasks": {task: title_of(task) for task in tasks},
        "bounds": {task: bounds(task) for task in tasks},
        "published": {task: learning.TASKS.get(task, {}).get("published", []) for task in tasks},
        "rows": [row_of(setting) for setting in settings],
        "aggregates": [
            aggregate_of(comparison, memory, own.get(memory))
            for comparison, own in found
            for memory in comparison.memories
        ],
        "recall": recall_rows(),
        "memories": [m for m in CELLS if any(m == setting.memory for setting in settings)],
        "looks": LOOKS,
        "reference": REFERENCE,
        "solved": SOLVED,
    }
    plotly = import_optional("plotly.offline", "report.py").get_plotlyjs()
    as_text = json.dumps(data, allow_nan=False, sort_keys=True).replace("</", "<\\/")
    parts = {"PLOTLY": plotly, "DATA": as_text}
    return re.sub(r"/\* (PLOTLY|DATA) \*/", lambda match: parts[match[1]], TEMPLATE.read_text())


# --- The command ---------------------------------------------------------------------------------


def folder() -> Path:
    """Where the documents and figures are: beside the results."""
    return results.RESULTS.parent / "studies"


def update(names: list[str], check: bool, page_path: Path) -> list[str]:
    """Write all that the report has, or only look; the documents that differ, in words.

    Raises:
      NoResult: a study has no results, or a file is damaged.
      UsageError: a library is missing.
    """
    known = studies()
    for name in names:
        if name not in known:
            advice = f"`python benchmark/study.py {name}` writes them"
            raise NoResult(f"the study {name} has no results: {advice}")
    if not known:
        raise NoResult("no study has results: `python benchmark/study.py small` writes some")
    settings = {study: read(study) for study in names or known}
    found = {}
    differing = []
    for study, own in settings.items():
        found[study] = [(x, statistics(x, with_curves=not check)) for x in comparisons(own)]
        path = folder() / f"{study}.md"
        text = document(study, found[study], folder())
        if not path.exists() or path.read_text() != text:
            differing.append(f"benchmark/studies/{path.name}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if not check:
        draw(found)
        pairs = [pair for own in found.values() for pair in own]
        page_path.parent.mkdir(parents=True, exist_ok=True)
        page_path.write_text(page([s for own in settings.values() for s in own], pairs))
    return differing


def draw(found: dict) -> None:
    """Draw the figures of every study."""
    import report_figures

    for study, own in found.items():
        for comparison, statistics_ in own:
            if statistics_:
                paths = {
                    name: figure_path(study, comparison.algorithm, name, folder())
                    for name in FIGURES
                }
                report_figures.draw_all(statistics_, REFERENCE, THRESHOLDS, SHARES, paths)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", help="studies with results; all if none is given")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page")
    args = parser.parse_args()
    try:
        differing = update(args.studies, args.check, args.page)
    except (NoResult, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    for name in differing:
        print(f"{name} {'does not show what the files say' if args.check else 'was rewritten'}")
    if not args.check:
        print(f"page: {args.page}")
    sys.exit(1 if args.check and differing else 0)


if __name__ == "__main__":
    main()
