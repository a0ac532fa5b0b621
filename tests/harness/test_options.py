"""Mistakes on the command line get one sentence and exit code 2."""

import importlib

import pytest
from helpers import as_command, run_script, words

from harness.options import launch

# The command line, and a part of the sentence.
BAD = [
    (
        "--env gymnax::Cartpole-v1",
        "unknown environment 'gymnax::Cartpole-v1' (did you mean 'gymnax::CartPole-v1'?)",
    ),
    ("--env CartPole-v1", "(did you mean 'gymnax::CartPole-v1'?)"),
    ("--env atari::Pong", "unknown environment namespace 'atari' in 'atari::Pong'"),
    (
        "--env gymnax::Pendulum-v1",
        "needs discrete actions, those of gymnax::Pendulum-v1 are continuous",
    ),
    ("--env-kwargs lenth 3", "gymnax::CartPole-v1 has no option 'lenth' (did you mean 'length'?)"),
    ("--env-kwargs id 3", "gymnax::CartPole-v1 has no option 'id'"),
    ("--env-kwargs gravity low", "option gravity of gymnax::CartPole-v1 must be float, got 'low'"),
    ("--seed 3000000000", "seed must be less than 2**31 - num_seeds, got 3000000000"),
    ("--seed -1", "seed must be 0 or more, got -1"),
    ("--mask velocities", "unknown mask 'velocities' (did you mean 'velocity'?)"),
    ("--num-envs 0", "num_envs must be greater than 0, got 0"),
    ("--hidden-size -3", "hidden_size must be greater than 0, got -3"),
    ("--learning-rate -1e-3", "learning_rate must be greater than 0, got -0.001"),
    ("--gamma 1.5", "gamma must be between 0 and 1, got 1.5"),
    ("--ent-coef -0.1", "ent_coef must be 0 or more, got -0.1"),
    ("--total-steps 10", "total_steps (10) is less than one update"),
    ("--num-minibatches 7", "num_minibatches (7) must divide"),
    ("--num-envs many", "many"),
    ("--log fax", "fax"),
    ("--run-dir /dev/null/run", "run directory '/dev/null/run' cannot be written: Not a directory"),
    ("--run-dir /usr", "run directory '/usr' exists; choose another with --run-dir"),
    ("--evaluate nowhere", "no run in 'nowhere'"),
    ("--resume nowhere", "no run in 'nowhere'"),
    ("--video agent.mp4", "video must be a file name that ends in .gif, got 'agent.mp4'"),
    ("--video agent.gif", "video needs a trained agent"),
    ("--video nowhere/agent.gif", "video must be in a folder that exists, got 'nowhere/agent.gif'"),
    ("--best", "best needs a trained agent"),
    ("--learning-rate nan", "learning_rate must be greater than 0, got nan"),
    (
        "--log wandb",
        "wandb has no API key: "
        "run `wandb login`, set WANDB_API_KEY, or choose --wandb-mode offline",
    ),
    ("--log neptune", "neptune needs NEPTUNE_API_TOKEN: set it, or choose --neptune-mode offline"),
]
BAD_REPLAY = [
    (
        "--learning-starts 200_000",
        "learning_starts (200000) must be less than total_steps (200000)",
    ),
    ("--tau 2", "tau must be between 0 and 1, got 2.0"),
    (
        "--num-envs 64 --buffer-size 32",
        "buffer_size (32) is less than the steps of one update (64)",
    ),
    ("--buffer-size 1000000000000", "a replay buffer of buffer_size 1000000000000 takes 3"),
]
BAD_ACTIONS = [
    (
        "sac",
        "--env gymnax::CartPole-v1",
        "needs continuous actions with bounds, those of gymnax::CartPole-v1 are not",
    ),
    ("sac", "--target-entropy nan", "target_entropy must be finite, got nan"),
    (
        "sacd",
        "--env gymnax::Pendulum-v1",
        "needs discrete actions, those of gymnax::Pendulum-v1 are continuous",
    ),
    ("sacd", "--target-entropy-ratio 2", "target_entropy_ratio must be between 0 and 1, got 2.0"),
]
BAD_SEQUENCES = [
    ("--burn-in -1", "burn_in must be 0 or more, got -1"),
    (
        "--learning-starts 100",
        "learning_starts (100) must be at least 640, for sequences of burn_in +",
    ),
    ("--buffer-size 300", "buffer_size (300) must be at least 768, for sequences of burn_in +"),
]
BAD_Q = [
    ("--q-lambda 1.5", "q_lambda must be between 0 and 1, got 1.5"),
    ("--end-e -0.1", "end_e must be between 0 and 1, got -0.1"),
    ("--exploration-fraction 2", "exploration_fraction must be between 0 and 1, got 2.0"),
]
BAD_CONTINUOUS = [
    (
        "--env gymnax::CartPole-v1",
        "needs continuous actions, those of gymnax::CartPole-v1 are discrete",
    ),
]
BAD_MEMORY = [
    ("--cell gruu", "gruu"),
    ("--cell slstm --hidden-size 30", "hidden_size to be a multiple of num_heads, got 30 and 4"),
    ("--cell-kwargs bias 1", "cell 'gru' has no option 'bias'"),
    ("--cell-kwargs hidden_size 1", "cell 'gru' has no option 'hidden_size'"),
    (
        "--cell slstm --cell-kwargs num_heads 2.0",
        "option num_heads of cell 'slstm' must be int, got 2.0",
    ),
    ("--bptt 48", "bptt (48) must divide num_steps (128)"),
    ("--bptt -1", "bptt must be 0 or more, got -1"),
]
CASES = [
    *(("ppo", *case) for case in BAD),
    *(("rppo", *case) for case in BAD[-2:] + BAD_MEMORY),
    *(("dqn", *case) for case in BAD_REPLAY),
    *(("drqn", *case) for case in BAD_SEQUENCES),
    *(("pqn", *case) for case in BAD_Q),
    *(("ppo_continuous", *case) for case in BAD_CONTINUOUS),
    *BAD_ACTIONS,
]


@pytest.mark.parametrize(("script", "args", "message"), CASES)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    script, args, message, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module(f"algorithms.{script}")
    monkeypatch.chdir(tmp_path)
    with as_command(script, *args.split()), pytest.raises(SystemExit) as ended:
        launch(module.main, module.Config)
    output = capsys.readouterr()
    assert ended.value.code == 2 and message in words(output.err), output.err
    assert not output.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", ["--num-envs many", "--gamma 1.5", "--resume nowhere"])
def test_bad_input_ends_the_process_without_a_traceback(args, tmp_path):
    _, value = args.split()
    result = run_script("rppo", *args.split(), cwd=tmp_path)
    assert result.returncode == 2 and value in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not result.stdout
    assert not list(tmp_path.iterdir())
