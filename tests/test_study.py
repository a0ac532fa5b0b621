"""study.py: the file as it is read, and studies on Ray that are interrupted in every way."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import learning
import pytest
import results
import study
from helpers import ROOT

from harness.errors import UsageError

# The process of the tests has used jax before it starts Ray; study.py has not.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

OPTIONS = "--hidden-size 8 --num-envs 4 --num-steps 8 --num-eval-envs 4 --eval-episodes 4"
LONG = {"steps": 25_600, "eval_every": 1_280}  # ten seconds: most of them for 20 checkpoints
TABLE = {
    "title": "as small as can be",
    "scripts": ["rppo"],
    "memories": ["gru"],
    "tasks": ["memorychain-10"],
    "options": OPTIONS,
    "steps": 640,
    "seeds": 2,
    "eval_every": 160,
}


def written(path, *more, **tables):
    """A study file with these tables, each `TABLE` with the given changes, and then more text."""
    lines = []
    for name, changes in tables.items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in (TABLE | changes).items())]
    path.write_text("\n".join([*lines, *more]))
    return path


# --- The file -------------------------------------------------------------------------------------


def test_the_studies_of_the_file_are_as_large_as_they_are_meant_to_be():
    studies = study.read_studies(study.FILE)
    sizes = {name: len(settings) for name, settings in studies.items()}
    assert sizes == {"small": 2, "memories": 26 * 20, "rates": 26 * 20, "values": 3 * 8 * 5}
    every = [setting for settings in studies.values() for setting in settings]
    assert len({setting.agent().result for setting in every}) == len(every)
    for setting in studies["rates"]:
        assert len({setting.candidate(rate).run_dir for rate in setting.choose}) == 3
    (pendulum,) = {x.script for x in studies["memories"] if x.task == "pendulum-masked"}
    assert pendulum == "rppo_continuous"
    assert {x.steps for x in studies["values"] if x.script == "rsacd"} == {200_000}


def test_scripts_accept_the_settings_of_the_file():
    """One memory of each task and script: the others differ in the name of --cell only."""
    every = [x for settings in study.read_studies(study.FILE).values() for x in settings]
    study.check_options(every)


def test_a_choice_has_seeds_of_its_own_and_one_device():
    (setting,) = [
        x
        for x in study.read_studies(study.FILE)["rates"]
        if x.id == "rates/memorychain-10/rppo-none"
    ]
    config = learning.config_of(setting.agent(3e-4))
    assert (config["seed"], config["num_seeds"], config["learning_rate"]) == (0, 5, 3e-4)
    assert (config["cell"], config["prev_action"], config["num_devices"]) == ("none", False, 1)
    config = learning.config_of(setting.candidate(1e-3))
    assert (config["seed"], config["num_seeds"], config["learning_rate"]) == (100, 3, 1e-3)


def test_values_hold_until_an_exception_or_the_study_itself_says_otherwise(tmp_path):
    first = {"tasks": ["memorychain-10", "memorychain-30"], "scripts": ["rppo", "drqn"]}
    path = written(
        tmp_path / "study.toml",
        "[first.except.memorychain-30]\nsteps = 1_280",
        "[first.except.drqn]\noptions = ''\nseeds = 1",
        "[second]\nlike = 'first'\nchoose = [1e-3]",
        first=first,
    )
    studies = study.read_studies(path)
    found = [(x.task, x.script, x.steps, x.seeds, x.options) for x in studies["first"]]
    assert found == [
        ("memorychain-10", "rppo", 640, 2, OPTIONS),
        ("memorychain-10", "drqn", 640, 1, ""),
        ("memorychain-30", "rppo", 1280, 2, OPTIONS),
        ("memorychain-30", "drqn", 1280, 1, ""),
    ]
    assert [x.choose for x in studies["first"]] == [()] * 4
    assert [x.choose for x in studies["second"]] == [(1e-3,)] * 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memories": ["gur"]}, "a memory must be one of .* mean 'gru'"),
        ({"tasks": ["memorychain-1"]}, "a task must be one of .* mean 'memorychain-10'"),
        ({"scripts": ["ppo"]}, "a script must be one of drqn, rppo, .* mean 'rppo'"),
        ({"step": 5}, "study tiny has no key 'step' .did you mean 'steps'"),
        ({"steps": "many"}, "steps must be a whole number above 0, got 'many'"),
        ({"seeds": 101}, "seeds must be at most 100"),
        ({"choose": [1]}, "choose takes learning rates, got 1"),
        ({"like": "tinny"}, "like must be one of tiny, got 'tinny' .did you mean 'tiny'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, changes, sentence):
    path = written(tmp_path / "study.toml", tiny=changes)
    with pytest.raises(UsageError, match=sentence):
        study.read_studies(path)


def test_other_mistakes_in_the_file_are_named(tmp_path):
    path = tmp_path / "study.toml"
    with pytest.raises(UsageError, match="no study file .*: No such file"):
        study.read_studies(path)
    path.write_text("[tiny]\nsteps = 5")
    with pytest.raises(UsageError, match="study tiny has no title"):
        study.read_studies(path)
    path.write_text("steps = 5")
    with pytest.raises(UsageError, match="has 'steps' outside of a study"):
        study.read_studies(path)
    path.write_text("[tiny")
    with pytest.raises(UsageError, match="is not TOML"):
        study.read_studies(path)
    for line, sentence in (
        ("[tiny.except.rpp]", "except must be one of .* mean 'rppo'"),
        (
            "[tiny.except.rppo]\nstps = 5",
            "tiny, except rppo has no key 'stps' .did you mean 'steps'",
        ),
        ("[tiny.except]\nrppo = 5", "write .tiny.except.rppo. with keys under it"),
    ):
        written(path, line, tiny={})
        with pytest.raises(UsageError, match=sentence):
            study.read_studies(path)


def test_names_select_settings():
    settings = study.read_studies(study.FILE)["memories"]
    gru = study.select(settings, ["gru"])
    assert {x.memory for x in gru} == {"gru"} and len(gru) == 26  # not mingru
    assert len(study.select(settings, ["popgym-repeatp", "memorychain-10"])) == 3 * 20
    assert len(study.select(settings, ["memorychain-10/rppo-lru"])) == 1
    assert study.select(settings, []) == settings
    with pytest.raises(UsageError, match="has no 'popgym-autoencode-esy' .did you mean 'popgym"):
        study.select(settings, ["popgym-autoencode-esy"])


def test_options_that_a_script_refuses_are_named_before_any_training(tmp_path):
    path = written(tmp_path / "study.toml", tiny={"options": "--num-minibatches 3"})
    with pytest.raises(UsageError, match="tiny/memorychain-10/rppo-gru would be refused: num_mini"):
        study.check_options(study.read_studies(path)["tiny"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["small2"], "the study must be one of small, .* mean 'small'"),
        ([], "which study. study.toml has small, memories"),
        (["small", "--jobs", "-1"], "--jobs must not be so small"),
        (["small", "mem-chain"], "study small has no 'mem-chain'"),
    ],
)
def test_mistakes_of_the_command_are_named(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr("sys.argv", ["study.py", *words])
    with pytest.raises(SystemExit) as error:
        study.main()
    assert error.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_without_ray_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(UsageError, match="study.py needs ray, .*: pip install ray"):
        study.carry_out(study.read_command(["small"]))


# --- The choice of a learning rate ----------------------------------------------------------------


def finish(studying, job, **result):
    studying.running = {"reference": job}
    studying.ray.get = lambda _: result
    studying._finish("reference", SimpleNamespace(say=lambda line: None))


def test_the_best_learning_rate_is_reported_on_seeds_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path = written(tmp_path / "study.toml", tiny={"choose": [1e-3, 3e-4, 3e-3, 1e-2]})
    settings = study.read_studies(path)["tiny"]
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=OSError))
    studying = study.Studying(ray, SimpleNamespace(), settings)
    candidates = list(studying.waiting)
    assert [job.rate for job in candidates] == [1e-3, 3e-4, 3e-3, 1e-2]
    studying.waiting.clear()
    for job, returns in zip(candidates, ([1.0, math.nan], [0.5, 0.5], [0.5, 0.5]), strict=False):
        finish(studying, job, values={"returns": returns})
        assert not studying.waiting
    finish(studying, candidates[-1], failed="all seeds diverged")
    (job,) = studying.waiting  # a lost seed is the worst, and of equals the first is taken
    assert job.rate == 3e-4 and not job.is_candidate and not studying.failed
    values = {"returns": [0.25], "median": 0.25, "worst": 0.25, "learning_rate": 3e-4}
    about = {"commit": "c0ef676c7615d544a54b2eb75b9513593aced03b", "dirty": False}
    about |= {"machine": {}, "versions": {}}
    assert not settings[0].is_done()
    finish(studying, job, values=values, cost={"seconds": 1.0}, about=about)
    choice = results.load(job.agent.result)["values"]["choice"]
    assert choice["learning_rates"] == [1e-3, 3e-4, 3e-3, 1e-2] and choice["returns"][3] is None
    assert settings[0].is_done() and settings[0].reported() == job.agent
    assert not study.Studying(ray, SimpleNamespace(), settings).waiting
    written(path, tiny={"choose": [3e-4]})
    assert not study.read_studies(path)["tiny"][0].is_done()  # it is another choice


def test_a_setting_fails_only_if_all_its_learning_rates_do(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path = written(tmp_path / "study.toml", tiny={"choose": [1e-3, 3e-4]})
    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=OSError))
    studying = study.Studying(ray, SimpleNamespace(), study.read_studies(path)["tiny"])
    for job in list(studying.waiting):
        studying.waiting.popleft()
        finish(studying, job, failed="all seeds diverged")
    assert not studying.waiting and studying.failed == ["memorychain-10/rppo-gru"]
    assert "0 of 1 done, 0 running, 1 failed" in str(studying)


# --- Processes ------------------------------------------------------------------------------------

SLEEPS = "import time; print('asleep', flush=True); time.sleep(60)"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot do this")
def test_a_script_ends_with_the_process_that_started_it(tmp_path):
    log = tmp_path / "log"
    code = f"import os, pathlib, study; study.start(['{sys.executable}', '-c', {SLEEPS!r}],"
    code += f"pathlib.Path({str(log)!r}), os.environ)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmark'}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    until(lambda: log.exists() and "\nasleep" in log.read_text())
    (child,) = children_of(parent.pid)
    parent.kill()
    parent.wait()
    until(lambda: not is_alive(child))


def children_of(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def is_alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.05)


# --- Studies on Ray -------------------------------------------------------------------------------


on_ray = pytest.mark.xdist_group("ray")  # starting it takes ten seconds


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node for one run, as if a shell had started it in the background."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # its processes inherit that
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    signal.signal(signal.SIGINT, handler)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function: the words of a command -> the files of its results, by name."""

    def run(*words, name="here"):
        folder = tmp_path / name
        monkeypatch.setattr(results, "RESULTS", folder / "results")
        monkeypatch.setattr("sys.argv", ["study.py", *words, "--runs", str(folder / "runs")])
        study.main()
        files = (folder / "results").rglob("*.json")
        return {str(file.relative_to(folder / "results")): file.read_bytes() for file in files}

    return run


