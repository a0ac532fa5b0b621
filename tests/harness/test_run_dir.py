"""Run directories: taken, unwritable, of another script, of another version."""

import contextlib
import copy
import json
import os
import subprocess
from dataclasses import replace

import jax
import pytest
from helpers import ROOT, as_command, disk, tiny, words

from algorithms import ppo, rppo
from experiment import UsageError, show
from harness.options import launch, parse
from harness.run_dir import (
    forget_after,
    is_running,
    load_config,
    open_run_dir,
    provenance,
    save_evaluation,
    write_whole,
)

CONFIG = tiny(ppo)


def test_a_run_directory_holds_the_config_and_where_it_comes_from(tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path / "a" / "run"), log=("file",))
    path, lock = open_run_dir(config)
    of_the_command = {"run_dir": "", "compilation_cache": ppo.Config.compilation_cache}
    assert load_config(str(path), ppo.Config) == replace(config, **of_the_command)
    saved = json.loads((path / "config.json").read_text())
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode == 0:
        assert saved["git"]["commit"] == head.stdout.strip()
        assert isinstance(saved["git"]["dirty"], bool)
    assert saved["packages"]["jax"] == jax.__version__ and saved["machine"]["devices"]
    elsewhere = tmp_path / "x.py"  # not under version control
    elsewhere.write_text("")
    assert provenance(elsewhere)["git"] == {"commit": None, "dirty": None}
    lock.release()


def test_a_run_without_a_name_gets_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {str(open_run_dir(CONFIG)[0]) for _ in range(5)}  # started in the same second
    assert len(names) == 5
    assert all(name.startswith("runs/test-Counting__ppo__seed0__") for name in names)


def test_unusable_run_directories(tmp_path):
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "run"
    for path, message in (
        (tmp_path, "exists"),
        (below_a_file, "cannot be written: Not a directory"),
    ):
        with pytest.raises(UsageError, match=message):
            open_run_dir(replace(CONFIG, run_dir=str(path)))
    taken, lock = open_run_dir(replace(CONFIG, run_dir=str(tmp_path / "taken")))
    with pytest.raises(UsageError, match="exists; choose another with --run-dir"):
        open_run_dir(replace(CONFIG, run_dir=str(taken)))
    with pytest.raises(UsageError, match="is in use by another process"):
        open_run_dir(replace(CONFIG, resume=str(taken), run_dir=str(taken)))
    lock.release()
    open_run_dir(replace(CONFIG, resume=str(taken), run_dir=str(taken)))[1].release()
    (tmp_path / "empty").mkdir()  # what a process that was killed at once may leave
    open_run_dir(replace(CONFIG, run_dir=str(tmp_path / "empty")))[1].release()


def test_run_directories_without_permission(tmp_path):
    if os.geteuid():
        tmp_path.chmod(0o500)
        where = contextlib.nullcontext()
    else:
        where = disk(tmp_path, "ro")  # root may write everywhere else
    message = "cannot be written: (Permission denied|Read-only file system)"
    with where, pytest.raises(UsageError, match=message):
        open_run_dir(replace(CONFIG, run_dir=str(tmp_path / "run")))
    if os.geteuid():
        tmp_path.chmod(0o700)


def test_configs_that_do_not_fit(tmp_path):
    run_dir = tmp_path / "run"
    open_run_dir(replace(CONFIG, run_dir=str(run_dir)))[1].release()
    with pytest.raises(UsageError, match=r"is a run of ppo.py, not of rppo.py"):
        load_config(str(run_dir), rppo.Config)
    with pytest.raises(UsageError, match="no run in 'nowhere': .*No such file"):
        load_config("nowhere", ppo.Config)
    with pytest.raises(UsageError, match=r"was trained with gamma = 0.99, not with 0.9"):
        open_run_dir(replace(CONFIG, resume=str(run_dir), gamma=0.9))
    with pytest.raises(UsageError, match=r"was trained with num_seeds = 1, not with 2"):
        other = replace(CONFIG, evaluate=str(run_dir), num_seeds=2)
        show(other, CONFIG.make_env(), ppo.init, ppo.evaluate)
    saved = json.loads((run_dir / "config.json").read_text())
    of_code = "was begun with another version of ppo.py; it was made at commit"
    of_jax = "was begun with jax 0.5.0, not .*: install that, or start a new run"
    for part, name, value, message in (
        ("sources", "ppo.py", "0", of_code),
        ("packages", "jax", "0.5.0", of_jax),
    ):
        other = saved | {part: saved[part] | {name: value}, "git": {"commit": "abc", "dirty": True}}
        (run_dir / "config.json").write_text(json.dumps(other))
        with pytest.raises(UsageError, match=message):
            open_run_dir(replace(CONFIG, resume=str(run_dir), run_dir=str(run_dir)))
    saved["config"]["old_option"] = 1
    (run_dir / "config.json").write_text(json.dumps(saved))
    message = "another version of ppo.py: its config differs in old_option"
    with pytest.raises(UsageError, match=message):
        load_config(str(run_dir), ppo.Config)
    saved["config"].pop("old_option")
    saved["config"].pop("export")  # of the command: a run may be older than it
    (run_dir / "config.json").write_text(json.dumps(saved))
    assert load_config(str(run_dir), ppo.Config).export == ()
    saved["config"]["env"] = "gymnax::Pendulum-v1"
    (run_dir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="is not valid here: gymnax::Pendulum-v1 has no option"):
        load_config(str(run_dir), ppo.Config)


