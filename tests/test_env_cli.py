"""`python envs.py`, as it is used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ENVS = Path(__file__).parent.parent / "envs.py"


def run(*args):
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # JAX 0.9 warns when it takes a program from there
    return subprocess.run([sys.executable, str(ENVS), *args], env=env, capture_output=True, text=True, timeout=200)


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
    assert "MinesweeperHard float32[10] 64 actions 54" in [" ".join(row.split()) for row in rows]
    assert "StatelessPendulumHard float32[2] float32[1] 100" in [" ".join(row.split()) for row in rows]


def test_an_environment_is_tried(tmp_path):
    gif = tmp_path / "out.gif"
    options = (
        "--steps",
        "50",
        "--num-envs",
        "4",
        "--mask",
        "velocity",
        "--env-kwargs",
        "time_limit",
        "5",
        "delay",
        "1",
    )
    result = run("gymnax::CartPole-v1", *options, "--gif", str(gif))
    assert result.returncode == 0, result.stderr
    assert "float32[2]" in result.stdout and "0 terminated, 40 truncated" in result.stdout
    assert "mean return 5, mean length 5" in result.stdout
    assert re.search(r"compiled in +[\d.]+ s", result.stdout) and re.search(r"[\d,]+ steps per second", result.stdout)
    assert Image.open(gif).n_frames > 1 and "5 steps" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("popjaxl",), "'popjaxl' is no namespace (did you mean 'popjaxrl'?)"),
        (("CartPole-v1",), "'CartPole-v1' has no namespace (did you mean 'gymnax::CartPole-v1'?)"),
        (("popjaxrl::Catch",), "unknown environment 'popjaxrl::Catch' (did you mean 'gymnax::Catch-bsuite'?)"),
        (("gymnax::CartPole-v1", "--env-kwargs", "dely", "3"), "has no option 'dely' (did you mean 'delay'?)"),
        (("gymnax::CartPole-v1", "--steps", "0"), "steps must be greater than 0, got 0"),
        (("gymnax::CartPole-v1", "--gif", "a.mp4"), "gif must be a file name that ends in .gif, got 'a.mp4'"),
        (("popjaxrl::RepeatFirstEasy", "--gif", "a.gif"), "cannot be drawn"),
    ],
)
def test_errors_are_one_sentence(args, message):
    result = run(*args)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr and "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


def test_importing_envs_imports_no_library():
    code = "import sys, envs; print([m for m in ('gymnax', 'navix', 'brax', 'popjaxrl', 'rich') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ENVS.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
