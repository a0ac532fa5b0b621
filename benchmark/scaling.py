"""Training speed and peak memory, against the size of one thing at a time.

    python benchmark/scaling.py                            # measure what is missing
    python benchmark/scaling.py --only environments seeds  # some curves
    python benchmark/scaling.py --figure                   # draw what has been measured

Every point of a training curve is a process of its own: it compiles, then trains for some rounds of
about --seconds each. Its memory is the greatest that the process had, with Python and the compiler
in it. The points of `memories` are passes over a sequence through one layer, forward and backward
(see cells.py), and their memory is what XLA sets aside for intermediate values.

Every curve is a file in benchmark/results/scaling, written after every process. Points that a file
of this commit and these settings has are not measured again, except with --again or while the code
has changes that are not committed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import results
from throughput import compile_seconds, ours, peak_mib

SIZES = {"hidden_size": 64}
STEPS = 8192  # of all environments together, where the length of a rollout varies
ENVIRONMENTS = SIZES | {"num_steps": 32, "num_devices": 1}
SHAPE = SIZES | {"num_envs": 16, "num_steps": 128}
LENGTHS = (32, 512, 4096)
LIMIT = 180  # seconds until a process is given up
COLUMNS = ("steps_per_second", "lowest", "highest", "compile_seconds", "memory_mib")


class Curve(NamedTuple):
    """What is measured against one size.

    Attributes:
      axis: what the size is, in words.
      field: its name in a config.
      sizes: its values.
      series: name -> (script, other fields of its config); of memories, (None, fields).
      constant: environment steps of an update, if num_envs is that divided by the size.
      seconds: about how long a process takes.
    """

    axis: str
    field: str
    sizes: tuple
    series: dict[str, Any]
    constant: int = 0
    seconds: int = 12

    def fields(self, name, size):
        _, fields = self.series[name]
        shape = {"num_envs": self.constant // size} if self.constant else {}
        return fields | shape | {self.field: size}

    def jobs(self):
        """(name, sizes) of every process. One measures a memory at all lengths."""
        for name, (script, _) in self.series.items():
            yield from ((name, (size,)) for size in self.sizes) if script else [(name, self.sizes)]


def trained(num_devices):
    one = SHAPE | {"num_devices": num_devices}
    return {
        "ppo": ("ppo", one),
        "rppo gru": ("rppo", one | {"cell": "gru"}),
        "dqn": ("dqn", SIZES | {"num_devices": num_devices}),
    }


def cell_series():
    from memory_cells import CELLS

    return {name: (None, {"cell": name} | SIZES) for name in CELLS if name != "none"}


def rollouts():
    fields = SIZES | {"num_devices": 1, "num_minibatches": 2}
    return {f"rppo {c}": ("rppo", fields | {"cell": c}) for c in ("gru", "mlstm", "lru")}


def make_curves():
    return {
        "environments": Curve(
            "environments",
            "num_envs",
            (4, 16, 64, 256, 1024, 4096),
            {
                "ppo": ("ppo", ENVIRONMENTS),
                "pqn": ("pqn", ENVIRONMENTS),
                "rppo gru": ("rppo", ENVIRONMENTS | {"cell": "gru"}),
                "dqn": ("dqn", SIZES | {"num_devices": 1}),
            },
        ),
        "seeds": Curve("seeds", "num_seeds", (1, 2, 4, 8, 16, 32, 64), trained(1)),
        "devices": Curve("seeds, on 2 devices", "num_seeds", (4, 16), trained(2)),
        "rollouts": Curve("steps of a rollout", "num_steps", LENGTHS, rollouts(), STEPS, 20),
        "memories": Curve("steps of a sequence", "num_steps", LENGTHS, cell_series(), STEPS, 13),
        "total-steps": Curve("steps of the run", "total_steps", (10**4, 10**6, 10**8), trained(1)),
    }


# --- One process ---------------------------------------------------------------------------------


def timed(run, updates):
    start = time.perf_counter()
    steps = run(updates)
    return steps, time.perf_counter() - start


def speeds_of(run, rounds, seconds):
    """Steps per second in every round of about so many seconds; a round is at least an update."""
    updates = 1
    while True:
        _, took = timed(run, updates)
        if took > seconds / 4:
            break
        updates *= 4
    updates = max(1, round(updates * seconds / took))
    return [steps / took for steps, took in (timed(run, updates) for _ in range(rounds))]


def train_point(script, fields, rounds, seconds):
    run = ours(script, **fields)
    compiling = compile_seconds(run)
    return speeds_of(run, rounds, seconds), compiling, peak_mib()


def layer_point(fields, rounds, seconds):
    from cells import compile_passes

    steps, envs = fields["num_steps"], fields["num_envs"]
    shape = (fields["hidden_size"], steps, envs)
    (_, gradient), compiling, memory = compile_passes("ours", fields["cell"], "", *shape)

    def run(passes):
        for _ in range(passes):
            gradient()
        return passes * steps * envs

    return speeds_of(run, rounds, seconds), compiling, memory


def worker(job):
    """Measure the points of a job: a line of JSON for each."""
    settings = job["rounds"], job["seconds"]
    for size, fields in job["points"]:
        if job["script"]:
            measured = train_point(job["script"], fields, *settings)
        else:
            measured = layer_point(fields, *settings)
        speeds, compiling, memory = measured
        point = {
            "steps_per_second": round(statistics.median(speeds)),
            "lowest": round(min(speeds)),
            "highest": round(max(speeds)),
            "compile_seconds": round(compiling, 2),
            "memory_mib": round(memory, 1),
        }
        print(json.dumps({"size": size, "point": point} | results.environment()), flush=True)


# --- All of them ---------------------------------------------------------------------------------


def measure(curve, name, sizes, rounds, seconds):
    """Run a job: what its process says of every point, and why points are missing, or ""."""
    script, _ = curve.series[name]
    points = [(size, curve.fields(name, size)) for size in sizes]
    job = {"script": script, "points": points, "rounds": rounds, "seconds": seconds}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    reason = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT * len(sizes))
        printed = done.stdout
        if done.returncode:
            reason = f"exit code {done.returncode}: {results.last_line(done.stderr)}"
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode()
        reason = f"not done after {LIMIT * len(sizes)} seconds"
    return [json.loads(line) for line in printed.splitlines()], reason


def known_points(name, command):
    """The points (series, size) -> values of a result file, if it is of this code and command."""
    if not results.exists(f"scaling/{name}"):
        return {}
    entry, now = results.load(f"scaling/{name}"), results.code()
    if (entry["commit"], entry["dirty"], now["dirty"]) != (now["commit"], False, False):
        return {}
    if entry["command"] != command:
        return {}
    found = {}
    for series, columns in entry["values"]["series"].items():
        for i, size in enumerate(columns["sizes"]):
            found[series, size] = {column: columns[column][i] for column in COLUMNS}
    return found


def record(name, curve, points, command, settings, about):
    series = {}
    for own in curve.series:
        sizes = [size for size in curve.sizes if (own, size) in points]
        if sizes:
            columns = {c: [points[own, size][c] for size in sizes] for c in COLUMNS}
            series[own] = {"sizes": sizes} | columns
    values = {"axis": curve.axis, "field": curve.field, "series": series} | settings
    provenance = {key: about[key] for key in ("machine", "versions")}
    results.record(f"scaling/{name}", values, command, **provenance)


def measure_curve(name, curve, rounds, seconds, again):
    """Measure what is missing of a curve; the number of points that could not be measured."""
    command = f"python benchmark/scaling.py --only {name} --rounds {rounds} --seconds {seconds:g}"
    points = {} if again else known_points(name, command)
    failed = 0
    for own, sizes in curve.jobs():
        missing = [size for size in sizes if (own, size) not in points]
        if not missing:
            continue
        answers, reason = measure(curve, own, missing, rounds, seconds)
        for answer in answers:
            point = points[own, answer["size"]] = answer["point"]
            speed, memory = point["steps_per_second"], point["memory_mib"]
            size = f"{answer['size']:,} {curve.axis}"
            print(f"{own:<18}{size:<32}{speed:>12,} steps/s{memory:>10,.0f} MiB", flush=True)
        if answers:
            settings = {"rounds": rounds, "seconds": seconds}
            record(name, curve, points, command, settings, answers[-1])
        if len(answers) < len(missing):
            failed += len(missing) - len(answers)
            print(f"{own}, {missing[len(answers)]:,} {curve.axis}: {reason}", flush=True)
    return failed


# --- Figures -------------------------------------------------------------------------------------

LOOKS = {  # of Okabe and Ito's colours, with markers and lines that differ without them
    "ppo": {"color": "#0072B2", "marker": "o"},
    "rppo gru": {"color": "#D55E00", "marker": "s"},
    "dqn": {"color": "#000000", "marker": "^"},
    "pqn": {"color": "#009E73", "marker": "D"},
    "rppo mlstm": {"color": "#CC79A7", "marker": "v"},
    "rppo lru": {"color": "#0072B2", "marker": "P"},
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
ROWS = (("steps_per_second", "steps per second"), ("memory_mib", "peak MiB"))


def spread(heights, gap):
    """The heights of labels, in the same order, moved up until they are so far apart."""
    moved = list(heights)
    above = float("-inf")
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        moved[i] = above = max(heights[i], above + gap)
    return moved


def draw_panel(axis, lines, column):
    """Lines (label, columns, look), each with its label at its end."""
    from matplotlib.ticker import EngFormatter, LogLocator

    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sorted({size for _, columns, _ in lines for size in columns["sizes"]}))
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(LogLocator(subs=range(1, 10)))
    axis.yaxis.set_minor_formatter("")
    axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axis.yaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    ends = []
    for label, columns, look in lines:
        sizes, values = columns["sizes"], columns[column]
        axis.plot(sizes, values, markersize=5, **look)
        if column == "steps_per_second":
            low, high = columns["lowest"], columns["highest"]
            axis.fill_between(sizes, low, high, color=look["color"], alpha=0.15, lw=0)
        ends.append((label, sizes[-1], values[-1], look["color"]))
    low, high = axis.get_ylim()
    if high < 4 * low:  # what is nearly flat should look so
        axis.set_ylim(low / 2, high * 2)
    place = axis.transData + axis.transAxes.inverted()
    at = [place.transform((size, value)) for _, size, value, _ in ends]
    for (label, _, _, color), (x, y), moved in zip(
        ends, at, spread([y for _, y in at], 0.085), strict=True
    ):
        text = {"textcoords": "axes fraction", "xycoords": "axes fraction", "va": "center"}
        arrow = {"arrowstyle": "-", "color": color, "lw": 0.6}
        axis.annotate(label, (x, y), (1.05, moved), color=color, arrowprops=arrow, **text)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw(panels, path):
    """A column of panels for each title, from {title: (x label, lines)}: speed above memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import tables

    plt.rcParams.update({"font.size": 10})
    size = (3.9 * len(panels), 7)
    figure, axes = plt.subplots(2, len(panels), figsize=size, layout="constrained", squeeze=False)
    places = set()
    for column, (title, (label, lines, entries)) in enumerate(panels.items()):
        for row, (key, words) in enumerate(ROWS):
            draw_panel(axes[row, column], lines, key)
            axes[row, column].set(xlabel=label, ylabel="" if column else words)
        axes[0, column].set_title(title)
        for entry in entries:
            about = tables.machine(entry), tables.versions(entry)
            dirty = "+" if entry["dirty"] else ""
            places.add(f"{', '.join(about)}, commit {entry['commit'][:7]}{dirty}")
    figure.suptitle("; ".join(sorted(places)))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure: {path}")


