"""Time and memory of a pass over a sequence, for every memory and every `impl` that it has.

    python benchmark/cells.py
    python benchmark/cells.py --cells gru mlstm --steps 64 512 8192 --envs 1 256
    python benchmark/cells.py --cells mamba --steps 512 1024 2048 4096 --repeats 0
    python benchmark/cells.py --peer memorax

A pass reads T steps of B environments, with resets and D = H inputs. Its gradient is that of the
mean squared output, by parameters and inputs. Compile time is that of the gradient. Memory is what
XLA sets aside for intermediate values. Milliseconds are medians of repetitions. The systems of one
cell and size take turns, and each runs once before it is timed. With --repeats 0 only memory and
compile time are measured.

With several numbers of steps a second table shows how memory grows: a line fitted through all of
them, and how far it misses one at most, in percent of the largest.

The peer runs in an environment of its own, which is made if it is missing (see peers.py). Its cells
get the sizes that are the defaults of ours. Timed rows are written to benchmark/results.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

import results
from peers import interpreter_of


def ours(name, impl, hidden_size, xs, starts):
    import jax

    from memory_cells import make_cell

    cell = make_cell(name, hidden_size, **({"impl": impl} if impl else {}))
    carry = cell.initialize_carry(None, xs.shape[1:])
    params = cell.init(jax.random.key(0), carry, xs[:2], starts[:2], method="sequence")
    return params, lambda params, xs, starts: cell.apply(
        params, carry, xs, starts, method="sequence"
    )[1]


MEMORAX = {  # flax.linen, memorax's sequence models, H
    "gru": lambda nn, m, h: m.RNN(nn.GRUCell(h)),
    "lstm": lambda nn, m, h: m.RNN(nn.OptimizedLSTMCell(h)),
    "slstm": lambda nn, m, h: m.RNN(m.sLSTMCell(h, h, num_heads=4)),
    "mlstm": lambda nn, m, h: m.Memoroid(m.mLSTMCell(h, h, num_heads=4)),
    "shm": lambda nn, m, h: m.RNN(m.SHMCell(32, h)),
    "s5": lambda nn, m, h: m.Memoroid(m.S5Cell(h, h)),
    "lru": lambda nn, m, h: m.Memoroid(m.LRUCell(h, h)),
    "mingru": lambda nn, m, h: m.Memoroid(m.MinGRUCell(h)),
    "ffm": lambda nn, m, h: m.Memoroid(m.FFMCell(h, 32, 4)),
    "mamba": lambda nn, m, h: m.Memoroid(m.MambaCell(h)),
    "linear_attention": lambda nn, m, h: m.Memoroid(
        m.LinearAttentionCell(
            h // 4, 4, nn.initializers.lecun_normal(), nn.initializers.zeros, "float32"
        )
    ),
}


def memorax(name, _, hidden_size, xs, starts):
    import flax.linen as nn
    import jax
    from memorax.networks import sequence_models

    model = MEMORAX[name](nn, sequence_models, hidden_size)
    params = model.init(jax.random.key(0), xs[:2].swapaxes(0, 1), starts[:2].T)  # it is batch-major
    return params, lambda params, xs, starts: model.apply(params, xs.swapaxes(0, 1), starts.T)[1]


LIBRARIES = {"ours": ours, "memorax": memorax}


def compile_passes(library, name, impl, hidden_size, steps, envs):
    """Compile both passes.

    Returns:
      Functions without arguments that run them, seconds to compile the gradient, its memory in MiB.
    """
    import jax

    key = jax.random.key(0)
    xs, starts = (
        jax.random.normal(key, (steps, envs, hidden_size)),
        jax.random.bernoulli(key, 0.02, (steps, envs)),
    )
    params, outputs = LIBRARIES[library](name, impl, hidden_size, xs, starts)
    loss = lambda params, xs, starts: (outputs(params, xs, starts) ** 2).mean()  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    start = time.perf_counter()
    gradient = gradient.lower(params, xs, starts).compile()
    seconds = time.perf_counter() - start
    memory = gradient.memory_analysis().temp_size_in_bytes / 2**20
    forward = jax.jit(outputs).lower(params, xs, starts).compile()
    passes = [
        lambda run=run: jax.block_until_ready(run(params, xs, starts))
        for run in (forward, gradient)
    ]
    return passes, seconds, memory


def worker(library):
    """Answer requests from standard input, a line each.

    A list of arguments compiles a system, its number runs it, null forgets all of them, and
    "about" tells machine and versions.
    """
    systems = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if isinstance(request, list):
                number, *arguments = request
                systems[number], seconds, memory = compile_passes(library, *arguments)
                answer = {"compile": seconds, "memory": memory}
            elif request == "about":
                answer = results.environment()
            elif request is None:
                answer = systems.clear()
            else:
                answer = []
                for run in systems[request]:
                    run()  # what ran before, another system, left its own data in the caches
                    start = time.perf_counter()
                    run()
                    answer.append(1e3 * (time.perf_counter() - start))
        except Exception as error:  # this cell at this size, not the table
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:60]}
        print(json.dumps(answer), flush=True)


class Worker:
    """A library in a process of its own."""

    def __init__(self, python, library):
        command = [python, __file__, "--worker", library]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {' '.join(self.process.args)} ended")
        return json.loads(line)


def measure(workers, systems, args, steps, envs):
    """One result per system (library, cell, impl): numbers, or the reason why there are none."""
    measured = []
    for number, (library, name, impl) in enumerate(systems):
        result = workers[library].ask([number, name, impl, args.hidden_size, steps, envs])
        if result.get("memory", 0) > 1024 * args.limit:
            result["error"] = f"over the limit of {args.limit:g} GiB"
        measured.append(result | {"forward": [], "gradient": []})
    for _ in range(args.repeats):
        for number, (library, _, _) in enumerate(systems):
            if "error" in measured[number]:
                continue
            times = workers[library].ask(number)
            if isinstance(times, dict):
                measured[number] |= times
            else:
                measured[number]["forward"].append(times[0])
                measured[number]["gradient"].append(times[1])
    for process in workers.values():
        process.ask(None)
    return measured


def columns(result):
    """Forward, gradient, compile and memory of a result, as text."""
    measured = [f"{result[key]:.1f}" if key in result else "" for key in ("compile", "memory")]
    if "error" in result:
        return [result["error"], "", *measured]
    times = [
        f"{statistics.median(result[key]):.1f}" if result[key] else ""
        for key in ("forward", "gradient")
    ]
    return times + measured


def print_growth(memory):
    """From {(cell, impl, envs): {steps: MiB}} how memory grows with the steps."""
    print(
        "\n| cell | impl | B | MiB + | KiB per step and environment | off by at most % |\n"
        + "|---" * 6
        + "|"
    )
    for (name, impl, envs), sizes in memory.items():
        if len(sizes) > 1:
            slope, constant = statistics.linear_regression(list(sizes), list(sizes.values()))
            off = max(abs(constant + slope * steps - size) for steps, size in sizes.items()) / max(
                sizes.values()
            )
            growth = f"{constant:.1f} | {1024 * slope / envs:.2f} | {100 * off:.1f}"
            print(f"| {name} | {impl} | {envs} | {growth} |")


def median_of(times):
    return round(statistics.median(times), 2) if times else None


def values_of(result):
    """A result as a result file has it; what was not measured is null."""
    compile_seconds = result.get("compile")
    memory = result.get("memory")
    return {
        "forward_ms": median_of(result["forward"]),
        "gradient_ms": median_of(result["gradient"]),
        "compile_seconds": None if compile_seconds is None else round(compile_seconds, 2),
        "memory_mib": None if memory is None else round(memory, 1),
    }


def record(values, ours, peer, about):
    """Write the result file of a memory at one size.

    Args:
      values: what was measured: name, size, repetitions.
      ours: {impl: result}.
      peer: the result of the other library, or None.
      about: {library: machine and versions of its process}.
    """
    known = about["ours"]
    values = values | {"impls": {}, "peer": None}
    for impl, result in ours.items():
        values["impls"][impl or "default"] = values_of(result)
    if peer:
        library = next(library for library in about if library != "ours")
        values["peer"] = {"name": library} | values_of(peer)
        versions = known["versions"] | {library: about[library]["versions"].get(library)}
        known = known | {"versions": versions}
    size = f"T{values['steps']}-B{values['num_envs']}-H{values['hidden_size']}"
    name = f"cells/{results.folder(known['machine'])}/{values['cell']}-{size}"
    results.record(name, values, results.this_command(), **known)


def print_row(name, impl, steps, envs, result, peer, width):
    row = [name, impl, str(steps), str(envs), *columns(result)]
    if peer:
        own = median_of(result["gradient"])
        other = median_of(peer["gradient"])
        row += [*columns(peer), f"{other / own:.2f}" if own and other else ""]
    print("| " + " | ".join(row + [""] * (width - len(row))) + " |", flush=True)


def main():
    from memory_cells import CELLS
    from memory_cells.parts.checks import IMPLS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL")
    parser.add_argument(
        "--steps", "--lengths", nargs="+", type=int, default=[64, 1024], metavar="T"
    )
    parser.add_argument("--envs", "--batches", nargs="+", type=int, default=[16], metavar="B")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--impls", nargs="+", default=IMPLS, choices=IMPLS, metavar="IMPL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--limit", type=float, default=8.0, help="GiB; what needs more is compiled, but not run"
    )
    parser.add_argument("--peer", choices=[name for name in LIBRARIES if name != "ours"])
    args = parser.parse_args()

    workers = {"ours": Worker(sys.executable, "ours")}
    head = ["cell", "impl", "T", "B"]
    head += ["forward ms", "forward + gradient ms", "compile s", "memory MiB"]
    if args.peer:
        workers[args.peer] = Worker(str(interpreter_of(args.peer)), args.peer)
        head += [f"{args.peer}: forward ms", "forward + gradient ms", "compile s", "memory MiB"]
        head += ["times ours"]
    about = {library: worker.ask("about") for library, worker in workers.items()}
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    memory = {}
    for steps, envs, name in itertools.product(args.steps, args.envs, args.cells):
        impls = args.impls if "impl" in CELLS[name].__dataclass_fields__ else ("",)
        systems = [("ours", name, impl) for impl in impls]
        has_peer = args.peer and name in MEMORAX
        systems += [(args.peer, name, "")] if has_peer else []
        measured = measure(workers, systems, args, steps, envs)
        peer = measured.pop() if has_peer else None
        ours = dict(zip(impls, measured, strict=True))
        for impl, result in ours.items():
            if "memory" in result:
                memory.setdefault((name, impl, envs), {})[steps] = result["memory"]
            print_row(name, impl, steps, envs, result, peer, len(head))
        if args.repeats and impls[0] in ("", "auto"):  # else the table would lack a number
            values = {"cell": name, "steps": steps, "num_envs": envs}
            values |= {"hidden_size": args.hidden_size, "repeats": args.repeats}
            record(values, ours, peer, about)
    if len(args.steps) > 1:
        print_growth(memory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main()
