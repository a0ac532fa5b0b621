"""What holds for an update of every script: rates, exploration, targets, metrics, randomness.

One program per script serves all of this: one gradient step, no memory, `echo_task`. Several
gradient steps, memories and tasks of other kinds are tested with the algorithms.
"""

import functools
import importlib

import jax
import numpy as np
import pytest
from helpers import REPLAY, SCRIPTS, assert_close, assert_same, one_gradient_step, one_seed, start

EXPLORING = ("dqn", "drqn", "pqn", "rpqn")
UPDATES = 64  # of the whole run; exploration ends half-way
OPTIONS = {"num_envs": 8, "learning_starts": 0, "total_steps": 8 * 8 * UPDATES, "tau": 0.3}
OPTIONS |= {"target_network_frequency": 2, "start_e": 1.0, "end_e": 0.0}
OPTIONS |= {"exploration_fraction": 0.5, "learning_rate": 1e-3, "anneal_lr": True}


def on_one_worker(scripts):
    """The scripts as parameters: who compiles an update also runs the other tests of it."""
    return [pytest.param(script, marks=pytest.mark.xdist_group(script)) for script in scripts]


@functools.cache
def ran(script):
    """The compiled update, and the states and metrics of the first three."""
    module = importlib.import_module(f"algorithms.{script}")
    env, state = start(one_gradient_step(module, **OPTIONS), module)
    update = jax.jit(functools.partial(module.update, env=env))
    states, metrics = [one_seed(state)], []
    for _ in range(3):
        state, report = update(states[-1])
        states.append(state)
        metrics.append(report)
    return update, states, metrics


def after(script, updates, first=3):
    """The state `first`, and the next one and its metrics if `updates` had been done before it."""
    update, states, _ = ran(script)
    before = states[first]
    return before, *update(before.replace(updates=before.updates * 0 + updates))


@pytest.mark.parametrize("script", on_one_worker(SCRIPTS))
def test_the_learning_rate_that_is_applied_is_reported_and_falls_to_zero(script):
    def change(updates, rate, first=3):
        before, state, metrics = after(script, updates, first)
        np.testing.assert_allclose(metrics["charts/learning_rate"], rate, rtol=1e-6, atol=0)
        return jax.tree.map(lambda a, b: a - b, state.params, before.params)

    # The first step of Adam has the size of the learning rate.
    first = change(UPDATES // 2, 5e-4, first=0)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(first))
    np.testing.assert_allclose(largest, 5e-4, rtol=0.02)
    # From one state, steps in one direction.
    half, quarter = change(UPDATES // 2, 5e-4), change(3 * UPDATES // 4, 2.5e-4)
    assert_close(quarter, jax.tree.map(lambda x: x / 2, half), rtol=1e-3, atol=3e-7)
    for updates in (UPDATES, 2 * UPDATES):  # never past the end
        assert not any(leaf.any() for leaf in jax.tree.leaves(change(updates, 0.0)))


@pytest.mark.parametrize("script", on_one_worker(REPLAY))
def test_the_target_network_follows(script):
    """By tau, after every second gradient step where the script counts them.

    The clock is that of the optimizer: updates that fill a buffer take no gradient step.
    """
    has_frequency = hasattr(ran(script)[1][0].config, "target_network_frequency")
    for first in (2, 3):
        before, state, _ = after(script, 10, first)
        moves = not has_frequency or (first + 1) % 2 == 0

        def expected(online, target, moves=moves):
            return target + 0.3 * moves * (online - target)

        assert_close(
            state.target_params,
            jax.tree.map(expected, state.params, before.target_params),
            rtol=1e-5,
            atol=1e-7,
        )
    distances = jax.tree.map(lambda a, b: abs(a - b).max(), state.params, state.target_params)
    assert max(jax.tree.leaves(distances)) > 1e-5


@pytest.mark.parametrize("script", on_one_worker(SCRIPTS))
def test_exploration_is_that_of_the_schedule_or_of_the_policy(script):
    """All environments show the same until actions differ, which greedy ones never do."""

    def differ(updates):
        _, state, metrics = after(script, updates, first=0)
        obs = np.asarray(state.obs if hasattr(state, "obs") else state.inputs.obs)
        return (obs != obs[:1]).any(), metrics

    different, metrics = differ(0)
    assert different
    if script in EXPLORING:
        assert metrics["charts/epsilon"] == 1.0
        different, metrics = differ(UPDATES // 2)
        assert metrics["charts/epsilon"] == 0.0 and not different
        _, metrics = differ(UPDATES // 4)
        np.testing.assert_allclose(metrics["charts/epsilon"], 0.5)
    else:
        assert differ(UPDATES // 2)[0]


@pytest.mark.parametrize("script", on_one_worker(SCRIPTS))
def test_metrics_are_those_of_the_episodes_that_ended(script):
    """Eight environments; an episode of 5 steps pays 15; updates have 8 steps."""
    for metrics, ended in zip(ran(script)[2], (8, 16, 8), strict=True):
        assert metrics["charts/episodes"] == ended
        assert metrics["charts/episodic_return"] == 15 * ended
        assert metrics["charts/episodic_length"] == 5 * ended


@pytest.mark.parametrize("script", on_one_worker(SCRIPTS))
def test_every_environment_and_every_update_has_keys_of_its_own(script):
    update, states, metrics = ran(script)
    drawn = np.concatenate([state.env_state.task[1] for state in states])
    assert len(set(drawn.tolist())) == 4 * 8
    keys = [jax.random.key_data(state.key).tolist() for state in states]
    assert len(set(map(tuple, keys))) == 4
    assert [int(state.updates) for state in states] == [0, 1, 2, 3]
    # And the same keys do the same again.
    state, report = update(states[2])
    assert_same(state, states[3])
    assert_same(report, metrics[2])
