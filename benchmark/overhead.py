"""The cost of logging and of a start.

    python benchmark/overhead.py             # in a terminal, which the dashboard needs
    python benchmark/overhead.py --rounds 30

Logging is measured on PPO on CartPole, the fastest training here, where it weighs most. A round
trains 100 updates (204,800 steps, ten reports) with every set of loggers, in changing order. Its
time includes closing the loggers, which waits for their threads. The run begins with 1,000 reports
in its file, which the dashboard draws.

The start is that of `algorithms/rppo.py`, from the shell to the end of its first update, first with
an empty and then with a filled compilation cache. Both are written to benchmark/results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import results

from harness.metrics import GREEDY

LOGGERS = {
    "none": (),
    "console file tensorboard": ("console", "file", "tensorboard"),
    "dashboard": ("dashboard",),
}
UPDATES = 100  # of a round
REPEATS = 3  # of the start
ROOT = Path(__file__).parent.parent
RECORD = {
    "time": 0.0,
    "charts/episodic_return": [1.0],
    GREEDY: [1.0],
    "charts/SPS": 1.0,
}
PAST = "".join(json.dumps({"step": step} | RECORD) + "\n" for step in range(1000))


def overhead(rounds):
    """Seconds of every round, by loggers: {name: (rounds,)}; environment steps of a round."""
    from dataclasses import replace

    from algorithms import ppo
    from experiment import seed_keys
    from loggers import Logger, make_logger

    config = ppo.Config()
    env = config.make_env()
    state = ppo.init(config, seed_keys(config))
    state = ppo.warmup(state, env, Logger())
    steps = UPDATES * config.steps_per_update
    seconds = {name: [] for name in LOGGERS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            names = list(LOGGERS)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                run_dir = Path(folder) / f"{name.replace(' ', '-')}-{turn}"
                run_dir.mkdir()
                about = {"script": "ppo", "final_step": config.total_steps, "config": {}}
                (run_dir / "config.json").write_text(json.dumps(about))
                (run_dir / "metrics.jsonl").write_text(PAST)
                logger = make_logger(replace(config, log=LOGGERS[name]), run_dir)
                began = time.perf_counter()
                state, _ = ppo.train(state, env, logger, steps)
                logger.close()
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(times[1:]) for name, times in seconds.items()}, steps


def start(cache):
    """Seconds until a new process has done its first update."""
    command = [
        sys.executable,
        str(ROOT / "algorithms" / "rppo.py"),
        "--log-every",
        "1",
        "--compilation-cache",
        cache,
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
        }
        command += ["--log", "console", "--run-dir", f"{folder}/run"]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for line in process.stdout:
            if "%" in line:
                break
        seconds = time.perf_counter() - began
        process.kill()
        process.communicate()
    return seconds


def cost(seconds, steps):
    """Median seconds of a round and the overhead of every set of loggers, as a result file."""
    plain = seconds["none"]
    loggers = {}
    for name, times in seconds.items():
        over = np.median(times / plain) - 1
        loggers[name] = {"seconds": np.median(times).round(4), "overhead": over.round(4)}
    return {
        "steps_per_second": round(steps / np.median(plain)),
        "rounds": len(plain),
        "loggers": loggers,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    seconds, steps = overhead(args.rounds)
    if not sys.stdout.isatty():
        seconds.pop("dashboard")
        print("standard output is not a terminal: no dashboard", file=sys.stderr)
    starts = {"first start": [], "second start": []}
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as cache:
            for times in starts.values():
                times.append(start(cache))
    values = cost(seconds, steps)
    print(f"\n| loggers | seconds, median of {args.rounds} | overhead, median over rounds |")
    print("|---|---|---|")
    for name, own in values["loggers"].items():
        print(f"| {name} | {own['seconds']:.3f} | {own['overhead']:+.1%} |")
    print(
        f"\n| rppo.py, to the end of the first update | seconds, median of {REPEATS} |\n|---|---|"
    )
    for name, times in starts.items():
        print(f"| {name} | {np.median(times):.1f} |")
    first, second = (np.median(times).round(2) for times in starts.values())
    started = {"first_start_seconds": first, "second_start_seconds": second, "repeats": REPEATS}
    results.record("overhead/loggers", values, results.this_command())
    results.record("overhead/start", started, results.this_command())


if __name__ == "__main__":
    main()
