"""Soft actor-critic, continuous and discrete, with memory and without: losses and replay."""

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

from algorithms import rsac, rsacd, sac, sacd
from envs import Box, Discrete
from experiment import compiled_updates, fill_buffer, seed_keys
from loggers import Logger
from memory_cells import CELLS
from replay import Joined, joined

SCRIPTS = [sac, sacd, rsac, rsacd]
RECURRENT, CONTINUOUS = (rsac, rsacd), (sac, rsac)


@functools.cache
def filled(script, **changes):
    """A config, its network, the state of one seed with a filled buffer, a minibatch."""
    config = small_off_policy(script, **changes)
    env, state = start(config, script)
    state = one_seed(fill_buffer(script.rollout, state, env))
    sample = script.make_replay(config).sample(state.buffer, jax.random.key(1))
    sample = sample if script in RECURRENT else joined(sample, config.gamma)
    return config, network_of(script, config), state, sample


@functools.cache
def loss_of(script, part=None):
    """The script's loss of a minibatch with one key, or one of its parts."""
    loss = getattr(script, "sac_loss" if script in CONTINUOUS else "sacd_loss")

    def value(params, target_params, network, batch):
        key = (jax.random.key(2),) if script in CONTINUOUS else ()
        total, parts = loss(params, target_params, network, batch, *key)
        return parts[f"losses/{part}"] if part else total

    return jax.jit(value, static_argnums=2)


def gradients_of(script, parts, params, target_params, network, batch):
    """The gradients of some parts with respect to the parameters, by module."""

    @jax.jit
    def gradients(params):
        args = params, target_params, network, batch
        return [jax.grad(loss_of(script, part))(*args) for part in parts]

    return [
        {name: jax.tree.leaves(leaves) for name, leaves in gradient["params"].items()}
        for gradient in gradients(params)
    ]


def is_zero(leaves):
    return all((leaf == 0).all() for leaf in leaves)


# --- Mathematics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", CONTINUOUS)
def test_log_probability_is_that_of_the_change_of_variables(script):
    """p(action) |d action / d noise| = p(noise), the derivative taken numerically, in float64."""
    space = Box(np.array([-3.0, 0.5]), np.array([2.0, 0.75]), (2,))
    mean, log_std = [0.3, -0.7], [-1.0, 0.4]
    noise = np.random.default_rng(0).normal(size=(50, 2))
    policy = jnp.array(mean), jnp.array(log_std)
    action, log_prob = script.squashed_normal(jnp.asarray(noise), policy, space)

    def exact(noise):
        squashed = np.tanh(mean + np.exp(log_std) * noise)
        return space.low + (space.high - space.low) * (1 + squashed) / 2

    slope = (exact(noise + 1e-5) - exact(noise - 1e-5)) / 2e-5
    expected = (-0.5 * noise**2 - 0.5 * np.log(2 * np.pi) - np.log(slope)).sum(axis=-1)
    np.testing.assert_allclose(action, exact(noise), atol=1e-5)
    np.testing.assert_allclose(log_prob, expected, atol=1e-3)
    # And it is a density: one dimension between its bounds has probability 1.
    noise = jnp.linspace(-8.0, 8.0, 20_001)[:, None]
    policy = jnp.zeros(1), jnp.zeros(1)
    action, log_prob = script.squashed_normal(noise, policy, Box(-0.2, 0.1, (1,)))
    assert action.min() > -0.2001 and action.max() < 0.1001
    np.testing.assert_allclose(jnp.trapezoid(jnp.exp(log_prob), action[:, 0]), 1.0, atol=1e-3)


@pytest.mark.parametrize("script", CONTINUOUS)
@pytest.mark.parametrize("u", [-40.0, 40.0])
def test_log_probability_is_finite_where_tanh_is_one(script, u):
    def log_prob(mean, log_std):
        return script.squashed_normal(jnp.zeros(1), (mean, log_std), Box(-2.0, 2.0, (1,)))[1]

    value, gradients = jax.value_and_grad(log_prob, (0, 1))(jnp.array([u]), jnp.zeros(1))
    # log(1 - tanh(u)^2) = log 4 - 2 |u| there.
    expected = -0.5 * np.log(2 * np.pi) - np.log(2.0) - np.log(4.0) + 80.0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradients).all()


class Table:
    """A network whose parameters are the logits, and that knows two estimates of the values."""

    action_space = Discrete(4)

    def __init__(self, config, q_values):
        self.config, self.q_values = config, q_values

    def apply(self, params, *_):
        return params["params"]["logits"], self.q_values


