"""PPO and recurrent PPO, for discrete and continuous actions: the mathematics against brute force, and the
invariants that catch recurrent bugs. What only continuous actions have is in test_ppo_continuous.py."""

from dataclasses import replace
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import ppo, ppo_continuous, rppo, rppo_continuous
from experiment import seed_keys
from loggers import Logger
from memory_cells import CELLS

SCRIPTS = [ppo, rppo]
RECURRENT, CONTINUOUS = [rppo, rppo_continuous], [ppo_continuous, rppo_continuous]
SIZES = {"num_envs": 8, "num_steps": 16, "hidden_size": 16, "log": (), "eval_episodes": 8}


def small(script, **changes):
    env = "gymnax::Pendulum-v1" if script in CONTINUOUS else "gymnax::CartPole-v1"
    return script.Config(**({"env": env, "total_steps": 8 * 16 * 20} | SIZES | changes))


def counting(script, **changes):
    """A config for test::Counting, or its twin with continuous actions."""
    return small(script, env="test::Steering" if script in CONTINUOUS else "test::Counting", **changes)


def start(config, script):
    return config.make_env(), script.init(config, seed_keys(config))


def copy(state):
    """The public functions donate their state: keep one to compare with."""
    return jax.tree.map(jnp.copy, state)


def assert_same(actual, expected):
    """Equal pytrees, typed keys included."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), actual, expected)


def one_seed(state):
    return jax.tree.map(lambda x: x[0], state)


def multivariate_normal_log_prob(action, mean, std):
    """Of independent entries, by the formula for dependent ones."""
    return jax.scipy.stats.multivariate_normal.logpdf(action, mean, jnp.diag(std**2))


# --- Mathematics -----------------------------------------------------------------------------------------------------


def brute_force_gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """A_t = sum of (gamma lambda)^k delta_(t + k) until the episode of t is over, O(T^2); one environment."""
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
    steps, envs = 30, 6
    reward, value, next_value = rng.normal(size=(3, steps, envs)).astype(np.float32)
    terminated = rng.random((steps, envs)) < 0.1
    done = terminated | (rng.random((steps, envs)) < 0.1)
    config = small(script, gamma=0.97, gae_lambda=gae_lambda)
    advantages, returns = script.gae(*map(jnp.asarray, (reward, value, next_value, terminated, done)), config)
    for env in range(envs):
        column = (x[:, env] for x in (reward, value, next_value, terminated, done))
        np.testing.assert_allclose(advantages[:, env], brute_force_gae(*column, 0.97, gae_lambda), atol=1e-4)
    np.testing.assert_allclose(returns, advantages + value, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_is_the_formula_of_the_docstring(script, rng):
    """Against numpy, away from ratio = 1 and with both signs of the advantage."""

    class Table:
        def apply(self, params, *_):
            return params

    n, actions = 50, 3
    logits, value = rng.normal(size=(n, actions)), rng.normal(size=n)
    action, old_log_prob, old_value = rng.integers(actions, size=n), rng.normal(size=n) - 1.0, rng.normal(size=n)
    advantage, returns = rng.normal(size=n), rng.normal(size=n)
    others = {name: None for name in script.Transition._fields}
    batch = script.Transition(**others | {"action": jnp.asarray(action), "log_prob": old_log_prob, "value": old_value})
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
    np.testing.assert_allclose(parts["losses/clipfrac"], np.mean(np.abs(ratio - 1) > 0.3), rtol=1e-5)
    np.testing.assert_allclose(parts["losses/approx_kl"], np.mean(ratio - 1 - np.log(ratio)), rtol=1e-4)


@pytest.mark.parametrize(
    ("script", "gae_lambda"),
    [(ppo, 0.0), (ppo, 1.0), (rppo, 0.0), (rppo, 1.0), (ppo_continuous, 0.0), (rppo_continuous, 1.0)],
)
def test_truncation_is_no_end_of_the_world(script, gae_lambda):
    """Reward 1 for ever, cut into episodes of 5 steps: the value is 1 / (1 - gamma) = 10. Taking the cut for an end
    would give less than 4.1."""
    changes = {"cell": "none"} if script in RECURRENT else {}
    if script in CONTINUOUS:
        changes |= {"normalize_reward": False, "env_kwargs": {"continuous": True}}
    config = small(
        script,
        env="test::Constant",
        gamma=0.9,
        gae_lambda=gae_lambda,
        total_steps=8 * 16 * 250,
        learning_rate=3e-3,
        ent_coef=0.0,
        **changes,
    )
    env, state = start(config, script)
    state, _ = script.train(state, env, Logger(), config.total_steps)
    _, batch = script.rollout(one_seed(state), env)
    np.testing.assert_allclose(batch.value, 10.0, atol=0.5)


# --- Rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_next_values_are_of_the_true_next_observation(script):
    config = counting(script, **({"normalize_obs": False} if script in CONTINUOUS else {}))
    env, state = start(config, script)
    state = one_seed(state)
    _, batch = jax.jit(script.rollout, static_argnames="env")(state, env=env)
    done = batch.done[:-1]
    assert not done.all() and batch.terminated.any() and (batch.done & ~batch.terminated).any()
    np.testing.assert_allclose(batch.next_value[:-1][~done], batch.value[1:][~done], atol=1e-5)

    # At an episode's end the next observation is (number, 1), read by a memory that has not been reset: unrolled here
    # as if the episode went on.
    network = script.ActorCritic(config)
    if script not in RECURRENT:
        final = batch.obs.at[..., 1].set(1.0)
        expected = network.apply(state.params, final)[-1]
    else:
        values = []
        for t in range(config.num_steps):
            so_far = jax.tree.map(itemgetter(slice(t + 1)), (batch.inputs, batch.start))
            carry, *_ = network.apply(state.params, state.carry, *so_far)
            final = script.Inputs(batch.inputs.obs[t].at[:, 1].set(1.0), batch.action[t], batch.reward[t])
            values.append(network.apply(state.params, carry, final, jnp.zeros(8, bool), method="step")[-1])
        expected = jnp.stack(values)
    np.testing.assert_allclose(batch.next_value[batch.done], expected[batch.done], atol=1e-5)


@pytest.mark.parametrize(
    ("script", "cell", "shared_torso"),
    [*((rppo, cell, False) for cell in CELLS), (rppo, "gru", True)]
    + [(rppo_continuous, "gru", False), (rppo_continuous, "s5", True)],
)
def test_the_loss_sees_what_the_rollout_saw(script, cell, shared_torso):
    """Unrolling the batch from the carry before the rollout gives its log-probabilities and values again."""
    config = counting(script, cell=cell, shared_torso=shared_torso)
    env, state = start(config, script)
    for _ in range(2):  # for a used carry and trained parameters
        state, report = script.train(state, env, Logger(), config.steps_per_update)
        assert report["losses/first_ratio_error"].max() < 1e-4
    state = one_seed(state)
    after, batch = script.rollout(state, env)
    assert not batch.start[0].all() and batch.start.any()  # the rollout begins and ends within episodes
    np.testing.assert_array_equal(batch.start[1:], batch.done[:-1])
    carry, *policy, value = script.ActorCritic(config).apply(state.params, state.carry, batch.inputs, batch.start)
    if script in CONTINUOUS:
        log_prob = multivariate_normal_log_prob(batch.action, *policy)
    else:
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(*policy), batch.action[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_prob, batch.log_prob, atol=1e-5)
    np.testing.assert_allclose(value, batch.value, atol=1e-5)
    if cell != "dnc":  # which of two equally free slots it writes to is decided by rounding
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carry, after.carry)


@pytest.mark.parametrize("cell", ["gru", "slstm", "gtrxl", "gated_deltanet"])
def test_the_network_forgets_at_a_start(cell):
    config = small(rppo, cell=cell)
    _, state = start(config, rppo)
    state, network = one_seed(state), rppo.ActorCritic(config)
    key, steps = jax.random.key(1), 12
    inputs = rppo.Inputs(
        jax.random.normal(key, (steps, 8, 4)),
        jax.random.randint(key, (steps, 8), 0, 2),
        jax.random.normal(key, (steps, 8)),
    )
    starts = jnp.zeros((steps, 8), bool).at[6, :4].set(True)
    _, logits, value = network.apply(state.params, state.carry, inputs, starts)
    # Everything before step 6 changes, and so does the action and reward that step 6 is told of.
    other = rppo.Inputs(inputs.obs.at[:6].add(1.0), (inputs.action.at[:7].add(1)) % 2, inputs.reward.at[:7].add(1.0))
    carry = jax.tree.map(lambda c: c + 1.0, state.carry)
    _, other_logits, other_value = network.apply(state.params, carry, other, starts)
    np.testing.assert_array_equal(logits[6:, :4], other_logits[6:, :4])
    np.testing.assert_array_equal(value[6:, :4], other_value[6:, :4])
    assert (jnp.abs(value[6, 4:] - other_value[6, 4:]) > 1e-6).all()


@pytest.mark.parametrize("read", ["prev_action", "prev_reward"])
def test_previous_action_and_reward_can_be_left_out(read):
    config = small(rppo, **({"prev_action": False, "prev_reward": False} | {read: True}))
    _, state = start(config, rppo)
    state, network = one_seed(state), rppo.ActorCritic(config)

    def value(inputs):
        return network.apply(state.params, state.carry, inputs, jnp.zeros(8, bool), method="step")[2]

    base = rppo.Inputs(state.inputs.obs, jnp.zeros(8, jnp.int32), jnp.zeros(8))
    assert (value(base) != value(base._replace(action=base.action + 1))).any() == (read == "prev_action")
    assert (value(base) != value(base._replace(reward=base.reward + 1))).any() == (read == "prev_reward")


# --- Updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "changes"),
    [(ppo, {}), (ppo, {"shared_torso": True}), (rppo, {}), (rppo, {"cell": "slstm"})]
    + [(rppo, {"shared_torso": True, "num_layers": 2, "bptt": 4})]
    + [(ppo_continuous, {}), (rppo_continuous, {"bptt": 4})],
)
def test_first_ratio_is_one(script, changes):
    config = counting(script, **changes)
    env, state = start(config, script)
    for _ in range(3):
        state, report = script.train(state, env, Logger(), config.steps_per_update)
        assert report["losses/first_ratio_error"].max() < 1e-5
        assert np.isfinite(report["losses/policy_loss"]).all() and report["losses/entropy"].min() > 0
        assert report["losses/explained_variance"].max() <= 1.0
    assert report["losses/approx_kl"].min() > 0  # the later minibatches have moved


def test_minibatches_are_whole_environments(monkeypatch):
    """test::Counting marks every observation with its episode and its time in it: the loss must get sequences."""
    original = rppo.ppo_loss

    def checked_loss(params, network, config, carry, batch, advantage, returns):
        number, time = batch.inputs.obs[..., 0], batch.inputs.obs[..., 1]
        follows = (number[1:] == number[:-1]) & (jnp.abs(time[1:] - time[:-1] - 1 / 7) < 1e-6)
        fresh = (number[1:] != number[:-1]) & (time[1:] == 0)
        in_order = jnp.where(batch.start[1:], fresh, follows).all() & (batch.inputs.obs.shape[:2] == (16, 2))
        loss, parts = original(params, network, config, carry, batch, advantage, returns)
        return loss, parts | {"test/in_order": in_order.astype(jnp.float32), "test/number": number[0].mean()}

    monkeypatch.setattr(rppo, "ppo_loss", checked_loss)
    config = small(rppo, env="test::Counting", cell="none", num_minibatches=4, gamma=0.98)  # compiled here only
    env, state = start(config, rppo)
    first_numbers = state.inputs.obs[..., 0].mean()
    _, report = rppo.train(state, env, Logger(), config.steps_per_update)
    assert report["test/in_order"] == 1.0
    np.testing.assert_allclose(report["test/number"], first_numbers, rtol=1e-5)  # an epoch sees all, each once


def test_minibatches_of_steps_cover_the_batch(monkeypatch):
    original = ppo.ppo_loss

    def checked_loss(params, network, config, batch, advantage, returns):
        loss, parts = original(params, network, config, batch, advantage, returns)
        return loss, parts | {"test/returns": returns.mean(), "test/squares": (returns**2).mean()}

    monkeypatch.setattr(ppo, "ppo_loss", checked_loss)
    config = small(ppo, env="test::Counting", num_minibatches=4, gamma=0.98)  # compiled here only
    env, state = start(config, ppo)
    _, batch = ppo.rollout(one_seed(state), env)
    _, returns = ppo.gae(batch.reward, batch.value, batch.next_value, batch.terminated, batch.done, config)
    _, report = ppo.train(state, env, Logger(), config.steps_per_update)
    np.testing.assert_allclose(report["test/returns"], returns.mean(), rtol=1e-4)
    np.testing.assert_allclose(report["test/squares"], (returns**2).mean(), rtol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_run_and_other_seed_other_run(script):
    def metrics(seed):
        config = small(script, seed=seed)
        env, state = start(config, script)
        return script.train(state, env, Logger(), 4 * config.steps_per_update)

    (state, report), (same_state, same_report), (_, other_report) = metrics(0), metrics(0), metrics(1)
    jax.tree.map(np.testing.assert_array_equal, state.params, same_state.params)
    same_report.pop("charts/SPS"), report.pop("charts/SPS")
    jax.tree.map(np.testing.assert_array_equal, report, same_report)
    assert report["losses/value_loss"] != other_report["losses/value_loss"]


@pytest.mark.parametrize("script", SCRIPTS + CONTINUOUS)
def test_a_seed_among_several_is_the_run_of_that_seed(script):
    several = small(script, num_seeds=3)
    env, state = start(several, script)
    state, _ = script.train(state, env, Logger(), 2 * several.steps_per_update)
    single = small(script, seed=2)
    env, alone = start(single, script)
    alone, _ = script.train(alone, env, Logger(), 2 * single.steps_per_update)
    third = jax.tree.map(lambda x: x[2], state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), third, one_seed(alone).params)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shorter_last_chunk_is_the_same_training(script):
    config = small(script, log_every=4)
    env, state = start(config, script)
    whole, _ = script.train(state, env, Logger(), 6 * config.steps_per_update)
    config = small(script, log_every=3)
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
def test_the_learning_rate_falls_to_zero_and_with_it_the_steps(script):
    config = small(script, total_steps=8 * 16 * 4)
    env, state = start(config, script)
    rates = []
    for _ in range(4):
        state, report = script.train(state, env, Logger(), config.steps_per_update)
        rates.append(float(report["charts/learning_rate"][0]))
    np.testing.assert_allclose(rates, config.learning_rate * np.array([1.0, 0.75, 0.5, 0.25]), rtol=1e-5)
    before = copy(state.params)
    state, _ = script.train(state, env, Logger(), config.steps_per_update)  # past the end: nothing left to step with
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    constant = replace(config, anneal_lr=False)
    env, state = start(constant, script)
    for _ in range(2):
        state, report = script.train(state, env, Logger(), config.steps_per_update)
    np.testing.assert_allclose(report["charts/learning_rate"], config.learning_rate, rtol=1e-6)


def test_episode_metrics_are_those_of_the_episodes():
    config = small(ppo, env="test::Counting")
    env, state = start(config, ppo)
    _, report = ppo.train(state, env, Logger(), config.steps_per_update)
    assert report["charts/episodic_return"] == report["charts/episodic_length"] == 7.0
    assert report["charts/episodes"] == 8 * (16 // 7)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("id", ["gymnax::Breakout-MinAtar", "gymnax::Catch-bsuite", "gymnax::FrozenLake-misc"])
def test_images_matrices_and_integers_are_observations_too(script, id):
    config = small(script, env=id, num_steps=4, total_steps=32, **({"cell": "none"} if script is rppo else {}))
    env, state = start(config, script)
    state, report = script.train(state, env, Logger(), config.steps_per_update)
    assert np.isfinite(report["losses/value_loss"]).all()
    kernels = {leaf.ndim for leaf in jax.tree.leaves(state.params)}
    assert (5 in kernels) == ("MinAtar" in id)  # a convolution's kernel, with the seed axis


# --- Learning --------------------------------------------------------------------------------------------------------


def final_returns(script, **changes):
    config = script.Config(**changes, log=())
    env, state = start(config, script)
    state, _ = script.train(state, env, Logger(), config.total_steps)
    return np.asarray(script.evaluate(state, env, 100).returns.mean(axis=1))


def test_memory_learns_what_none_cannot():
    """Remember one bit over five steps, in a few seconds: 1 with a memory, 0 by chance."""
    task = {"env": "gymnax::MemoryChain-bsuite", "env_kwargs": {"memory_length": 5}, "total_steps": 40_000}
    size = {"num_envs": 32, "num_steps": 32, "hidden_size": 32, "num_seeds": 2}
    assert np.median(final_returns(rppo, cell="gru", **task, **size)) >= 0.95
    # Without the previous action: an agent that reads it can write the bit down in what it does.
    assert np.abs(final_returns(rppo, cell="none", prev_action=False, **task, **size)).max() <= 0.4


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
        *[
            (
                rppo,
                {
                    "cell": cell,
                    "env": "gymnax::MemoryChain-bsuite",
                    "env_kwargs": {"memory_length": 10},
                    "total_steps": 200_000,
                },
                0.95,
            )
            for cell in ("gru", "slstm")
        ],
    ],
)
def test_the_results_of_the_readme(script, changes, at_least):
    assert np.median(final_returns(script, num_seeds=5, **changes)) >= at_least
