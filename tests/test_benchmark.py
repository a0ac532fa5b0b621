"""The result files of the benchmarks and the tables that are made of them."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import results
import tables
from filelock import FileLock

from harness.options import read_words
from harness.run_dir import LOCK_FILE

FILES = sorted(results.RESULTS.rglob("*.json"))
ABOUT = {
    "commit": "c0ef676c7615d544a54b2eb75b9513593aced03b",
    "dirty": False,
    "machine": {"device": "cpu", "cores": 2},
    "versions": {"python": "3.12.3", "jax": "0.11.2"},
}


def name_of(path):
    return path.relative_to(results.RESULTS).with_suffix("").as_posix()


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the documents and result files, which a test may change."""
    for name in tables.DOCUMENTS:
        if (results.ROOT / name).exists():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(results.ROOT / name, tmp_path / name)
    folder = tmp_path / "benchmark" / "results"
    shutil.copytree(results.RESULTS, folder)
    monkeypatch.setattr(results, "RESULTS", folder)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def test_every_result_file_has_all_keys():
    assert FILES
    for path in FILES:
        entry = results.load(name_of(path))
        assert entry.keys() == {*results.KEYS, "path"}, path
        assert entry["machine"].keys() == {"device", "cores"}, path
        assert entry["values"] and entry["measured"] and entry["source"], path


def test_commits_and_dates_of_result_files_are_well_formed():
    for path in FILES:
        entry = json.loads(path.read_text())
        assert re.fullmatch(r"[0-9a-f]{40}", entry["commit"]), path
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", entry["date"]), path
        assert entry["dirty"] in (True, False, None), path


def test_result_files_hold_no_paths_of_a_machine():
    for path in FILES:
        assert not re.search(r'["\s]/\w', path.read_text()), path


def test_all_tables_show_what_the_files_say():
    assert tables.update(results.ROOT, check=True) == []


def test_every_table_of_results_is_in_the_benchmarks_document():
    text = (results.ROOT / "benchmark" / "README.md").read_text()
    elsewhere = ("memories", "critics", "trials")  # in the folders whose code they are about
    full = [name for name in tables.TABLES if not name.endswith("-short") and name not in elsewhere]
    assert [name for name in full if f"<!-- table: {name} -->" not in text] == []


def test_a_changed_number_makes_the_check_fail_until_tables_are_rewritten(copied):
    path = results.RESULTS / "throughput" / "cpu" / "ppo-32-x-64-16-minibatches.json"
    entry = json.loads(path.read_text())
    entry["values"]["steps_per_second"] += 1
    path.write_text(json.dumps(entry))
    changed = tables.update(copied, check=True)
    assert "benchmark/README.md: table speed" in changed
    assert tables.update(copied, check=True) == changed  # a check writes nothing
    assert tables.update(copied, check=False) == changed
    assert tables.update(copied, check=True) == []


def test_a_table_with_a_missing_file_fails_with_one_sentence(copied, monkeypatch, capsys):
    (results.RESULTS / "sac-grid" / "cpu.json").unlink()
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as error:
        tables.main()
    assert error.value.code == (
        "error: benchmark/results/sac-grid/cpu.json is missing: "
        "`python benchmark/throughput.py --grid` writes it"
    )


def test_a_damaged_file_is_named(copied):
    (results.RESULTS / "sac-grid" / "cpu.json").write_text('{"values": {}}')
    with pytest.raises(results.NoResult, match="sac-grid/cpu.json is damaged: it has no measured"):
        results.load("sac-grid/cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: sped -->\n<!-- /table -->\n", "unknown table 'sped'"),
        ("<!-- table: speed -->\n| a |\n", "without its closing line"),
    ],
)
def test_a_wrong_marker_is_refused(copied, text, message):
    document = copied / "benchmark" / "README.md"
    document.write_text(text)
    with pytest.raises(results.NoResult, match=message):
        tables.rewritten(document)


def test_load_reads_what_record_writes(copied):
    values = {"speed": 1.5, "curve": [1, 2.5, float("nan")], "nested": {"list": [[1, 2], [3, 4]]}}
    results.record("overhead/test", values, "python benchmark/overhead.py", **ABOUT)
    entry = results.load("overhead/test")
    assert entry["values"] == values | {"curve": [1, 2.5, None]}
    assert entry["source"] == "benchmark/overhead.py"
    assert {key: entry[key] for key in ABOUT} == ABOUT
    assert entry.keys() == {*results.KEYS, "path"}


