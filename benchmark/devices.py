"""Training speed on several devices of one CPU, against one device.

    python benchmark/devices.py
    python benchmark/devices.py --only "1 seed" --devices 1 2 --rounds 9

Every system on every number of devices is a process of its own. They compile, then train in turn,
one at a time, for several rounds. The ratio of a round is the speed on several devices over that
on one, in the same round; its median, least and greatest are written to benchmark/results.
"""

import argparse
import statistics
import sys
import time

import results
from throughput import ours, take_turns, timed_rounds

LARGE = {"cell": "gru", "num_envs": 64, "num_steps": 128}
SMALL = {"cell": "gru", "num_envs": 16, "num_steps": 128}
SYSTEMS = {  # name: (script, fields of its config, updates of a round)
    "rppo, defaults, 4 seeds": ("rppo", {"num_seeds": 4}, 3),
    "ppo, defaults, 4 seeds": ("ppo", {"num_seeds": 4}, 40),
    "dqn, defaults, 4 seeds": ("dqn", {"num_seeds": 4}, 1500),
    "drqn, defaults, 4 seeds": ("drqn", {"num_seeds": 4}, 60),
    "rsac, defaults, 4 seeds": ("rsac", {"num_seeds": 4}, 20),
    "rppo, shared torso, 64 x 128, 1 seed": ("rppo", LARGE | {"shared_torso": True}, 6),
    "rppo, two torsos, 64 x 128, 1 seed": ("rppo", LARGE, 4),
    "rppo, two torsos, 16 x 128, 1 seed": ("rppo", SMALL, 10),
    "rpqn, defaults, 1 seed": ("rpqn", {}, 20),
    "rppo, defaults, 3 seeds": ("rppo", {"num_seeds": 3}, 4),
    "rppo, defaults, 5 seeds": ("rppo", {"num_seeds": 5}, 3),
    "ppo, defaults, 5 seeds": ("ppo", {"num_seeds": 5}, 40),
    "dqn, defaults, 5 seeds": ("dqn", {"num_seeds": 5}, 1500),
}


def worker(name, num_devices):
    """Compile, then run one round per line of standard input."""
    script, fields, updates = SYSTEMS[name]
    timed_rounds(lambda: ours(script, num_devices=num_devices, **fields), updates)


def record(name, speeds, started):
    """Write the result file of a system; `speeds`: number of devices -> steps per second."""
    one, *others = speeds
    values = {
        "system": name,
        "devices": list(speeds),
        "steps_per_second": [round(statistics.median(x)) for x in speeds.values()],
        "compile_seconds": [round(started[count]["compile"], 2) for count in speeds],
        "ratios": {},
        "rounds": len(speeds[one]),
    }
    for count in others:
        ratios = [x / y for x, y in zip(speeds[count], speeds[one], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        values["ratios"][str(count)] = [round(x, 3) for x in (middle, low, high)]
        print(f"{name:<42} {count} devices / {one}: {middle:.2f} ({low:.2f} to {high:.2f})")
    speeds_now = ", ".join(f"{speed:,}" for speed in values["steps_per_second"])
    print(f"{'':<42} steps/s {speeds_now}; compile s {values['compile_seconds']}", flush=True)
    own = {key: started[one][key] for key in ("machine", "versions")}
    results.record(f"devices/{results.slug(name)}", values, results.this_command(), **own)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only systems whose name contains this")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, count = args.worker
        return worker(name, int(count))

    for name in SYSTEMS:
        if args.only not in name:
            continue
        command = [sys.executable, __file__, "--worker", name]
        commands = {f"{name}, on {count}": [*command, str(count)] for count in args.devices}
        told = take_turns(commands, args.rounds)
        started, speeds = (dict(zip(args.devices, x.values(), strict=True)) for x in told)
        record(name, speeds, started)
        time.sleep(1)  # threads that wait for work spin for a moment


if __name__ == "__main__":
    main()
