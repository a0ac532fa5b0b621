"""introspect.py: gradients through the memories, what a probe finds, and the files of a run."""

import functools
import importlib
import json
import sys

import introspect
import jax
import numpy as np
import optax
import pytest
from helpers import is_continuous, make_run, tiny

from algorithms import rppo
from experiment import seed_keys
from harness.errors import UsageError
from memory_cells import CELLS

CHAIN = {"env": "gymnax::MemoryChain-bsuite", "env_kwargs": {"memory_length": 5}}


def untrained(module, **changes):
    """An agent as `introspect.load` returns it, with the parameters of a fresh state."""
    config = tiny(module, **changes)
    state = module.init(config, seed_keys(config))
    seeds = list(range(config.num_seeds))
    return introspect.Agent(module, config, config.make_env(), state, seeds, 0)


# --- The gradient ---------------------------------------------------------------------------------


def check_reach(agent, steps=12):
    """Gradients reach back to the start of the episode and no further; without memory nowhere."""
    records = introspect.play(agent, episodes=2, steps=steps)
    norms = introspect.sensitivities(agent, records)
    episode = records.start.cumsum(axis=1)  # (S, T, N)
    assert episode.max() > 1 and np.isfinite(norms).all()
    for seed, env in np.ndindex(norms.shape[:2]):
        number = episode[seed, :, env]
        same = (number[:, None] == number) & np.tri(len(number), dtype=bool)
        reached = norms[seed, env] > 0
        expected = same & np.eye(len(number), dtype=bool) if agent.config.cell == "none" else same
        np.testing.assert_array_equal(reached, expected)
        assert (norms[seed, env][~expected] == 0.0).all()


@pytest.mark.parametrize("script", introspect.DECIDES)
def test_gradients_reach_from_the_start_of_the_episode_to_the_present(script):
    module = importlib.import_module(f"algorithms.{script}")
    env = {"env": "test::Steering" if is_continuous(module) else "test::Counting"}
    check_reach(untrained(module, **env))


QUICK = ("none", "s5", "mlstm")


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS]
)
def test_gradients_of_all_kinds_of_memories_respect_time(cell):
    check_reach(untrained(rppo, cell=cell))


def test_cuts_in_training_and_shared_torsos_hide_nothing():
    check_reach(untrained(rppo, bptt=2, shared_torso=True, num_seeds=2))
    module = importlib.import_module("algorithms.rsacd")
    check_reach(untrained(module, shared_torso=True))


def test_where_one_action_is_valid_nothing_decides():
    agent = untrained(rppo, env="test::Masked")
    records = introspect.play(agent, episodes=2, steps=5)
    norms = introspect.sensitivities(agent, records)[0]
    has_choice = records.obs.action_mask[0].sum(axis=-1) > 1  # (T, N)
    assert has_choice.any() and not has_choice.all()
    diagonal = np.diagonal(norms, axis1=1, axis2=2).T
    np.testing.assert_array_equal(diagonal > 0, has_choice)


ASYMMETRIC = [script for script in introspect.DECIDES if script not in ("drqn", "rpqn")]


@pytest.mark.parametrize("script", ASYMMETRIC)
def test_agents_whose_critic_saw_everything_are_looked_into(script):
    """The actor is differentiated, and what was hidden from it is that of the task."""
    module = importlib.import_module(f"algorithms.{script}")
    env = {"env": "test::Steering" if is_continuous(module) else "test::Counting", "mask": ("1",)}
    agent = untrained(module, **env, critic_obs="full")
    check_reach(agent)
    records = introspect.play(agent, episodes=2, steps=12)
    start, time = records.start[0], records.hidden["1"][0]  # steps so far, in fifths
    begun = np.maximum.accumulate(np.where(start, np.arange(12)[:, None], 0), axis=0)
    np.testing.assert_allclose(5 * time, np.arange(12)[:, None] - begun, atol=1e-6)


@pytest.mark.parametrize("script", ["rppo", "rsacd"])
def test_actions_and_observations_of_several_parts_are_looked_at(script):
    module = importlib.import_module(f"algorithms.{script}")
    agent = untrained(module, env="test::Parts", env_kwargs={})
    norms = introspect.sensitivities(agent, introspect.play(agent, episodes=1, steps=4))
    np.testing.assert_array_equal(norms[0, 0] > 0, np.tri(4, dtype=bool))


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (("image",), []),  # a vector can be read from a carry, not an image
        (("image", "body.0.0"), ["body.0.0"]),
        (("body",), ["body.0 0", "body.0 1"]),
    ],
)
def test_hidden_parts_are_probed_by_their_names(mask, names):
    agent = untrained(rppo, env="test::Parts", env_kwargs={}, mask=mask)
    hidden = introspect.play(agent, episodes=8, steps=4).hidden
    assert list(hidden) == names
    for name in names:
        assert set(hidden[name].flat) == ({0.5} if name.endswith("1") else {-1.0, 1.0})


