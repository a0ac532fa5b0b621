"""The command line: what it accepts, what --help shows, and what it takes from a run."""

import dataclasses
import importlib
import json
import re

import pytest
from helpers import SCRIPTS, as_command, tiny, words

from algorithms import dqn, ppo, rppo
from harness.options import COMMON, explain_fields, parse
from harness.run_dir import open_run_dir


def config_of(module, *args):
    with as_command(module.__name__.split(".")[1], *args):
        return parse(module.Config)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("200000", 200_000),
        ("200_000", 200_000),
        ("2e5", 200_000),
        ("2E+5", 200_000),
        ("20e4", 200_000),
        ("2000000e-1", 200_000),
        ("1.5e6", 1_500_000),
        ("123456789e-0", 123_456_789),
    ],
)
def test_whole_numbers_are_written_in_several_ways(text, number):
    config = config_of(ppo, "--total-steps", text, "--num-envs", "1e3", "--num-minibatches", "1e3")
    assert (config.total_steps, config.num_envs) == (number, 1000)
    assert type(config.total_steps) is int


def test_the_command_line_without_options_is_the_config_without_arguments():
    for script in SCRIPTS:
        module = importlib.import_module(f"algorithms.{script}")
        assert config_of(module) == module.Config()


def test_every_kind_of_option_is_read():
    words = "--env-kwargs gravity 9.0 max_steps_in_episode 1e2 --mask 0 1 --no-anneal-lr --gamma 1"
    config = config_of(rppo, *words.split(), "--log", "console", "file", "--cell=lstm", "--seed=3")
    assert config.env_kwargs == {"gravity": 9.0, "max_steps_in_episode": 100}
    assert type(config.env_kwargs["gravity"]) is float
    assert config.mask == ("0", "1") and config.log == ("console", "file")
    assert (config.anneal_lr, config.gamma, config.cell, config.seed) == (False, 1.0, "lstm", 3)
    assert config_of(ppo, "--episodes", "7") == config_of(ppo, "--eval_episodes", "7")
    assert config_of(ppo, "--sample") == ppo.Config(eval_policy="sample")


def test_a_run_gives_the_defaults_and_options_are_added_to_its_own(tmp_path):
    options = {"max_steps_in_episode": 50, "gravity": 5.0}
    config = ppo.Config(env_kwargs=options, gamma=0.5, run_dir=str(tmp_path / "run"), num_seeds=2)
    open_run_dir(config)[1].release()
    run = str(tmp_path / "run")
    resumed = config_of(ppo, "--resume", run, "--log", "file")
    config = dataclasses.replace(config, run_dir="")  # which is of the command, not of the run
    assert resumed == dataclasses.replace(config, resume=run, log=("file",))
    shown = config_of(ppo, f"--evaluate={run}", "--env_kwargs", "gravity", "7.0", "--sample")
    merged = {"max_steps_in_episode": 50, "gravity": 7.0}
    changes = {"evaluate": run, "env_kwargs": merged, "eval_policy": "sample"}
    assert shown == dataclasses.replace(config, **changes)


def test_evaluating_the_last_checkpoint_is_the_default_also_of_a_run_that_began_with_a_best(
    tmp_path,
):
    run = tmp_path / "run"
    open_run_dir(tiny(ppo, run_dir=str(run)))[1].release()
    about = json.loads((run / "config.json").read_text())
    about["config"] |= {"init_from": "another", "best": True, "env": "gymnax::CartPole-v1"}
    about["config"]["env_kwargs"] = {}
    (run / "config.json").write_text(json.dumps(about))
    assert config_of(ppo, "--resume", str(run)).best
    assert not config_of(ppo, "--evaluate", str(run)).best


# --- Help -----------------------------------------------------------------------------------------


def help_of(module, capsys):
    with pytest.raises(SystemExit) as ended:
        config_of(module, "--help")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("module", [rppo, dqn])
def test_help_is_grouped_as_the_config_is_and_fits_the_terminal(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(module, capsys)
    assert max(map(len, text.splitlines())) <= 80
    _, *parts = re.split(r"^\W*(.*?) ?options\W*$", text, flags=re.M)  # with and without boxes
    heads, boxes = parts[::2], [words(box) for box in parts[1::2]]
    assert heads == ["", "Common", "Environment and networks", "Algorithm", "Experiment"]
    fields = [field.name for field in dataclasses.fields(module.Config)]
    flags = ["--" + name.replace("_", "-") + " " for name in COMMON if name in fields]
    places = [boxes[1].index(flag) for flag in flags]
    assert places == sorted(places) and len(places) >= 12
    assert "--gamma " in boxes[3] and "--hidden-size " in boxes[2] and "--eval-every " in boxes[4]


def test_comments_are_read_from_the_class_that_has_the_last_word():
    explained = explain_fields(dqn.Config)
    assert explained["total_steps"][0] == "Experiment"
    assert explained["gamma"] == ("Algorithm", "discount per step")
    comment = "environment, as namespace::id or file.py::name"
    assert explained["env"] == ("Environment and networks", comment)
    assert explained.keys() == {field.name for field in dataclasses.fields(dqn.Config)}
