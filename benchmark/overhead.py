"""What logging costs: the same training with different loggers, taking turns in one process; and what a start costs.

    python benchmark/overhead.py             # in a terminal, for the dashboard to be one
    python benchmark/overhead.py --rounds 30

PPO on CartPole, the fastest there is here, so that logging weighs most. A round trains 100 updates (204,800 steps, ten
reports) with every set of loggers, in changing order, closing included: background threads have finished. The run has
1,000 reports behind it, which the dashboard draws. The start is that of
`algorithms/rppo.py`, from the shell to the end of its first update, without and with a filled compilation cache.
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

LOGGERS = {"none": (), "console file tensorboard": ("console", "file", "tensorboard"), "dashboard": ("dashboard",)}
ROOT = Path(__file__).parent.parent
RECORD = {"time": 0.0, "charts/episodic_return": [1.0], "eval/episodic_return": [1.0], "charts/SPS": 1.0}
PAST = "".join(json.dumps({"step": step} | RECORD) + "\n" for step in range(1000))


def overhead(rounds):
    """Seconds of every round, by loggers: {name: (rounds,)}."""
    from dataclasses import replace

    from algorithms import ppo
    from experiment import seed_keys
    from loggers import Logger, make_logger

    config = ppo.Config()
    state, env = ppo.init(config, seed_keys(config)), config.make_env()
    state = ppo.warmup(state, env, Logger())
    seconds = {name: [] for name in LOGGERS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            names = list(LOGGERS)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                run_dir, backends = Path(folder) / f"{name.replace(' ', '-')}-{turn}", LOGGERS[name]
                run_dir.mkdir()
                about = {"script": "ppo", "final_step": config.total_steps, "config": {}}
                (run_dir / "config.json").write_text(json.dumps(about))
                (run_dir / "metrics.jsonl").write_text(PAST)
                logger = make_logger(replace(config, log=backends), run_dir)
                began = time.perf_counter()
                state, _ = ppo.train(state, env, logger, 100 * config.steps_per_update)
                logger.close()
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(times[1:]) for name, times in seconds.items()}


def start(cache):
    """Seconds until a new process has done its first update."""
    command = [sys.executable, str(ROOT / "algorithms" / "rppo.py"), "--log-every", "1", "--compilation-cache", cache]
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    seconds = overhead(args.rounds)
    if not sys.stdout.isatty():
        seconds.pop("dashboard")
        print("standard output is not a terminal: no dashboard", file=sys.stderr)
    starts = {"first start": [], "second start": []}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            for times in starts.values():
                times.append(start(cache))
    print(f"\n| loggers | seconds, median of {args.rounds} | overhead, median over rounds |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {np.median(times):.3f} | {np.median(times / seconds['none']) - 1:+.1%} |")
    print("\n| rppo.py, to the end of the first update | seconds, median of 3 |\n|---|---|")
    for name, times in starts.items():
        print(f"| {name} | {np.median(times):.1f} |")


if __name__ == "__main__":
    main()