def test_images_are_looked_at():
    agent = untrained(rppo, env="test::Picture", env_kwargs={})
    records = introspect.play(agent, episodes=1, steps=3)
    assert records.obs.dtype == np.uint8
    norms = introspect.sensitivities(agent, records)[0, 0]
    np.testing.assert_array_equal(norms > 0, np.tri(3, dtype=bool))


def test_a_gradient_is_that_of_differences():
    """Small changes of the entries of obs[t'] change log pi at t as it says."""
    agent = untrained(rppo)
    records = introspect.play(agent, episodes=1, steps=4)
    norms = introspect.sensitivities(agent, records)[0, 0]
    one = jax.tree.map(lambda x: x[0], records._replace(carry=()))
    params = jax.tree.map(lambda x: x[0], agent.state.params)
    network = rppo.make_network(agent.config, agent.env)

    def decided(obs):
        inputs = rppo.Inputs(obs, one.previous, one.reward)
        carry = network.initialize_carry(1)
        sequence = (carry, inputs, one.start, one.action)
        return network.apply(params, *sequence, method=introspect.ppo_log_prob)[3, 0, 0]

    size = 1e-2
    for seen in range(4):
        slopes = []
        for entry in range(one.obs.shape[-1]):
            change = np.zeros_like(one.obs)
            change[seen, 0, entry] = size
            slopes.append(float(decided(one.obs + change) - decided(one.obs - change)) / (2 * size))
        np.testing.assert_allclose(np.linalg.norm(slopes), norms[3, seen], rtol=0.02, atol=1e-4)


@functools.cache
def taught(cell):
    """An agent that was taught to say the first of six numbers at the end, and records of such.

    Its logits of the two actions are to differ by the number. The first observation is marked. The
    later ones, which it has to ignore, show other numbers, drawn anew in every step of learning.
    """
    agent = untrained(rppo, **CHAIN, cell=cell, hidden_size=16, shared_torso=True)
    records = introspect.play(agent, episodes=64, steps=6)
    one = jax.tree.map(lambda x: x[0], records._replace(carry=()))
    network = rppo.make_network(agent.config, agent.env)
    optimizer = optax.adam(1e-2)

    def draw(key):
        numbers = jax.random.uniform(key, (6, 64, 3), minval=-1.0, maxval=1.0)
        return numbers.at[:, :, 0].set(0.0).at[0, :, 0].set(1.0)

    def loss(params, obs):
        inputs = rppo.Inputs(obs, one.previous, one.reward)
        _, logits, _ = network.apply(params, network.initialize_carry(64), inputs, one.start)
        return ((logits[-1, :, 1] - logits[-1, :, 0] - obs[0, :, 2]) ** 2).mean()

    @jax.jit
    def train(params):
        def step(i, learner):
            params, opt_state = learner
            gradients = jax.grad(loss)(params, draw(jax.random.key(i)))
            changes, opt_state = optimizer.update(gradients, opt_state)
            return optax.apply_updates(params, changes), opt_state

        params, _ = jax.lax.fori_loop(1, 600, step, (params, optimizer.init(params)))
        return params, loss(params, draw(jax.random.key(0)))

    params, error = train(jax.tree.map(lambda x: x[0], agent.state.params))
    params = jax.tree.map(lambda x: x[None], params)
    records = records._replace(obs=np.asarray(draw(jax.random.key(0)))[None])
    return agent._replace(state=agent.state.replace(params=params)), records, error


@pytest.mark.parametrize("cell", ["gru", "s5", "none"])
def test_what_must_be_recalled_carries_the_gradient(cell):
    """The first observation decides the last action, if there is a memory."""
    agent, records, error = taught(cell)
    norms = introspect.sensitivities(agent, records, episodes=4)
    last = [introspect.shares(rows, 6)[-1] for rows in norms[0]]
    if cell == "none":
        np.testing.assert_array_equal(last, [[0, 0, 0, 0, 0, 1]] * 4)
        assert error > 0.2  # the numbers have a variance of 1/3
    else:
        assert error < 0.05
        assert all(row[0] > 2 * row[1:].max() for row in last), np.round(last, 3)


def test_a_trained_carry_holds_the_first_bit_and_an_observation_does_not():
    agent, _, _ = taught("gru")
    found = introspect.probes(introspect.play(agent, episodes=32, steps=6, seed=1))["first bit"]
    assert found["measure"] == "accuracy"
    assert found["carry"] > 0.95 and found["observation"] < 0.9


def test_shares_are_those_of_the_past_and_curves_their_means():
    rows = introspect.shares(np.array([[3.0, 9, 9], [1, 3, 9], [0, 0, 0]]), 3)
    np.testing.assert_array_equal(rows, [[1, np.nan, np.nan], [0.25, 0.75, np.nan], [np.nan] * 3])
    curve = introspect.recall_curve(rows, 4)
    np.testing.assert_array_equal(curve, [0.875, 0.25, np.nan, np.nan])
    found = introspect.summary(np.stack([curve, [0.125, np.nan, np.nan, np.nan]]))
    np.testing.assert_allclose(found["median"], [0.5, 0.25])
    np.testing.assert_array_equal(found["episodes"], [2, 1])


