"""What is taken from a trained run: evaluations, its continuation, the beginning of another."""

import dataclasses
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_command, assert_same, tiny, words

from algorithms import dqn, drqn, ppo, rppo, sacd
from env_adapters.environment import Statistics
from env_adapters.episodes import Episodes
from experiment import Run, UsageError, seed_keys
from harness.checkpoints import Checkpoints
from harness.metrics import GREEDY, GREEDY_LENGTH, SAMPLED, SAMPLED_LENGTH, read_metrics
from harness.options import launch
from harness.run_dir import open_run_dir
from harness.trained import begin_with

NORMALIZED = {"normalize_obs": True, "normalize_reward": True}
CONFIG = tiny(ppo, env="test::Coin", env_kwargs=NORMALIZED, log=("file",), eval_policy="both")
CONFIG = replace(CONFIG, eval_episodes=64, num_eval_envs=64)
SCORES = {32: 5.0, 64: 1.0}  # step: score


def state_at(script, config, step):
    """A state that a run may have had: parameters and statistics say which step it is of."""
    state = script.init(config, seed_keys(config))
    params = jax.tree.map(lambda x: jnp.full_like(x, step), state.params)
    env_state = state.env_state
    if env_state.statistics:
        obs, returns, discounted, _ = env_state.statistics
        obs = jax.tree.map(lambda x: jnp.full_like(x, step / 100), obs)
        returns = jax.tree.map(lambda x: x + 1, returns)
        env_state = env_state._replace(statistics=Statistics(obs, returns, discounted))
    changes = {"updates": jnp.full_like(state.updates, step // 32)}
    if hasattr(state, "target_params"):
        changes["target_params"] = jax.tree.map(lambda x: x + 0.5, params)
    return state.replace(params=params, env_state=env_state, **changes)


def make_run(path, script=ppo, config=CONFIG, diverged=()):
    """A run with two checkpoints, the first of which is the better one; nothing is trained."""
    open_run_dir(replace(config, run_dir=str(path)))[1].release()
    checkpoints = Checkpoints(path)
    for step, score in SCORES.items():
        notes = {"metrics_bytes": 0, "diverged": diverged, "returns": {"sampled": score}}
        checkpoints.save(state_at(script, config, step), step, score, **notes)
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run_dir(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def command(*args, code=0, capsys, script=ppo):
    """Standard output of a script in this process, or its errors if they are expected."""
    name = script.__name__.split(".")[1]
    with as_command(name, *map(str, args)):
        if not code:
            launch(script.main, script.Config)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            launch(script.main, script.Config)
    assert ended.value.code == code
    return words(capsys.readouterr().err)


def evaluations(run_dir):
    """The evaluations in the order of their making: names of one second do not sort."""
    files = sorted((run_dir / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in files]


# --- Evaluations ----------------------------------------------------------------------------------


def test_evaluate_plays_episodes_that_chose_nothing(run_dir, capsys):
    """Not those of the evaluation in training; others with another seed; the same with the same."""
    state = state_at(ppo, CONFIG, 64)
    in_training = ppo.evaluate(state, CONFIG.make_env(), 64)
    for args in ([], [], ["--seed", "1"], ["--sample"]):
        command("--evaluate", run_dir, *args, capsys=capsys)
    first, again, other, sampled = [saved["policies"] for saved in evaluations(run_dir)]
    assert first.keys() == {"greedy", "sampled"} and sampled.keys() == {"sampled"}
    assert first == again and first["sampled"] == sampled["sampled"]
    returns = [np.asarray(found["greedy"]["returns"]) for found in (first, other)]
    assert all(found.shape == (1, 64) for found in returns)
    for one, two in ((returns[0], in_training.returns), (*returns,)):
        assert 16 < (one != two).sum() < 48  # independent coins differ in every second place
    assert set(np.unique(returns)) == {1.0, 9.0}


def test_an_evaluation_is_printed_and_saved_with_what_made_it(run_dir, capsys):
    options = ("--best", "--sample", "--episodes", "5", "--seed", "3")
    output = command("--evaluate", run_dir, *options, capsys=capsys)
    shown, saved_to = output.splitlines()
    (saved,) = evaluations(run_dir)
    assert saved_to == f"saved to {next((run_dir / 'evaluations').iterdir())}"
    found = saved["policies"]["sampled"]
    (returns,) = found["returns"]
    assert len(returns) == 5 and found["lengths"] == found["returns"]  # a step pays 1
    assert found["mean"] == pytest.approx(np.mean(returns))
    low, high = found["interval"]
    assert shown == (
        "checkpoint of step 32 (the best sampled return): sampled return over 5 episodes: "
        f"{np.mean(returns):.2f} (95 % interval {low:.2f} to {high:.2f})"
    )
    chosen = {"step": 32, "chosen_by": "best sampled return"}
    assert saved["checkpoint"] == chosen | {"returns_in_training": {"sampled": 5.0}}
    assert (saved["seed"], saved["env"], saved["env_kwargs"]) == (3, "test::Coin", NORMALIZED)
    assert saved["command"][1:3] == ["--evaluate", str(run_dir)] and "commit" in saved["git"]


@pytest.mark.parametrize(
    ("eval_policy", "logged", "score"),
    [
        ("greedy", {GREEDY: [1.0], GREEDY_LENGTH: [7.0]}, 1.0),
        ("sample", {SAMPLED: [2.0], SAMPLED_LENGTH: [8.0]}, 2.0),
        (
            "both",
            {GREEDY: [1.0], GREEDY_LENGTH: [7.0], SAMPLED: [2.0], SAMPLED_LENGTH: [8.0]},
            2.0,
        ),
    ],
)
def test_the_policy_that_was_trained_chooses_the_best_checkpoint(
    eval_policy, logged, score, tmp_path
):
    def evaluate(state, env, episodes, greedy=True):
        means = (1.0, 7.0) if greedy else (2.0, 8.0)
        return Episodes(*(np.full((1, episodes), mean) for mean in means))

    config = replace(CONFIG, eval_policy=eval_policy, run_dir=str(tmp_path / "run"))
    run = Run(config, ppo.init)
    run.evaluate(evaluate, run.state, config.make_env())
    run.logger.close()
    run.lock.release()
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {name: record[name] for name in record if name.startswith("eval/")} == logged
    about = json.loads(json.loads((run.checkpoints.folder / "0.json").read_text())["about"])
    means = {"greedy": 1.0, "sampled": 2.0}
    means = {policy: mean for policy, mean in means.items() if f"eval/{policy}_return" in logged}
    assert about["score"] == score and about["notes"]["returns"] == means
    run.checkpoints.close()


def test_the_last_checkpoint_is_evaluated_without_best(run_dir, capsys):
    output = command("--evaluate", run_dir, "--eval-policy", "greedy", capsys=capsys)
    assert output.startswith("checkpoint of step 64: greedy return over 64 episodes: ")
    (saved,) = evaluations(run_dir)
    assert saved["checkpoint"]["step"] == 64 and saved["checkpoint"]["chosen_by"] == "last"


def test_an_evaluation_that_cannot_be_saved_is_still_printed(run_dir, capsys):
    (run_dir / "evaluations").write_text("")
    with as_command("ppo", "--evaluate", str(run_dir)):
        launch(ppo.main, ppo.Config)
    output = capsys.readouterr()
    assert output.out.count("return over 64 episodes: ") == 2
    assert output.err == "warning: the evaluation was not saved: File exists\n"


def test_what_cannot_be_evaluated_is_refused_with_the_cause(run_dir, capsys):
    wider = ("--evaluate", run_dir, "--env-kwargs", "frame_stack", "4")
    refused = command(*wider, code=2, capsys=capsys)
    assert "cannot be evaluated with env_kwargs {" in refused and "'frame_stack': 4" in refused
    assert "has the shape" in refused and "version" not in refused
    raw = ("--evaluate", run_dir, "--env-kwargs", "normalize_obs", "False")
    assert "was there in training" in command(*raw, code=2, capsys=capsys)
    lines = [json.dumps({"step": 32, "time": 1, SAMPLED: [1]}) + "\n"] * 2
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    shutil.rmtree(run_dir / "checkpoints")
    for option, purpose in (("--evaluate", "evaluate"), ("--resume", "continue from")):
        gone = f"the checkpoints of '{run_dir}' are gone, there is nothing to {purpose}"
        assert gone in command(option, run_dir, code=2, capsys=capsys)
    (run_dir / "metrics.jsonl").write_text(lines[0])  # one evaluation, perhaps never saved
    refused = command("--evaluate", run_dir, code=2, capsys=capsys)
    assert "did not come to its first evaluation" in refused


# --- Beginning with a trained run -----------------------------------------------------------------


def beginning(script, config, tmp_path):
    """The state that a new run begins with."""
    run = Run(replace(config, run_dir=str(tmp_path / "new")), script.init)
    run.logger.close()
    run.checkpoints.close()
    run.lock.release()
    return run.state


@pytest.mark.parametrize(("best", "step"), [(False, 64), (True, 32)])
def test_a_run_begins_with_the_parameters_and_statistics_of_another(best, step, kept, tmp_path):
    """In another environment, with other options, and with one trained seed for several."""
    options = {"init_from": str(kept), "best": best, "seed": 5, "num_seeds": 3, "num_envs": 8}
    config = replace(CONFIG, **options, env="test::Constant", learning_rate=0.1, gamma=0.5)
    state = beginning(ppo, config, tmp_path)
    fresh = ppo.init(state.config, seed_keys(config))
    assert all((leaf == step).all() for leaf in jax.tree.leaves(state.params))
    obs, returns, *_ = state.env_state.statistics
    assert all(jnp.allclose(leaf, step / 100) for leaf in jax.tree.leaves(obs))
    assert obs.mean.shape[:2] == (3, 8) and jnp.allclose(returns.mean, 1.0)
    statistics = fresh.env_state.statistics._replace(obs=obs, returns=returns)
    env_state = fresh.env_state._replace(statistics=statistics)
    assert_same(state, fresh.replace(params=state.params, env_state=env_state))


def test_target_networks_are_taken_over(tmp_path):
    config = tiny(dqn, env="test::Coin", env_kwargs={}, log=())
    source = make_run(tmp_path / "source", dqn, config)
    state = beginning(dqn, replace(config, init_from=str(source)), tmp_path)
    assert all((leaf == 64).all() for leaf in jax.tree.leaves(state.params))
    assert all((leaf == 64.5).all() for leaf in jax.tree.leaves(state.target_params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, r"actor_head/kernel has the shape \(16, 2\), in training \(8, 2\)"),
        ({"num_layers": 2}, "params/params/torsos_0/Dense_2/bias was not there in training"),
        ({"env_kwargs": {}}, "its observations were normalised; set normalize_obs to True"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(changes, message, kept, tmp_path):
    config = replace(CONFIG, init_from=str(kept), **changes)
    with pytest.raises(UsageError, match=f"init_from '{kept}' does not fit: .*{message}"):
        beginning(ppo, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_has_the_same_shapes_and_is_another_function_is_refused(tmp_path):
    config = tiny(drqn, log=())
    source = make_run(tmp_path / "source", drqn, config)
    new = replace(config, init_from=str(source))
    normalized = {"normalize_obs": True, **config.env_kwargs}
    for changes, message in (
        ({"rescale": True}, "rescale was False, not True"),
        (
            {"env_kwargs": normalized},
            "observations were not normalised; set normalize_obs to False",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            beginning(drqn, replace(new, **changes), tmp_path)


def test_a_critic_that_saw_something_else_is_refused(tmp_path):
    """With noise both parts of an observation have the same shape."""
    config = tiny(rppo, log=(), env_kwargs={"noise": 0.1})
    source = make_run(tmp_path / "source", rppo, config)
    new = replace(config, init_from=str(source), critic_obs="full")
    with pytest.raises(UsageError, match="critic_obs was 'same', not 'full'"):
        beginning(rppo, new, tmp_path)


def test_moments_of_what_the_critic_sees_are_taken_over():
    options = {"mask": ("1",), "critic_obs": "full", "env_kwargs": {"normalize_obs": True}}
    config = tiny(rppo, **options)
    trained = rppo.init(config, seed_keys(config))
    state = begin_with(trained, rppo.init(config, seed_keys(replace(config, seed=5))))
    ours, theirs = (x.env_state.statistics.full.mean for x in (state, trained))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(("autotune", "expected"), [(True, 64.0), (False, np.log(0.25))])
def test_alpha_that_is_not_tuned_is_that_of_the_new_run(autotune, expected):
    config = tiny(sacd, alpha=0.25, autotune=autotune)
    state = sacd.init(config, seed_keys(config))
    state = begin_with(state_at(sacd, config, 64), state)
    np.testing.assert_allclose(state.params["params"]["log_alpha"], expected, rtol=1e-6)


def test_seeds_that_do_not_fit_or_diverged_are_refused(tmp_path):
    config = replace(CONFIG, num_seeds=2)
    source = make_run(tmp_path / "source", config=config, diverged=[(1, "story")])
    new = replace(config, init_from=str(source))
    with pytest.raises(UsageError, match="has 2 seeds, this run 3; give it as many, or one"):
        beginning(ppo, replace(new, num_seeds=3), tmp_path)
    with pytest.raises(UsageError, match="cannot be used: seed_1 diverged"):
        beginning(ppo, new, tmp_path)


# --- Going on -------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_to_more_steps(run_dir, capsys):
    shorter = command("--resume", run_dir, "--total-steps", "32", code=2, capsys=capsys)
    assert "total_steps may only grow, from 64 to 32 is less" in shorter
    before = json.loads((run_dir / "config.json").read_text())
    command("--resume", run_dir, capsys=capsys)  # there is nothing left to do
    assert json.loads((run_dir / "config.json").read_text()) == before

    output = command("--resume", run_dir, "--total-steps", "160", capsys=capsys)
    assert f"saved to {run_dir}" in output
    assert Checkpoints(run_dir).steps()[-1] == 160
    after = json.loads((run_dir / "config.json").read_text())
    assert after["extended"] == [{"step": 64, "from": 64, "to": 160}]
    assert after["final_step"] == after["config"]["total_steps"] == 160
    unchanged = {"extended": after["extended"], "config": after["config"], "final_step": 160}
    assert after == before | unchanged
    assert after["config"] == before["config"] | {"total_steps": 160}
    # The schedules are those of the new total from there on.
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rates = [r["charts/learning_rate"] for r in map(json.loads, lines) if "losses/entropy" in r]
    assert len(rates) == 1 and 0 < rates[0][0] < CONFIG.learning_rate
    assert dataclasses.asdict(CONFIG)["total_steps"] == 64