def test_result_files_are_sorted_and_keep_lists_of_numbers_on_one_line(copied):
    values = {"b": [1, 2.5, None], "a": "text"}
    path = results.record("overhead/test", values, "python benchmark/overhead.py", **ABOUT)
    text = path.read_text()
    assert '"b": [1, 2.5, null]' in text
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert [file.name for file in path.parent.glob("*.new")] == []


def test_record_finds_machine_and_versions_by_itself(copied):
    results.record("overhead/test", {"seconds": 1.0}, "python benchmark/overhead.py")
    entry = results.load("overhead/test")
    assert entry["machine"]["device"] and entry["machine"]["cores"] > 0
    assert {"python", "jax", "flax"} <= entry["versions"].keys()


def test_commands_are_recorded_without_paths_of_the_machine(monkeypatch):
    arguments = ["/home/me/benchmark/throughput.py", "--peer", "rejax", "/opt/x/bin/python3.12"]
    monkeypatch.setattr("sys.argv", arguments)
    assert results.this_command() == "python benchmark/throughput.py --peer rejax PYTHON"


def test_provenance_of_a_run_comes_from_its_own_directory():
    about = {
        "started": "2026-11-28 10:00:00 +0000",
        "git": {"commit": ABOUT["commit"], "dirty": True},
        "python": "3.12.3",
        "packages": {"jax": "0.11.2", "pip": "25.0"},
        "machine": {"host": "here", "cpus": 16, "devices": ["gpu: NVIDIA H200"]},
    }
    assert results.of_run(about) == {
        "commit": ABOUT["commit"],
        "dirty": True,
        "date": "2026-11-28",
        "machine": {"device": "NVIDIA H200", "cores": 16},
        "versions": {"python": "3.12.3", "jax": "0.11.2"},
    }


def test_curves_in_result_files_are_short_and_end_at_the_end():
    import learning
    import numpy as np

    for points in (1, 20, 50, 51, 80, 400):
        steps = np.arange(1, points + 1)
        curve = learning.thinned(steps, np.stack([steps, 2 * steps], axis=1))
        assert len(curve["steps"]) <= learning.POINTS
        assert curve["steps"][-1] == points
        assert curve["returns"].shape == (2, len(curve["steps"]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (500.0, "500"),
        (495.3, "495.3"),
        (-0.456, "-0.46"),
        (8496.4, "8,496"),
        (100, "100"),
    ],
)
def test_numbers_in_tables_have_the_digits_that_were_recorded(value, text):
    assert tables.number(value) == text


def test_every_agent_of_the_tasks_has_a_valid_command():
    import learning

    agents = learning.agents() + learning.memories()
    assert len({agent.result for agent in agents}) == len(agents)
    for agent in agents:
        python, script, *words = agent.command.split()
        config_class = importlib.import_module(f"algorithms.{Path(script).stem}").Config
        options = read_words(words, config_class, {})
        assert (options["total_steps"], options["num_seeds"]) == (agent.steps, agent.seeds)
        summary, _, goal = agent.goal.partition(" ")
        assert not agent.goal or (summary in learning.SUMMARIES and float(goal))


def test_an_agent_is_done_when_its_file_is_of_its_command(monkeypatch, tmp_path):
    import learning

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    agent = learning.Agent("cartpole", "ppo", "learning/cartpole/ppo", 1000, 2, goal="worst 20")
    assert not learning.is_done(agent) and "not trained" in learning.describe(agent)
    values = {"returns": [19.0, 30.0], "median": 24.5, "worst": 19.0}
    results.record(agent.result, values, agent.command)
    assert learning.is_done(agent) and "goal worst 20 missed" in learning.describe(agent)
    assert learning.reached(dataclasses.replace(agent, goal="mean 24")) == "reached"
    assert not learning.is_done(dataclasses.replace(agent, options="--gamma 0.9"))