# --- The probe ------------------------------------------------------------------------------------


def test_hidden_velocities_are_those_of_the_task():
    cartpole = {"env": "gymnax::CartPole-v1", "env_kwargs": {}}
    records = introspect.play(untrained(rppo, **cartpole, mask=("velocity",)), 4, 8)
    position, velocity = records.obs[..., 0], records.hidden["velocity 1"]
    moved = np.where(records.start[:, 1:], np.nan, position[:, 1:] - position[:, :-1])
    expected = np.where(records.start[:, 1:], np.nan, 0.02 * velocity[:, :-1])  # Euler's method
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert list(records.hidden) == ["velocity 1", "velocity 3"]


def made_up(rng):
    """Features and targets (T, N, ...) of 16 episodes of up to 20 steps: a walk, and a bit."""
    walk = rng.normal(size=(20, 16, 1)).cumsum(axis=0)
    bit = np.broadcast_to(rng.choice([-1.0, 1.0], (16, 1)), (20, 16, 1))
    targets = np.concatenate([walk, bit], axis=-1)
    return targets, rng.integers(10, 21, 16), np.arange(20)


def test_a_probe_finds_what_is_there_and_nothing_else(rng):
    targets, lengths, steps = made_up(rng)
    carry = targets @ rng.normal(size=(2, 30)) + 0.01 * rng.normal(size=(20, 16, 30))
    carry[0] = np.nan  # the first step does not count
    carry[np.arange(20)[:, None] >= lengths] = np.nan  # nor do those after the episode
    fit, accuracy = introspect.probe(carry, targets, lengths, steps)
    assert fit > 0.99 and accuracy == 1.0
    nothing = rng.normal(size=(20, 16, 30))
    fit, accuracy = introspect.probe(nothing, targets, lengths, steps)
    assert fit < 0.2 and accuracy < 0.8
    which = np.broadcast_to(np.eye(16), (20, 16, 16))  # of no use for other episodes
    assert introspect.probe(which, targets, lengths, steps)[0] < 0.2
    assert introspect.probe(np.zeros((20, 16, 0)), targets, lengths, steps)[0] < 0.2
    even = np.broadcast_to(np.tile([-1.0, 1.0], 8)[:, None], (20, 16, 1))
    assert introspect.probe(np.zeros((20, 16, 0)), even, lengths, steps) > 0.3  # it has to guess


def test_carries_become_features():
    tree = {
        "a": np.ones((2, 3, 4, 5)),
        "b": np.full((2, 3, 4), 1 + 2j),
        "c": np.ones((2, 3, 4), int),
    }
    features = introspect.as_features(tree, num_axes=3)
    assert features.shape == (2, 3, 4, 5 + 2) and features[0, 0, 0].tolist() == [1] * 6 + [2]


def test_large_carries_are_kept_in_strides(monkeypatch):
    agent = untrained(rppo)
    every = introspect.play(agent, 2, 12)
    monkeypatch.setattr(introspect, "MOST_BYTES", 800)
    some = introspect.play(agent, 2, 12)
    stride = 12 // jax.tree.leaves(some.carry)[0].shape[1]
    assert stride > 1
    for few, many in zip(*map(jax.tree.leaves, (some.carry, every.carry)), strict=True):
        np.testing.assert_array_equal(few, many[:, stride - 1 :: stride])


# --- A run ----------------------------------------------------------------------------------------


def run_introspect(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["introspect.py", *map(str, words)])
        introspect.main()


def test_a_run_gets_a_picture_and_a_file(tmp_path, capsys):
    cartpole = {"env": "gymnax::CartPole-v1", "env_kwargs": {}, "mask": ("velocity",)}
    run = tmp_path / "run"
    rppo.main(tiny(rppo, **cartpole, num_seeds=2, run_dir=str(run), log=("file",)))
    run_introspect(run, "--episodes", 8, "--steps", 10)
    assert "velocity 1: R^2" in capsys.readouterr().out
    assert (run / "introspect.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((run / "introspect.json").read_text())
    assert (found["cell"], found["seeds"], found["step"]) == ("gru", [0, 1], 64)
    assert np.shape(found["lengths"]) == (2, 8) and len(found["recall"]["median"]) == 10
    assert len(found["probe"]["velocity 3"]["carry"]) == 2
    assert found["heat_map"][0] == [1.0] + [None] * (found["lengths"][0][0] - 1)


def test_what_cannot_be_looked_into_is_named(tmp_path):
    make_run(tmp_path / "plain", script="ppo")
    with pytest.raises(UsageError, match="ppo.py, which has no memory: look into a run of rppo.py"):
        introspect.load(str(tmp_path / "plain"))
    make_run(tmp_path / "idea", script="my_idea")
    with pytest.raises(UsageError, match="my_idea.py, and introspect.py knows rppo, "):
        introspect.load(str(tmp_path / "idea"))
    with pytest.raises(UsageError, match="no run in"):
        introspect.load(str(tmp_path / "nothing"))
