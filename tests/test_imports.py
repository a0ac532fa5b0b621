"""Imports run one way: a short table says who may import whom, every file is held against it."""

import ast
import graphlib
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from helpers import ALGORITHMS, ROOT, SCRIPTS

from harness.run_dir import numerical_sources

# A line names a module or folder, what it may import, and after the colon the order inside of the
# folder: a file imports only what stands left of it. The parts of memories import each other.
TABLE = """
algorithms: envs experiment fast replay memory_cells
benchmark: *
envs: env_adapters harness.options
experiment: env_adapters loggers harness
loggers: harness
env_adapters: harness fast
    | task, library, callbacks < environment, wrappers, physics < episodes, contract, playground
    < host_* < * < registry < cli
memory_cells: harness.errors
    | parts < masked_rnn < * < xlstm < __init__
harness: fast
    | errors, text, identity, axes < output, signals, processes, own_code < metrics < run_dir
    < checkpoints, sizes < options, trained, history, real < export, plots, devices < dashboard
fast: nothing
replay: harness.axes
"""
LINES = {line.split(":")[0]: line for line in TABLE.replace("\n   ", "").strip().splitlines()}


# --- Reading and checking -------------------------------------------------------------------------


def project_modules() -> dict:
    """module -> its file, of every module in the root, in packages and in the benchmark."""
    folders = [path.parent for path in ROOT.glob("*/__init__.py")] + [ROOT / "benchmark"]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


def imported(text: str, modules) -> set:
    """Those of the modules that a file imports, inside of functions, too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not read"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & set(modules)


def import_graph() -> dict:
    """module -> the modules of this project that it imports."""
    modules = project_modules()
    return {name: imported(path.read_text(), modules) for name, path in modules.items()}


def place(module: str, order: str) -> int:
    """The place of a module in its folder's order: where its name stands, else the first fit."""
    own = module.split(".")[1] if "." in module else "__init__"
    groups = [group.split(", ") for group in order.split(" < ")]
    by_name = [i for i, group in enumerate(groups) if own in group]
    by_pattern = [i for i, group in enumerate(groups) if any(fnmatch(own, x) for x in group)]
    return (by_name or by_pattern)[0]


def is_allowed(line: str, module: str, other: str) -> bool:
    others, _, order = line.partition(": ")[2].partition(" | ")
    folder, other_folder = module.split(".")[0], other.split(".")[0]
    if folder != other_folder or not order:
        return any(name in ("*", other, other_folder) for name in others.split())
    if module.split(".")[1:2] == other.split(".")[1:2]:
        return True  # two parts of memories
    return place(other, order) < place(module, order)


def file_of(module: str) -> str:
    path = project_modules().get(module)
    return str(path.relative_to(ROOT)) if path else module.replace(".", "/") + ".py"


def strays(graph: dict) -> list:
    """A sentence for every import that the table does not allow."""
    sentences = []
    for module, others in sorted(graph.items()):
        line = LINES.get(module.split(".")[0])
        if line is None:
            sentences.append(
                f"{file_of(module)} is in no line of the table in tests/test_imports.py"
            )
            continue
        for other in sorted(others):
            if not is_allowed(line, module, other):
                stray = f"{file_of(module)} imports {file_of(other)}"
                sentences.append(f"{stray}, against the table's {line!r}")
    return sentences


def circle(graph: dict) -> list:
    """The modules of a circle, if there is one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


# --- The project ----------------------------------------------------------------------------------


def test_imports_run_one_way():
    found = strays(import_graph())
    assert not found, "\n".join(found)


def test_no_circle_of_imports():
    assert not circle(import_graph())


def test_a_stray_import_is_named_in_one_sentence():
    for module, other, sentence in (
        ("harness.errors", "envs", "harness/errors.py imports envs.py, against the table's 'harne"),
        ("fast", "replay", "fast.py imports replay.py, against the table's 'fast: nothing'"),
        ("harness.metrics", "harness.options", "harness/metrics.py imports harness/options.py, "),
        ("env_adapters.brax", "env_adapters.mujoco", "env_adapters/brax.py imports env_adapters/"),
        ("env_adapters.task", "env_adapters.host_mujoco", "env_adapters/task.py imports env_adap"),
        ("memory_cells.gru", "memory_cells", "memory_cells/gru.py imports memory_cells/__init__"),
        ("memory_cells.parts.x", "memory_cells.gru", "memory_cells/parts/x.py imports memory_cel"),
        ("memory_cells", "harness.options", "memory_cells/__init__.py imports harness/options.py"),
        ("algorithms.ppo", "loggers", "algorithms/ppo.py imports loggers.py, against the table's"),
        ("algorithms.rppo", "algorithms.ppo", "algorithms/rppo.py imports algorithms/ppo.py, ag"),
        ("news", "fast", "news.py is in no line of the table"),
    ):
        (stray,) = strays({module: {other}})
        assert stray.startswith(sentence)
    graph = {"loggers": {"harness.metrics"}, "memory_cells.parts.x": {"memory_cells.parts.y"}}
    graph |= {"env_adapters.mujoco": {"env_adapters.host_mujoco"}, "benchmark.x": {"benchmark.y"}}
    assert not strays(graph | {"memory_cells.xlstm": {"memory_cells.mlstm"}})


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_all_ways_to_import_are_read():
    modules = {"fast", "envs", "harness", "harness.errors", "harness.run_dir"}
    text = """
import jax, fast
from harness import errors
def f():
    from harness.run_dir import load_config
    import envs as doors
"""
    assert imported(text, modules) == {"fast", "harness.errors", "harness.run_dir", "envs"}


def reached(graph: dict, module: str) -> set:
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_numbers_of_a_run_depend_on_decides_about_resuming(script):
    """All that a script imports, but what only looks after the run and the door to environments."""
    modules, graph = project_modules(), import_graph()
    needed = {modules[name] for name in reached(graph, f"algorithms.{script}")}
    harmless = {path for name, path in modules.items() if name.split(".")[0] == "harness"}
    harmless |= {ROOT / "loggers.py", ROOT / "envs.py"}
    sources = set(numerical_sources(ALGORITHMS / f"{script}.py").values())
    assert needed - harmless <= sources
    assert ROOT / "fast.py" in sources and ROOT / "env_adapters" / "environment.py" in sources


# --- In a process ---------------------------------------------------------------------------------


def run(code):
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


NEW_MODULES = """
import sys
import jax, jax.numpy, flax.linen, numpy
before = set(sys.modules)
import {module}
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""


@pytest.mark.parametrize("module", ["memory_cells", "envs"])
def test_a_door_loads_nothing_of_others(module):
    """Neither what reads command lines, nor a logger, nor a library of environments."""
    loaded = set(run(NEW_MODULES.format(module=module)).split())
    assert module in loaded and not loaded & {"argparse", "loggers", "experiment", "tyro"}
    ours = {name.split(".")[0] for name in project_modules()}
    assert not loaded - ours - set(sys.stdlib_module_names)


RUN_AS_SCRIPT = """
import contextlib, runpy, sys
sys.argv = ["{module}.py", "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_path("{module}.py", run_name="__main__")
print("twice" if "{module}" in sys.modules else "once")
"""


@pytest.mark.parametrize("module", ["envs", "loggers"])
def test_a_door_that_is_run_is_executed_once(module):
    """`python envs.py` is the module __main__: whoever imported envs would execute it again."""
    assert run(RUN_AS_SCRIPT.format(module=module)).splitlines()[-1] == "once"
