"""The learning results of the README: runs every command of its table, prints the table, draws the curves.

    python benchmark/learning.py            # train what is missing under runs/learning, then report
    python benchmark/learning.py --report   # report what is there
    python benchmark/learning.py --cells    # the same for every memory on MemoryChain: a table, three seeds

After a change of a script or of its defaults, delete its runs.
Each run is the command shown, with --num-seeds 5 --eval-every 25000 and its own --run-dir.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from loggers import load
from memory_cells import CELLS

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "learning"
CARTPOLE, ACROBOT, PENDULUM = (f"--env gymnax::{id}" for id in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1"))
MASK, GRU = "--mask velocity", "--mask velocity --cell gru"
CHAIN = "--env gymnax::MemoryChain-bsuite --env-kwargs memory_length 10 --total-steps"

RESULTS = {  # panel of the figure: {label: command}
    "CartPole-v1": {
        "PPO": f"ppo.py {CARTPOLE}",
        "PQN": f"pqn.py {CARTPOLE}",
        "DQN": f"dqn.py {CARTPOLE}",
        "SACD": f"sacd.py {CARTPOLE}",
        "RPPO, GRU": f"rppo.py {CARTPOLE} --cell gru",
        "RPPO, LSTM": f"rppo.py {CARTPOLE} --cell lstm",
        "RPPO, sLSTM": f"rppo.py {CARTPOLE} --cell slstm",
    },
    "CartPole-v1, velocities hidden": {
        "PPO": f"ppo.py {CARTPOLE} {MASK}",
        "SACD": f"sacd.py {CARTPOLE} {MASK}",
        "RPPO, GRU": f"rppo.py {CARTPOLE} {GRU}",
        "RPQN, GRU": f"rpqn.py {CARTPOLE} {GRU}",
        "DRQN, GRU": f"drqn.py {CARTPOLE} {GRU} --total-steps 500_000",
        "RSACD, GRU": f"rsacd.py {CARTPOLE} {GRU}",
    },
    "MemoryChain, length 10": {
        "RPPO, no memory": f"rppo.py {CHAIN} 200_000 --cell none --no-prev-action",
        "RPPO, GRU": f"rppo.py {CHAIN} 200_000 --cell gru",
        "RPPO, sLSTM": f"rppo.py {CHAIN} 200_000 --cell slstm",
        "RPQN, GRU": f"rpqn.py {CHAIN} 300_000 --cell gru",
        "DRQN, GRU": f"drqn.py {CHAIN} 200_000 --cell gru",
        "RSACD, GRU": f"rsacd.py {CHAIN} 200_000 --cell gru",
    },
    "Acrobot-v1": {
        "PPO": f"ppo.py {ACROBOT}",
        "PQN": f"pqn.py {ACROBOT}",
        "DQN": f"dqn.py {ACROBOT} --total-steps 500_000",
    },
    "Pendulum-v1": {
        "PPO": f"ppo_continuous.py {PENDULUM} --total-steps 300_000",
        "SAC": f"sac.py {PENDULUM}",
    },
    "Pendulum-v1, velocity hidden": {
        "PPO": f"ppo_continuous.py {PENDULUM} {MASK} --total-steps 300_000",
        "SAC": f"sac.py {PENDULUM} {MASK}",
        "RPPO, GRU": f"rppo_continuous.py {PENDULUM} {GRU} --total-steps 1_000_000",
        "RSAC, GRU": f"rsac.py {PENDULUM} {GRU}",
    },
}
COLORS = {"PPO": "C0", "PQN": "C2", "DQN": "C1", "SAC": "C3", "SACD": "C3"}  # those with memory alike


def style(label):
    """Of a curve: the colour says the algorithm; without memory it is dotted, cells but the GRU are fainter."""
    script, _, cell = label.partition(", ")
    has_memory = cell not in ("", "no memory")
    color = COLORS[script if script in COLORS else script.replace("DR", "D").removeprefix("R")]
    return {"color": color, "ls": "-" if has_memory else ":", "alpha": 1.0 if cell in ("", "GRU", "no memory") else 0.5}


# every memory; hidden size 64 in one torso, so that all of them are done in an hour or two
MEMORY = "--env gymnax::MemoryChain-bsuite --env-kwargs memory_length 10 --total-steps 300_000"
CELL_COMMANDS = [f"rppo.py {MEMORY} --cell {cell} --hidden-size 64 --shared-torso" for cell in CELLS if cell != "none"]


def run_dir(command):
    return RUNS / command.replace("--", "").replace("::", "-").replace(" ", "_").replace(".py", "")


def train(command, num_seeds=5):
    shutil.rmtree(run_dir(command), ignore_errors=True)  # what an interrupted run left
    script, *args = command.split()
    extra = ["--num-seeds", str(num_seeds), "--eval-every", "25_000", "--run-dir", str(run_dir(command))]
    subprocess.run([sys.executable, str(ROOT / "algorithms" / script), *args, *extra], check=True)


def is_complete(command):
    if not (run_dir(command) / "config.json").exists():
        return False
    run = load(run_dir(command))
    return run.step >= run.about["final_step"]


def evaluations(command):
    """Steps (E,) and greedy returns (E, seeds) of a run's evaluations."""
    records = map(json.loads, (run_dir(command) / "metrics.jsonl").read_text().splitlines())
    points = [(r["step"], r["eval/episodic_return"]) for r in records if "eval/episodic_return" in r]
    steps, returns = zip(*points, strict=True)
    return np.array(steps), np.array(returns)