# An edit of config.json, as the path to a value and the value, and a part of the sentence.
GONE = object()
EDITS = [
    (("seed",), "0", "seed must be a whole number, got '0'"),
    (("seed",), 0.5, "seed must be a whole number, got 0.5"),
    (("seed",), None, "seed must be a whole number, got None"),
    (("seed",), -1, "seed must be 0 or more, got -1"),
    (("seed",), 2**40, "seed must be less than 2**31 - num_seeds"),
    (("num_seeds",), True, "num_seeds must be a whole number, got True"),
    (("num_envs",), [4], "num_envs must be a whole number, got (4,)"),
    (("num_envs",), {}, "num_envs must be a whole number, got {}"),
    (("num_envs",), 0, "num_envs must be greater than 0, got 0"),
    (("num_envs",), 2**40, "num_envs must be less than 2**31, got 1099511627776"),
    (("num_minibatches",), 3, "num_minibatches (3) must divide a batch (32)"),
    (("hidden_size",), "abc", "hidden_size must be a whole number, got 'abc'"),
    (("total_steps",), 1e30, "total_steps must be a whole number, got 1e+30"),
    (("total_steps",), 10**30, "a run can count to 2,147,483,647"),
    (("total_steps",), -64, "total_steps must be greater than 0, got -64"),
    (("gamma",), "0.9", "gamma must be a number, got '0.9'"),
    (("gamma",), False, "gamma must be a number, got False"),
    (("gamma",), 2, "gamma must be between 0 and 1, got 2"),
    (("gamma",), float("nan"), "gamma must be finite, got nan"),
    (("learning_rate",), float("inf"), "learning_rate must be finite, got inf"),
    (("anneal_lr",), 1, "anneal_lr must be true or false, got 1"),
    (("anneal_lr",), "no", "anneal_lr must be true or false, got 'no'"),
    (("env",), 7, "env must be text, got 7"),
    (("env",), "gymnax::Cartpole-v1", "(did you mean 'gymnax::CartPole-v1'?)"),
    (("env_kwargs",), None, "env_kwargs must be names with a number, true, false or text each"),
    (("env_kwargs",), ["terminal_every", 5], "env_kwargs must be names with a number"),
    (("env_kwargs",), {"terminal_every": [5]}, "env_kwargs must be names with a number"),
    (("env_kwargs",), {"terminal_every": None}, "env_kwargs must be names with a number"),
    (("mask",), "velocity", "mask must be a list, each of them text, got 'velocity'"),
    (("mask",), [1], "mask must be a list, each of them text, got (1,)"),
    (("log",), "file", "each of log must be one of console, file, tensorboard"),
    (("log",), ["file", "fiel"], "got 'fiel' (did you mean 'file'?)"),
    (("log",), [["file"]], "each of log must be one of console, file, tensorboard"),
    (("wandb_mode",), "on", "wandb_mode must be one of online, offline, got 'on'"),
    (("eval_policy",), None, "eval_policy must be one of greedy, sample, both, got None"),
    (("gamma",), GONE, "another version of ppo.py: its config differs in gamma"),
    (("gama",), 0.9, "another version of ppo.py: its config differs in gama"),
]
OUTER_EDITS = [
    (("config",), None, "'config' is None, not of type dict"),
    (("config",), [1], "'config' is [1], not of type dict"),
    (("config",), GONE, "it has no 'config'"),
    (("final_step",), GONE, "it has no 'final_step'"),
    (("final_step",), "64", "'final_step' is '64', not of type int"),
    (("final_step",), 0, "'final_step' is 0, not greater than 0"),
    (("script",), GONE, "it has no 'script'"),
    (("script",), 3, "'script' is 3, not of type str"),
    (("script",), "rppo", "is a run of rppo.py, not of ppo.py"),
    (("sources",), [], "'sources' is [], not of type dict"),
    (("packages",), None, "'packages' is None, not of type dict"),
    (("git",), "abc", "'git' is 'abc', not of type dict"),
    (("extended",), {}, "'extended' is {}, not of type list"),
]
TEXTS = [
    (b"", "it is not JSON"),
    (b"{", "it is not JSON"),
    (b"\xff\xfe", "it is not JSON"),
    (b"[" * 100_000, "it is not JSON"),
    (b"9" * 5_000, "it is not JSON"),  # more digits than Python reads
    (b"[1, 2]", "it is not the config of a run"),
    (b"null", "it is not the config of a run"),
    (b'"ppo"', "it is not the config of a run"),
]