def starts_of(folder):
    """The commands that trained in the runs below a folder."""
    logs = sorted(folder.rglob("*.log"))
    return [line for log in logs for line in log.read_text().splitlines() if line[:1] == "$"]


@on_ray
def test_a_study_trains_what_is_missing_and_nothing_twice(cluster, run, tmp_path, capsys):
    path = written(tmp_path / "study.toml", tiny={})
    files = run("tiny", "--file", str(path))
    name = "tiny/memorychain-10/rppo-gru"
    assert files.keys() == {f"study/{name}.json", f"study-cost/{name}.json"}
    values = results.load(f"study/{name}")["values"]
    assert values["steps"] == 640 and values["curve"]["steps"] == [160, 320, 480, 640]
    assert len(values["returns"]) == len(values["mmer"]) == len(values["curve"]["returns"]) == 2
    assert (values["memory"], values["task"]) == ("gru", "memorychain-10")
    assert values["learning_rate"] == 1e-3 and 500 < values["num_params"] < 2000
    assert not {"seconds", "steps_per_second"} & values.keys()
    cost = results.load(f"study-cost/{name}")["values"]
    assert min(cost[key] for key in ("seconds", "steps_per_second", "compile_seconds")) > 0
    assert cost["memory_mb"] > 50
    assert "1 of 1 done" in capsys.readouterr().out

    assert run("tiny", "--file", str(path)) == files
    (tmp_path / "here" / "results" / "study" / f"{name}.json").unlink()
    # From its run, which is complete.
    assert run("tiny", "--file", str(path), "--address", cluster.address) == files
    assert len(starts_of(tmp_path)) == 1


