"""PQN and recurrent PQN: targets against brute force, rollouts, tasks of known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Table,
    assert_close,
    final_returns,
    network_of,
    one_seed,
    order_of,
    outputs_at_final_observations,
    small_on_policy,
    start,
)

from algorithms import pqn, rpqn
from loggers import Logger
from memory_cells import CELLS

SCRIPTS = [pqn, rpqn]


def small(script, **changes):
    return small_on_policy(script, **{"num_minibatches": 4, "learning_rate": 3e-3} | changes)


def q_values(state, batch):
    """The values (T, N, num_actions) in a rollout, read again from the state before it."""
    if hasattr(batch, "obs"):
        network = network_of(pqn, state.config)
        return jax.vmap(network.apply, (None, 0))(state.params, batch.obs)
    apply = jax.jit(network_of(rpqn, state.config).apply)
    return apply(state.params, state.carry, batch.inputs, batch.start)[1]


# --- Mathematics ---------------------------------------------------------------------------------


def brute_force_targets(reward, next_q, terminated, done, gamma, q_lambda):
    """The forward view of one environment: n-step targets with weights (1 - lambda) lambda^(n - 1).

    The longest, up to the end of the episode or of the rollout, has the weight that is left.
    """
    targets = np.zeros(len(reward))
    for t in range(len(reward)):
        rewards, weight = 0.0, 1.0
        for n in range(1, len(reward) - t + 1):
            last = t + n - 1
            rewards += gamma ** (n - 1) * reward[last]
            n_step = rewards + (0.0 if terminated[last] else gamma**n * next_q[last])
            is_longest = done[last] or last == len(reward) - 1
            targets[t] += weight * (1.0 if is_longest else 1.0 - q_lambda) * n_step
            weight *= q_lambda
            if is_longest:
                break
    return targets


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("q_lambda", [0.0, 0.65, 1.0])
def test_targets_equal_brute_force(script, q_lambda, rng):
    steps, envs = 30, 6
    reward, next_q = rng.normal(size=(2, steps, envs)).astype(np.float32)
    terminated = rng.random((steps, envs)) < 0.1
    done = terminated | (rng.random((steps, envs)) < 0.1)
    config = small(script, gamma=0.97, q_lambda=q_lambda)
    targets = script.q_lambda_targets(*map(jnp.asarray, (reward, next_q, terminated, done)), config)
    for env in range(envs):
        column = (x[:, env] for x in (reward, next_q, terminated, done))
        expected = brute_force_targets(*column, 0.97, q_lambda)
        np.testing.assert_allclose(targets[:, env], expected, atol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_epsilon_falls_in_environment_steps(script):
    """Half-way down at a tenth of the run, whatever steps and gradient steps an update has."""
    changes = {"total_steps": 100_000, "exploration_fraction": 0.2, "start_e": 0.9, "end_e": 0.1}
    changes |= {"num_minibatches": 2, "update_epochs": 3}

    def at(steps, config):
        return script.epsilon(steps // config.steps_per_update, config)

    for sizes in ({"num_envs": 4, "num_steps": 5}, {"num_envs": 50, "num_steps": 2}):
        config = small(script, **changes | sizes)
        for steps, expected in (
            (0, 0.9),
            (10_000, 0.5),
            (20_000, 0.1),
            (50_000, 0.1),
            (100_000, 0.1),
        ):
            np.testing.assert_allclose(at(steps, config), expected, rtol=1e-6)
    config = small(script, exploration_fraction=0.0, end_e=0.05)
    np.testing.assert_allclose(script.epsilon(1, config), 0.05, rtol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_epsilon_greedy_is_what_it_says(script):
    values = jnp.tile(jnp.array([0.1, 0.3, 0.2]), (20_000, 1))
    actions = script.epsilon_greedy(jax.random.key(0), values, 0.3)
    np.testing.assert_allclose(np.bincount(actions) / 20_000, [0.1, 0.8, 0.1], atol=0.01)
    assert (script.epsilon_greedy(jax.random.key(0), values, 0.0) == 1).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_is_the_formula_of_the_docstring(script, rng):
    n, actions = 50, 3
    values, targets = rng.normal(size=(n, actions)), rng.normal(size=n)
    action = rng.integers(actions, size=n)
    given = {"action": jnp.asarray(action), "q_value": jnp.zeros(n)}
    batch = script.Transition(**dict.fromkeys(script.Transition._fields) | given)
    outputs, carry = jnp.asarray(values), ()
    if script is rpqn:
        outputs, carry = ((), outputs), ((),)
    loss, parts = script.td_loss(outputs, Table(), *carry, batch, jnp.asarray(targets))
    chosen = values[np.arange(n), action]
    np.testing.assert_allclose(loss, np.mean(0.5 * (chosen - targets) ** 2), rtol=1e-5)
    np.testing.assert_allclose(parts["losses/q_values"], chosen.mean(), rtol=1e-5)


# --- Rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_next_values_are_of_the_true_next_observation(script):
    config = small(script, env="test::Counting")
    env, state = start(config, script)
    state = one_seed(state)
    _, batch = jax.jit(script.rollout, static_argnames="env")(state, env=env)
    done, best = batch.done[:-1], q_values(state, batch).max(axis=-1)
    assert not done.all() and batch.terminated.any() and (batch.done & ~batch.terminated).any()
    np.testing.assert_allclose(batch.next_q[:-1][~done], best[1:][~done], atol=1e-5)

    # At an episode's end the next observation is (number, 1), read by a memory that is not reset.
    network = network_of(script, config)
    if script is pqn:
        final = batch.obs.at[..., 1].set(1.0)
        expected = jax.vmap(network.apply, (None, 0))(state.params, final).max(axis=-1)
    else:
        expected = outputs_at_final_observations(rpqn, network, state, batch).max(axis=-1)
    np.testing.assert_allclose(batch.next_q[batch.done], expected[batch.done], atol=1e-5)


FEW = ("gru", "gated_deltanet")  # the others compile for two minutes
OTHERS_ARE_SLOW = [
    pytest.param(cell, marks=() if cell in FEW else pytest.mark.slow) for cell in CELLS
]


@pytest.mark.parametrize("cell", OTHERS_ARE_SLOW)
def test_the_loss_sees_what_the_rollout_saw(cell):
    """Unrolled from the carry before the rollout, the batch has the values that were acted on."""
    config = small(rpqn, env="test::Counting", cell=cell, num_minibatches=2, update_epochs=1)
    env, state = start(config, rpqn)
    for _ in range(2):  # for a used carry and trained parameters
        state, report = rpqn.train(state, env, Logger(), config.steps_per_update)
        assert report["losses/first_q_error"].max() < 1e-4
    state = one_seed(state)
    after, batch = jax.jit(rpqn.rollout, static_argnames="env")(state, env=env)
    # The rollout begins and ends within episodes.
    assert not batch.start[0].all() and batch.start.any()
    np.testing.assert_array_equal(batch.start[1:], batch.done[:-1])
    args = state.carry, batch.inputs, batch.start
    carry, values = jax.jit(network_of(rpqn, config).apply)(state.params, *args)
    chosen = jnp.take_along_axis(values, batch.action[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, batch.q_value, atol=1e-5)
    if cell != "dnc":  # which of two equally free slots it writes to is decided by rounding
        assert_close(carry, after.carry, atol=1e-5)


def test_the_memory_is_told_the_executed_action():
    """Also where exploration chose it."""
    config = small(rpqn, env="test::Counting", start_e=0.5, end_e=0.5)
    env, state = start(config, rpqn)
    state = one_seed(state)
    after, batch = rpqn.rollout(state, env)
    assert 0.1 < (q_values(state, batch).argmax(axis=-1) != batch.action).mean() < 0.6
    np.testing.assert_array_equal(batch.inputs.action[1:], batch.action[:-1])
    np.testing.assert_array_equal(after.inputs.action, batch.action[-1])
    np.testing.assert_array_equal(after.inputs.reward, batch.reward[-1])


# --- Updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "changes"),
    [(pqn, {}), (rpqn, {}), (rpqn, {"cell": "slstm", "num_layers": 2, "bptt": 4})],
)
def test_the_first_minibatch_finds_the_values_of_the_rollout(script, changes):
    config = small(script, env="test::Counting", **changes)
    env, state = start(config, script)
    for _ in range(3):
        state, report = script.train(state, env, Logger(), config.steps_per_update)
        assert report["losses/first_q_error"].max() < 1e-5
        assert np.isfinite(report["losses/td_loss"]).all()
        assert report["losses/grad_norm"].min() > 0


def test_minibatches_are_whole_environments(monkeypatch):
    """The loss must get sequences, each of one environment."""
    original = rpqn.td_loss

    def checked_loss(params, network, carry, batch, targets):
        loss, parts = original(params, network, carry, batch, targets)
        return loss, parts | order_of(batch)

    monkeypatch.setattr(rpqn, "td_loss", checked_loss)
    # With another gamma than elsewhere: a program compiled before would have the original loss.
    config = small(rpqn, env="test::Counting", cell="none", gamma=0.98)
    env, state = start(config, rpqn)
    first_numbers = state.inputs.obs[..., 0].mean()
    _, report = rpqn.train(state, env, Logger(), config.steps_per_update)
    assert report["test/in_order"] == 1.0
    # An epoch sees all, each once.
    np.testing.assert_allclose(report["test/number"], first_numbers, rtol=1e-5)


def test_minibatches_of_steps_cover_the_batch(monkeypatch):
    original = pqn.td_loss

    def checked_loss(params, network, batch, targets):
        loss, parts = original(params, network, batch, targets)
        return loss, parts | {"test/targets": targets.mean(), "test/squares": (targets**2).mean()}

    monkeypatch.setattr(pqn, "td_loss", checked_loss)
    config = small(pqn, env="test::Counting", gamma=0.98)  # compiled with this loss
    env, state = start(config, pqn)
    _, batch = pqn.rollout(one_seed(state), env)
    targets = pqn.q_lambda_targets(batch.reward, batch.next_q, batch.terminated, batch.done, config)
    _, report = pqn.train(state, env, Logger(), config.steps_per_update)
    np.testing.assert_allclose(report["test/targets"], targets.mean(), rtol=1e-4)
    np.testing.assert_allclose(report["test/squares"], (targets**2).mean(), rtol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("id", ["gymnax::Breakout-MinAtar", "gymnax::FrozenLake-misc"])
def test_images_and_integers_are_observations_too(script, id):
    cell = {"cell": "none"} if script is rpqn else {}
    config = small(script, env=id, num_steps=4, total_steps=32, update_epochs=1, **cell)
    env, state = start(config, script)
    state, report = script.train(state, env, Logger(), config.steps_per_update)
    assert np.isfinite(report["losses/td_loss"]).all()
    kernels = {leaf.ndim for leaf in jax.tree.leaves(state.params)}
    assert (5 in kernels) == ("MinAtar" in id)  # a convolution's kernel, with the seed axis


# --- Tasks of known values -----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_truncation_is_no_end_of_the_world(script):
    """Reward 1 for ever, cut into episodes of 5 steps: the value is 1 / (1 - gamma) = 10.

    If the cut counted as an end, it would be less than 4.1.
    """
    cell = {"cell": "none"} if script is rpqn else {}
    config = small(script, env="test::Constant", gamma=0.9, total_steps=8 * 16 * 150, **cell)
    env, state = start(config, script)
    state, _ = script.train(state, env, Logger(), config.total_steps)
    _, batch = script.rollout(one_seed(state), env)
    np.testing.assert_allclose(batch.q_value, 10.0, atol=0.5)


@pytest.mark.parametrize(
    ("script", "probe"),
    [
        (pqn, {"obs_matters": False, "action_matters": False}),
        (pqn, {"obs_matters": False, "action_matters": False, "wait": 2}),
        (pqn, {"action_matters": False}),
        (pqn, {"obs_matters": False}),
        (pqn, {}),
        (rpqn, {}),
        (rpqn, {"action_matters": False, "wait": 2}),
        (rpqn, {"wait": 3}),
    ],
    ids=str,
)
def test_probes_are_solved(script, probe):
    """Acting greedily in the end: that epsilon explores as it should is tested elsewhere."""
    changes = {"gamma": 0.8, "end_e": 0.0, "total_steps": 8 * 16 * 100}
    config = small(script, env="test::Probe", env_kwargs=probe, **changes)
    env, state = start(config, script)
    state, _ = script.train(state, env, Logger(), config.total_steps)
    returns = script.evaluate(state, env, 40).returns
    state = one_seed(state)
    _, batch = script.rollout(state, env)
    obs = batch.obs if script is pqn else batch.inputs.obs
    steps_to_go, first = obs[..., 1], obs[..., 1] == probe.get("wait", 0)
    if probe.get("action_matters", True):
        assert (returns == 1.0).all()
        expected, known = 0.8**steps_to_go, True
    elif probe.get("obs_matters", True):  # later on, only the memory knows the sign
        expected, known = obs[..., 0] * 0.8**steps_to_go, first
    else:
        expected, known = 0.8**steps_to_go, True
    known &= steps_to_go >= 0
    best = q_values(state, batch).max(axis=-1)
    expected = jnp.broadcast_to(expected, best.shape)
    np.testing.assert_allclose(best[known], expected[known], atol=0.1)


def test_without_a_memory_the_sign_is_forgotten():
    """Half of the answers are wrong, as not even the previous action, which could be it, helps."""
    probe = {"env": "test::Probe", "env_kwargs": {"wait": 3}, "total_steps": 8 * 16 * 100}
    config = small(rpqn, cell="none", prev_action=False, **probe)
    env, state = start(config, rpqn)
    state, _ = rpqn.train(state, env, Logger(), config.total_steps)
    assert abs(rpqn.evaluate(state, env, 40).returns.mean()) < 0.7


# --- Learning ------------------------------------------------------------------------------------


def chain(length):
    return {"env": "gymnax::MemoryChain-bsuite", "env_kwargs": {"memory_length": length}}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("script", "changes", "at_least"),
    [
        (pqn, {}, 490),
        (pqn, {"env": "gymnax::Acrobot-v1"}, -95),
        (rpqn, {"cell": "gru", "mask": ("velocity",)}, 400),
        (rpqn, {"cell": "gru", "total_steps": 300_000} | chain(10), 0.95),
        (rpqn, {"cell": "gru", "total_steps": 500_000} | chain(100), 0.9),
    ],
)
def test_the_results_of_the_readme(script, changes, at_least):
    assert np.median(final_returns(script, num_seeds=5, **changes)) >= at_least
