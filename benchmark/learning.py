"""The learning results of the README: runs their commands, writes result files, draws the curves.

    python benchmark/learning.py            # train what is missing under runs/learning, then report
    python benchmark/learning.py --report   # report what is there
    python benchmark/learning.py --more     # also the commands that are not in the figure
    python benchmark/learning.py --cells    # instead: every memory on MemoryChain, three seeds
    python benchmark/learning.py --only "sac.py --env gymnax"    # only commands that contain this

After a change of a script or of its defaults, delete its runs. Each run is the command shown, with
--num-seeds, --eval-every 25_000 and its own --run-dir. Every complete run is written to
benchmark/results. The figure takes the curves of commands without a run from there.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import results

from harness.dashboard import load
from harness.metrics import GREEDY
from memory_cells import CELLS

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "learning"
CARTPOLE = "--env gymnax::CartPole-v1"
ACROBOT = "--env gymnax::Acrobot-v1"
PENDULUM = "--env gymnax::Pendulum-v1"
MASK = "--mask velocity"
GRU = "--mask velocity --cell gru"
MEMORY_CHAIN = "--env gymnax::MemoryChain-bsuite --env-kwargs memory_length"
CHAIN = f"{MEMORY_CHAIN} 10 --total-steps"

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
        "PQN": f"pqn.py {CARTPOLE} {MASK}",
        "DQN": f"dqn.py {CARTPOLE} {MASK}",
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
        "PPO": f"ppo_continuous.py {PENDULUM} --total-steps 300_000 {MASK}",
        "SAC": f"sac.py {PENDULUM} {MASK}",
        "RPPO, GRU": f"rppo_continuous.py {PENDULUM} --total-steps 1_000_000 {GRU}",
        "RSAC, GRU": f"rsac.py {PENDULUM} {GRU}",
    },
}
MINATAR = "pqn.py --env gymnax::Breakout-MinAtar --total-steps"
MINATAR_OPTIONS = (
    "--num-envs 128 --num-steps 32 --num-minibatches 32 --update-epochs 2 --learning-rate 5e-4 "
    "--exploration-fraction 0.1 --q-lambda 0.65"
)
POPGYM = "--env popjaxrl::"
FOUR_ENVS = "--num-envs 4 --gradient-steps 4"
NORMALIZED = "--env-kwargs normalize_obs True normalize_reward True"
MORE = {  # what the table has besides: {command: seeds}
    f"ppo.py {POPGYM}RepeatFirstEasy --total-steps 1_000_000": 3,
    f"ppo.py {POPGYM}StatelessCartPoleEasy --total-steps 1_000_000": 3,
    f"rppo.py {POPGYM}RepeatFirstEasy --cell gru --total-steps 1_000_000": 3,
    f"rppo.py {POPGYM}StatelessCartPoleEasy --cell gru --total-steps 1_000_000": 3,
    "ppo_continuous.py --env gymnax::MountainCarContinuous-v0 --total-steps 300_000": 3,
    f"{MINATAR} 2_000_000 {MINATAR_OPTIONS}": 3,
    f"{MINATAR} 10_000_000 {MINATAR_OPTIONS}": 3,  # minutes on a GPU, hours on a CPU
    f"rpqn.py {MEMORY_CHAIN} 100 --total-steps 500_000 --cell gru": 3,
    f"sac.py --env brax::inverted_pendulum --total-steps 20_000 {FOUR_ENVS}": 1,
    f"sac.py --env mujoco::HalfCheetah-v4 --total-steps 300_000 {FOUR_ENVS}": 1,
    f"sac.py --env mujoco::Hopper-v4 --total-steps 300_000 {FOUR_ENVS}": 1,
    f"drqn.py {CARTPOLE} {GRU} --total-steps 500_000 --prioritized": 5,
    f"dqn.py {CARTPOLE} {NORMALIZED}": 3,
    f"drqn.py {CARTPOLE} {GRU} --total-steps 500_000 {NORMALIZED}": 3,
    f"sac.py {PENDULUM} {NORMALIZED}": 3,
    f"rsac.py {PENDULUM} {GRU} {NORMALIZED}": 3,
    f"sacd.py {CARTPOLE} {NORMALIZED}": 3,
    f"rsacd.py {CARTPOLE} {GRU} {NORMALIZED}": 3,
}
ORDER = (  # of the scripts in tables
    "ppo.py",
    "rppo.py",
    "ppo_continuous.py",
    "rppo_continuous.py",
    "dqn.py",
    "drqn.py",
    "pqn.py",
    "rpqn.py",
    "sac.py",
    "rsac.py",
    "sacd.py",
    "rsacd.py",
)
# every memory; hidden size 64 in one torso, so that all of them are done in an hour or two
CELL_COMMANDS = {
    cell: f"rppo.py {CHAIN} 300_000 --cell {cell} --hidden-size 64 --shared-torso"
    for cell in CELLS
    if cell != "none"
}
COLORS = {"PPO": "C0", "PQN": "C2", "DQN": "C1", "SAC": "C3", "SACD": "C3"}
POINTS = 50  # at most so many of a curve are kept in a result file


# --- Commands ----------------------------------------------------------------------------------


def figure_commands():
    return [command for commands in RESULTS.values() for command in commands.values()]


def all_commands():
    """The commands of the table, the scripts in the order of `ORDER`."""
    commands = [*figure_commands(), *MORE]
    return sorted(commands, key=lambda command: ORDER.index(command.split()[0]))


def seeds_of(command):
    if command in CELL_COMMANDS.values():
        return 3
    return MORE.get(command, 3 if "sac" in command else 5)  # SAC takes ten times as long


def run_dir(command):
    return RUNS / command.replace("--", "").replace("::", "-").replace(" ", "_").replace(".py", "")


def result_name(command):
    """The name of a command's result file."""
    for cell, cell_command in CELL_COMMANDS.items():
        if command == cell_command:
            return f"memory-chain/{cell}"
    words = command.replace(".py --env", "").replace("--", "")
    return f"learning/{results.slug(words)}"