@on_ray
def test_a_study_is_interrupted_and_continued(cluster, run, tmp_path):
    path = written(tmp_path / "study.toml", tiny=LONG)
    here = tmp_path / "here"
    code = f"import pathlib, results, study; results.RESULTS = pathlib.Path({str(here)!r}, "
    code += "'results'); study.main()"
    words = ["tiny", "--file", str(path), "--address", cluster.address]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmark'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--runs", str(here / "runs")],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    until(lambda: list(here.rglob("checkpoints/*.json")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 130, (printed, said)
    assert "rppo-gru starts" in printed and "the same command continues" in said
    (log,) = here.rglob("*.log")
    assert "stopped; the last checkpoint is of step" in log.read_text()
    begun = json.loads(next(here.rglob("config.json")).read_text())

    run(*words)
    assert json.loads(next(here.rglob("config.json")).read_text()) == begun
    first, second = starts_of(here)
    assert "--resume" not in first and "--resume" in second


@on_ray
@pytest.mark.slow
def test_a_node_is_killed_and_the_results_are_the_same_to_the_bit(cluster, run, tmp_path, capsys):
    path = written(tmp_path / "study.toml", tiny=LONG | {"memories": ["gru", "lstm"]})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    words = ("tiny", "--file", str(path), "--address", cluster.address)
    expected = run(*words, name="whole")
    assert [len(starts_of(tmp_path / "whole")), len(expected)] == [2, 4]

    there = tmp_path / "killed" / "runs"
    begun = {}

    def kill():
        until(lambda: len({x.parent for x in there.rglob("checkpoints/*.json")}) == 2)
        begun.update({file: file.read_text() for file in there.rglob("config.json")})
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = run(*words, name="killed")
    killer.join()
    learned = {name: text for name, text in expected.items() if name.startswith("study/")}
    assert {name: text for name, text in found.items() if name in learned} == learned
    assert found.keys() == expected.keys()
    # Two runs were begun, and one of them was continued.
    assert {file: file.read_text() for file in there.rglob("config.json")} == begun
    assert len(begun) == 2
    starts = starts_of(there)
    assert (len(starts), sum("--resume" in line for line in starts)) == (3, 1)
    assert "2 of 2 done" in capsys.readouterr().out
