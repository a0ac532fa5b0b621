"""DQN and recurrent DQN: targets against brute force, what is replayed against what happened."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_same_shapes,
    final_returns,
    network_of,
    one_seed,
    replayed_steps,
    small_off_policy,
    start,
)

from algorithms import dqn, drqn
from experiment import compiled_updates, fill_buffer, seed_keys
from loggers import Logger
from memory_cells import CELLS
from replay import Joined, Sequence

SCRIPTS = [dqn, drqn]


def small(script, **changes):
    sizes = {"tau": 1.0, "target_network_frequency": 4, "gradient_steps": 2, "anneal_lr": False}
    return small_off_policy(script, **sizes | changes)


@functools.cache
def filled(**changes):
    """A config of DRQN, its network, the state of one seed with a filled buffer, a minibatch."""
    config = small(drqn, **changes)
    env, state = start(config, drqn)
    state = one_seed(fill_buffer(drqn.rollout, state, env))  # acted with one set of parameters
    sample = drqn.make_replay(config).sample(state.buffer, jax.random.key(1))
    return config, network_of(drqn, config), state, sample


# --- Mathematics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_epsilon_falls_linearly_in_environment_steps(script):
    config = small(script, total_steps=10_000, exploration_fraction=0.5, start_e=0.9, end_e=0.1)
    for steps, expected in ((0, 0.9), (1250, 0.7), (2500, 0.5), (5000, 0.1), (9000, 0.1)):
        epsilon = script.epsilon(steps / config.steps_per_update, config)
        np.testing.assert_allclose(epsilon, expected, atol=1e-6)


def test_epsilon_greedy():
    q_values = jnp.array([[0.0, 2.0, 1.0]] * 20_000)
    assert (dqn.epsilon_greedy(jax.random.key(0), q_values, 0.0) == 1).all()
    actions = dqn.epsilon_greedy(jax.random.key(0), q_values, 0.6)
    share = np.bincount(actions, minlength=3) / len(q_values)
    np.testing.assert_allclose(share, [0.2, 0.6, 0.2], atol=0.02)


@pytest.mark.parametrize("double_q", [True, False])
def test_targets_of_dqn(double_q, rng):
    reward, terminated = rng.normal(size=30).astype(np.float32), rng.random(30) < 0.5
    online, target = rng.normal(size=(2, 30, 4)).astype(np.float32)
    config = small(dqn, gamma=0.9, double_q=double_q)
    best = (online if double_q else target).argmax(axis=1)
    expected = reward + 0.9 * np.where(terminated, 0.0, target[np.arange(30), best])
    discount = np.full(30, 0.9, np.float32)
    sample = Joined(None, None, reward, None, terminated, discount)
    actual = dqn.q_targets(sample, online, target, config)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("n_step", "rescale", "double_q"), [(1, False, True), (3, False, False), (5, True, True)]
)
def test_targets_of_drqn_equal_brute_force(n_step, rescale, double_q, rng):
    length, batch_size = 20, 40
    final = rng.random((length + 1, batch_size)) < 0.15
    final[1:] &= ~final[:-1]  # an episode has at least one step
    terminated = np.zeros_like(final)
    terminated[:-1] = final[1:] & (rng.random((length, batch_size)) < 0.5)
    reward = rng.normal(size=final.shape).astype(np.float32)
    online, target = rng.normal(size=(2, *final.shape, 3)).astype(np.float32)
    config = small(drqn, gamma=0.9, n_step=n_step, rescale=rescale, double_q=double_q)
    batch = Sequence(None, None, None, *map(jnp.asarray, (reward, terminated, final)))
    actual = drqn.q_targets(batch, jnp.asarray(online), jnp.asarray(target), config)

    def value(t, b):
        q = target[t, b, (online if double_q else target)[t, b].argmax()]
        return float(drqn.unscaled(q)) if rescale else q

    for b in range(batch_size):
        for t in range(length):
            if final[t, b]:
                continue  # no step begins there
            expected, k = 0.0, 0
            while True:
                expected += 0.9**k * reward[t + k, b]
                k += 1
                if terminated[t + k - 1, b]:
                    break
                if k == n_step or final[t + k, b] or t + k == length:
                    expected += 0.9**k * value(t + k, b)
                    break
            expected = float(drqn.rescaled(expected)) if rescale else expected
            np.testing.assert_allclose(actual[t, b], expected, atol=1e-4)


def test_the_scale_of_values_and_its_inverse():
    x = jnp.array([-1000.0, -1.0, -1e-3, 0.0, 0.5, 30.0, 1e4])
    np.testing.assert_allclose(drqn.unscaled(drqn.rescaled(x)), x, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(drqn.rescaled(jnp.array(3.0)), 1.003, rtol=1e-6)


# --- Replay --------------------------------------------------------------------------------------


def test_dqn_keeps_the_true_next_observation():
    config = small(dqn)
    env, state = start(config, dqn)
    state = fill_buffer(dqn.rollout, state, env)
    steps = int(state.updates[0]) * config.steps_per_update
    assert steps == 200
    written = steps // config.num_envs
    seen = jax.tree.map(
        lambda x: x[0, :, :written].reshape(steps, *x.shape[3:]), replayed_steps(state.buffer)
    )
    step = np.round(7 * np.asarray(seen.obs[:, 1]))
    # 1 at the end, not the 0 of a reset.
    np.testing.assert_allclose(seen.next_obs[:, 1], (step + 1) / 7, atol=1e-6)
    np.testing.assert_array_equal(seen.next_obs[:, 0], seen.obs[:, 0])
    np.testing.assert_array_equal(seen.terminated, (step == 6) & (seen.obs[:, 0] < 0.5))
    assert seen.terminated.any() and not seen.terminated[step == 6].all()


SLOW_CELLS = [pytest.param(cell, marks=pytest.mark.slow) for cell in ("gtrxl", "mlstm")]


@pytest.mark.parametrize("cell", ["gru", *SLOW_CELLS])
def test_replayed_values_are_those_of_acting(cell):
    """From the stored carry, over ends and starts, with and without burn-in."""
    _, network, state, sample = filled(cell=cell)
    steps = replayed_steps(state.buffer)
    steps = jax.tree.map(lambda x: x[:, :12].reshape(4, 48, *x.shape[3:]).swapaxes(0, 1), steps)
    initial = network.initialize_carry(4)
    apply = jax.jit(network.apply, static_argnums=4)

    @jax.jit
    def act(carry, step):
        """The values of an observation, and of the true next one, read by the same memory."""
        carry, q_values = network.apply(state.params, carry, step.inputs, step.start, method="step")
        following = drqn.Inputs(step.next_obs, step.action, step.reward)
        _, next_q = network.apply(state.params, carry, following, jnp.zeros(4, bool), method="step")
        return carry, (q_values, next_q)

    def names(obs):
        return [tuple(row) for row in np.round(np.asarray(obs).reshape(-1, 2), 5)]

    _, (acting, final) = jax.lax.scan(act, initial, steps)
    values = {}
    for obs, q_values in ((steps.next_obs, final), (steps.inputs.obs, acting)):
        values |= zip(names(obs), np.asarray(q_values).reshape(-1, 3), strict=True)
    carry, batch, _, _ = sample
    for burn_in in (0, 4):
        _, q_values = apply(state.params, carry, batch.inputs, batch.start, burn_in)
        assert batch.final[burn_in:].sum() > 10
        expected = np.stack([values[name] for name in names(batch.inputs.obs[burn_in:])])
        np.testing.assert_allclose(q_values.reshape(-1, 3), expected, atol=1e-5)


def test_burn_in_gets_no_gradient_and_both_networks_read_it():
    config, network, state, sample = filled()
    sample = sample._replace(batch=sample.batch._replace(start=jnp.zeros_like(sample.batch.start)))

    @jax.jit
    @jax.value_and_grad
    def loss(obs):
        inputs = sample.batch.inputs._replace(obs=obs)
        replayed = sample._replace(batch=sample.batch._replace(inputs=inputs))
        return drqn.td_loss(state.params, state.target_params, network, config, replayed)[0]

    obs = sample.batch.inputs.obs
    value, gradient = loss(obs)
    assert (gradient[:4] == 0).all() and (gradient[4:-1] != 0).any(axis=(1, 2)).all()
    assert (gradient[-1] == 0).all()  # the last observation is only bootstrapped from
    other, _ = loss(obs.at[:4].add(1.0))
    assert abs(other - value) > 1e-6  # what is remembered counts
    # With equal networks and gamma = 1, the one-step target of a row without reward is the greedy
    # value in the next row.
    carry, batch, *_ = sample
    _, q_values = network.apply(state.params, carry, batch.inputs, batch.start, 4)
    batch = jax.tree.map(lambda x: x[4:], batch._replace(reward=jnp.zeros_like(batch.reward)))
    targets = drqn.q_targets(batch, q_values, q_values, small(drqn, gamma=1.0, n_step=1))
    expected = jnp.where(batch.terminated[:-1], 0.0, q_values[1:].max(axis=-1))
    np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_final_observations_are_no_steps():
    """Of a row without a step only the observation counts: the row before bootstraps from it."""
    config, network, state, sample = filled()

    @jax.jit
    def loss(sample):
        return drqn.td_loss(state.params, state.params, network, config, sample)[0]

    final = sample.batch.final
    assert final[4:-1].any()
    changed = {
        "action": jnp.where(final, 2, sample.batch.action),
        "reward": jnp.where(final, 1e6, sample.batch.reward),
        "terminated": sample.batch.terminated | final,
    }
    assert loss(sample) == loss(sample._replace(batch=sample.batch._replace(**changed)))


# --- Updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_target_network_follows(script):
    config = small(script)
    assert (config.tau, config.target_network_frequency, config.gradient_steps) == (1.0, 4, 2)
    env, state = start(config, script)
    state = fill_buffer(script.rollout, state, env)
    same = []
    first = int(state.updates[0])
    for _ in range(4):
        state, _ = script.train(state, env, Logger(), config.steps_per_update)
        equal = jax.tree.map(lambda a, b: (a == b).all(), state.params, state.target_params)
        same.append(all(jax.tree.leaves(equal)))
    assert same == [(first + i) * 2 % 4 == 0 for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_run_alone_or_among_several(script):
    def trained(config, seed):
        env, state = start(config, script, seed)
        state = script.warmup(state, env, Logger())
        assert state.updates[0] == 200 // config.steps_per_update
        return script.train(state, env, Logger(), 5 * config.steps_per_update)[0]

    state, same = (trained(small(script), seed=1) for _ in range(2))
    several = trained(small(script, num_seeds=2), seed=0)
    jax.tree.map(np.testing.assert_array_equal, state.params, same.params)
    second = jax.tree.map(lambda x: x[1], several.params)
    assert_close(second, one_seed(state).params, atol=2e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_images_stay_bytes_in_replay(script):
    config = small(script, env="test::Picture")
    kept = replayed_steps(jax.eval_shape(lambda: script.init(config, seed_keys(config))).buffer)
    obs = kept.obs if script is dqn else kept.inputs.obs
    assert obs.dtype == kept.next_obs.dtype == jnp.uint8
    env, state = start(config, script)
    state = script.warmup(state, env, Logger())
    _, report = script.train(state, env, Logger(), config.steps_per_update)
    assert np.isfinite(report["losses/td_loss"]).all()


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_can_be_replayed(cell):
    """Traced only: the buffer takes its carry, the update returns a state like the one it got."""
    config = small(drqn, cell=cell)
    env = config.make_env()
    before = jax.eval_shape(lambda: drqn.init(config, seed_keys(config)))
    after, _, _ = compiled_updates.eval_shape(drqn.update, before, env, 1)
    assert_same_shapes(before, after)


# --- Learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "probe"),
    [
        (dqn, {"obs_matters": False, "action_matters": False, "wait": 2}),
        (dqn, {"action_matters": False}),
        (dqn, {}),
        (drqn, {"action_matters": False, "wait": 2}),
        (drqn, {"wait": 3}),
    ],
    ids=str,
)
def test_probes_are_solved(script, probe):
    """Rewards of one step, without burn-in being needed, rescaling or priorities."""
    # All actions stay in the buffer, so that none has a value that nothing corrects.
    changes = {"num_steps": 4, "gradient_steps": 4, "end_e": 0.2, "gamma": 0.8, "tau": 0.05}
    changes |= {"total_steps": 10_000, "learning_rate": 3e-3, "buffer_size": 4096}
    changes |= {"learning_starts": 64}
    if script is drqn:  # more steps before the value would have their random actions in it
        changes |= {"n_step": 1}
    config = small_off_policy(script, env="test::Probe", env_kwargs=probe, **changes)
    env, state = start(config, script)
    state = script.warmup(state, env, Logger())
    state, _ = script.train(state, env, Logger(), config.total_steps)
    if probe.get("action_matters", True):
        assert (script.evaluate(state, env, 40).returns == 1.0).all()
    wait, state, network = probe.get("wait", 0), one_seed(state), network_of(script, config)
    obs = jnp.array([[-1.0, wait], [1.0, wait]])  # the first of an episode
    if script is dqn:
        q_values = network.apply(state.params, obs)
    else:
        inputs = drqn.Inputs(obs, jnp.zeros(2, int), jnp.zeros(2))
        args = network.initialize_carry(2), inputs, jnp.ones(2, bool)
        _, q_values = network.apply(state.params, *args, method="step")
    only_obs_matters = probe.get("obs_matters", True) and not probe.get("action_matters", True)
    sign = obs[:, 0] if only_obs_matters else jnp.ones(2)
    np.testing.assert_allclose(q_values.max(axis=-1), sign * 0.8**wait, atol=0.1)


CHAIN = {"env": "gymnax::MemoryChain-bsuite", "env_kwargs": {"memory_length": 10}}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("script", "changes", "at_least"),
    [
        (dqn, {}, 475),
        (dqn, {"env": "gymnax::Acrobot-v1", "total_steps": 500_000}, -95),
        (drqn, {"cell": "gru", "total_steps": 200_000} | CHAIN, 0.95),
        (drqn, {"cell": "gru", "mask": ("velocity",), "total_steps": 500_000}, 400),
    ],
)
def test_the_results_of_the_readme(script, changes, at_least):
    assert np.median(final_returns(script, num_seeds=5, **changes)) >= at_least