def test_the_best_discrete_policy_is_softmax_of_values_over_alpha(rng):
    """Only where logits = Q / alpha is the gradient zero, and V = alpha logsumexp(Q / alpha)."""
    q_values = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    alpha, config = 0.3, small_off_policy(sacd, gamma=0.9)
    batch = Joined(
        obs=None,
        action=jnp.zeros(5, int),
        reward=jnp.zeros(5),
        next_obs=None,
        terminated=jnp.zeros(5, bool),
        discount=jnp.full(5, 0.9),
    )

    def parts(logits):
        params = {"params": {"logits": logits, "log_alpha": jnp.log(alpha)}}
        return sacd.sacd_loss(params, params, Table(config, q_values), batch)[1]

    def gradient(logits):
        return jax.grad(lambda logits: parts(logits)["losses/actor_loss"])(logits)

    best = q_values.min(axis=0) / alpha
    np.testing.assert_allclose(gradient(best), 0.0, atol=1e-6)
    assert jnp.abs(gradient(0.5 * best)).max() > 1e-2
    value = alpha * jax.nn.logsumexp(best, axis=-1)
    np.testing.assert_allclose(parts(best)["losses/actor_loss"], -value.mean(), rtol=1e-4)
    expected = 0.5 * ((q_values[:, :, 0] - 0.9 * value) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(parts(best)["losses/td_loss"], expected, rtol=1e-4)


# --- What trains what ----------------------------------------------------------------------------

PLAIN = [(script, {}) for script in SCRIPTS]
SHARED = [(script, {"shared_torso": True}) for script in RECURRENT]


@pytest.mark.parametrize(("script", "changes"), PLAIN + SHARED)
def test_every_loss_trains_its_own_parameters_only(script, changes):
    _, network, state, batch = filled(script, **changes)
    args = state.params, state.target_params, network, batch
    actor, critic = gradients_of(script, ["actor_loss", "td_loss"], *args)
    assert ("actor_torso" in actor) == (script in RECURRENT and not changes)
    for name in actor:
        assert is_zero(actor[name]) == (not name.startswith("actor")), name
        assert is_zero(critic[name]) == (not name.startswith("critic")), name


# --- Replayed sequences --------------------------------------------------------------------------


@pytest.mark.parametrize("script", RECURRENT)
@pytest.mark.parametrize("shared_torso", [False, True])
def test_replayed_features_are_those_of_acting(script, shared_torso):
    """From the stored carries, over ends and starts: what both memories see is what they saw."""
    config, network, state, sample = filled(script, shared_torso=shared_torso)
    steps = replayed_steps(state.buffer)
    steps = jax.tree.map(lambda x: x[:, :12].reshape(4, 48, *x.shape[3:]).swapaxes(0, 1), steps)

    def read(*args):
        return network.apply(state.params, *args, method="read")

    def as_sequence(*step):
        return jax.tree.map(lambda x: x[None], step)

    @jax.jit
    def act(carry, step):
        """What is seen in an observation, and in the true next one, by the same memories."""
        carry, *features = read(carry, *as_sequence(step.inputs, step.start))
        following = script.Inputs(step.next_obs, step.action, step.reward)
        _, *final = read(carry, *as_sequence(following, jnp.zeros(4, bool)))
        return carry, (jnp.concatenate(features, axis=-1)[0], jnp.concatenate(final, axis=-1)[0])

    def names(obs):
        return [tuple(row) for row in np.round(np.asarray(obs).reshape(-1, 2), 5)]

    _, (acting, final) = jax.lax.scan(act, network.initialize_carry(4), steps)
    seen = {}
    for obs, features in ((steps.next_obs, final), (steps.inputs.obs, acting)):
        seen |= zip(names(obs), np.asarray(features).reshape(-1, 32), strict=True)
    carry, batch, *_ = sample
    for burn_in in (0, 4):
        args = carry, batch.inputs, batch.start, burn_in
        _, *features = jax.jit(read, static_argnums=3)(*args)
        assert batch.final[burn_in:].sum() > 10
        expected = np.stack([seen[name] for name in names(batch.inputs.obs[burn_in:])])
        features = jnp.concatenate(features, axis=-1).reshape(-1, 32)
        np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("script", RECURRENT)
def test_burn_in_counts_but_gets_no_gradient(script):
    _, network, state, sample = filled(script)
    sample = sample._replace(batch=sample.batch._replace(start=jnp.zeros_like(sample.batch.start)))

    @jax.jit
    @jax.value_and_grad
    def loss(obs):
        inputs = sample.batch.inputs._replace(obs=obs)
        replayed = sample._replace(batch=sample.batch._replace(inputs=inputs))
        return loss_of(script)(state.params, state.target_params, network, replayed)

    obs = sample.batch.inputs.obs
    value, gradient = loss(obs)
    assert (gradient[:4] == 0).all() and (gradient[4:-1] != 0).any(axis=(1, 2)).all()
    assert (gradient[-1] == 0).all()  # the last observation is only bootstrapped from
    other, _ = loss(obs.at[:4].add(1.0))
    assert abs(other - value) > 1e-6


@pytest.mark.parametrize("script", RECURRENT)
def test_final_observations_are_no_steps(script):
    """Of a row without a step only the observation counts: the row before bootstraps from it."""
    _, network, state, sample = filled(script)
    final = sample.batch.final
    assert final[4:-1].any()

    @jax.jit
    def both(batch):
        args = state.params, state.target_params, network, sample._replace(batch=batch)
        return loss_of(script)(*args), loss_of(script, "td_loss")(*args)

    def losses(**changes):
        return both(sample.batch._replace(**changes))

    action = sample.batch.action
    is_final = final.reshape(final.shape + (1,) * (action.ndim - 2))
    changes = {"action": jnp.where(is_final, 2, action)}
    changes |= {"reward": jnp.where(final, 1e6, sample.batch.reward)}
    terminated = sample.batch.terminated | final
    (total, td_loss), (other, _) = losses(), losses(**changes, terminated=terminated)
    assert total == other
    # test::Counting and test::Steering terminate or truncate: then it is bootstrapped from.
    truncated = final & ~jnp.roll(sample.batch.terminated, 1, axis=0)
    assert truncated[5:].any() and (final & ~truncated)[5:].any()
    for which, changes_something in ((truncated, True), (final & ~truncated, False)):
        obs = jnp.where(which.at[:5].set(False)[..., None], -1.0, sample.batch.inputs.obs)
        _, other = losses(inputs=sample.batch.inputs._replace(obs=obs))
        assert (other != td_loss) == changes_something


def test_candidate_actions_are_no_history():
    """Values of later steps depend on the action that was executed, not on one considered."""
    config, network, state, (carry, batch, *_) = filled(rsac)

    def values(inputs, action):
        *_, features = network.apply(state.params, carry, inputs, batch.start, method="read")
        return network.apply(state.params, features, action, method="values")

    before = values(batch.inputs, batch.action)
    considered = values(batch.inputs, batch.action.at[3].add(1.0)) - before
    assert (considered[:, 3] != 0).all()
    assert (considered[:, :3] == 0).all() and (considered[:, 4:] == 0).all()
    executed = batch.inputs._replace(action=batch.inputs.action.at[4].add(1.0))
    executed = values(executed, batch.action) - before
    assert (executed[:, :4] == 0).all() and (executed[:, 4:][:, :, ~batch.start[4]] != 0).any()


@pytest.mark.parametrize("script", [sac, sacd])
def test_the_true_next_observation_is_kept(script):
    config, _, state, _ = filled(script)
    written = 200 // config.num_envs
    seen = jax.tree.map(
        lambda x: x[:, :written].reshape(200, *x.shape[2:]), replayed_steps(state.buffer)
    )
    step = np.round(7 * np.asarray(seen.obs[:, 1]))
    # 1 at the end, not the 0 of a reset.
    np.testing.assert_allclose(seen.next_obs[:, 1], (step + 1) / 7, atol=1e-6)
    np.testing.assert_array_equal(seen.terminated, (step == 6) & (seen.obs[:, 0] < 0.5))
    assert seen.terminated.any() and not seen.terminated[step == 6].all()


@pytest.mark.parametrize("script", CONTINUOUS)
def test_actions_are_uniform_until_learning_starts(script):
    """Then they are those of the policy, at first near the middle of test::Steering's -3 to 2."""
    config, _, state, _ = filled(script)
    steps = replayed_steps(state.buffer)
    action = np.asarray(steps.action).reshape(-1, 2)
    action = action[(action != 0).all(axis=1)]
    np.testing.assert_allclose(action.mean(), -0.5, atol=0.4)
    np.testing.assert_allclose(action.std(), 5 / 12**0.5, atol=0.2)
    after = replayed_steps(script.rollout(state, config.make_env())[0].buffer)
    after = np.asarray(after.action).reshape(-1, 2)
    before = np.asarray(steps.action).reshape(-1, 2)
    new = after[(after != before).any(axis=1)]
    assert len(new) == config.steps_per_update and np.abs(new + 0.5).max() < 2.0


# --- Updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_run_alone_or_among_several(script):
    def trained(config, seed):
        env, state = start(config, script, seed)
        state = script.warmup(state, env, Logger())
        assert state.updates[0] == 200 // config.steps_per_update
        return script.train(state, env, Logger(), 5 * config.steps_per_update)[0]

    state, same = (trained(small_off_policy(script), seed=1) for _ in range(2))
    several = trained(small_off_policy(script, num_seeds=2), seed=0)
    jax.tree.map(np.testing.assert_array_equal, state.params, same.params)
    second = jax.tree.map(lambda x: x[1], several.params)
    assert_close(second, one_seed(state).params, atol=2e-4)


@pytest.mark.parametrize("script", [sacd, rsacd])
def test_images_are_observations_too(script):
    config = small_off_policy(script, env="test::Picture")
    env, state = start(config, script)
    state = script.warmup(state, env, Logger())
    _, report = script.train(state, env, Logger(), config.steps_per_update)
    for name in ("losses/td_loss", "losses/actor_loss"):
        assert np.isfinite(report[name]).all()
    dimensions = {leaf.ndim for leaf in jax.tree.leaves(state.params)}
    assert 5 in dimensions  # a convolution's kernel, with the seed axis


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("script", [rsac, pytest.param(rsacd, marks=pytest.mark.slow)])
def test_every_cell_can_be_replayed(script, cell):
    """Traced only: the buffer takes its carry, the update returns a state like the one it got."""
    config = small_off_policy(script, cell=cell, shared_torso=True)  # one memory, not two
    env = config.make_env()
    before = jax.eval_shape(lambda: script.init(config, seed_keys(config)))
    after, _, _ = compiled_updates.eval_shape(script.update, before, env, 1)
    assert_same_shapes(before, after)


# --- Learning ------------------------------------------------------------------------------------


PROBES = [
    *((script, probe) for script in (sac, sacd) for probe in ({"action_matters": False}, {})),
    *((script, {"action_matters": False, "wait": 2}) for script in RECURRENT),
    *((script, {"wait": 2}) for script in RECURRENT),
]


@pytest.mark.parametrize(("script", "probe"), PROBES)
def test_probes_are_solved(script, probe):
    """With next to no weight of the entropy, which is not tuned: values are those of rewards."""
    changes = {"num_steps": 4, "gradient_steps": 4, "gamma": 0.8, "total_steps": 8_000, "tau": 0.05}
    changes |= {"alpha": 0.02, "autotune": False, "learning_rate": 3e-3}
    kwargs = probe | ({"continuous": True} if script in CONTINUOUS else {})
    config = small_off_policy(script, env="test::Probe", env_kwargs=kwargs, **changes)
    env, state = start(config, script)
    state = script.warmup(state, env, Logger())
    state, _ = script.train(state, env, Logger(), config.total_steps)
    if probe.get("action_matters", True):
        assert script.evaluate(state, env, 40).returns.min() > 0.9
        return
    wait, state, network = probe.get("wait", 0), one_seed(state), network_of(script, config)
    obs = jnp.array([[-1.0, wait], [1.0, wait]])  # the first of an episode
    args = (obs,)
    if script in RECURRENT:
        action = jnp.zeros((2, *env.action_space.shape), env.action_space.dtype)
        inputs = script.Inputs(obs, action, jnp.zeros(2))
        args = network.initialize_carry(2), inputs, jnp.ones(2, bool)
    *_, values = network.apply(state.params, *args)
    expected = 0.8**wait * obs[:, 0].reshape(1, 2, *(1,) * (values.ndim - 2))
    np.testing.assert_allclose(values, jnp.broadcast_to(expected, values.shape), atol=0.1)


CHAIN = {"env": "gymnax::MemoryChain-bsuite", "env_kwargs": {"memory_length": 10}}
MASKED = {"mask": ("velocity",)}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("script", "changes", "at_least"),
    [
        (sac, {}, -170),
        (sacd, {}, 450),
        (rsac, {"cell": "gru"} | MASKED, -250),
        (rsacd, {"cell": "gru"} | MASKED, 200),
        (rsacd, {"cell": "gru", "total_steps": 200_000} | CHAIN, 0.9),
    ],
)
def test_the_results_of_the_readme(script, changes, at_least):
    assert np.median(final_returns(script, num_seeds=3, **changes)) >= at_least
