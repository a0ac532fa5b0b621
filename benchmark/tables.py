"""Makes the tables of the READMEs from the files in benchmark/results.

    python benchmark/tables.py            # rewrite the tables
    python benchmark/tables.py --check    # exit 1 if a table does not show what the files say

A table stands in a document between two lines of its own, `<!-- table: NAME -->` and
`<!-- /table -->`, where NAME is a key of `TABLES` below. What is between them is replaced.
The table `memories` comes from the code of the memories; all others come from result files
(see `results.py`), to which they link.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import results
from results import ROOT, NoResult, load, slug

DOCUMENTS = (
    "README.md",
    "algorithms/README.md",
    "benchmark/README.md",
    "env_adapters/README.md",
    "memory_cells/README.md",
)
MARKED = re.compile(r"^<!-- table: (.+?) -->\n(.*?)^<!-- /table -->$", re.MULTILINE | re.DOTALL)
OPENING = re.compile(r"^<!-- table: ", re.MULTILINE)

SHORT_RESULTS = (  # algorithm, agents of tasks.toml without and with memory
    ("PPO", "cartpole-masked/ppo", "cartpole-masked/rppo-gru"),
    ("PPO, continuous", "pendulum-masked/ppo_continuous", "pendulum-masked/rppo_continuous-gru"),
    ("PQN", "cartpole-masked/pqn", "cartpole-masked/rpqn-gru"),
    ("DQN", "cartpole-masked/dqn", "cartpole-masked/drqn-gru"),
    ("SAC", "pendulum-masked/sac", "pendulum-masked/rsac-gru"),
    ("SAC, discrete", "cartpole-masked/sacd", "cartpole-masked/rsacd-gru"),
)
SHORT_SPEED = (  # label, our system of throughput.py, those of others
    (
        "RPPO, a GRU in each of two torsos, 64 environments",
        "rppo gru two torsos, 64 x 128",
        ("memorax PPO gru (two torsos), 64 x 128",),
    ),
    (
        "PPO, 32 environments",
        "ppo, 32 x 64, 16 minibatches",
        ("rejax PPO, 32 x 64, 16 minibatches",),
    ),
    (
        "PQN, 32 environments",
        "pqn, 32 x 64, 16 minibatches",
        ("rejax PQN, 32 x 64, 16 minibatches",),
    ),
    (
        "DQN, 10 environments",
        "dqn, 10 environments, batch 128",
        ("rejax DQN, 10 environments, batch 128",),
    ),
    (
        "SAC, 1 environment, layers of 64",
        "sac, batch 256, two layers of 64",
        ("rejax SAC, batch 256, two layers of 64", "sbx SAC, batch 256, two layers of 64"),
    ),
)
GPU_SYSTEMS = (  # those of throughput.py that have been measured on a GPU
    "rppo gru shared torso, 64 x 128",
    "rppo gru two torsos, 64 x 128",
    "rppo slstm shared torso, 64 x 128",
    "ppo, 32 x 64, 16 minibatches",
    "rejax PPO, 32 x 64, 16 minibatches",
    "pqn, 32 x 64, 16 minibatches",
    "rejax PQN, 32 x 64, 16 minibatches",
    "sac, batch 256, two layers of 64",
    "rejax SAC, batch 256, two layers of 64",
)
NOT_MEASURED_ON_CPU = ("xlstm", "gtrxl", "gpt2", "dnc", "rtu")  # by cells.py, beside memorax
NOT_MEASURED_ON_GPU = ("gated_deltanet", "rtu")
PARALLEL = {  # how a memory reads a whole sequence at once; those that are not here cannot
    "mlstm": "chunks",
    "xlstm": "chunks",
    "linear_attention": "chunks",
    "retnet": "chunks",
    "deltanet": "chunks",
    "gated_deltanet": "chunks",
    "gtrxl": "window",
    "gpt2": "window",
    "s5": "scan",
    "shm": "scan",
    "ffm": "scan",
    "lru": "scan",
    "mingru": "scan",
    "mamba": "scan",
    "rtu": "scan, if linear",
}
PEERS = ("memorax", "rejax", "sbx-rl", "sb3-contrib")
# Kinds whose files differ in their commands.
OWN_COMMANDS = ("learning", "memory-chain", "recall", "study", "study-cost")


# --- Text --------------------------------------------------------------------------------------


def markdown(head, rows):
    """A table; columns that are empty in all rows are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [
        [head[i] for i in kept],
        ["---"] * len(kept),
        *([row[i] for i in kept] for row in rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def number(value, decimals=2):
    """With at most that many decimals, none from 1,000 on; empty for None."""
    if value is None:
        return ""
    text = f"{value:,.{0 if abs(value) >= 1000 else decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def fixed(value, decimals=0):
    return "" if value is None else f"{value:,.{decimals}f}"


def percent(value, form="+.0f"):
    return "" if value is None else f"{100 * value:{form}} %"


def thousands(steps):
    """500000 as 500k, 2000000 as 2M."""
    if steps >= 1e6:
        return f"{round(steps / 1e6, 1):g}M"
    return f"{round(steps / 1e3)}k"


def linked(text, entry, here):
    """`text` as a link from a document in the folder `here` to a result file."""
    return f"[{text}]({os.path.relpath(entry['path'], here).replace(os.sep, '/')})" if text else ""


def short_commit(entry):
    """Seven digits of the commit, and a + where the code had changes that were not committed."""
    if not entry["commit"]:
        return "no commit"
    return f"`{entry['commit'][:7]}`" + ("+" if entry["dirty"] else "")


def machine(entry):
    device = entry["machine"]["device"]
    cores = entry["machine"]["cores"]
    if device is None:
        return "machine not recorded"
    names = [] if device == "cpu" and cores else ["CPU" if device == "cpu" else device]
    names += [f"{cores} CPU cores"] if cores else []
    return ", ".join(names)


def versions(entry):
    known = entry["versions"] or {}
    names = {"python": "Python", "jax": "JAX"}
    words = [f"{shown} {known[name]}" for name, shown in names.items() if name in known]
    return ", ".join(words) or "versions not recorded"


def peer_of(entry):
    """The other library that a result file is about, with its version; empty for ours."""
    known = entry["versions"] or {}
    return next((f"{peer} {known[peer]}" for peer in PEERS if peer in known), "")


def command_of(entry):
    """How the number of a result file is made, in words."""
    kind = entry["path"].relative_to(results.RESULTS).parts[0]
    if kind in OWN_COMMANDS:
        return f"`python benchmark/{results.KINDS[kind][0]}` (in each file its own command)"
    return f"`{entry['command']}`" if entry["command"] else "command not recorded"


def notes(entries):
    """A list with commit, date, machine, versions, command and origin of result files."""
    commits = {}
    for entry in entries:
        known = [machine(entry), versions(entry), command_of(entry)]
        if entry["source"].startswith("README"):
            known.append(f"transcribed from the {entry['source']}")
        commit = f"{short_commit(entry)} ({entry['date']})"
        commits.setdefault(", ".join(known), {})[commit] = None  # a set that keeps the order
    return "\n" + "".join(f"- {', '.join(own)}: {known}\n" for known, own in commits.items())


def measured_table(head, rows, here):
    """A table with a column that links result files, and notes on them below.

    Args:
      rows: pairs of the cells of a row and the result files that they come from.
    """
    full = []
    for cells, entries in rows:
        full.append(
            [*cells, ", ".join(linked(short_commit(entry), entry, here) for entry in entries)]
        )
    entries = [entry for _, own in rows for entry in own]
    return markdown([*head, "measured"], full) + notes(entries)


def section_link(text, section, here):
    path = os.path.relpath(results.RESULTS.parent / "README.md", here).replace(os.sep, "/")
    return f"[{text}]({path}#{section})"


# --- Tables: functions of the folder that the document is in -----------------------------------


def results_short(here):
    import learning

    def cell(id):
        entry = load(learning.find(id).result)
        values = entry["values"]
        median = linked(number(values["median"]), entry, here)
        budget = f"{thousands(values['steps'])}, {values['num_seeds']} seeds"
        return f"{median} ({number(values['worst'])}) after {budget}"

    rows = []
    for name, plain, memory in SHORT_RESULTS:
        task = learning.TASKS[learning.find(plain).task]["title"]
        rows.append([name, task, cell(plain), cell(memory)])
    head = ["algorithm", "task", "without memory", "with a GRU"]
    legend = (
        "Greedy return over 100 episodes: median and (worst) seed. "
        "Some runs with memory are longer.\n"
    )
    more = f"Every number links to its file; {section_link('all results', 'results', here)}.\n"
    return markdown(head, rows) + "\n" + legend + more


def results_full(here):
    import learning

    rows = []
    missing = []
    for task, about in learning.TASKS.items():
        agents = [agent for agent in learning.agents() if agent.task == task]
        missing += [agent.id for agent in agents if not results.exists(agent.result)]
        own = [result_row(agent, here) for agent in agents if results.exists(agent.result)]
        if own:
            others = [(published_cells(agent), []) for agent in about.get("published", [])]
            rows.append(([f"**{about['title']}** `{about['options']}`", *[""] * 5], []))
            rows += own + others
    head = ["`algorithms/...`", "steps", "seeds", "median", "worst seed", "MMER"]
    table = measured_table(head, rows, here)
    listed = ", ".join(f"`{id}`" for id in missing)
    return table + (f"- listed in tasks.toml and not trained yet: {listed}\n" if missing else "")


def result_row(agent, here):
    import learning

    entry = load(agent.result)
    values = entry["values"]
    mmer = values.get("mmer")
    # What was run, in the words of the file: tasks.toml may ask for something else by now.
    words = entry["command"].partition(" --total-steps")[0]
    words = words.removeprefix(f"python algorithms/{agent.script} ")
    of_task = learning.TASKS[agent.task]["options"]
    own = words.removeprefix(of_task).strip() if words.startswith(of_task) else words
    cells = [
        f"`{agent.script}`" + (f" `{own}`" if own else ""),
        thousands(values["steps"]),
        str(values["num_seeds"]),
        number(values["median"]),
        number(values["worst"]),
        number(sum(mmer) / len(mmer)) if mmer else "",
    ]
    return cells, [entry]


def published_cells(agent):
    """The row of somebody else's agent: a published return, with its source."""
    is_mmer = "MMER" in agent["agent"]
    value = number(agent["return"])
    source = f"[{agent['agent']}]({agent['source']})"
    return [
        source,
        thousands(agent["steps"]),
        "",
        "" if is_mmer else value,
        "",
        value if is_mmer else "",
    ]


def with_interval(values):
    """The interquartile mean of seeds, and its 95 % bootstrap interval."""
    import numpy as np

    from harness.metrics import interval, iqm

    low, high = interval(np.array(values))
    return f"{number(float(iqm(np.array(values))), 1)} ({number(low, 1)} to {number(high, 1)})"


def critics(here):
    """Pairs of agents of tasks.toml, with and without `--critic-obs full`."""
    import learning
    import numpy as np

    ending = "-critic"
    rows = []
    for agent in learning.agents():
        if not agent.name.endswith(ending) or not results.exists(agent.result):
            continue
        pair = [load(learning.find(agent.id.removesuffix(ending)).result), load(agent.result)]
        cells = [learning.TASKS[agent.task]["title"], f"`{agent.script}`, {thousands(agent.steps)}"]
        cells.append(str(agent.seeds))
        curves = [np.array(entry["values"]["curve"]["returns"]) for entry in pair]
        cells += [with_interval(curve.mean(axis=1)) for curve in curves]
        cells += [with_interval(entry["values"]["returns"]) for entry in pair]
        rows.append((cells, pair))
    head = ["task", "script, steps", "seeds", "mean of all evaluations", "critic sees all"]
    return measured_table([*head, "at the end", "critic sees all"], rows, here)


def trials(here):
    import learning

    rows = []
    for memory in ("none", "gru"):
        agent = learning.find(f"fourrooms-trials/rppo-{memory}")
        entry = load(agent.result)
        values = entry["values"]
        cells = [f"`--cell {memory}`", thousands(values["steps"]), str(values["num_seeds"])]
        cells += [with_interval(values["returns"]), number(values["worst"])]
        rows.append((cells, [entry]))
    head = ["", "steps", "seeds", "goals found in 5 trials", "worst seed"]
    return measured_table(head, rows, here)


def speed_short(here):
    def cell(system, is_peer):
        entry = load(speed_file(system, "cpu"))
        speed = linked(fixed(entry["values"]["steps_per_second"]), entry, here)
        if not is_peer:
            return speed, entry
        return f"{peer_of(entry)}: {speed}", entry

    rows = []
    places = set()
    for label, own, others in SHORT_SPEED:
        speed, entry = cell(own, is_peer=False)
        rows.append([label, speed, ", ".join(cell(system, is_peer=True)[0] for system in others)])
        places.add(f"{machine(entry)}, {versions(entry)}")
    legend = f"Environment steps per second of training ({'; '.join(sorted(places))}).\n"
    more = f"Every number links to its file; {section_link('all systems', 'speed', here)}.\n"
    return markdown(["", "Memory-RL", "others"], rows) + "\n" + legend + more


def speed_file(system, device):
    return f"throughput/{device}/{slug(system)}"


def speed_table(systems, device, here):
    rows = []
    for system in systems:
        entry = load(speed_file(system, device))
        values = entry["values"]
        peer = peer_of(entry)
        cells = [
            f"{peer} {system.partition(' ')[2]}" if peer else system,
            fixed(values["steps_per_second"]),
            fixed(values["lowest"]),
            fixed(values["highest"]),
            str(values["rounds"] or ""),
            ratio_of(values.get("ours_over_this")),
            percent(share_of_floor(values), ".0f"),
            fixed(values["compile_seconds"], 1),
            fixed(values.get("peak_mib")),
        ]
        rows.append((cells, [entry]))
    head = ["system", "steps per second", "lowest", "highest", "rounds", "ours / this"]
    head += ["of the floor", "compile, seconds", "peak MiB"]
    return measured_table(head, rows, here)


def ratio_of(ratio):
    """A median with its least and greatest round."""
    return "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def share_of_floor(values):
    """The speed as a share of that of the matrix products alone; None if that is not known."""
    floor = values.get("floor")
    return floor and values["steps_per_second"] / floor["steps_per_second"]


def speed(here):
    import throughput

    measured = [name for name in throughput.SYSTEMS if results.exists(speed_file(name, "cpu"))]
    return speed_table(measured, "cpu", here)


def speed_gpu(here):
    return speed_table(GPU_SYSTEMS, "gpu", here)


def sac_grid(here):
    entry = load("sac-grid/cpu")
    values = entry["values"]
    head = ["environments \\ gradient steps", *map(str, values["gradient_steps"])]
    rows = []
    for num_envs, speeds in zip(values["num_envs"], values["steps_per_second"], strict=True):
        rows.append(([str(num_envs), *map(fixed, speeds)], [entry]))
    return measured_table(head, rows, here)


def devices(here):
    import devices as benchmark

    head = ["", "one device", "several", "of them", "ratio (least to greatest)", "compile, s"]
    rows = []
    for name in benchmark.SYSTEMS:
        entry = load(f"devices/{slug(name)}")
        values = entry["values"]
        one, *others = zip(
            values["devices"], values["steps_per_second"], values["compile_seconds"], strict=True
        )
        for i, (count, speed, compile_seconds) in enumerate(others):
            ratio, low, high = values["ratios"][str(count)]
            cells = [
                "" if i else name,
                fixed(one[1]),
                fixed(speed),
                str(count),
                f"{ratio:.2f} ({low:.2f} to {high:.2f})",
                f"{one[2]:.1f}, {compile_seconds:.1f}",
            ]
            rows.append((cells, [entry]))
    return measured_table(head, rows, here)


def environments(here):
    import environments as benchmark

    rows = []
    for id in benchmark.FAMILIES:
        for num_envs in benchmark.NUM_ENVS:
            entry = load(f"environments/cpu/{slug(id)}-{num_envs}")
            values = entry["values"]
            own = values["own_loop"] or {"steps_per_second": None, "compile_seconds": None}
            first = num_envs == benchmark.NUM_ENVS[0]
            cells = [
                environment_label(values) if first else "",
                str(num_envs),
                fixed(values["steps_per_second"]),
                fixed(own["steps_per_second"]),
                percent(values["time_over_own"]),
                fixed(values["compile_seconds"], 1),
                fixed(own["compile_seconds"], 1),
            ]
            rows.append((cells, [entry]))
    head = ["", "environments", "ours", "own loop", "time over own"]
    head += ["compile, seconds", "own loop, compile"]
    return measured_table(head, rows, here)


def environment_label(values):
    words = [f"`{values['id']}`"]
    words += [f"`{name} {value}`" for name, value in values["options"].items()]
    own = values["own_loop"]
    if own and "VectorEnv" in own["name"]:
        words.append(f"own loop: {own['name']}")
    return ", ".join(words)


def overhead(here):
    entry = load("overhead/loggers")
    values = entry["values"]
    rows = []
    for loggers, cost in values["loggers"].items():
        if loggers != "none":
            rows.append(([f"`--log {loggers}`", percent(cost["overhead"], ".1f")], [entry]))
    speed = fixed(values["steps_per_second"])
    return measured_table([f"PPO on CartPole, {speed} steps per second", "overhead"], rows, here)


def start_up(here):
    entry = load("overhead/start")
    values = entry["values"]
    rows = [
        (["first start", fixed(values["first_start_seconds"], 1)], [entry]),
        (
            ["second start, with compiled programs", fixed(values["second_start_seconds"], 1)],
            [entry],
        ),
    ]
    head = ["`rppo.py`, from the shell to the end of the first update", "seconds"]
    return measured_table(head, rows, here)


def memories_learning(here):
    def updates(task):
        if task["learned"]:
            return str(task["updates"])
        return f"{task['accuracy']:.0%} after {task['updates']}"

    rows = []
    for cell in memories_without():
        recall = load(f"recall/{cell}")
        chain = load(f"memory-chain/{cell}")
        tasks = recall["values"]["tasks"]
        values = chain["values"]
        cells = [
            f"`{cell}`",
            updates(tasks["recall"]),
            updates(tasks["4-back"]),
            number(values["median"]),
            number(values["worst"]),
            fixed(values["steps_per_second"]),
        ]
        rows.append((cells, [recall, chain]))
    head = ["`--cell`", "recall", "4-back", "MemoryChain, median", "worst seed"]
    return measured_table([*head, "steps per second"], rows, here)


def cost_table(cells, device, num_envs, here):
    rows = []
    peers = set()
    for cell in cells:
        entry = load(f"cells/{device}/{cell}-T1024-B{num_envs}-H128")
        values = entry["values"]
        impls = values["impls"]
        usual = impls.get("auto") or impls["default"]
        loop = {"gradient_ms": None, "memory_mib": None}
        if device == "gpu" or PARALLEL.get(cell) == "chunks":  # else `auto` is the loop on CPUs
            loop = impls.get("scan", loop)
        peer = values["peer"] or {"gradient_ms": None}
        row = [
            f"`{cell}`",
            fixed(usual["gradient_ms"], 1),
            fixed(usual["memory_mib"]),
            fixed(loop["gradient_ms"], 1),
            fixed(loop["memory_mib"]),
            fixed(peer["gradient_ms"], 1),
        ]
        rows.append((row, [entry]))
        peers.add(peer_of(entry))
    head = [f"T = 1024, B = {num_envs}, H = 128", "ms", "MiB", "step by step, ms", "MiB"]
    head.append(f"{', '.join(sorted(filter(None, peers)))}, ms")
    return measured_table(head, rows, here)


def memories_cost(here):
    return cost_table(memories_without(*NOT_MEASURED_ON_CPU), "cpu", 16, here)


def memories_cost_gpu(here):
    return cost_table(memories_without(*NOT_MEASURED_ON_GPU), "gpu", 64, here)


def memories_without(*left_out):
    from memory_cells import CELLS

    return [name for name in CELLS if name not in ("none", *left_out)]


def memories(here):
    """From the code: one row per memory at hidden size 128, read from 128 inputs."""
    import dataclasses

    from memory_cells import CELLS, MemoryCell

    inherited = {field.name for field in dataclasses.fields(MemoryCell)}
    rows = []
    for name in memories_without():
        cell_class = CELLS[name]
        path = ROOT / "memory_cells" / f"{name}.py"
        fields = [field.name for field in dataclasses.fields(cell_class)]
        carry, parameters = sizes_of(name)
        row = [
            linked(f"`{name}`", {"path": path}, here),
            description(cell_class),
            f"{carry:,}",
            thousands(parameters),
            PARALLEL.get(name, ""),
            " ".join(f"`{field}`" for field in fields if field not in inherited),
        ]
        rows.append(row)
    head = ["`--cell`", "", "carry", "parameters", "parallel", "options (`--cell-kwargs`)"]
    return markdown(head, rows)


def sizes_of(name, hidden_size=128):
    """Numbers that a memory carries per environment (complex ones count twice), parameters."""
    import jax
    import jax.numpy as jnp

    from memory_cells import make_cell

    cell = make_cell(name, hidden_size)

    def create():
        carry = cell.initialize_carry(jax.random.key(0), (1, hidden_size))
        xs = jnp.zeros((2, 1, hidden_size))
        starts = jnp.zeros((2, 1), bool)
        return carry, cell.init(jax.random.key(0), carry, xs, starts, method="sequence")

    carry, params = (jax.tree.leaves(tree) for tree in jax.eval_shape(create))
    numbers = sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in carry)
    return numbers, sum(leaf.size for leaf in params)


def description(cell_class):
    """What a memory is, with authors and year: the beginning of its module's docstring."""
    first = sys.modules[cell_class.__module__].__doc__.partition("\n")[0].rstrip(".")
    cited = re.match(r"(.+? \([^(),;]*\d{4})[,;)]", first)
    return f"{cited[1]})" if cited else first


TABLES = {
    "results-short": results_short,
    "results": results_full,
    "critics": critics,
    "trials": trials,
    "speed-short": speed_short,
    "speed": speed,
    "speed-gpu": speed_gpu,
    "sac-grid": sac_grid,
    "devices": devices,
    "environments": environments,
    "overhead": overhead,
    "start-up": start_up,
    "memories": memories,
    "memories-learning": memories_learning,
    "memories-cost": memories_cost,
    "memories-cost-gpu": memories_cost_gpu,
}


# --- Documents ---------------------------------------------------------------------------------


def rewritten(document: Path):
    """The text of a document with its tables regenerated, and the names of those that differ.

    Raises:
      NoResult: a result file is missing, or the document names a table that does not exist.
    """
    text = document.read_text()
    changed = []

    def regenerated(match):
        name = match[1]
        if name not in TABLES:
            raise NoResult(
                f"{document.name} has an unknown table {name!r}; known: {', '.join(TABLES)}"
            )
        lines = f"<!-- table: {name} -->\n{TABLES[name](document.parent)}<!-- /table -->"
        if lines != match[0]:
            changed.append(name)
        return lines

    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise NoResult(f"{document.name} has a table without its closing line, <!-- /table -->")
    return MARKED.sub(regenerated, text), changed


def update(root: Path, check: bool) -> list[str]:
    """Rewrite the documents under `root`, or only look; the tables that differ, in words."""
    differing = []
    for name in DOCUMENTS:
        document = root / name
        if document.exists():
            text, changed = rewritten(document)
            differing += [f"{name}: table {table}" for table in changed]
            if changed and not check:
                document.write_text(text)
    return differing


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    try:
        differing = update(ROOT, args.check)
    except NoResult as error:
        sys.exit(f"error: {error}")
    for table in differing:
        print(f"{table} {'does not show what the files say' if args.check else 'was rewritten'}")
    sys.exit(1 if args.check and differing else 0)


if __name__ == "__main__":
    main()