def test_learning_trains_what_is_missing_and_records_it(monkeypatch, tmp_path):
    import learning

    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(learning, "RUNS", tmp_path / "runs")
    options = "--num-envs 4 --num-steps 8 --num-minibatches 2 --hidden-size 8 --log file"
    options += " --num-eval-envs 2 --eval-episodes 2"
    run = {"options": options, "steps": 640, "seeds": 2, "eval_every": 160}
    about = {"options": "--env gymnax::CartPole-v1", "runs": {"ppo": run}}
    monkeypatch.setattr(learning, "TASKS", {"cartpole": about})
    (agent,) = learning.agents()
    monkeypatch.setattr("sys.argv", ["learning.py"])
    learning.main()
    assert learning.is_complete(agent)
    values = results.load(agent.result)["values"]
    assert values["steps"] == 640 and len(values["returns"]) == len(values["mmer"]) == 2
    assert values["curve"]["steps"] == [160, 320, 480, 640]
    assert learning.measured(agent)["returns"].tolist() == values["returns"]
    # The run is of this command alone, and it is not deleted where another one begins.
    assert not learning.is_complete(dataclasses.replace(agent, options=f"{options} --gamma 0.9"))
    with FileLock(agent.run_dir / LOCK_FILE), pytest.raises(SystemExit, match="in use by another"):
        learning.set_aside(agent)
    learning.set_aside(agent)
    assert (agent.run_dir.parent / "ppo-old-1" / "metrics.jsonl").exists()
    learning.main()  # it is done: nothing is trained
    assert not agent.run_dir.exists()


def test_products_of_a_program_are_counted_as_often_as_they_run():
    import floor
    import jax
    import jax.numpy as jnp

    def program(x, w):
        def step(x, _):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(step, x, length=5)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return jax.jit(lambda x: (x @ w.T).sum())(x)

    traced = jax.make_jaxpr(jax.vmap(program, in_axes=(0, None)))(
        jnp.ones((3, 2, 4)), jnp.ones((4, 4))
    )
    products = floor.products_of(traced.jaxpr)
    assert sum(products.values()) == 5 + 2 + 1
    assert floor.flops_of(products) == (5 + 2 + 1) * 2 * (3 * 2) * 4 * 4
    kind = ((3, 2, 4), (4, 7), (((2,), (0,)), ((), ())))
    assert floor.flops_of_one(*kind) == 2 * 3 * 2 * 4 * 7
    assert floor.bytes_of_one(*kind) == 4 * (3 * 2 * 4 + 4 * 7 + 3 * 2 * 7)
    kind = ((5, 3, 2), (5, 2, 4), (((2,), (1,)), ((0,), (0,))))
    assert floor.flops_of_one(*kind) == 2 * 5 * 3 * 2 * 4


def worker_of(*code):
    return [sys.executable, "-c", "; ".join(("import json, sys", *code))]


SAYS = "print(json.dumps({'compile': 1.0}), flush=True)"
TRAINS = "sys.stdin.readline(); print(json.dumps({'sps': 2.0, 'peak_mib': 3}), flush=True)"
DIES = "raise ValueError('no such environment')"


def test_workers_take_turns():
    import throughput

    commands = {"a": worker_of(SAYS, TRAINS, TRAINS, SAYS), "b": worker_of(SAYS, TRAINS, TRAINS)}
    about, speeds = throughput.take_turns(commands, rounds=2)
    assert speeds == {"a": [2.0, 2.0], "b": [2.0, 2.0]}
    assert about == {name: {"compile": 1.0, "peak_mib": 3} for name in "ab"}


@pytest.mark.parametrize("code", [[DIES], [SAYS, DIES], [SAYS, TRAINS, DIES]])
def test_a_worker_that_dies_is_named_with_its_last_line(code):
    import throughput

    commands = {"ours": worker_of(SAYS, TRAINS), "theirs": worker_of(*code)}
    with pytest.raises(SystemExit) as error:
        throughput.take_turns(commands, rounds=1)
    reason = "ValueError: no such environment"
    assert error.value.code == f"error: theirs ended with exit code 1: {reason}"


def test_devices_are_compared_by_their_number(monkeypatch):
    import devices

    def take_turns(commands, rounds):
        assert list(commands) == ["small, on 1", "small, on 2"]
        about = {name: {"compile": 1.0, "machine": {}, "versions": {}} for name in commands}
        return about, {"small, on 1": [10.0, 20.0], "small, on 2": [15.0, 40.0]}

    kept = {}
    monkeypatch.setattr(devices, "SYSTEMS", {"small": ("ppo", {}, 1)})
    monkeypatch.setattr(devices, "take_turns", take_turns)
    monkeypatch.setattr(
        devices.results, "record", lambda path, values, *_, **__: kept.update(values)
    )
    monkeypatch.setattr("sys.argv", ["devices.py", "--rounds", "2"])
    devices.main()
    assert kept["devices"] == [1, 2] and kept["ratios"] == {"2": [1.75, 1.5, 2.0]}


