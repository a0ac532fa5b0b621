"""tune.py: the search as it is read, trials that end early, and a study that is killed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import learning
import numpy as np
import pytest
import results
from helpers import ROOT

from algorithms import rppo
from harness.errors import UsageError

optuna = pytest.importorskip("optuna")

import tune  # noqa: E402

LEARNING_RATE = "learning_rate log 1e-4 1e-2"


def read(*words, script="rppo.py"):
    return tune.read_command([script, *words])


# --- The command ----------------------------------------------------------------------------------


def test_a_search_has_the_types_of_the_fields():
    spaces = read(
        "--search",
        LEARNING_RATE,
        "num-steps choice 32 1e2",
        "hidden_size uniform 16 64",
        "anneal_lr choice true false",
        "cell choice gru s5",
    ).spaces
    kinds = optuna.distributions
    assert spaces == {
        "learning_rate": kinds.FloatDistribution(1e-4, 1e-2, log=True),
        "num_steps": kinds.CategoricalDistribution([32, 100]),
        "hidden_size": kinds.IntDistribution(16, 64),
        "anneal_lr": kinds.CategoricalDistribution([True, False]),
        "cell": kinds.CategoricalDistribution(["gru", "s5"]),
    }


def test_what_is_not_for_tune_goes_to_the_script_unchanged():
    words = "--env gymnax::CartPole-v1 --mask velocity --total-steps 200_000 --no-prev-action"
    command = read(*words.split(), "--search", LEARNING_RATE, "--trials", "7", "--gae-lambda=0.9")
    assert command.words == [*words.split(), "--gae-lambda=0.9"]
    assert (command.trials, command.seed, command.seeds) == (7, 1000, 3)
    assert command.config.eval_every == 20_000
    assert command.own == {"learning_rate": rppo.Config.learning_rate}


def test_the_command_of_the_document_is_understood():
    text = (ROOT / "benchmark" / "README.md").read_text()
    (words,) = re.findall(r"^python benchmark/tune.py (.+?[^\\])$", text, re.DOTALL | re.MULTILINE)
    command = tune.read_command(shlex.split(words.replace("\\\n", "")))
    assert list(command.spaces) == ["learning_rate", "num_steps", "ent_coef"]
    assert command.words[-2:] == ["--total-steps", "200_000"]


def test_values_become_options_of_the_script():
    params = {"gamma": 0.99995, "num_steps": 64, "anneal_lr": False, "prev_action": True}
    words = ["--gamma", "0.99995", "--num-steps", "64", "--no-anneal-lr", "--prev-action"]
    assert tune.to_words(params) == words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--search", "learning_rat log 1e-4 1"], "no option 'learning_rat' .* 'learning_rate'"),
        (["--search", "learning_rate lgo 1e-4 1"], "must be one of log, uniform.* mean 'log'"),
        (["--search", "learning_rate log 0.01"], "takes LOW greater than 0 and HIGH"),
        (["--search", "learning_rate log 1 0.1"], "takes LOW greater than 0 and HIGH"),
        (["--search", "learning_rate uniform -1 1"], "learning_rate must be greater than 0"),
        (["--search", "gamma uniform 0.9 1.1"], "gamma must be between 0 and 1, got 1.1"),
        (["--search", "num_steps choice 32 6.5"], "num_steps must be a whole number, got '6.5'"),
        (["--search", "cell choice gru ltsm"], "cell must be one of .* mean 'lstm'"),
        (["--search", "cell uniform gru lstm"], "cell is no number"),
        (["--search", "learning_rate"], "is not complete: write"),
        (["--search", "total_steps log 1e4 1e5"], "total_steps is not to be searched"),
        (["--search", "cell_kwargs choice a b"], "cell_kwargs is not to be searched"),
        (["--search", LEARNING_RATE, LEARNING_RATE], "learning_rate is searched twice"),
        (["--search", LEARNING_RATE, "--learning-rate", "1"], "is given and searched"),
        (["--search", LEARNING_RATE, "--num-seeds", "5"], "use --seeds"),
        (["--search", LEARNING_RATE, "--seed", "0"], "those below 100 are for results"),
        (["--search", LEARNING_RATE, "--seed", "-5"], "those below 100 are for results"),
        (["--search", LEARNING_RATE, "--seed", str(2**40)], "would refuse every trial: seed must"),
        (["--search", LEARNING_RATE, "--trials", "-1"], "--trials must be 0 or more"),
        (["--search", LEARNING_RATE, "--objective", "men"], "did you mean 'mean'"),
        (["--search", LEARNING_RATE, "--eval-policy", "sample"], "compares greedy returns"),
        (["--search", LEARNING_RATE, "--env", "gymnax::CartPol-v1"], "mean 'gymnax::CartPole-v1"),
        (["--search", "num_minibatches choice 3 5"], "would refuse every trial: num_minibatches"),
    ],
)
def test_mistakes_are_named_before_any_training(words, sentence):
    with pytest.raises(UsageError, match=sentence):
        read(*words)


def test_scripts_are_named_and_memories_belong_to_those_that_have_them():
    with pytest.raises(UsageError, match="no script 'rpop.py' .did you mean 'rppo.py'"):
        read("--search", LEARNING_RATE, script="rpop.py")
    with pytest.raises(UsageError, match="ppo.py has no memory, so no --cell: rppo.py has"):
        read("--search", "cell choice gru s5", script="ppo.py")


def test_without_optuna_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match="tune.py needs optuna, .*: pip install optuna"):
        read("--search", LEARNING_RATE)


def test_no_seed_of_a_result_is_one_that_chooses():
    files = list((results.RESULTS / "learning").rglob("*.json"))
    numbers = [json.loads(file.read_text())["values"]["num_seeds"] for file in files]
    numbers += [agent.seeds for agent in learning.agents() + learning.memories()]
    assert len(files) > 10 and rppo.Config.seed == 0
    assert max(numbers) <= tune.RESERVED <= read("--search", LEARNING_RATE).seed


def test_a_file_of_ones_own_is_tuned(tmp_path):
    path = tmp_path / "idea.py"
    text = (ROOT / "algorithms" / "ppo.py").read_text()
    path.write_text(
        text.replace("    gamma: float", "    zeal: float = 1.0  # new\n    gamma: float")
    )
    assert "zeal" in read("--search", "zeal uniform 1 2", script=str(path)).spaces


# --- A trial --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "value", "with_lost"),
    [("mean", 4, -np.inf), ("median", 2, 1), ("worst", 1, -np.inf)],
)
def test_objectives_count_a_seed_that_diverged_as_the_worst(objective, value, with_lost):
    assert tune.score([1.0, 9.0, 2.0], objective) == value
    assert tune.score([1.0, 9.0, None], objective) == with_lost


@pytest.fixture
def training(tmp_path):
    """A function: the returns of each evaluation -> a trial in training that has reported them."""
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(1))
    first = study.ask({"learning_rate": optuna.distributions.FloatDistribution(0, 1)})
    for index in range(1, 11):
        first.report(10.0 * index, index)
    study.tell(first, 100.0)
    config = SimpleNamespace(total_steps=1000, eval_every=100)
    command = SimpleNamespace(objective="mean", config=config)

    def make(*evaluations, code="import time; time.sleep(60)"):
        trial = study.ask({"learning_rate": optuna.distributions.FloatDistribution(0, 1)})
        made = tune.Training(command, study, trial, tmp_path)
        made.run_dir.mkdir()
        records = [
            {"step": 96 * (i + 1), "time": 0.0, tune.GREEDY: returns}
            for i, returns in enumerate(evaluations)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (made.run_dir / "metrics.jsonl").write_text(lines)
        with open(made.log, "w") as log:
            made.process = subprocess.Popen([sys.executable, "-c", code], stderr=log)
        return made

    return make


def until_over(training):
    for _ in range(600):
        if training.poll():
            return training.study.trials[training.trial.number]
        time.sleep(0.05)
    raise AssertionError("the trial does not end")


def test_a_trial_that_falls_behind_is_ended_and_one_that_leads_is_not(training):
    behind = training([11.0, 13.0], [8.0, 6.0])
    trial = until_over(behind)
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert trial.intermediate_values == {1: 12.0, 2: 7.0}
    assert behind.process.returncode == -signal.SIGINT
    ahead = training([11.0, 13.0], [28.0, 26.0], code="")
    trial = until_over(ahead)
    assert (trial.state, trial.value) == (optuna.trial.TrialState.COMPLETE, 27.0)
    assert trial.user_attrs["returns"] == [28.0, 26.0]


def test_a_trial_that_diverges_is_the_worst(training):
    trial = until_over(training([11.0, 13.0], [30.0, None]))
    assert (trial.state, trial.value) == (optuna.trial.TrialState.COMPLETE, -np.inf)
    exits = "import sys; sys.exit('error: training diverged: losses/td_loss is nan')"
    trial = until_over(training(code=exits))
    assert (trial.state, trial.value) == (optuna.trial.TrialState.COMPLETE, -np.inf)


def test_a_trial_that_fails_is_named_with_its_log(training, capsys):
    trial = until_over(training(code="import sys; sys.exit('no more memory')"))
    assert trial.state == optuna.trial.TrialState.FAIL
    assert "failed with exit code 1" in (said := capsys.readouterr().out)
    assert "no more memory" in said and ".log" in said
    study = SimpleNamespace(
        trials=[trial], get_trials=lambda states: [trial] * (trial.state in states)
    )
    tune.report(SimpleNamespace(objective="mean"), study, "runs/tune/mine")
    assert "0 complete, 0 pruned, 0 refused, 1 failed" in capsys.readouterr().out


REFUSES = "import sys; print('error: {}', file=sys.stderr); sys.exit(2)"


def test_a_full_disk_is_named_and_the_trial_not_repeated(training):
    sentence = "run directory runs/x cannot be written: No space left on device"
    for is_resumed in (False, True):
        made = training(code=REFUSES.format(sentence))
        made.is_resumed = is_resumed
        assert until_over(made).state == optuna.trial.TrialState.FAIL
        assert made.run_dir.exists() and "No space left" in made.log.read_text()


def test_a_trial_waits_for_the_process_that_has_its_directory(training):
    for sentence in ("is in use by another process", "exists; choose another with --run-dir"):
        made = training(code=REFUSES.format(f"run directory runs/x {sentence}"))
        made.process.wait()
        assert not made.poll() and made.process is None and made.state == "running"
        assert made.run_dir.exists()


def test_what_cannot_be_continued_is_kept_and_begun_again(training, capsys):
    made = training([1.0, 2.0], code=REFUSES.format("jax was 0.9.2 and is 0.11.2"))
    made.is_resumed = True
    starts = []
    made.start = lambda: starts.append(made.run_dir.exists())
    made.process.wait()
    assert not made.poll() and starts == [False]
    old = made.run_dir.with_name(f"{made.run_dir.name}-old-1")
    assert "metrics.jsonl" in [path.name for path in old.iterdir()]
    (said,) = capsys.readouterr().out.splitlines()
    assert "begins again" in said and said.endswith("jax was 0.9.2 and is 0.11.2")


# --- A study --------------------------------------------------------------------------------------

STATES = optuna.trial.TrialState


def test_a_study_runs_again_what_was_killed_and_nothing_of_another_command(tmp_path):
    command = read("--search", LEARNING_RATE)
    study = tune.open_study(command, tmp_path)
    first = tune.Training(command, study, study.ask(command.spaces), tmp_path)
    assert first.trial.params == command.own  # the script's own values come first
    study.ask(command.spaces)  # killed before it had a directory

    study = tune.open_study(command, tmp_path)
    assert [trial.state for trial in study.trials] == [STATES.FAIL] * 2 + [STATES.WAITING] * 2
    repeated = tune.Training(command, study, study.ask(command.spaces), tmp_path)
    assert (repeated.run_dir, repeated.trial.params) == (first.run_dir, command.own)
    tuning = tune.Tuning(command, study, tmp_path)
    command.trials = 2
    assert tuning.is_due()  # the other one that was killed
    tune.Training(command, study, study.ask(command.spaces), tmp_path)
    assert not tuning.is_due()

    other = read("--search", LEARNING_RATE, "--objective", "worst")
    with pytest.raises(UsageError, match="begun with objective 'mean', not 'worst': .* --name"):
        tune.open_study(other, tmp_path)


def test_trials_are_told_what_optuna_knows_of_them(tmp_path):
    command = read("--search", LEARNING_RATE, "gae_lambda uniform 0.912345 0.912346")
    study = tune.open_study(command, tmp_path)
    for _ in range(3):
        params = study.ask(command.spaces).params
        assert params["learning_rate"] == float(f"{params['learning_rate']:.4g}")
        assert 0.912345 <= params["gae_lambda"] <= 0.912346
        words = tune.to_words(params)
        assert [float(word) for word in words[1::2]] == list(params.values())


def start(folder, *words):
    command = [sys.executable, str(ROOT / "benchmark" / "tune.py"), "ppo.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def test_an_interrupted_study_continues_to_its_end(tmp_path):
    """Two trials: one that the script refuses, and one that is stopped and continued."""
    words = "--num-envs 4 --num-steps 8 --hidden-size 8 --num-devices 1 --env gymnax::CartPole-v1"
    words += " --eval-episodes 4 --num-eval-envs 4 --env-kwargs max_steps_in_episode 20"
    words += " --total-steps 25_600 --eval-every 3_200 --seeds 2 --trials 2 --parallel 2"
    words = [*words.split(), "--name", "mine", "--search", "num_minibatches choice 4 7"]
    folder = tmp_path / "runs" / "tune" / "mine"

    process = start(tmp_path, *words)
    while not list(folder.glob("*/checkpoints/*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command continues" in said
    (run,) = {path.parents[1] for path in folder.glob("*/checkpoints/*.json")}
    begun = (run / "config.json").read_text()

    process = start(tmp_path, *words)
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert (run / "config.json").read_text() == begun  # it was continued, not begun anew
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'study.db'}")
    by_state = {trial.state: trial for trial in study.trials}
    best = by_state[STATES.COMPLETE]
    assert best.params == {"num_minibatches": 4} and best.user_attrs["step"] == 25_600
    assert len(best.user_attrs["returns"]) == 2 and len(best.intermediate_values) == 8
    refused = by_state[STATES.PRUNED].user_attrs["refused"]
    assert refused == "num_minibatches (7) must divide a batch (32)"
    assert "1 complete, 0 pruned, 1 refused" in printed
    assert printed.strip().endswith("--num-minibatches 4 --num-seeds 5")
    config = json.loads(begun)["config"]
    assert (config["seed"], config["num_seeds"], config["log"]) == (1000, 2, ["file"])
