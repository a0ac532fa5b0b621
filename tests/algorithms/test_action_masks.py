"""Actions that are not always allowed: their probabilities, targets, entropies and exploration."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS, is_continuous, one_gradient_step, one_seed, start, tiny

from algorithms import drqn, ppo, rppo, rsacd, sacd
from envs import (
    Discrete,
    MaskedObs,
    greatest_entropy,
    make,
    only_valid,
    random_valid,
    without_mask,
)
from experiment import RunError
from loggers import Logger
from replay import joined

DISCRETE = [
    script
    for script in SCRIPTS
    if not is_continuous(importlib.import_module(f"algorithms.{script}"))
]
MASKED = {"env": "test::Masked", "env_kwargs": {}}


def masks(rng, *shape):
    """Random masks of which each allows something."""
    valid = rng.random(shape) < 0.5
    valid[..., 0] |= ~valid.any(axis=-1)
    return valid


# --- The pieces ----------------------------------------------------------------------------------


def test_without_a_mask_nothing_changes(rng):
    obs, values = jnp.asarray(rng.normal(size=(5, 4))), jnp.asarray(rng.normal(size=(5, 3)))
    assert without_mask(obs) is obs
    assert only_valid(values, obs) is values
    assert greatest_entropy(Discrete(3), obs) == np.log(3)
    for seed in range(20):
        key = jax.random.key(seed)
        any_action = jax.random.randint(key, (5,), 0, 3)
        np.testing.assert_array_equal(random_valid(key, values), any_action)


def test_random_actions_are_valid_and_equally_likely(rng):
    valid = masks(rng, 6, 5)
    values = only_valid(jnp.zeros((6, 5)), MaskedObs(jnp.zeros((6, 1)), valid))
    keys = jax.random.split(jax.random.key(0), 4000)
    actions = jax.vmap(random_valid, in_axes=(0, None))(keys, values)
    shares = jax.nn.one_hot(actions, 5).mean(axis=0)
    expected = valid / valid.sum(axis=-1, keepdims=True)
    assert (shares[~valid] == 0).all()
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_probability_and_entropy_are_those_of_the_valid_actions(rng):
    """By brute force: a softmax over the valid logits alone; and all gradients are finite."""
    logits, valid = rng.normal(size=(20, 6)), masks(rng, 20, 6)
    obs = MaskedObs(jnp.zeros((20, 1)), jnp.asarray(valid))

    def entropy(logits):
        logits = only_valid(logits, obs)
        return -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(axis=-1)

    policy = jax.nn.softmax(only_valid(jnp.asarray(logits), obs))
    for i in range(20):
        weights = np.exp(logits[i][valid[i]])
        share = weights / weights.sum()
        np.testing.assert_allclose(policy[i][valid[i]], share, rtol=1e-5)
        assert (policy[i][~valid[i]] == 0).all()
        expected = -(share * np.log(share)).sum()
        np.testing.assert_allclose(entropy(jnp.asarray(logits))[i], expected, rtol=1e-5, atol=1e-6)
    greatest = np.log(valid.sum(axis=-1))
    np.testing.assert_allclose(greatest_entropy(Discrete(6), obs), greatest, rtol=1e-6)
    gradient = jax.grad(lambda logits: entropy(logits).sum())(jnp.asarray(logits))
    assert jnp.isfinite(gradient).all() and (gradient[~valid] == 0).all()


def test_where_nothing_is_valid_values_are_what_they_were(rng):
    """In the last observation of a truncated episode, from which targets bootstrap."""
    values = jnp.asarray(rng.normal(size=(2, 3)))
    obs = MaskedObs(jnp.zeros((2, 1)), jnp.array([[False] * 3, [True, False, True]]))
    np.testing.assert_array_equal(only_valid(values, obs)[0], values[0])
    assert only_valid(values, obs)[1, 1] == -1e9


def test_a_diverged_agent_explores_valid_actions(rng):
    obs = MaskedObs(jnp.zeros((50, 1)), jnp.asarray([[False, True, True]] * 50))
    actions = random_valid(jax.random.key(0), only_valid(jnp.full((50, 3), jnp.nan), obs))
    assert set(actions.tolist()) == {1, 2}


# --- The scripts ---------------------------------------------------------------------------------


def outputs(script, rng, valid):
    """Logits or values of a fresh network for two copies of one observation, differently masked."""
    module = importlib.import_module(f"algorithms.{script}")
    config = one_gradient_step(module, **MASKED)
    env, state = start(config, module)
    network = module.make_network(config, env)
    obs = MaskedObs(jnp.full((2, 1), 0.3), jnp.stack([jnp.ones(3, bool), jnp.asarray(valid)]))
    params = one_seed(state).params
    if not script.startswith("r") and script != "drqn":
        result = network.apply(params, obs)
    else:
        inputs = module.Inputs(obs, jnp.zeros(2, int), jnp.zeros(2))
        method = {} if script == "rsacd" else {"method": "step"}
        carry = network.initialize_carry(2)
        _, *result = network.apply(params, carry, inputs, jnp.ones(2, bool), **method)
        result = result if len(result) > 1 else result[0]
    return np.asarray(result[0] if isinstance(result, (tuple, list)) else result)


@pytest.mark.parametrize("script", DISCRETE)
def test_the_network_rules_out_invalid_actions(script, rng):
    free, masked = outputs(script, rng, [True, False, True])
    np.testing.assert_array_equal(masked[[0, 2]], free[[0, 2]])
    assert masked[1] == -1e9 and np.abs(free).max() < 10


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=pytest.mark.xdist_group(s)) for s in DISCRETE]
)
def test_every_script_learns_the_best_valid_action(script):
    """An invalid action, also a random one, would end the episode and pay -100."""
    module = importlib.import_module(f"algorithms.{script}")
    names = {field for field in module.Config.__dataclass_fields__}
    changes = {"num_envs": 8, "total_steps": 8_000, "learning_rate": 5e-3, "cell": "none"}
    changes |= {"num_steps": 4 if script in ("drqn", "rsacd") else 8, "batch_size": 32}
    changes |= {"gradient_steps": 2, "gamma": 0.5, "buffer_size": 4096, "log_every": 50}
    changes |= {"learning_starts": 256, "alpha": 0.02, "autotune": False, "tau": 0.05}
    changes = {name: value for name, value in changes.items() if name in names}
    config = tiny(module, **MASKED, **changes)
    env, state = start(config, module)
    state = module.warmup(state, env, Logger())
    lowest = []
    logger = Logger()
    logger.log = lambda report, step: lowest.append(report["charts/episodic_return"])
    state, _ = module.train(state, env, logger, config.total_steps)
    assert np.nanmin(lowest) >= 0  # no episode had an invalid action
    np.testing.assert_array_equal(module.evaluate(state, env, 40).returns, 5.0)


@pytest.mark.parametrize("script", [sacd, rsacd])
def test_targets_expect_the_valid_actions_only(script, rng):
    """The loss does not change with what the critics say of invalid actions."""
    config = one_gradient_step(script, **MASKED)
    env, state = start(config, script)
    state = one_seed(script.warmup(state, env, Logger()))
    sample = script.make_replay(config).sample(state.buffer, jax.random.key(0))
    sample = joined(sample, config.gamma) if script is sacd else sample
    network = script.make_network(config, env)

    class Louder:
        """The same network, whose critics value invalid actions highly."""

        config = network.config
        action_space = network.action_space

        def apply(self, params, *args, **method):
            result = network.apply(params, *args, **method)
            if method.get("method") == "values":
                return self.shout(result, self.obs)
            if not method:
                return result[0], self.shout(result[1], args[0])
            if method["method"] == "read":
                self.obs = jax.tree.map(lambda x: x[config.burn_in :], args[1].obs)
            return result

        def shout(self, values, obs):
            return jnp.where(obs.action_mask, values, 1e6)

    params = state.params
    loss, parts = script.sacd_loss(params, params, network, sample)
    other, _ = script.sacd_loss(params, params, Louder(), sample)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    gradients = jax.grad(script.sacd_loss, has_aux=True)(params, params, network, sample)[0]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("script", [ppo, drqn])
def test_a_mask_that_allows_nothing_is_an_error_that_names_the_step(script):
    config = tiny(script, env="test::Masked", env_kwargs={"empty_at": 3})
    env, state = start(config, script)
    expected = "the action mask of test::Masked allows nothing at step 3 of an episode"
    with pytest.raises(RunError, match=expected):
        state = script.warmup(state, env, Logger())
        script.train(state, env, Logger(), config.total_steps)


# --- The environments ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalize_obs": True}, {"delay": 2, "time_limit": 3}])
def test_a_mask_belongs_to_the_state_that_its_observation_shows(options):
    """Also behind wrappers, after an automatic reset, and in final_obs."""
    env = make("test::Masked", **options)
    obs, state = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    for i in range(12):
        inner = state.task
        while hasattr(inner, "inner"):
            inner = inner.inner
        np.testing.assert_array_equal(obs.action_mask, inner[1])
        action = obs.action_mask.argmax()
        obs, state, reward, terminated, truncated, info = step(jax.random.key(i), state, action)
        assert reward >= 0
        np.testing.assert_array_equal(info["action_mask"], obs.action_mask)
        if not info["episode_done"]:
            np.testing.assert_array_equal(info["final_obs"].action_mask, obs.action_mask)
        assert truncated or not terminated or not info["final_obs"].action_mask.any()
    with pytest.raises(ValueError, match="sticky_actions is not for action masks"):
        make("test::Masked", sticky_actions=0.1)


@pytest.mark.parametrize("game", ["BattleshipEasy", "MinesweeperEasy"])
def test_squares_that_were_played_are_invalid(game):
    env = make(f"popjaxrl::{game}", invalid_actions=True)
    plain = make(f"popjaxrl::{game}")
    obs, state = jax.jit(env.reset)(jax.random.key(1))
    assert obs.action_mask.all()
    step, plain_step = jax.jit(env.step), jax.jit(plain.step)
    _, plain_state = plain.reset(jax.random.key(1))
    played = set()
    for i in range(6):
        action = int(obs.action_mask.argmax())
        assert action not in played
        played.add(action)
        args = jax.random.key(i), state, action
        obs, state, *rest, info = step(*args)
        plain_obs, plain_state, *plain_rest, _ = plain_step(args[0], plain_state, action)
        np.testing.assert_array_equal(obs.obs, plain_obs)  # the game is the same
        np.testing.assert_array_equal(rest, plain_rest)
        if info["episode_done"]:
            played.clear()
        assert set(np.flatnonzero(~obs.action_mask)) == played


def test_other_games_have_no_invalid_actions():
    with pytest.raises(ValueError, match="has no option 'invalid_actions'"):
        make("popjaxrl::RepeatFirstEasy", invalid_actions=True)


def test_memories_carry_masks_through_a_replay_buffer():
    """What was valid when an action was taken is replayed with it."""
    config = tiny(rsacd, **MASKED, learning_starts=64, total_steps=128)
    env, state = start(config, rsacd)
    state = one_seed(rsacd.warmup(state, env, Logger()))
    sample = rsacd.make_replay(config).sample(state.buffer, jax.random.key(3))
    batch = sample.batch
    mask = batch.inputs.obs.action_mask
    taken = jnp.take_along_axis(mask, batch.action[..., None], axis=-1)[..., 0]
    assert taken[~batch.final].all()
    assert not mask[batch.final].all()


def test_evaluation_obeys_masks_too():
    config = tiny(rppo, **MASKED, eval_policy="sample")
    env, state = start(config, rppo)
    returns = rppo.evaluate(state, env, 40, greedy=False).returns
    assert (returns >= 0).all() and returns.min() < 5  # untrained, and nothing invalid
