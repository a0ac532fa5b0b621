"""PPO and recurrent PPO: the mathematics against brute force, invariants that catch recurrent bugs.

What only continuous actions have is in test_ppo_continuous.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Table,
    assert_close,
    assert_same,
    copy,
    counting,
    final_returns,
    network_of,
    one_seed,
    order_of,
    outputs_at_final_observations,
    start,
)
from helpers import small_on_policy as small

from algorithms import ppo, ppo_continuous, rppo, rppo_continuous
from experiment import report_chunks
from loggers import Logger
from memory_cells import CELLS

SCRIPTS = [ppo, rppo]
RECURRENT, CONTINUOUS = [rppo, rppo_continuous], [ppo_continuous, rppo_continuous]


def multivariate_normal_log_prob(action, mean, std):
    """Of independent entries, by the formula for dependent ones."""
    return jax.scipy.stats.multivariate_normal.logpdf(action, mean, jnp.diag(std**2))


# --- Mathematics ---------------------------------------------------------------------------------


def brute_force_gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """A_t = sum of (gamma lambda)^k delta_(t + k) until the end of its episode; one environment."""
    advantages = np.zeros(len(reward))
    for t in range(len(reward)):
        for k in range(t, len(reward)):
            bootstrap = 0.0 if terminated[k] else gamma * next_value[k]
            advantages[t] += (gamma * gae_lambda) ** (k - t) * (reward[k] + bootstrap - value[k])
            if done[k]:
                break
    return advantages


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_gae_equals_brute_force(script, gae_lambda, rng):
    length, envs = 30, 6
    reward, value, next_value = rng.normal(size=(3, length, envs)).astype(np.float32)
    terminated = rng.random((length, envs)) < 0.1
    done = terminated | (rng.random((length, envs)) < 0.1)
    config = small(script, gamma=0.97, gae_lambda=gae_lambda)
    steps = reward, value, next_value, terminated, done
    advantages, returns = script.gae(*map(jnp.asarray, steps), config)
    for env in range(envs):
        column = (x[:, env] for x in steps)
        expected = brute_force_gae(*column, 0.97, gae_lambda)
        np.testing.assert_allclose(advantages[:, env], expected, atol=1e-4)
    np.testing.assert_allclose(returns, advantages + value, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_is_the_formula_of_the_docstring(script, rng):
    """Against numpy, away from ratio = 1 and with both signs of the advantage."""
    n, actions = 50, 3
    logits, value = rng.normal(size=(n, actions)), rng.normal(size=n)
    action = rng.integers(actions, size=n)
    old_log_prob, old_value = rng.normal(size=n) - 1.0, rng.normal(size=n)
    advantage, returns = rng.normal(size=n), rng.normal(size=n)
    given = {"action": jnp.asarray(action), "log_prob": old_log_prob, "value": old_value}
    batch = script.Transition(**dict.fromkeys(script.Transition._fields) | given)
    config = small(script, clip_coef=0.3, vf_coef=0.7, ent_coef=0.2, clip_vloss=True)
    outputs = jnp.asarray(logits), jnp.asarray(value)
    outputs, carry = (outputs, ()) if script is ppo else (((), *outputs), ((),))
    data = batch, jnp.asarray(advantage), jnp.asarray(returns)
    loss, parts = script.ppo_loss(outputs, Table(), config, *carry, *data)

    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ratio = policy[np.arange(n), action] / np.exp(old_log_prob)
    normal = (advantage - advantage.mean()) / advantage.std()
    policy_loss = -np.mean(np.minimum(ratio * normal, np.clip(ratio, 0.7, 1.3) * normal))
    clipped = old_value + np.clip(value - old_value, -0.3, 0.3)
    value_loss = 0.5 * np.mean(np.maximum((value - returns) ** 2, (clipped - returns) ** 2))
    entropy = -np.mean((policy * np.log(policy)).sum(1))
    np.testing.assert_allclose(loss, policy_loss + 0.7 * value_loss - 0.2 * entropy, rtol=1e-4)
    clipfrac, approx_kl = np.mean(np.abs(ratio - 1) > 0.3), np.mean(ratio - 1 - np.log(ratio))
    np.testing.assert_allclose(parts["losses/clipfrac"], clipfrac, rtol=1e-5)
    np.testing.assert_allclose(parts["losses/approx_kl"], approx_kl, rtol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_a_single_advantage_is_learned_from(script):
    """Minus its own mean it would be 0."""
    one = jnp.ones(1)
    discrete = script in SCRIPTS
    given = {"action": jnp.zeros(1, int) if discrete else jnp.zeros((1, 1))}
    given |= {"log_prob": 0.0 * one, "value": one}
    batch = script.Transition(**dict.fromkeys(script.Transition._fields) | given)
    policy = (jnp.zeros((1, 2)),) if discrete else (jnp.zeros((1, 1)), jnp.ones((1, 1)))
    outputs, carry = (*policy, one), ()
    if script in (rppo, rppo_continuous):
        outputs, carry = ((), *outputs), ((),)
    config = small(script, normalize_advantage=True, clip_coef=0.9)
    _, parts = script.ppo_loss(outputs, Table(), config, *carry, batch, 3.0 * one, one)
    assert parts["losses/policy_loss"] < -0.1


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_minibatches_on_two_devices_have_the_loss_of_one(script, rng):
    """Their advantages have mean 0 and deviation 1 together, not each on its own."""
    n, discrete = 20, script in SCRIPTS
    advantage, returns, value, log_prob = jnp.asarray(rng.normal(size=(4, n)), jnp.float32)
    action = rng.integers(2, size=n) if discrete else rng.normal(size=(n, 1))
    given = {"action": jnp.asarray(action), "log_prob": log_prob, "value": value}
    batch = script.Transition(**dict.fromkeys(script.Transition._fields) | given)
    policy = (rng.normal(size=(n, 2)),) if discrete else (rng.normal(size=(n, 1)), np.ones((n, 1)))
    outputs = *map(jnp.asarray, policy), value
    config = small(script, normalize_advantage=True)

    def loss(outputs, *data):
        carry = ()
        if script in (rppo, rppo_continuous):
            outputs, carry = ((), *outputs), ((),)
        return script.ppo_loss(outputs, Table(), config, *carry, *data)[0]

    minibatch = outputs, batch, advantage, returns
    halves = jax.tree.map(lambda x: x.reshape(2, n // 2, *x.shape[1:]), minibatch)
    of_halves = jax.vmap(loss, axis_name="devices")(*halves)
    np.testing.assert_allclose(of_halves.mean(), loss(*minibatch), rtol=1e-5)
    assert abs(jax.vmap(loss)(*halves).mean() - loss(*minibatch)) > 1e-3


@pytest.mark.parametrize(
    ("script", "gae_lambda"),
    [*itertools.product(SCRIPTS, (0.0, 1.0)), (ppo_continuous, 0.0), (rppo_continuous, 1.0)],
)
def test_truncation_is_no_end_of_the_world(script, gae_lambda):
    """Reward 1 for ever, cut into episodes of 5 steps: the value is 1 / (1 - gamma) = 10.

    If the cut counted as an end, it would be less than 4.1.
    """
    changes = {"gamma": 0.9, "gae_lambda": gae_lambda, "learning_rate": 3e-3, "ent_coef": 0.0}
    if script in RECURRENT:
        changes |= {"cell": "none"}
    if script in CONTINUOUS:
        changes |= {"normalize_reward": False, "env_kwargs": {"continuous": True}}
    config = small(script, env="test::Constant", total_steps=8 * 16 * 250, **changes)
    env, state = start(config, script)
    state, _ = script.train(state, env, Logger(), config.total_steps)
    _, batch = script.rollout(one_seed(state), env)
    np.testing.assert_allclose(batch.value, 10.0, atol=0.5)


# --- Rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_next_values_are_of_the_true_next_observation(script):
    config = counting(script, **({"normalize_obs": False} if script in CONTINUOUS else {}))
    env, state = start(config, script)
    state = one_seed(state)
    _, batch = jax.jit(script.rollout, static_argnames="env")(state, env=env)
    done = batch.done[:-1]
    assert not done.all() and batch.terminated.any() and (batch.done & ~batch.terminated).any()
    np.testing.assert_allclose(batch.next_value[:-1][~done], batch.value[1:][~done], atol=1e-5)

    # At an episode's end the next observation is (number, 1), read by a memory that is not reset.
    network = network_of(script, config)
    if script not in RECURRENT:
        final = batch.obs.at[..., 1].set(1.0)
        expected = jax.vmap(network.apply, (None, 0))(state.params, final)[-1]
    else:
        expected = outputs_at_final_observations(script, network, state, batch)
    np.testing.assert_allclose(batch.next_value[batch.done], expected[batch.done], atol=1e-5)


# One memory compiles in half the time of two: two of a kind are the exception.
EVERY_CELL = [(rppo, cell, cell not in ("gru", "slstm")) for cell in CELLS]
OTHERS = [(rppo, "gru", True), (rppo_continuous, "gru", False), (rppo_continuous, "s5", True)]


@pytest.mark.parametrize(("script", "cell", "shared_torso"), EVERY_CELL + OTHERS)
def test_the_loss_sees_what_the_rollout_saw(script, cell, shared_torso):
    """Unrolled from the carry before it, the rollout has its log-probabilities and values."""
    config = counting(script, cell=cell, shared_torso=shared_torso)
    env, state = start(config, script)
    for _ in range(2):  # for a used carry and trained parameters
        state, report = script.train(state, env, Logger(), config.steps_per_update)
        assert report["losses/first_ratio_error"].max() < 1e-4

    @jax.jit
    def act_and_read(state):
        after, batch = script.rollout(state, env)
        args = state.carry, batch.inputs, batch.start
        return after, batch, network_of(script, config).apply(state.params, *args)

    after, batch, (carry, *policy, value) = act_and_read(one_seed(state))
    # The rollout begins and ends within episodes.
    assert not batch.start[0].all() and batch.start.any()
    np.testing.assert_array_equal(batch.start[1:], batch.done[:-1])
    if script in CONTINUOUS:
        log_prob = multivariate_normal_log_prob(batch.action, *policy)
    else:
        log_prob = jax.nn.log_softmax(*policy)
        log_prob = jnp.take_along_axis(log_prob, batch.action[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_prob, batch.log_prob, atol=1e-5)
    np.testing.assert_allclose(value, batch.value, atol=1e-5)
    if cell != "dnc":  # which of two equally free slots it writes to is decided by rounding
        assert_close(carry, after.carry, atol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "slstm", "gtrxl", "gated_deltanet"])
def test_the_network_forgets_at_a_start(cell):
    config = small(rppo, cell=cell, shared_torso=cell != "gru")
    _, state = start(config, rppo)
    state, read = one_seed(state), jax.jit(network_of(rppo, config).apply)
    key, steps = jax.random.key(1), 12
    inputs = rppo.Inputs(
        jax.random.normal(key, (steps, 8, 4)),
        jax.random.randint(key, (steps, 8), 0, 2),
        jax.random.normal(key, (steps, 8)),
    )
    starts = jnp.zeros((steps, 8), bool).at[6, :4].set(True)
    _, logits, value = read(state.params, state.carry, inputs, starts)
    # Everything before step 6 changes, and so does the action and reward that step 6 is told of.
    obs = inputs.obs.at[:6].add(1.0)
    other = rppo.Inputs(obs, inputs.action.at[:7].add(1) % 2, inputs.reward.at[:7].add(1.0))
    carry = jax.tree.map(lambda c: c + 1.0, state.carry)
    _, other_logits, other_value = read(state.params, carry, other, starts)
    np.testing.assert_array_equal(logits[6:, :4], other_logits[6:, :4])
    np.testing.assert_array_equal(value[6:, :4], other_value[6:, :4])
    assert (jnp.abs(value[6, 4:] - other_value[6, 4:]) > 1e-6).all()


@pytest.mark.parametrize("read", ["prev_action", "prev_reward"])
def test_previous_action_and_reward_can_be_left_out(read):
    config = small(rppo, **({"prev_action": False, "prev_reward": False} | {read: True}))
    _, state = start(config, rppo)
    state, network = one_seed(state), network_of(rppo, config)

    def value(inputs):
        args = state.carry, inputs, jnp.zeros(8, bool)
        return network.apply(state.params, *args, method="step")[2]

    base = rppo.Inputs(state.inputs.obs, jnp.zeros(8, jnp.int32), jnp.zeros(8))
    other_action = value(base._replace(action=base.action + 1))
    other_reward = value(base._replace(reward=base.reward + 1))
    assert (value(base) != other_action).any() == (read == "prev_action")
    assert (value(base) != other_reward).any() == (read == "prev_reward")


# --- Updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (ppo, {}),
        (ppo, {"shared_torso": True}),
        (rppo, {}),
        (rppo, {"cell": "slstm"}),
        (rppo, {"shared_torso": True, "num_layers": 2, "bptt": 4}),
        (ppo_continuous, {}),
        (rppo_continuous, {"bptt": 4}),
    ],
)
def test_first_ratio_is_one(script, changes):
    config = counting(script, **changes)
    env, state = start(config, script)
    for _ in range(3):
        state, report = script.train(state, env, Logger(), config.steps_per_update)
        assert report["losses/first_ratio_error"].max() < 1e-5
        assert np.isfinite(report["losses/policy_loss"]).all()
        assert report["losses/entropy"].min() > 0
        assert report["losses/explained_variance"].max() <= 1.0
    assert report["losses/approx_kl"].min() > 0  # the later minibatches have moved


def test_minibatches_are_whole_environments(monkeypatch):
    """The loss must get sequences, each of one environment."""
    original = rppo.ppo_loss

    def checked_loss(params, network, config, carry, batch, advantage, returns):
        loss, parts = original(params, network, config, carry, batch, advantage, returns)
        return loss, parts | order_of(batch)

    monkeypatch.setattr(rppo, "ppo_loss", checked_loss)
    # With another gamma than elsewhere: a program compiled before would have the original loss.
    config = counting(rppo, cell="none", num_minibatches=4, gamma=0.98)
    env, state = start(config, rppo)
    first_numbers = state.inputs.obs[..., 0].mean()
    _, report = rppo.train(state, env, Logger(), config.steps_per_update)
    assert report["test/in_order"] == 1.0
    # An epoch sees all, each once.
    np.testing.assert_allclose(report["test/number"], first_numbers, rtol=1e-5)


def test_minibatches_of_steps_cover_the_batch(monkeypatch):
    original = ppo.ppo_loss

    def checked_loss(params, network, config, batch, advantage, returns):
        loss, parts = original(params, network, config, batch, advantage, returns)
        return loss, parts | {"test/returns": returns.mean(), "test/squares": (returns**2).mean()}

    monkeypatch.setattr(ppo, "ppo_loss", checked_loss)
    config = counting(ppo, num_minibatches=4, gamma=0.98)  # compiled with this loss
    env, state = start(config, ppo)
    _, batch = ppo.rollout(one_seed(state), env)
    steps = batch.reward, batch.value, batch.next_value, batch.terminated, batch.done
    _, returns = ppo.gae(*steps, config)
    _, report = ppo.train(state, env, Logger(), config.steps_per_update)
    np.testing.assert_allclose(report["test/returns"], returns.mean(), rtol=1e-4)
    np.testing.assert_allclose(report["test/squares"], (returns**2).mean(), rtol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_run_and_other_seed_other_run(script):
    config = small(script)

    def metrics(seed):
        env, state = start(config, script, seed)
        return script.train(state, env, Logger(), 4 * config.steps_per_update)

    state, report = metrics(0)
    same_state, same_report = metrics(0)
    _, other_report = metrics(1)
    jax.tree.map(np.testing.assert_array_equal, state.params, same_state.params)
    same_report.pop("charts/SPS"), report.pop("charts/SPS")
    jax.tree.map(np.testing.assert_array_equal, report, same_report)
    assert report["losses/value_loss"] != other_report["losses/value_loss"]


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_a_seed_among_several_is_the_run_of_that_seed(script):
    several, single = small(script, num_seeds=2), small(script)
    env, state = start(several, script)
    state, _ = script.train(state, env, Logger(), 2 * several.steps_per_update)
    env, alone = start(single, script, seed=1)
    alone, _ = script.train(alone, env, Logger(), 2 * single.steps_per_update)
    second = jax.tree.map(lambda x: x[1], state.params)
    assert_close(second, one_seed(alone).params, atol=2e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shorter_last_chunk_is_the_same_training(script):
    config = small(script)
    assert list(report_chunks(config, 6 * config.steps_per_update)) == [4, 2]
    env, state = start(config, script)
    whole, _ = script.train(state, env, Logger(), 6 * config.steps_per_update)
    env, state = start(config, script)
    parts, _ = script.train(state, env, Logger(), 3 * config.steps_per_update)
    parts, _ = script.train(parts, env, Logger(), 3 * config.steps_per_update)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    assert whole.updates == parts.updates == 6


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_warmup_and_evaluation_leave_the_state_alone(script):
    config = small(script, num_seeds=2)
    env, state = start(config, script)
    before = copy(state)
    state = script.warmup(state, env, Logger())
    assert_same(state, before)
    first = script.evaluate(state, env, 8)
    assert_same(state, before)
    again = script.evaluate(state, env, 8)
    assert_same(first, again)
    assert first.returns.shape == first.lengths.shape == (2, 8)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "id", ["gymnax::Breakout-MinAtar", "gymnax::Catch-bsuite", "gymnax::FrozenLake-misc"]
)
def test_images_matrices_and_integers_are_observations_too(script, id):
    cell = {"cell": "none"} if script is rppo else {}
    config = small(script, env=id, num_steps=4, total_steps=32, **cell)
    env, state = start(config, script)
    state, report = script.train(state, env, Logger(), config.steps_per_update)
    assert np.isfinite(report["losses/value_loss"]).all()
    kernels = {leaf.ndim for leaf in jax.tree.leaves(state.params)}
    assert (5 in kernels) == ("MinAtar" in id)  # a convolution's kernel, with the seed axis


# --- Learning ------------------------------------------------------------------------------------


def test_memory_learns_what_none_cannot():
    """Remember one bit over five steps, in a few seconds: 1 with a memory, 0 by chance."""
    task = {
        "env": "gymnax::MemoryChain-bsuite",
        "env_kwargs": {"memory_length": 5},
        "total_steps": 40_000,
    }
    size = {"num_envs": 32, "num_steps": 32, "hidden_size": 32, "num_seeds": 2}
    assert np.median(final_returns(rppo, cell="gru", **task, **size)) >= 0.95
    # Without the previous action: an agent that reads it can write the bit down in what it does.
    assert np.abs(final_returns(rppo, cell="none", prev_action=False, **task, **size)).max() <= 0.4


CHAIN = {"env": "gymnax::MemoryChain-bsuite", "env_kwargs": {"memory_length": 10}}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("script", "changes", "at_least"),
    [
        (ppo, {}, 475),
        (ppo, {"env": "gymnax::Acrobot-v1"}, -90),
        (rppo, {"cell": "gru"}, 475),
        (rppo, {"cell": "lstm"}, 475),
        (rppo, {"cell": "slstm"}, 475),
        (rppo, {"cell": "gru", "mask": ("velocity",)}, 400),
        (rppo, {"cell": "gru", "total_steps": 200_000} | CHAIN, 0.95),
        (rppo, {"cell": "slstm", "total_steps": 200_000} | CHAIN, 0.95),
    ],
)
def test_the_results_of_the_readme(script, changes, at_least):
    assert np.median(final_returns(script, num_seeds=5, **changes)) >= at_least