# --- Runs --------------------------------------------------------------------------------------


def extra_options(command):
    return ["--num-seeds", str(seeds_of(command)), "--eval-every", "25_000"]


def train(command):
    shutil.rmtree(run_dir(command), ignore_errors=True)  # what an interrupted run left
    script, *options = command.split()
    options += [*extra_options(command), "--run-dir", str(run_dir(command))]
    subprocess.run([sys.executable, str(ROOT / "algorithms" / script), *options], check=True)


def is_complete(command):
    if not (run_dir(command) / "config.json").exists():
        return False
    run = load(run_dir(command))
    return run.step >= run.about["final_step"]


def records_of(command):
    lines = (run_dir(command) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def evaluations(command):
    """Steps (E,) and greedy returns (E, seeds) of a run's evaluations; nan for a diverged seed."""
    points = [(r["step"], r[GREEDY]) for r in records_of(command) if GREEDY in r]
    steps, returns = zip(*points, strict=True)
    return np.array(steps), np.array(returns, float)


def thinned(steps, returns):
    """A curve of at most `POINTS` points, the last among them, as a result file keeps it."""
    stride = -(-len(steps) // POINTS)
    chosen = slice((len(steps) - 1) % stride, None, stride)
    return {"steps": steps[chosen], "returns": returns[chosen].T.round(3)}


def measured(command):
    """The values of a complete run. Returns are listed by seed; curves are one list per seed."""
    steps, returns = evaluations(command)
    final = returns[-1]
    return {
        "steps": steps[-1],
        "num_seeds": len(final),
        "median": np.median(final).round(4),
        "worst": final.min().round(4),
        "returns": final.round(4),
        "curve": thinned(steps, returns),
        "seconds": records_of(command)[-1]["time"],
        "steps_per_second": round(np.median(load(run_dir(command)).values("charts/SPS"))),
    }


def record(command):
    about = json.loads((run_dir(command) / "config.json").read_text())
    shown = " ".join(["python", f"algorithms/{command}", *extra_options(command)])
    results.record(result_name(command), measured(command), shown, **results.of_run(about))


def curve(command):
    """Steps and returns (E, seeds), of the run or else of the result file; None in neither."""
    if is_complete(command):
        return evaluations(command)
    if not results.exists(result_name(command)):
        return None
    saved = results.load(result_name(command))["values"]["curve"]
    return saved and (np.array(saved["steps"]), np.array(saved["returns"], float).T)


# --- Reports -----------------------------------------------------------------------------------


def report(commands):
    print("| command | steps | median | the seeds | steps per second |\n|---|---|---|---|---|")
    for command in filter(is_complete, commands):
        record(command)
        values = measured(command)
        seeds = ", ".join(f"{value:.2f}" for value in sorted(values["returns"]))
        speed = f"{values['steps_per_second']:,.0f}"
        cells = (f"`{command}`", f"{values['steps']:,}", f"{values['median']:.2f}", seeds, speed)
        print(f"| {' | '.join(cells)} |")


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


def draw(curves, path):
    """The figure from {command: (steps, returns)}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.9 * len(RESULTS), 6.8)
    figure, axes = plt.subplots(2, len(RESULTS) // 2, figsize=size, layout="constrained")
    for axis, (title, commands) in zip(axes.flat, RESULTS.items(), strict=True):
        for label, command in commands.items():
            steps, returns = curves[command]
            look = style(label)
            axis.plot(steps / 1e3, np.median(returns, axis=1), label=label, **look)
            low = returns.min(axis=1)
            high = returns.max(axis=1)
            axis.fill_between(steps / 1e3, low, high, alpha=0.1, color=look["color"], lw=0)
        axis.set(title=title, xlabel="thousand environment steps")
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
    parser.add_argument("--report", action="store_true", help="do not train")
    parser.add_argument("--more", action="store_true", help="also what is not in the figure")
    parser.add_argument("--cells", action="store_true", help="every memory on MemoryChain instead")
    parser.add_argument("--only", default="", help="only commands that contain this")
    args = parser.parse_args()
    if args.cells:
        commands = list(CELL_COMMANDS.values())
    else:
        commands = all_commands() if args.more or args.report else figure_commands()
    commands = [command for command in commands if args.only in command]
    for command in commands:
        if not args.report and not is_complete(command):
            train(command)
    report(commands)
    if args.cells:
        return
    curves = {command: curve(command) for command in figure_commands()}
    missing = [command for command, points in curves.items() if points is None]
    if missing:
        return print(f"no figure: {len(missing)} curves are missing, as that of {missing[0]}")
    draw(curves, ROOT / "benchmark" / "learning.png")


if __name__ == "__main__":
    main()
