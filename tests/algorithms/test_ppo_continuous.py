"""PPO with continuous actions: what the tests of PPO do not say about it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Table, assert_same, counting, final_returns, network_of, one_seed, start
from helpers import small_on_policy as small
from scipy import stats

from algorithms import ppo_continuous, rppo_continuous
from experiment import seed_keys
from harness.checkpoints import Checkpoints
from loggers import Logger

CONTINUOUS = [ppo_continuous, rppo_continuous]

# --- Mathematics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", CONTINUOUS)
def test_the_loss_is_the_formula_of_the_docstring(script, rng):
    """With the density and the entropy of scipy; the action is not squashed, nor clipped."""
    n, std = 50, np.array([0.5, 2.0])
    mean, action, value = rng.normal(size=(n, 2)), 2.0 * rng.normal(size=(n, 2)), rng.normal(size=n)
    old_log_prob, advantage, returns = rng.normal(size=(3, n))
    given = {"action": jnp.asarray(action), "log_prob": old_log_prob, "value": value}
    batch = script.Transition(**dict.fromkeys(script.Transition._fields) | given)
    config = small(script, clip_coef=0.3, vf_coef=0.7, ent_coef=0.2)
    outputs = jnp.asarray(mean), jnp.asarray(std), jnp.asarray(value)
    outputs, carry = (outputs, ()) if script is ppo_continuous else (((), *outputs), ((),))
    data = batch, jnp.asarray(advantage), jnp.asarray(returns)
    loss, parts = script.ppo_loss(outputs, Table(), config, *carry, *data)

    densities = [stats.multivariate_normal(m, np.diag(std**2)) for m in mean]
    log_prob = np.array([density.logpdf(a) for density, a in zip(densities, action, strict=True)])
    ratio = np.exp(log_prob - old_log_prob)
    normal = (advantage - advantage.mean()) / advantage.std()
    policy_loss = -np.mean(np.minimum(ratio * normal, np.clip(ratio, 0.7, 1.3) * normal))
    value_loss, entropy = 0.5 * np.mean((value - returns) ** 2), densities[0].entropy()
    np.testing.assert_allclose(parts["losses/entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(parts["losses/policy_loss"], policy_loss, rtol=1e-4)
    np.testing.assert_allclose(loss, policy_loss + 0.7 * value_loss - 0.2 * entropy, rtol=1e-4)


# --- Actions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_are_stored_as_drawn_and_clipped_where_they_are_executed(script):
    """test::Steering has actions from -3 to 2, and a reward of 1 plus the first of them."""
    config = counting(script, normalize_reward=False)
    env, state = start(config, script)
    _, batch = script.rollout(one_seed(state), env)
    assert batch.action.shape == (16, 8, 2) and (jnp.abs(batch.action) > 1.0).any()
    executed = -0.5 + 2.5 * jnp.clip(batch.action[..., 0], -1.0, 1.0)
    np.testing.assert_allclose(batch.reward, 1.0 + executed, atol=1e-5)
    log_prob = stats.norm.logpdf(batch.action, *policy(state, batch)).sum(-1)
    np.testing.assert_allclose(batch.log_prob, log_prob, atol=1e-4)


def policy(state, batch):
    """Mean and standard deviation that the actions of a rollout were drawn from."""
    state = one_seed(state)
    if hasattr(state, "obs"):
        network = network_of(ppo_continuous, state.config)
        mean, std, _ = jax.vmap(network.apply, (None, 0))(state.params, batch.obs)
        return mean, std[0]
    inputs = state.carry, batch.inputs, batch.start
    return network_of(rppo_continuous, state.config).apply(state.params, *inputs)[1:3]


def test_the_memory_reads_the_executed_action():
    """Two actions beyond the same bound are one; before an episode's first step there was none."""
    config = small(rppo_continuous)
    _, state = start(config, rppo_continuous)
    state, network = one_seed(state), network_of(rppo_continuous, config)

    def value(action, start):
        inputs = state.inputs._replace(action=jnp.full((8, 1), action))
        args = state.carry, inputs, jnp.full(8, start)
        return network.apply(state.params, *args, method="step")[-1]

    np.testing.assert_array_equal(value(1.5, False), value(40.0, False))
    assert (value(0.5, False) != value(1.5, False)).all()
    assert (value(-1.0, False) != value(1.0, False)).all()
    np.testing.assert_array_equal(value(0.5, True), value(-0.5, True))


