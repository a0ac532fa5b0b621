"""Trains the agents of tasks.toml, writes their result files, draws the learning curves.

    python benchmark/learning.py --list                   # every command, and whether it is done
    python benchmark/learning.py                          # train all that is missing
    python benchmark/learning.py pendulum memorychain-10  # only names that contain one of these
    python benchmark/learning.py hopper/sac-300k --again  # also if it is done
    python benchmark/learning.py --memories               # every memory on MemoryChain, three seeds
    python benchmark/learning.py --figure                 # draw benchmark/learning.png

A run lies under runs, where its result lies under benchmark/results. One that was interrupted goes
on from its last checkpoint. If the code or the command has changed since, its directory is renamed
and a new run starts. An agent is done if benchmark/results has its result file and the file is of
the same command. After a change of a script or of its defaults, use --again.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import results

from harness.history import load
from harness.metrics import GREEDY, RETURN
from harness.options import read_words
from harness.run_dir import CHECKPOINTS_FOLDER, is_running
from memory_cells import CELLS

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs"
TASKS = tomllib.loads((Path(__file__).parent / "tasks.toml").read_text())
SUMMARIES = {"worst": np.min, "median": np.median, "mean": np.mean}  # of the seeds' returns
COLORS = {"PPO": "C0", "PQN": "C2", "DQN": "C1", "SAC": "C3", "SACD": "C3"}
REFUSED = 2  # exit code of a script that does not start, as where it may not resume
POINTS = 50  # at most so many of a curve are kept in a result file


@dataclass(frozen=True)
class Agent:
    """One script with its options on one task.

    Attributes:
      task: key of tasks.toml.
      name: script, then what tells it from the task's other agents.
      result: name of its result file, and of its run's directory.
      options: of the agent alone; those of the task come before them.
      figure: its label in the figure; empty if it is not drawn.
      goal: what it must reach, such as "worst 450"; empty if nothing.
      runs: the folder of its run; `RUNS` if empty.
    """

    task: str
    name: str
    result: str
    steps: int
    seeds: int
    options: str = ""
    eval_every: int = 25_000
    figure: str = ""
    goal: str = ""
    runs: str = ""

    @property
    def id(self):
        return f"{self.task}/{self.name}"

    @property
    def script(self):
        return f"{self.name.partition('-')[0]}.py"

    @property
    def command(self):
        words = ["python", f"algorithms/{self.script}", TASKS[self.task]["options"], self.options]
        words += ["--total-steps", f"{self.steps:_}", "--num-seeds", str(self.seeds)]
        words += ["--eval-every", f"{self.eval_every:_}"]
        return " ".join(filter(None, words))

    @property
    def run_dir(self):
        return Path(self.runs or RUNS) / self.result


def agents():
    """Those of tasks.toml, in its order."""
    return [
        Agent(task, name, f"learning/{task}/{name}", **values)
        for task, about in TASKS.items()
        for name, values in about.get("runs", {}).items()
    ]


def memories():
    """One agent per memory; 64 units in one torso, so that all are done in an hour or two."""
    options = "--cell {} --hidden-size 64 --shared-torso"
    return [
        Agent(
            "memorychain-10",
            f"rppo-{cell}",
            f"memory-chain/{cell}",
            300_000,
            3,
            options.format(cell),
        )
        for cell in CELLS
        if cell != "none"
    ]


def find(id):
    """The agent that is called that."""
    return next(agent for agent in agents() if agent.id == id)


# --- Runs --------------------------------------------------------------------------------------


def config_class_of(agent):
    """The Config of its script."""
    return importlib.import_module(f"algorithms.{Path(agent.script).stem}").Config


def config_of(agent):
    """The options that its command gives, all others with the defaults of today."""
    return read_words(agent.command.split()[2:], config_class_of(agent), {})


def has_run(agent):
    """True if its run directory is of a run with the options of its command."""
    if not (agent.run_dir / "config.json").exists():
        return False
    saved = json.loads((agent.run_dir / "config.json").read_text())["config"]
    wanted = json.loads(json.dumps(config_of(agent)))
    may_differ = ("run_dir", "log")
    return all(saved.get(name) == value for name, value in wanted.items() if name not in may_differ)


def set_aside(agent):
    """Make room for a new run. The old directory gets another name: nothing is deleted."""
    if not agent.run_dir.exists():
        return
    if is_running(agent.run_dir):
        sys.exit(f"error: {agent.run_dir} is in use by another process")
    results.set_aside(agent.run_dir)


def train(agent, start=subprocess.call):
    """Train from the last checkpoint, or else from the start.

    Args:
      start: runs a command and returns its exit code.

    Returns:
      The exit code of the script.
    """
    script = [sys.executable, str(ROOT / "algorithms" / agent.script)]
    status = REFUSED
    if has_run(agent):
        status = start([*script, "--resume", str(agent.run_dir)])
    if status == REFUSED:
        set_aside(agent)
        options = agent.command.split()[2:]
        status = start([*script, *options, "--run-dir", str(agent.run_dir)])
    return status


def is_complete(agent):
    """True if its run directory has a run of its command that reached its last step.

    The checkpoint of that step is the last thing that a run writes.
    """
    if not has_run(agent):
        return False
    final = load(agent.run_dir, read=False).about["final_step"]
    return (agent.run_dir / CHECKPOINTS_FOLDER / f"{final}.json").exists()


def is_done(agent):
    """True if there is a result file of this very command."""
    return results.exists(agent.result) and results.load(agent.result)["command"] == agent.command


def series(history, metric):
    """Steps (R,) and values (R, seeds) of a metric; nan where a seed has none."""
    steps, values = zip(*history.series[metric], strict=True)
    return np.array(steps), np.array(values)


def thinned(steps, returns):
    """A curve of at most `POINTS` points, the last among them, as a result file keeps it."""
    stride = -(-len(steps) // POINTS)
    chosen = slice((len(steps) - 1) % stride, None, stride)
    return {"steps": steps[chosen], "returns": returns[chosen].T.round(3)}


def outcome(history):
    """What the agents of a complete run have learned; no number depends on the machine's speed.

    Returns are listed by seed; curves are one list per seed.
    """
    steps, returns = series(history, GREEDY)
    final = returns[-1]
    _, training_returns = series(history, RETURN)
    return {
        "steps": steps[-1],
        "num_seeds": len(final),
        "median": np.median(final).round(4),
        "worst": final.min().round(4),
        "returns": final.round(4),
        "mmer": np.nanmax(training_returns, axis=0).round(4),
        "curve": thinned(steps, returns),
    }


def cost(history):
    """How long a complete run took, and how fast it was."""
    seconds, _ = history.clock[-1]
    speed = round(np.median(history.values("charts/SPS")))
    return {"seconds": seconds, "steps_per_second": speed}


def measured(agent):
    """The values of a complete run."""
    history = load(agent.run_dir)
    return outcome(history) | cost(history)


def record(agent):
    about = json.loads((agent.run_dir / "config.json").read_text())
    results.record(agent.result, measured(agent), agent.command, **results.of_run(about))


# --- Reports -----------------------------------------------------------------------------------


def reached(agent):
    """Whether a result meets its goal: "reached", "missed", or empty without a goal."""
    if not agent.goal:
        return ""
    summary, _, goal = agent.goal.partition(" ")
    value = SUMMARIES[summary](results.load(agent.result)["values"]["returns"])
    return "reached" if value >= float(goal) else "missed"


def describe(agent):
    """One line: what it is called, and how it stands."""
    if not results.exists(agent.result):
        return f"{agent.id}: not trained"
    values = results.load(agent.result)["values"]
    words = [f"{agent.id}: median {values['median']:.6g}, worst {values['worst']:.6g}"]
    if agent.goal and values["returns"]:
        words.append(f"goal {agent.goal} {reached(agent)}")
    if not is_done(agent):
        words.append("of an older command")
    return ", ".join(words)


def style(label):
    """Of a curve: the colour says the algorithm, dotted lines have no memory.

    Twins with and without memory share a colour. Curves of memories other than the GRU are
    fainter.
    """
    script, _, cell = label.partition(", ")
    has_memory = cell not in ("", "no memory")
    plain = script if script in COLORS else script.replace("DR", "D").removeprefix("R")
    return {
        "color": COLORS[plain],
        "ls": "-" if has_memory else ":",
        "alpha": 1.0 if cell in ("", "GRU", "no memory") else 0.5,
    }


def draw(path):
    """The figure of all agents that have a label and a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    for agent in agents():
        if agent.figure:
            panels.setdefault(agent.task, []).append(agent)
    size = (1.9 * len(panels), 6.8)
    figure, axes = plt.subplots(2, len(panels) // 2, figsize=size, layout="constrained")
    for axis, (task, drawn) in zip(axes.flat, panels.items(), strict=True):
        for agent in drawn:
            curve = results.load(agent.result)["values"]["curve"]
            if curve is None:
                print(f"{agent.id} has no curve: its numbers were transcribed")
                continue
            steps = np.array(curve["steps"]) / 1e3
            returns = np.array(curve["returns"], float)
            look = style(agent.figure)
            axis.plot(steps, np.median(returns, axis=0), label=agent.figure, **look)
            low = returns.min(axis=0)
            high = returns.max(axis=0)
            axis.fill_between(steps, low, high, alpha=0.1, color=look["color"], lw=0)
        axis.set(title=TASKS[task]["title"], xlabel="thousand environment steps")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=9, framealpha=0.8, edgecolor="none")
    for axis in axes[:, 0]:
        axis.set_ylabel("greedy return\nmedian, min and max of the seeds")
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="only agents whose task/name contains one of these"
    )
    parser.add_argument("--list", action="store_true", help="train nothing, print the commands")
    parser.add_argument("--again", action="store_true", help="also train what is done")
    parser.add_argument(
        "--memories", action="store_true", help="every memory on MemoryChain instead"
    )
    parser.add_argument("--figure", action="store_true", help="train nothing, draw the figure")
    args = parser.parse_args()
    if args.figure:
        return draw(ROOT / "benchmark" / "learning.png")
    known = memories() if args.memories else agents()
    chosen = [agent for agent in known if not args.names or any(n in agent.id for n in args.names)]
    if not chosen:
        parser.error(f"no agent is called {' or '.join(args.names)}; --list shows all")
    for agent in chosen:
        if args.list:
            print(f"{describe(agent)}\n    {agent.command}")
            continue
        if args.again or not is_done(agent):
            if args.again:
                set_aside(agent)
            if not is_complete(agent) and (status := train(agent)):
                sys.exit(status)
            record(agent)
        print(describe(agent))


if __name__ == "__main__":
    main()