def report_cells():
    print(
        "| `--cell` | steps | greedy return, median of 3 seeds | the seeds | steps per second |\n|---|---|---|---|---|"
    )
    for command in filter(is_complete, CELL_COMMANDS):
        steps, returns = evaluations(command)
        speed = np.median(load(run_dir(command)).values("charts/SPS"))
        seeds = ", ".join(f"{value:.2f}" for value in sorted(returns[-1]))
        cell = command.split("--cell ")[1].split()[0]
        print(f"| `{cell}` | {steps[-1]:,} | {np.median(returns[-1]):.2f} | {seeds} | {speed:,.0f} |")


def all_commands():
    return [command for commands in RESULTS.values() for command in commands.values()]


def report():
    print("| command | steps | greedy return, median | the seeds |\n|---|---|---|---|")
    for command in filter(is_complete, all_commands()):
        steps, returns = evaluations(command)
        seeds = ", ".join(f"{value:.2f}" for value in sorted(returns[-1]))
        print(f"| `{command}` | {steps[-1]:,} | {np.median(returns[-1]):.2f} | {seeds} |")


def draw(path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(RESULTS) // 2, figsize=(1.9 * len(RESULTS), 6.8), layout="constrained")
    for axis, (title, commands) in zip(axes.flat, RESULTS.items(), strict=True):
        for label, command in commands.items():
            steps, returns = evaluations(command)
            axis.plot(steps / 1e3, np.median(returns, axis=1), label=label, **style(label))
            axis.fill_between(steps / 1e3, returns.min(1), returns.max(1), alpha=0.1, color=style(label)["color"], lw=0)
        axis.set(title=title, xlabel="thousand environment steps")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=9, framealpha=0.8, edgecolor="none")
    for axis in axes[:, 0]:
        axis.set_ylabel("greedy return\nmedian, min and max of the seeds")
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="do not train")
    parser.add_argument("--cells", action="store_true", help="every memory on MemoryChain instead")
    args = parser.parse_args()
    for command in CELL_COMMANDS if args.cells else all_commands():
        if not args.report and not is_complete(command):
            train(command, num_seeds=3 if args.cells else 5)
    if args.cells:
        return report_cells()
    report()
    if all(map(is_complete, all_commands())):
        draw(ROOT / "benchmark" / "learning.png")


if __name__ == "__main__":
    main()
