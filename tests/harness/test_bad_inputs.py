"""Mistakes get one sentence and exit code 2, before anything is compiled or written."""

import dataclasses
import importlib
import os

import jax
import numpy as np
import pytest
from helpers import TASKS, as_command, run_script, words

from algorithms import ppo, ppo_continuous, sac
from envs import Box
from harness import sizes
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
    ("--num-devices -1", "num_devices must be 0 or more, got -1"),
    ("--num-devices 8", "num_devices is 8, and jax finds 4 here"),
    (
        "--num-devices 3",
        "num_devices 3 cannot be used: num_envs (16) of each seed would be divided by 3",
    ),
    ("--coordinator HOST:1", "coordinator needs --num-processes and --process-id, or is auto"),
    (
        "--coordinator auto --evaluate RUN",
        "coordinator is for training: --evaluate runs in one process",
    ),
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
    ("--export agent.pt", "export must be a file name that ends in .onnx or .jaxexport, got 'ag"),
    ("--export agent.onnx", "export needs a trained agent"),
    ("--best", "best needs a trained agent"),
    ("--learning-rate nan", "learning_rate must be finite, got nan"),
    ("--learning-rate inf", "learning_rate must be finite, got inf"),
    ("--ent-coef nan", "ent_coef must be finite, got nan"),
    ("--gamma=-inf", "gamma must be finite, got -inf"),
    ("--max-grad-norm inf", "max_grad_norm must be finite, got inf"),
    ("--env-kwargs gravity nan", "option gravity of gymnax::CartPole-v1 must be finite, got nan"),
    ("--total-steps 1.5e0", "'1.5e0' is not a whole number"),
    ("--total-steps 1e5.0", "'1e5.0' is not a whole number"),
    ("--total-steps 5000.0", "'5000.0' is not a whole number"),
    ("--total-steps 1.23e1", "'1.23e1' is not a whole number"),
    ("--total-steps 1e999999999", "'1e999999999' is too large"),
    ("--total-steps " + "9" * 5000, "is not a whole number"),
    ("--eval-episodes 2147483647 --num-eval-envs 1", "a table of eval_episodes 2147483647 takes"),
    ("--resume=", "resume needs the directory of a run, got ''"),
    ("--evaluate=", "evaluate needs the directory of a run, got ''"),
    ("--total-steps 1e-1", "'1e-1' is not a whole number"),
    ("--total-steps inf", "'inf' is not a whole number"),
    ("--total-steps 1,000", "'1,000' is not a whole number"),
    ("--seed 0x10", "'0x10' is not a whole number"),
    ("--total-steps 1e19", "makes 4,882,812,500,000,000 updates, a run can count to 2,147,483,647"),
    ("--total-steps 1e12", "makes 7,812,500,000 gradient steps, a run can count to 2,147,483,647"),
    ("--num-envs 5e9", "num_envs must be less than 2**31, got 5000000000"),
    ("--num-layers 1e6", "num_layers must be at most 1000, got 1000000"),
    ("--num-layers 0", "num_layers must be greater than 0, got 0"),
    ("--eval-episodes 0", "eval_episodes must be greater than 0, got 0"),
    ("--eval-every -5", "eval_every must be greater than 0, got -5"),
    ("--keep-checkpoints 0", "keep_checkpoints must be greater than 0, got 0"),
    ("--num-envs 100000000 --total-steps 1e11", "a rollout of num_steps 128 with num_envs 10000"),
    ("--num-envs 1e8 --num-steps 1 --num-seeds 100 --total-steps 1e9", "for num_seeds 100 takes"),
    (
        "--hidden-size 200000",
        "a matrix of hidden_size 200000 takes 149.0 GiB, the run at least 149",
    ),
    ("--num-seeds 10000000", "for num_seeds 10000000 takes"),
    ("--num-eval-envs 1e9 --eval-episodes 1e9", "an evaluation in num_eval_envs 1000000000 takes"),
    ("--wandb-mode of", "wandb_mode must be one of online, offline, got 'of'"),
    ("--wandb-mode ofline", "got 'ofline' (did you mean 'offline'?)"),
    ("--eval-policy smaple", "one of greedy, sample, both, got 'smaple' (did you mean 'sample'?)"),
    ("--log consol file", "each of log must be one of console, file, tensorboard, wandb, neptune,"),
    ("--log file tensorbord", "got 'tensorbord' (did you mean 'tensorboard'?)"),
    ("--log", "log needs at least one of console, file, tensorboard, wandb, neptune, dashboard"),
    ("--hiden-size 64", "Unrecognized options: --hiden-size, 64"),
    ("--hiden-size 64", "Perhaps you meant: --hidden-size"),
    ("--anneal-lr maybe", "Unrecognized options: maybe"),
    ("--env", "--env"),
    ("--init-from nowhere", "no run in 'nowhere'"),
    ("--init-from=", "init_from needs the directory of a run, got ''"),
    (f"--init-from {'a' * 5000}", "cannot be read (File name too long)"),
    ("--video .gif", "video must be a file name that ends in .gif, got '.gif'"),
    (f"--video {'a' * 300}/x.gif", "video must be in a folder that exists"),
    ("--best --init-from nowhere", "no run in 'nowhere'"),
    ("--evaluate a --resume b", "--resume and --evaluate exclude each other"),
    ("--sample 5", "Unrecognized options: 5"),
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
    (
        "--batch-size 256 --buffer-size 128",
        "batch_size (256) must be at most the 128 of buffer_size",
    ),
    ("--batch-size 0", "batch_size must be greater than 0, got 0"),
    ("--gradient-steps 1e9", "gradient steps, a run can count to 2,147,483,647"),
    ("--sample", "dqn.py has no stochastic policy to sample from: its policy takes the action of"),
    ("--cell gru", "dqn.py has no memory, so no --cell: drqn.py has"),
    ("--eval-policy sample", "Unrecognized options: --eval-policy"),
    ("--env gymnax::Pendulum-v1", "those of gymnax::Pendulum-v1 are continuous; sac.py has them"),
    ("--tau 2", "tau must be between 0 and 1, got 2.0"),
    (
        "--n-step 200",
        "n_step (200) is too long: the buffer then holds 126 steps of each environment; raise lear",
    ),
    ("--n-step 65 --buffer-size 512", "then holds 64 steps of each environment; raise buffer_s"),
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
        "needs continuous actions with bounds, those of gymnax::CartPole-v1 are discrete; sacd.py",
    ),
    ("rsac", "--env gymnax::CartPole-v1", "CartPole-v1 are discrete; rsacd.py has them"),
    ("rsacd", "--env gymnax::Pendulum-v1", "Pendulum-v1 are continuous; rsac.py has them"),
    ("ppo", "--env gymnax::Pendulum-v1", "are continuous; ppo_continuous.py has them"),
    ("rppo_continuous", "--env gymnax::CartPole-v1", "are discrete; rppo.py has them"),
    ("rpqn", "--env gymnax::Pendulum-v1", "are continuous; rppo_continuous.py has them"),
    ("sac", "--target-entropy nan", "target_entropy must be finite, got nan"),
    (
        "sacd",
        "--env gymnax::Pendulum-v1",
        "needs discrete actions, those of gymnax::Pendulum-v1 are continuous",
    ),
    ("sacd", "--target-entropy-ratio 2", "target_entropy_ratio must be between 0 and 1, got 2.0"),
    ("rppo", "--critic-obs full", "does nothing: nothing of gymnax::CartPole-v1 is hidden"),
    ("rsac", "--critic-obs full --mask 0 --shared-torso", "critic_obs full needs two torsos"),
]
BAD_SEQUENCES = [
    ("--burn-in -1", "burn_in must be 0 or more, got -1"),
    ("--burn-in 1e9", "learning_starts (1000) must be at least 16000000384, for sequences"),
    ("--sequence-length 0", "sequence_length must be greater than 0, got 0"),
    ("--n-step 0", "n_step must be greater than 0, got 0"),
    ("--n-step 1e9", "n_step (1000000000) must be at most burn_in + sequence_length"),
    ("--batch-size 1e9", "batch_size (1000000000) must be at most the"),
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
    ("--cell gruu", "got 'gruu' (did you mean 'gru'?)"),
    ("--cell lsmt", "got 'lsmt' (did you mean 'lstm'?)"),
    ("--cell GRU", "cell must be one of gru, lstm, slstm, mlstm, xlstm"),
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
    monkeypatch.setattr(sizes, "free_memory", lambda _: 15 * 2**30)
    with as_command(script, *args.split()), pytest.raises(SystemExit) as ended:
        launch(module.main, module.Config)
    output = capsys.readouterr()
    assert ended.value.code == 2 and message in words(output.err), output.err
    assert not output.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "space", "message"),
    [
        (ppo_continuous, Box(-1.0, 1.0, (2, 3)), r"that are vectors, .* have the shape \(2, 3\)"),
        (ppo_continuous, Box(-1.0, 1.0, ()), r"that are vectors, .* have the shape \(\)"),
        (
            sac,
            Box(-np.inf, np.inf, (2,)),
            "with bounds, .* have none; ppo_continuous.py needs none",
        ),
    ],
)
def test_actions_that_a_script_cannot_take(script, space, message, monkeypatch):
    task = dataclasses.replace(TASKS["Constant"](), action_space=space)
    name = f"Odd{len(space.shape)}"  # environments are cached by their names
    monkeypatch.setitem(TASKS, name, lambda: task)
    with pytest.raises(ValueError, match=f"this script needs .*actions {message}"):
        script.Config(env=f"test::{name}")


def test_memory_that_runs_out_later_is_a_sentence_too(capsys):
    def main(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 5 bytes.\nMore")

    with as_command("ppo"), pytest.raises(SystemExit) as ended:
        launch(main, ppo.Config)
    assert ended.value.code == 1
    sentence = "error: out of memory: RESOURCE_EXHAUSTED: Out of memory: 5 bytes.\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(
    ("platform", "args", "message"),
    [
        ("cpu", "--gamma 1.5", "gamma must be between 0 and 1, got 1.5"),
        ("cuda", "", "JAX_PLATFORMS=cuda cannot be used: "),
        ("toaster", "", "JAX_PLATFORMS=toaster cannot be used: Unable to initialize backend"),
    ],
)
def test_bad_input_ends_the_process_without_a_traceback(platform, args, message, tmp_path):
    if platform == "cuda" and jax.default_backend() != "cpu":
        pytest.skip("this machine has it")
    environment = os.environ | {"JAX_PLATFORMS": platform}
    result = run_script("rppo", *args.split(), cwd=tmp_path, env=environment)
    assert result.returncode == 2 and message in words(result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert not list(tmp_path.iterdir())