def test_a_peer_that_cannot_be_installed_is_named(monkeypatch, tmp_path):
    import peers

    def run(command, **_):
        code = 1 if "install" in command else 0
        return subprocess.CompletedProcess(command, code, "", "ERROR: why\nERROR: No match\n")

    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers.subprocess, "run", run)
    with pytest.raises(SystemExit) as error:
        peers.interpreter_of("sbx")
    assert error.value.code == "error: sbx cannot be installed: ERROR: No match"


def test_ratios_are_paired_by_round():
    import throughput

    assert throughput.paired([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == [2.0, 1.0, 3.0]
    for system in throughput.SYSTEMS.values():
        assert (system.library == "ours") == (not system.against)
        assert system.library == "ours" or throughput.SYSTEMS[system.against].library == "ours"


def scaling_file(name, series):
    values = {"axis": name, "field": name, "rounds": 1, "seconds": 1.0, "series": {}}
    for number, own in enumerate(series, 1):
        sizes = [4, 16, 64]
        columns = {"sizes": sizes, "compile_seconds": [1.0] * 3, "memory_mib": [300.0 * number] * 3}
        for column, factor in (("lowest", 80), ("steps_per_second", 100), ("highest", 120)):
            columns[column] = [factor * number * size for size in sizes]
        values["series"][own] = columns
    results.record(f"scaling/{name}", values, "python benchmark/scaling.py", **ABOUT)


def test_scaling_measures_what_is_missing(monkeypatch, tmp_path):
    import scaling

    small = {"hidden_size": 8, "num_devices": 1, "num_minibatches": 1, "num_steps": 4}
    layer = {"cell": "gru", "hidden_size": 8}
    curves = {
        "environments": scaling.Curve("environments", "num_envs", (2,), {"ppo": ("ppo", small)}),
        "memories": scaling.Curve("steps", "num_steps", (4, 8), {"gru": (None, layer)}, 16),
    }
    monkeypatch.setattr(scaling, "make_curves", lambda: curves)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "code", lambda: {key: ABOUT[key] for key in ("commit", "dirty")})
    monkeypatch.setattr("sys.argv", ["scaling.py", "--rounds", "1", "--seconds", "0.01"])
    scaling.main()
    for name, own, sizes in (("environments", "ppo", [2]), ("memories", "gru", [4, 8])):
        entry = results.load(f"scaling/{name}")
        columns = entry["values"]["series"][own]
        assert entry["command"].endswith(f"--only {name} --rounds 1 --seconds 0.01")
        assert columns["sizes"] == sizes
        assert all(len(columns[key]) == len(sizes) for key in scaling.COLUMNS)
        assert min(columns["steps_per_second"]) > 0
        assert (columns["memory_mib"][0] > 100) == (own == "ppo")  # the layer has next to nothing
    started = []

    def measure(curve, name, sizes, *_):
        started.append((name, sizes))
        return [], "exit code 1: why"

    monkeypatch.setattr(scaling, "measure", measure)
    scaling.main()
    assert started == []  # all of it is done
    monkeypatch.setattr("sys.argv", ["scaling.py", "--only", "memories"])
    with pytest.raises(SystemExit, match="2 points could not be measured"):
        scaling.main()  # with other settings nothing is
    assert started == [("gru", [4, 8])]


def test_a_point_that_fails_is_named_with_its_reason():
    import scaling

    curve = scaling.Curve("steps", "num_steps", (4,), {"x": (None, {"cell": "gru"})}, 16)
    answers, reason = scaling.measure(curve, "x", (4,), 1, 0.01)
    assert answers == [] and reason.startswith("exit code 1: KeyError")


def test_scaling_is_drawn_from_result_files(monkeypatch, tmp_path):
    import scaling

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="nothing has been measured"):
        scaling.draw_all(tmp_path)
    scaling_file("seeds", ["ppo", "rppo gru", "dqn"])
    scaling_file("devices", ["ppo"])
    scaling_file("memories", ["gru", "mlstm", "gtrxl", "s5"])
    scaling.draw_all(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling.png", "scaling-memories.png"}


def test_every_scaling_curve_has_valid_configs():
    import scaling

    for curve in scaling.make_curves().values():
        for name, (script, _) in curve.series.items():
            for size in curve.sizes if script else ():
                fields = {"total_steps": 10**8} | curve.fields(name, size)
                importlib.import_module(f"algorithms.{script}").Config(**fields)


def test_labels_keep_their_distance():
    import scaling

    assert scaling.spread([0.5, 0.1, 0.52], 0.1) == pytest.approx([0.5, 0.1, 0.6])