def series_of(name):
    """(its series, its entry) of a curve that has been measured."""
    entry = results.load(f"scaling/{name}")
    return entry["values"]["series"], entry


def training_panels():
    titles = {"environments": "environments", "seeds": "seeds (dashed: 2 devices)"}
    titles |= {"rollouts": "length, 8,192 steps", "total-steps": "total steps"}
    panels = {}
    for name, title in titles.items():
        if not results.exists(f"scaling/{name}"):
            continue
        series, entry = series_of(name)
        entries = [entry]
        lines = [(own, columns, LOOKS[own]) for own, columns in series.items()]
        if name == "seeds" and results.exists("scaling/devices"):
            series, entry = series_of("devices")
            entries.append(entry)
            dashed = {"ls": "--", "mfc": "white"}
            lines += [(f"{own}, 2", own_, LOOKS[own] | dashed) for own, own_ in series.items()]
        panels[title] = (entry["values"]["axis"].partition(",")[0], lines, entries)
    return panels


def memory_panels():
    import tables

    if not results.exists("scaling/memories"):
        return {}
    series, entry = series_of("memories")
    families = {"one step at a time": [], "in chunks": [], "scan": [], "window": []}
    for name, columns in series.items():
        way = tables.PARALLEL.get(name, "one step at a time").partition(",")[0]
        lines = families["in chunks" if way == "chunks" else way]
        n = len(lines)
        look = {"color": COLORS[n], "marker": MARKERS[n], "ls": LINES[n]}
        lines.append((name, columns, look))
    return {title: ("steps", lines, [entry]) for title, lines in families.items() if lines}


def draw_all(folder):
    drawn = {"scaling.png": training_panels(), "scaling-memories.png": memory_panels()}
    if not any(drawn.values()):
        sys.exit("error: nothing has been measured: `python benchmark/scaling.py` does it")
    for name, panels in drawn.items():
        if panels:
            draw(panels, folder / name)


def main():
    curves = make_curves()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=curves, default=list(curves), metavar="CURVE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long is a round")
    parser.add_argument("--again", action="store_true", help="also measure what is done")
    parser.add_argument("--figure", action="store_true", help="measure nothing, draw the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    if args.figure:
        return draw_all(results.ROOT / "benchmark")
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds more than 0")
    chosen = {name: curves[name] for name in args.only}
    jobs = {name: len(list(curve.jobs())) for name, curve in chosen.items()}
    total = sum(jobs[name] * curve.seconds for name, curve in chosen.items()) / 60
    print(f"{sum(jobs.values())} processes, about {total:.0f} minutes if none is done", flush=True)
    failed = sum(
        measure_curve(name, curve, args.rounds, args.seconds, args.again)
        for name, curve in chosen.items()
    )
    if failed:
        sys.exit(f"error: {failed} points could not be measured")


if __name__ == "__main__":
    main()
