"""What every script must be: documented, readable, shaped alike, helpful on the command line."""

import ast
import dataclasses
import functools
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import time
import tokenize
import tomllib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ALGORITHMS,
    REPLAY,
    ROOT,
    SCRIPTS,
    as_command,
    command_line,
    is_continuous,
    run_script,
    tiny,
    words,
)
from PIL import Image, ImageSequence

from experiment import compiled_updates, seed_keys
from harness.checkpoints import Checkpoints
from harness.options import launch

PAIRS = [  # most lines the second may remove from the first, and add to it
    ("ppo", "rppo", 45, 120),
    ("dqn", "drqn", 75, 140),
    ("pqn", "rpqn", 45, 105),
    ("ppo", "ppo_continuous", 35, 75),
    ("rppo", "rppo_continuous", 55, 75),
    ("ppo_continuous", "rppo_continuous", 45, 110),
    ("sac", "rsac", 85, 140),
    ("sacd", "rsacd", 85, 140),
    ("sac", "sacd", 90, 90),
]


def source(script):
    return (ALGORITHMS / f"{script}.py").read_text()


# --- How a script reads ---------------------------------------------------------------------------


def test_scripts_have_the_same_sections():
    banners = {name: re.findall(r"^# --- .*$", source(name), re.M) for name in SCRIPTS}
    assert len(banners["ppo"]) == 7 and len(set(map(tuple, banners.values()))) == 1
    (length,) = {len(banner) for banner in banners["ppo"]}
    assert length in (99, 100)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_flat(script):
    lines = source(script).splitlines()
    assert len(lines) <= 480
    assert max(len(line) for line in lines) <= 100
    assert max(len(line) - len(line.lstrip()) for line in lines) <= 4 * 4


NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
NO_CODE |= {tokenize.INDENT, tokenize.DEDENT}


def tokens_per_line(text):
    """Of the lines of code: without comments, docstrings and blank lines."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = [token.start[0] for token in tokens if token.type not in NO_CODE]
    lines = [line for line in lines if line not in docstrings]
    return len(lines) / len(set(lines))


def packed_assignments(text):
    """Lines of `a, b = x, y`: several names from as many expressions."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]


COUNTED = """'A docstring.'

x = 1  # three tokens
y = f(
    x
)
a, b = x, y
a, b = f(x)
"""


def test_how_code_is_counted():
    # 3 tokens of x, 6 in the three lines of y, 7 and 8 in the assignments to a and b.
    assert tokens_per_line(COUNTED) == (3 + 6 + 7 + 8) / 6
    assert packed_assignments(COUNTED) == [7]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_line_has_one_thought(script):
    assert tokens_per_line(source(script)) <= 10.5
    packed = packed_assignments(source(script))
    assert len(packed) <= 2, packed


@pytest.mark.parametrize("script", SCRIPTS)
def test_large_tuples_are_built_with_keywords(script):
    """Who inserts a field into a NamedTuple must not shift the others."""
    module = importlib.import_module(f"algorithms.{script}")
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = getattr(module, node.func.id, None)
            is_large = len(getattr(called, "_fields", ())) > 4
            assert not (is_large and node.args), f"{node.func.id}(...) in line {node.lineno}"