@pytest.fixture(scope="module")
def about(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    open_run_dir(replace(CONFIG, run_dir=str(run_dir)))[1].release()
    return json.loads((run_dir / "config.json").read_text())


def refused(folder, text, capsys):
    """The sentence with which a script refuses to look at or to continue a run."""
    (folder / "config.json").write_bytes(text)
    sentences = set()
    for option in ("--evaluate", "--resume"):
        with as_command("ppo", option, str(folder)), pytest.raises(SystemExit) as ended:
            launch(ppo.main, ppo.Config)
        output = capsys.readouterr()
        assert ended.value.code == 2 and not output.out
        sentences.add(words(output.err))
    (sentence,) = sentences
    return sentence


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [*((("config", *path), *rest) for path, *rest in EDITS), *OUTER_EDITS],
)
def test_an_edited_config_is_checked_like_the_command_line(
    path, value, message, about, tmp_path, capsys
):
    about = copy.deepcopy(about)
    *outer, name = path
    owner = about[outer[0]] if outer else about
    owner.pop(name, None) if value is GONE else owner.update({name: value})
    assert message in refused(tmp_path, json.dumps(about).encode(), capsys)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_config_that_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / "config.json")
    with pytest.raises(UsageError, match="config.json is damaged: it is not a file"):
        load_config(str(tmp_path), ppo.Config)


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_a_damaged_config_is_named(text, message, tmp_path, capsys):
    assert f"config.json is damaged: {message}" in refused(tmp_path, text, capsys)


def test_nothing_outside_of_a_run_is_changed_through_a_link(tmp_path):
    """A run directory may come from a stranger."""
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    open_run_dir(replace(CONFIG, run_dir=str(run_dir)))[1].release()
    victim.mkdir()
    (victim / "1.json").write_text("precious")
    (run_dir / ".lock").unlink(missing_ok=True)
    links = {"metrics.jsonl": victim / "1.json", ".lock": victim / "1.json"}
    links |= {"checkpoints": victim, "wandb": victim, ".neptune": victim, "videos": victim}
    (run_dir / "videos").mkdir()
    links = {"videos/64.gif": victim / "1.json"} | links
    for name, target in links.items():
        (run_dir / name).symlink_to(target)
        with pytest.raises(UsageError, match=f"/run/{name}' is a link, a run writes only its own"):
            open_run_dir(replace(CONFIG, resume=str(run_dir)))
        assert not is_running(run_dir)
        (run_dir / name).unlink()
        if name == "videos/64.gif":
            (run_dir / "videos").rmdir()
    assert [path.read_text() for path in victim.iterdir()] == ["precious"]
    (tmp_path / "link").symlink_to(run_dir)  # the directory itself may be one
    open_run_dir(replace(CONFIG, resume=str(tmp_path / "link")))[1].release()


def test_what_is_written_anew_is_not_written_through_a_link(tmp_path):
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    open_run_dir(replace(CONFIG, run_dir=str(run_dir)))[1].release()
    victim.write_text("precious")
    for name in (".new", "new", "config.json"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(victim)
    write_whole(run_dir / "config.json", "{}")
    assert (run_dir / "config.json").read_text() == "{}" and victim.read_text() == "precious"
    (run_dir / "evaluations").symlink_to(tmp_path)
    with pytest.raises(OSError, match="is a link"):
        save_evaluation(run_dir, {})
    assert {path.name for path in tmp_path.iterdir()} == {"run", "victim"}


def test_what_to_do_is_never_taken_from_a_run(about, tmp_path, monkeypatch):
    """A stranger may have written it: a folder of compiled programs would be executed."""
    monkeypatch.chdir(tmp_path)
    leaks = {"compilation_cache": "cache", "video": "a.gif", "export": ["a.onnx"], "run_dir": "x"}
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for option, other in (("--resume", "evaluate"), ("--evaluate", "resume")):
        config = about["config"] | leaks | {other: "other"}
        (run_dir / "config.json").write_text(json.dumps(about | {"config": config}))
        with as_command("ppo", option, "run"):
            parsed = parse(ppo.Config)
        assert not (parsed.video or parsed.export or parsed.run_dir or getattr(parsed, other))
        assert parsed.compilation_cache == "~/.cache/memory-rl"


def test_a_run_in_a_folder_that_leads_nowhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    for run_dir in ("", "runs/x"):
        with pytest.raises(UsageError, match="cannot be made: 'runs' is no directory"):
            open_run_dir(replace(CONFIG, run_dir=run_dir))


def test_a_record_that_has_lost_reports_is_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 0)
    assert not path.exists() and not capsys.readouterr().err
    path.write_text("12345678")
    forget_after(path, 5)
    assert path.read_text() == "12345" and not capsys.readouterr().err
    forget_after(path, 9)
    lost = "has 5 of 9 bytes that it had at the checkpoint: reports are missing"
    assert capsys.readouterr().err == f"warning: '{path}' {lost}\n"
