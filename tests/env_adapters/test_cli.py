"""`python envs.py`, as it is used."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, as_command
from PIL import Image

from env_adapters.cli import Command, main
from harness.options import launch


def run(*args):
    """`python envs.py ...` in a process of its own."""
    # JAX 0.9 warns when it takes a program from the cache.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, str(ROOT / "envs.py"), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_namespaces_are_listed():
    result = run()
    assert result.returncode == 0, result.stderr
    assert re.search(r"^gymnax +installed$", result.stdout, re.M)
    assert re.search(r"^popjaxrl +installed$", result.stdout, re.M)
    assert re.search(r"^gxm +installed$", result.stdout, re.M)  # whose ids need Gymnasium only


def test_environments_are_listed():
    result = run("popjaxrl")
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert len(rows) == 42 and head.split() == ["id", "observation", "action", "max", "steps"]
    rows = [" ".join(row.split()) for row in rows]
    assert "MinesweeperHard float32[10] 64 actions 54" in rows
    assert "StatelessPendulumHard float32[2] float32[1] 100" in rows


def test_an_environment_is_tried(tmp_path):
    gif = tmp_path / "out.gif"
    sizes = ("--steps", "50", "--num-envs", "4")
    wrappers = ("--mask", "velocity", "--env-kwargs", "time_limit", "5", "delay", "1")
    result = run("gymnax::CartPole-v1", *sizes, *wrappers, "--gif", str(gif))
    assert result.returncode == 0, result.stderr
    assert "float32[2]" in result.stdout and "0 terminated, 40 truncated" in result.stdout
    assert "mean return 5, mean length 5" in result.stdout
    assert re.search(r"compiled in +[\d.]+ s", result.stdout)
    assert re.search(r"[\d,]+ steps per second", result.stdout)
    assert Image.open(gif).n_frames > 1 and "5 steps" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("popjaxl",), "'popjaxl' is no namespace (did you mean 'popjaxrl'?)"),
        (("CartPole-v1",), "'CartPole-v1' has no namespace (did you mean 'gymnax::CartPole-v1'?)"),
        (
            ("popjaxrl::Catch",),
            "unknown environment 'popjaxrl::Catch' (did you mean 'gymnax::Catch-bsuite'?)",
        ),
        (
            ("gymnax::CartPole-v1", "--env-kwargs", "dely", "3"),
            "has no option 'dely' (did you mean 'delay'?)",
        ),
        (("gymnax::CartPole-v1", "--steps", "0"), "steps must be greater than 0 and less than"),
        (("gymnax::CartPole-v1", "--steps", "1e12"), "less than 2**31, got 1000000000000"),
        (("gymnax::CartPole-v1", "--seed", "1e20"), "seed must be 0 or more and less than 2**31"),
        (
            ("gymnax::CartPole-v1", "--gif", f"{'a' * 300}/x.gif"),
            "gif must be in a folder that exists, got",
        ),
        (
            ("gymnax::CartPole-v1", "--gif", "a.mp4"),
            "gif must be a file name that ends in .gif, got 'a.mp4'",
        ),
        (("popjaxrl::RepeatFirstEasy", "--gif", "a.gif"), "cannot be drawn"),
    ],
)
def test_errors_are_one_sentence(args, message, capsys):
    with as_command("envs", *args), pytest.raises(SystemExit) as ended:
        launch(main, Command)
    output = capsys.readouterr()
    assert ended.value.code == 2, output.out
    assert message in output.err and "Traceback" not in output.err
    assert len(output.err.splitlines()) == 1


def test_an_error_ends_the_process_without_a_traceback():
    result = run("popjaxl")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: 'popjaxl' is no namespace (did you mean 'popjaxrl'?)")
    assert len(result.stderr.splitlines()) == 1