# --- Normalisation -------------------------------------------------------------------------------


def test_statistics_are_learned_frozen_and_saved(tmp_path):
    """Training moves them, evaluation uses them and leaves them alone, a checkpoint keeps them."""
    config = counting(ppo_continuous, num_seeds=2)
    env, state = start(config, ppo_continuous)
    state, _ = ppo_continuous.train(state, env, Logger(), 4 * config.steps_per_update)
    observed = state.env_state.statistics.obs
    np.testing.assert_allclose(observed.count, 8 * (1 + 4 * 16), rtol=1e-5)  # those of reset, too
    np.testing.assert_allclose(observed.mean[..., 0], 0.5, atol=0.2)  # numbers between 0 and 1
    before = jax.tree.map(jnp.copy, state.env_state)
    episodes = ppo_continuous.evaluate(state, env, 8)
    assert_same(state.env_state, before)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 512, 0.0, metrics_bytes=0, diverged=[])
    checkpoints.close()
    like = jax.eval_shape(lambda: ppo_continuous.init(config, seed_keys(config)))
    loaded, *_ = Checkpoints(tmp_path).restore(like)
    assert_same(loaded.env_state.statistics, state.env_state.statistics)
    assert_same(ppo_continuous.evaluate(loaded, env, 8), episodes)

    # They matter: with those of other observations the same policy plays otherwise.
    statistics = jax.tree.map(lambda x: x + 1.0, state.env_state.statistics)
    other = state.env_state._replace(statistics=statistics)
    others = ppo_continuous.evaluate(state.replace(env_state=other), env, 8)
    assert (others.returns != episodes.returns).any()


# --- Learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", CONTINUOUS)
def test_steering_goes_to_its_bound(script):
    """Return 7 * (1 + 2) with the best action, 7 * (1 - 0.5) with that of the middle."""
    cell = {"cell": "none"} if script is rppo_continuous else {}
    config = counting(script, learning_rate=1e-2, total_steps=8 * 16 * 40, **cell)
    env, state = start(config, script)
    assert script.evaluate(state, env, 8).returns.mean() < 7 * 1.0
    state, _ = script.train(state, env, Logger(), config.total_steps)
    assert script.evaluate(state, env, 8).returns.mean() > 7 * 2.8


def test_memory_learns_what_none_cannot():
    """Remember a sign for three steps, then act on it: 1 with a memory; 0 by chance."""
    probe = {"env": "test::Probe", "env_kwargs": {"wait": 3, "continuous": True}}
    config = small(rppo_continuous, learning_rate=1e-2, total_steps=8 * 16 * 80, **probe)
    for cell, low, high in (("gru", 0.9, 1.0), ("none", -0.6, 0.6)):
        config = replace(config, cell=cell, prev_action=cell != "none")
        env, state = start(config, rppo_continuous)
        state, _ = rppo_continuous.train(state, env, Logger(), config.total_steps)
        assert low <= rppo_continuous.evaluate(state, env, 40).returns.mean() <= high


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("script", "changes", "at_least"),
    [
        (ppo_continuous, {"total_steps": 300_000}, -200),
        (rppo_continuous, {"total_steps": 1_000_000, "cell": "gru", "mask": ("velocity",)}, -300),
    ],
)
def test_the_results_of_the_readme(script, changes, at_least):
    assert np.median(final_returns(script, num_seeds=3, **changes)) >= at_least