@pytest.mark.parametrize(("first", "second", "removed", "added"), PAIRS)
def test_a_memory_is_a_small_difference(first, second, removed, added):
    command = ["diff", ALGORITHMS / f"{first}.py", ALGORITHMS / f"{second}.py"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert sum(line.startswith("<") for line in lines) <= removed
    assert sum(line.startswith(">") for line in lines) <= added


# --- What a script is made of ---------------------------------------------------------------------


def test_every_module_is_installed():
    """Otherwise scripts would run from the folder of the repository only."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    outer = [path.parent for path in ROOT.glob("*/__init__.py")]
    inner = [path.parent for folder in outer for path in folder.rglob("__init__.py")]
    packages = [".".join(folder.relative_to(ROOT).parts) for folder in inner]
    assert sorted(setuptools["packages"]) == sorted(packages)
    assert sorted(setuptools["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_four_functions(script):
    module = importlib.import_module(f"algorithms.{script}")
    for name in ("init", "warmup", "train", "evaluate", "main"):
        assert callable(getattr(module, name))
    assert dataclasses.is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    hash(module.Config())


@pytest.mark.parametrize("script", ["dqn", "drqn", "pqn", "rpqn"])
def test_memory_does_not_grow_with_total_steps(script):
    """Neither the state nor any array that an update makes on its way."""
    module = importlib.import_module(f"algorithms.{script}")

    def arrays(total_steps):
        config = tiny(module, total_steps=total_steps)
        state = jax.eval_shape(lambda: module.init(config, seed_keys(config)))
        program = compiled_updates.trace(module.update, state, config.make_env(), 1).jaxpr
        return Counter(re.findall(r":(\w+\[[\d,]*\])", str(program)))

    few, many = arrays(1_000), arrays(10**9)
    assert few == many and sum(few.values()) > 500


MERGES = "XLA merges writing and reading through the barrier"


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason=MERGES)
@pytest.mark.parametrize("script", REPLAY)
def test_the_replay_buffer_is_never_copied(script):
    """An update writes into it in place: a copy of a million steps takes ten times the rest."""
    module = importlib.import_module(f"algorithms.{script}")
    num_steps = 8 if hasattr(module.Config, "sequence_length") else 1
    sizes = {"num_envs": 1, "num_steps": num_steps, "gradient_steps": 1}
    config = tiny(module, buffer_size=num_steps * 7919, **sizes)
    state = jax.eval_shape(lambda: module.init(config, seed_keys(config)))
    lowered = compiled_updates.lower(module.update, state, config.make_env(), 1)
    program = lowered.compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]+)\]", program)
    buffers = {shape for shape in shapes if "7919" in shape.split(",")}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program)
    assert buffers and not buffers & set(copied)


# Deviation of the draws of a fresh policy, whose head gives nearly 0: of three equally likely
# actions; of a standard normal; of tanh of a normal of deviation exp(-1.5), in units of the bounds.
DRAWS = dict.fromkeys(("ppo", "rppo", "sacd", "rsacd"), 0.816)
DRAWS |= {"ppo_continuous": 1.0, "rppo_continuous": 1.0, "sac": 0.21, "rsac": 0.21}


def drawn_actions(env, policy, initialize, key, num_envs, episodes):
    """Takes the place of `play`: the actions for one observation under many keys."""
    obs = jnp.zeros((1, *env.observation_space.shape), env.observation_space.dtype)
    space = env.action_space
    before = jnp.zeros((1, *space.shape), space.dtype), jnp.zeros(1)

    def act(key):
        return policy(initialize(1), obs, jnp.ones(1, bool), *before, key)[1]

    return jax.vmap(act)(jax.random.split(key, episodes))


@pytest.mark.parametrize("script", DRAWS)
def test_evaluations_act_greedily_or_as_the_policy_draws(script):
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module)
    state, env = module.init(config, seed_keys(config)), config.make_env()
    greedy = module.evaluate(state, env, 1000, play=drawn_actions)
    assert (greedy == greedy[:, :1]).all()
    drawn = module.evaluate(state, env, 1000, greedy=False, play=drawn_actions)
    space = env.action_space
    unit = 0.5 * (space.high - space.low) if "sac" in script and "sacd" not in script else 1.0
    deviation = (drawn / unit).std(axis=1)
    np.testing.assert_allclose(deviation, DRAWS[script], rtol=0.1)
    if is_continuous(module):
        np.testing.assert_allclose((drawn / unit).mean(axis=1), greedy[:, 0] / unit, atol=0.1)


def test_the_other_scripts_have_no_policy_to_draw_from():
    for script in set(SCRIPTS) - set(DRAWS):
        module = importlib.import_module(f"algorithms.{script}")
        assert not hasattr(module.Config, "eval_policy")
        assert "greedy" not in inspect.signature(module.evaluate).parameters


# --- The command line -----------------------------------------------------------------------------


def test_help_is_quick():
    start = time.perf_counter()
    result = run_script("rppo", "--help", env={"COLUMNS": "80", "PATH": ""})
    assert time.perf_counter() - start < 5  # 3 s on a quiet machine
    assert result.returncode == 0 and "environment, as namespace::id" in words(result.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_field(script, capsys, monkeypatch):
    module = importlib.import_module(f"algorithms.{script}")
    monkeypatch.setenv("COLUMNS", "80")
    with as_command(script, "--help"), pytest.raises(SystemExit) as ended:
        launch(module.main, module.Config)
    assert ended.value.code == 0
    text = words(capsys.readouterr().out)
    for field in dataclasses.fields(module.Config):
        flag = "--" + field.name.replace("_", "-")
        entry = text.partition(f"{flag} ")[2] or text.partition(f"{flag},")[2]
        entry = re.sub(r"^(--\S+ |[A-Z|,]+ |\{.*?\} |\[.*?\]+ )*", "", entry.strip())
        explanation = entry.partition("(default: ")[0]
        assert len(explanation.split()) >= 2, f"{flag}: {entry[:80]}"


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """`run_script` in this process, which saves the seconds that a new one takes to start."""
    monkeypatch.chdir(tmp_path)

    def run(script, *args):
        module = importlib.import_module(f"algorithms.{script}")
        code = 0
        try:
            with as_command(script, *args):
                launch(module.main, module.Config)
        except SystemExit as ended:
            code = ended.code
        output = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, output.out, output.err)

    return run


IN_OWN_PROCESS = ("ppo", "drqn")  # one with and one without replay and memory
BOTH_POLICIES = ("ppo", "rsac")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_the_command_line(script, tmp_path, run_here):
    """Train, evaluate, save; load, evaluate the same again and film it."""
    run = functools.partial(run_script, cwd=tmp_path) if script in IN_OWN_PROCESS else run_here
    run_dir = tmp_path / "run"
    sizes = ("--total-steps", "200", "--log-every", "2", "--eval-every", "96", "--num-seeds", "2")
    policies = ["greedy", "sampled"] if script in BOTH_POLICIES else ["greedy"]
    options = ("--eval-policy", "both") if script in BOTH_POLICIES else ()
    result = run(script, *command_line(script), *sizes, *options, "--run-dir", str(run_dir))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    if script in REPLAY:
        assert re.fullmatch(r"replay buffer: [\d.]+ MiB", lines.pop(0))
    assert lines.pop(0) == "--total-steps 200 trains 192: whole updates of 32"
    assert lines.pop(0).startswith("compiling, ")
    lines.remove("compiling the first evaluation")
    compiled, *lines, saved = lines
    table, evaluations = lines[: -len(policies)], lines[-len(policies) :]
    assert compiled.startswith("compiled in ") and saved == f"saved to {run_dir}"
    for policy, line in zip(policies, evaluations, strict=True):
        assert line.startswith(f"{policy} return over 4 episodes: median of 2 seeds ")
    assert max(map(len, table)) <= 80
    # A heading, reports at updates 2, 3, 5 and 6, evaluations at 3 and 6. With replay, the steps
    # of the first update are collected before it, as learning_starts says.
    assert len(table) == 1 + 4 - (script in REPLAY) + 2
    expected = [32, 96, 96, 160, 192, 192] if script in REPLAY else [0, 64, 96, 96, 160, 192, 192]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == expected
    norms = [record["losses/grad_norm"] for record in records if "losses/grad_norm" in record]
    assert norms and all(len(seeds) == 2 for seeds in norms)
    assert max(max(record.get("losses/first_ratio_error", [0])) for record in records) < 1e-5
    assert list(run_dir.glob("events.*"))

    again = run(script, "--evaluate", str(run_dir), "--video", "agent.gif")
    assert again.returncode == 0, again.stderr
    *shown, saved, filmed = again.stdout.splitlines()
    for policy, line in zip(policies, shown, strict=True):
        assert line.startswith(f"checkpoint of step 192: {policy} return over 4 episodes: ")
    assert re.fullmatch(rf"saved to {run_dir}/evaluations/[\d-]+\.json", saved)
    video = rf"video of (\d+) steps, {policies[-1]} actions: agent.gif"
    length = int(re.fullmatch(video, filmed)[1])
    film = Image.open(tmp_path / "agent.gif")
    assert film.size in ((300, 200), (300, 300))
    # Equal frames in succession become one, which is shown for longer.
    assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(film)) == 40 * length
    if script == "ppo":  # the same code for all
        evaluate_on_shorter_episodes(script, run_dir)
        refuse_another_config(script, run_dir)


def evaluate_on_shorter_episodes(script, run_dir):
    checkpoints = Checkpoints(run_dir)
    checkpoints._write_about(checkpoints._about(96) | {"score": 501.0}, 96)  # not the last
    options = ("--best", "--episodes", "3", "--env-kwargs", "max_steps_in_episode", "9")
    best = run_script(script, "--evaluate", str(run_dir), *options)
    assert best.returncode == 0
    for policy, line in zip(("greedy", "sampled"), best.stdout.splitlines(), strict=False):
        chosen = "checkpoint of step 96 (the best sampled return): "
        assert line.startswith(f"{chosen}{policy} return over 3 episodes")
        assert max(map(float, re.search(r"the seeds: (.*)", line)[1].split())) <= 9


def refuse_another_config(script, run_dir):
    resume, evaluate = ("--resume", str(run_dir)), ("--evaluate", str(run_dir))
    for args, message in (
        ((*resume, "--gamma", "0.5"), "was trained with gamma = 0.99, not with 0.5"),
        ((*evaluate, "--hidden-size", "16"), "was trained with hidden_size = 8, not with 16"),
        ((*evaluate, *resume), "--resume and --evaluate exclude each other"),
    ):
        refused = run_script(script, *args)
        assert refused.returncode == 2 and message in words(refused.stderr), refused.stderr


def test_a_copied_script_runs_anywhere(tmp_path):
    """To fork an algorithm is to copy its file."""
    fork = tmp_path / "my_rppo.py"
    fork.write_text(source("rppo"))
    args = (*command_line("rppo"), "--total-steps", "64", "--cell", "none", "--log", "console")
    for _ in range(2):  # the second time there is a directory runs/ beside it
        command = [sys.executable, str(fork), *args]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
        assert result.returncode == 0, result.stderr
        assert "__my_rppo__none__seed0__" in result.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 2
