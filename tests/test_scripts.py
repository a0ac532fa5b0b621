"""What every script must be: importable, documented, shaped alike, and helpful on the command line."""

import dataclasses
import gc
import importlib
import json
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter

import jax
import pytest
from conftest import ALGORITHMS, REPLAY, SCRIPTS, command_line, tiny
from PIL import Image

import experiment
from experiment import seed_keys

PAIRS = [  # most lines the second may remove from the first, and add to it
    ("ppo", "rppo", 40, 90),
    ("dqn", "drqn", 60, 130),
    ("pqn", "rpqn", 40, 80),
    ("ppo", "ppo_continuous", 30, 60),
    ("rppo", "rppo_continuous", 30, 60),
    ("ppo_continuous", "rppo_continuous", 40, 90),
    ("sac", "rsac", 70, 140),
    ("sacd", "rsacd", 70, 140),
    ("sac", "sacd", 80, 70),
]


def run(script, *args, **kwargs):
    command = [sys.executable, str(ALGORITHMS / f"{script}.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **kwargs)


def words(text):
    """Text without the boxes and line breaks of the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_scripts_have_the_same_sections():
    banners = {name: re.findall(r"^# --- .*$", (ALGORITHMS / f"{name}.py").read_text(), re.M) for name in SCRIPTS}
    assert len(banners["ppo"]) == 7 and len(set(map(tuple, banners.values()))) == 1
    assert all(len(banner) == 119 for banner in banners["ppo"])


def test_every_module_is_installed():
    """Else scripts would run from the folder of the repository only."""
    root = ALGORITHMS.parent
    installed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(installed) == sorted(path.stem for path in root.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_flat(script):
    lines = (ALGORITHMS / f"{script}.py").read_text().splitlines()
    assert len(lines) <= 400
    assert max(len(line) for line in lines) <= 120
    assert max(len(line) - len(line.lstrip()) for line in lines) <= 4 * 4


@pytest.mark.parametrize(("first", "second", "removed", "added"), PAIRS)
def test_a_memory_is_a_small_difference(first, second, removed, added):
    diff = subprocess.run(
        ["diff", ALGORITHMS / f"{first}.py", ALGORITHMS / f"{second}.py"], capture_output=True, text=True
    ).stdout.splitlines()
    assert sum(line.startswith("<") for line in diff) <= removed
    assert sum(line.startswith(">") for line in diff) <= added


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
        program = module.train_chunk.trace(state, config.make_env(), 1).jaxpr
        return Counter(re.findall(r":(\w+\[[\d,]*\])", str(program)))

    few, many = arrays(1_000), arrays(10**9)
    assert few == many and sum(few.values()) > 500


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA merges writing and reading through the barrier")
@pytest.mark.parametrize("script", REPLAY)
def test_the_replay_buffer_is_never_copied(script):
    """An update writes into it in place: with a million steps in it, a copy takes ten times as long as all the rest."""
    module = importlib.import_module(f"algorithms.{script}")
    num_steps = 8 if hasattr(module.Config, "sequence_length") else 1
    config = tiny(module, num_envs=1, num_steps=num_steps, gradient_steps=1, buffer_size=num_steps * 7919)
    state = jax.eval_shape(lambda: module.init(config, seed_keys(config)))
    program = module.train_chunk.lower(state, config.make_env(), 1).compile().as_text()
    buffers = {shape for shape in re.findall(r"\w+\[([\d,]+)\]", program) if "7919" in shape.split(",")}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program)
    assert buffers and not buffers & set(copied)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_explains_every_field(script):
    start = time.perf_counter()
    result = run(script, "--help", env={"COLUMNS": "200", "PATH": ""})
    assert time.perf_counter() - start < 5  # 3 s on a quiet machine
    assert result.returncode == 0
    text, fields = words(result.stdout), dataclasses.fields(importlib.import_module(f"algorithms.{script}").Config)
    for field, following in zip(fields, [*fields[1:], None], strict=True):
        flag = "--" + field.name.replace("_", "-")
        entry = text.partition(f"{flag} ")[2] or text.partition(f"{flag},")[2]
        if following:
            entry = entry.partition("--" + following.name.replace("_", "-"))[0]
        explanation = re.sub(r"\(default:.*?\)|\{.*?\}|\[.*\]|[A-Z|,]+ |--no-\S+", "", entry)
        assert len(explanation.split()) >= 2, f"{flag}: {entry}"


BAD = [
    (
        ("--env", "gymnax::Cartpole-v1"),
        "unknown environment 'gymnax::Cartpole-v1' (did you mean 'gymnax::CartPole-v1'?)",
    ),
    (("--env", "CartPole-v1"), "(did you mean 'gymnax::CartPole-v1'?)"),
    (("--env", "atari::Pong"), "unknown environment namespace 'atari' in 'atari::Pong'"),
    (("--env", "gymnax::Pendulum-v1"), "needs discrete actions, those of gymnax::Pendulum-v1 are continuous"),
    (("--env-kwargs", "lenth", "3"), "gymnax::CartPole-v1 has no option 'lenth' (did you mean 'length'?)"),
    (("--env-kwargs", "id", "3"), "gymnax::CartPole-v1 has no option 'id'"),
    (("--env-kwargs", "gravity", "low"), "option gravity of gymnax::CartPole-v1 must be float, got 'low'"),
    (("--seed", "3000000000"), "seed must be less than 2**31 - num_seeds, got 3000000000"),
    (("--seed", "-1"), "seed must be 0 or more, got -1"),
    (("--mask", "velocities"), "unknown mask 'velocities' (did you mean 'velocity'?)"),
    (("--num-envs", "0"), "num_envs must be greater than 0, got 0"),
    (("--hidden-size", "-3"), "hidden_size must be greater than 0, got -3"),
    (("--learning-rate", "-1e-3"), "learning_rate must be greater than 0, got -0.001"),
    (("--gamma", "1.5"), "gamma must be between 0 and 1, got 1.5"),
    (("--ent-coef", "-0.1"), "ent_coef must be 0 or more, got -0.1"),
    (("--total-steps", "10"), "total_steps (10) is less than one update"),
    (("--num-minibatches", "7"), "num_minibatches (7) must divide"),
    (("--num-envs", "many"), "many"),
    (("--log", "fax"), "fax"),
    (("--run-dir", "/dev/null/run"), "run directory '/dev/null/run' cannot be written: Not a directory"),
    (("--run-dir", "/usr"), "run directory '/usr' exists; choose another with --run-dir"),
    (("--evaluate", "nowhere"), "no run in 'nowhere'"),
    (("--resume", "nowhere"), "no run in 'nowhere'"),
    (("--video", "agent.mp4"), "video must be a file name that ends in .gif, got 'agent.mp4'"),
    (("--video", "agent.gif"), "video needs a trained agent"),
    (("--video", "nowhere/agent.gif"), "video must be in a folder that exists, got 'nowhere/agent.gif'"),
    (("--best",), "best needs a trained agent"),
    (("--learning-rate", "nan"), "learning_rate must be greater than 0, got nan"),
    (("--log", "wandb"), "wandb has no API key: run `wandb login`, set WANDB_API_KEY, or choose --wandb-mode offline"),
    (("--log", "neptune"), "neptune needs NEPTUNE_API_TOKEN: set it, or choose --neptune-mode offline"),
]
BAD_REPLAY = [
    (("--learning-starts", "200_000"), "learning_starts (200000) must be less than total_steps (200000)"),
    (("--tau", "2"), "tau must be between 0 and 1, got 2.0"),
    (("--num-envs", "64", "--buffer-size", "32"), "buffer_size (32) is less than the steps of one update (64)"),
    (("--buffer-size", str(10**12)), "a replay buffer of buffer_size 1000000000000 takes 3"),
]
BAD_ACTIONS = [
    (
        "sac",
        ("--env", "gymnax::CartPole-v1"),
        "needs continuous actions with bounds, those of gymnax::CartPole-v1 are not",
    ),
    ("sac", ("--target-entropy", "nan"), "target_entropy must be finite, got nan"),
    ("sacd", ("--env", "gymnax::Pendulum-v1"), "needs discrete actions, those of gymnax::Pendulum-v1 are continuous"),
    ("sacd", ("--target-entropy-ratio", "2"), "target_entropy_ratio must be between 0 and 1, got 2.0"),
]
BAD_SEQUENCES = [
    (("--burn-in", "-1"), "burn_in must be 0 or more, got -1"),
    (("--learning-starts", "100"), "learning_starts (100) must be at least 640, for sequences of burn_in +"),
    (("--buffer-size", "300"), "buffer_size (300) must be at least 768, for sequences of burn_in +"),
]
BAD_Q = [
    (("--q-lambda", "1.5"), "q_lambda must be between 0 and 1, got 1.5"),
    (("--end-e", "-0.1"), "end_e must be between 0 and 1, got -0.1"),
    (("--exploration-fraction", "2"), "exploration_fraction must be between 0 and 1, got 2.0"),
]
BAD_CONTINUOUS = [
    (("--env", "gymnax::CartPole-v1"), "needs continuous actions, those of gymnax::CartPole-v1 are discrete"),
]
BAD_MEMORY = [
    (("--cell", "gruu"), "gruu"),
    (("--cell", "slstm", "--hidden-size", "30"), "hidden_size to be a multiple of num_heads, got 30 and 4"),
    (("--cell-kwargs", "bias", "1"), "cell 'gru' has no option 'bias'"),
    (("--cell-kwargs", "hidden_size", "1"), "cell 'gru' has no option 'hidden_size'"),
    (("--cell", "slstm", "--cell-kwargs", "num_heads", "2.0"), "option num_heads of cell 'slstm' must be int, got 2.0"),
    (("--bptt", "48"), "bptt (48) must divide num_steps (128)"),
    (("--bptt", "-1"), "bptt must be 0 or more, got -1"),
]


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [("ppo", *case) for case in BAD]
    + [("rppo", *case) for case in BAD[-2:] + BAD_MEMORY]
    + [("dqn", *case) for case in BAD_REPLAY]
    + [("drqn", *case) for case in BAD_SEQUENCES]
    + [("pqn", *case) for case in BAD_Q]
    + [("ppo_continuous", *case) for case in BAD_CONTINUOUS]
    + BAD_ACTIONS,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_gets_one_sentence_and_exit_code_2(script, args, message, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"algorithms.{script}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *args])
    monkeypatch.setattr(experiment, "use_compilation_cache", lambda folder: None)  # may start the process again
    monkeypatch.setattr(gc, "disable", lambda: None)
    with pytest.raises(SystemExit) as ended:
        experiment.launch(module.main, module.Config)
    output = capsys.readouterr()
    assert ended.value.code == 2 and message in words(output.err), output.err
    assert not output.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [("--num-envs", "many"), ("--gamma", "1.5"), ("--resume", "nowhere")])
def test_bad_input_ends_the_process_without_a_traceback(args, tmp_path):
    result = run("rppo", *args, cwd=tmp_path)
    assert result.returncode == 2 and args[1] in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_the_command_line(script, tmp_path):
    """Train, evaluate, save; load, evaluate the same again and film it; on another environment; with another config."""
    run_dir = tmp_path / "run"
    args = (*command_line(script), "--total-steps", "200", "--log-every", "2", "--eval-every", "96", "--num-seeds", "2")
    result = run(script, *args, "--run-dir", str(run_dir), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    if script in REPLAY:
        assert re.fullmatch(r"replay buffer: [\d.]+ MiB", lines.pop(0))
    compiled, *table, evaluation, saved = lines
    assert compiled.startswith("compiled in ") and saved == f"saved to {run_dir}"
    assert evaluation.startswith("greedy return over 4 episodes: median of 2 seeds ")
    assert len(table) == 1 + 4 - (script in REPLAY) + 2  # heading, reports at updates 2, 3, 5, 6, evaluations at 3, 6
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    # One update's steps are collected before the first update where learning_starts says so.
    assert steps == ([32, 96, 96, 160, 192, 192] if script in REPLAY else [0, 64, 96, 96, 160, 192, 192])
    assert all(len(record["losses/grad_norm"]) == 2 for record in records if "losses/grad_norm" in record)
    assert max(max(record.get("losses/first_ratio_error", [0])) for record in records) < 1e-5
    assert list(run_dir.glob("events.*"))

    again = run(script, "--evaluate", str(run_dir), "--video", "agent.gif", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    shown, video = again.stdout.splitlines()
    assert shown == f"checkpoint of step 192: {evaluation}"
    assert re.fullmatch(r"video of \d+ steps: agent.gif", video)
    film = Image.open(tmp_path / "agent.gif")
    assert film.size in ((300, 200), (300, 300)) and film.n_frames > 3
    if script != "ppo":
        return  # what follows is the same code for all
    best = run(
        script, "--evaluate", str(run_dir), "--best", "--episodes", "3", "--env-kwargs", "max_steps_in_episode", "9"
    )
    assert best.returncode == 0 and re.match(r"checkpoint of step (96|192): greedy return over 3 episodes", best.stdout)
    assert max(map(float, re.search(r"the seeds: (.*)", best.stdout)[1].split())) <= 9  # the shorter episodes

    for args, message in (
        (("--resume", str(run_dir), "--gamma", "0.5"), "was trained with gamma = 0.99, not with 0.5"),
        (("--evaluate", str(run_dir), "--hidden-size", "16"), "was trained with hidden_size = 8, not with 16"),
        (("--evaluate", str(run_dir), "--resume", str(run_dir)), "--resume and --evaluate exclude each other"),
    ):
        refused = run(script, *args)
        assert refused.returncode == 2 and message in words(refused.stderr), refused.stderr


def test_a_copied_script_runs_anywhere(tmp_path):
    """To fork an algorithm is to copy its file."""
    fork = tmp_path / "my_rppo.py"
    fork.write_text((ALGORITHMS / "rppo.py").read_text())
    args = (*command_line("rppo"), "--total-steps", "64", "--cell", "none", "--log", "console")
    for _ in range(2):  # the second time there is a directory runs/ beside it
        command = [sys.executable, str(fork), *args]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
        assert result.returncode == 0, result.stderr
        assert "__my_rppo__none__seed0__" in result.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 2
