"""Actions with several parts: probabilities, entropies and values against all combinations."""

import importlib
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPLAY, SCRIPTS, is_continuous, replayed_steps, start, tiny

from algorithms import dqn, ppo, rppo, rsacd, sacd
from envs import Discrete, MultiDiscrete, greatest_entropy, make, random_valid
from loggers import Logger
from replay import Sample, Sequence

SPACE = MultiDiscrete((3, 1, 4))
ALL = list(itertools.product(*map(range, SPACE.nvec)))  # all actions


def joint(tables, combine=np.sum):
    """(..., parts, max(nvec)) of every part -> (..., len(ALL)) of every action."""
    tables = np.asarray(tables)
    columns = [[tables[..., i, a] for i, a in enumerate(action)] for action in ALL]
    return np.stack([combine(column, axis=0) for column in columns], axis=-1)


def random_policy(rng, *shape):
    logits = SPACE.logits(jnp.asarray(rng.normal(size=(*shape, 8)), jnp.float32))
    policy = jax.nn.softmax(logits)
    probabilities = joint(policy, np.prod)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, rtol=1e-5)
    return logits, probabilities


# --- The pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [ppo, rppo])
def test_ppo_sees_the_probability_and_entropy_of_the_whole_action(script, rng):
    logits, probabilities = random_policy(rng, 6, 5)
    numbers = rng.integers(len(ALL), size=(6, 5))
    action = np.array(ALL)[numbers]
    log_prob = np.log(np.take_along_axis(probabilities, numbers[..., None], axis=-1)[..., 0])
    zeros = jnp.zeros((6, 5))
    apply = lambda *_: (logits, zeros) if script is ppo else ((), logits, zeros)  # noqa: E731
    network = SimpleNamespace(apply=apply, action_space=SPACE)
    batch = SimpleNamespace(
        obs=(), inputs=(), start=(), action=action, log_prob=log_prob, value=zeros
    )
    carry = () if script is ppo else ((),)
    _, parts = script.ppo_loss((), network, script.Config(), *carry, batch, zeros, zeros)
    assert parts["losses/first_ratio_error"] < 1e-5
    entropy = -(probabilities * np.log(probabilities)).sum(axis=-1).mean()
    np.testing.assert_allclose(parts["losses/entropy"], entropy, rtol=1e-5)


def enumerated(config, q_values, policy, reward, terminated, action, next_q, next_policy):
    """The losses of SACD, by sums over all actions; values are two estimates of each part's."""
    alpha = config.alpha
    least = joint(next_q.min(axis=0))  # part by part
    value = (next_policy * (least - alpha * np.log(next_policy))).sum(axis=-1)
    target = reward + config.gamma * np.where(terminated, 0.0, value)
    chosen = np.take_along_axis(joint(q_values), action[None, ..., None], axis=-1)[..., 0]
    actor = (policy * (alpha * np.log(policy) - joint(q_values.min(axis=0)))).sum(axis=-1)
    return {
        "losses/td_loss": (0.5 * ((chosen - target) ** 2).sum(axis=0)).mean(),
        "losses/actor_loss": actor.mean(),
        "losses/entropy": -(policy * np.log(policy)).sum(axis=-1).mean(),
    }


@pytest.mark.parametrize("script", [sacd, rsacd])
def test_sacd_expects_what_the_sum_over_all_actions_does(script, rng):
    """With Q the sum over the parts, and the policy their product."""
    rows = (7,) if script is sacd else (4, 3)
    config = script.Config(alpha=0.3) if script is sacd else script.Config(alpha=0.3, burn_in=0)
    q_values, next_q = (
        SPACE.values(jnp.asarray(rng.normal(size=(2, *rows, 8)), jnp.float32)) for _ in range(2)
    )
    logits, policy = random_policy(rng, *rows)
    next_logits, next_policy = random_policy(rng, *rows)
    reward = rng.normal(size=rows).astype(np.float32)
    terminated = rng.random(rows) < 0.3
    action = rng.integers(len(ALL), size=rows)
    params = {"params": {"log_alpha": jnp.log(0.3)}}
    if script is sacd:
        sample = SimpleNamespace(
            obs="now",
            action=jnp.asarray(np.array(ALL)[action]),
            reward=reward,
            discount=config.gamma,
            next_obs="next",
            terminated=terminated,
        )

        def apply(given, obs):
            if obs == "now":
                return logits, q_values
            return next_logits, next_q

        expected = (q_values, policy, reward, terminated, action, next_q, next_policy)
    else:
        batch = Sequence(
            inputs=SimpleNamespace(obs=()),
            start=(),
            action=jnp.asarray(np.array(ALL)[action]),
            reward=reward,
            terminated=terminated,
            final=jnp.zeros(rows, bool),
        )
        batch = batch._replace(inputs=rsacd.Inputs((), (), ()))
        sample = Sample((), batch, (), ())

        def apply(given, *args, method):
            if method == "read":
                return (), (), "target" if given is target else "online"
            if method == "policy":
                return logits
            return next_q if args[0] == "target" else q_values

        steps = slice(None, -1), slice(1, None)
        now = [x[steps[0]] for x in (policy, reward, terminated, action)]
        expected = (q_values[:, steps[0]], *now, next_q[:, steps[1]], policy[steps[1]])
    target = {"params": dict(params["params"])}
    network = SimpleNamespace(apply=apply, action_space=SPACE, config=config)
    _, parts = script.sacd_loss(params, target, network, sample)
    for name, value in enumerated(config, *expected).items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-5, err_msg=name)
    sizes = np.log(np.array(SPACE.nvec)).sum()
    np.testing.assert_allclose(greatest_entropy(SPACE, ()), sizes)
    assert np.isclose(sizes, np.log(len(ALL)))


def test_what_moves_from_part_to_part_does_not_change_the_values(rng):
    """Only the sum is learned: the minimum of two estimates must not depend on its division."""
    outputs = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    moved = outputs + jnp.array([7.0] * 3 + [-5.0] + [-2.0] * 4)
    is_action = np.arange(4) < np.array(SPACE.nvec)[:, None]
    np.testing.assert_allclose(
        SPACE.values(moved)[:, is_action], SPACE.values(outputs)[:, is_action], atol=1e-5
    )
    np.testing.assert_allclose(
        joint(SPACE.values(outputs)), joint(SPACE.logits(outputs)), atol=1e-5
    )


def test_one_part_is_like_a_discrete_action(rng):
    one, outputs = MultiDiscrete((4,)), jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(one.values(outputs)[:, 0], outputs, atol=1e-6)
    np.testing.assert_array_equal(one.logits(outputs)[:, 0], Discrete(4).logits(outputs))
    actions = jnp.arange(4)
    np.testing.assert_array_equal(one.one_hot(actions[:, None]), Discrete(4).one_hot(actions))


def test_actions_that_a_part_does_not_have_are_never_drawn(rng):
    logits = SPACE.logits(jnp.zeros((2000, 8)))
    drawn = jax.random.categorical(jax.random.key(0), logits)
    explored = jax.vmap(random_valid)(jax.random.split(jax.random.key(1), 2000), logits)
    for actions in (drawn, explored):
        assert set(map(tuple, np.asarray(actions).tolist())) == set(ALL)
    one_hot = SPACE.one_hot(jnp.array([[2, 0, 3]]))
    np.testing.assert_array_equal(one_hot, [[0, 0, 1, 1, 0, 0, 0, 1]])


# --- The scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=pytest.mark.xdist_group(s)) for s in SCRIPTS]
)
def test_every_script_reads_all_parts_and_acts_with_all(script):
    """Half of what can be earned is in the image, half in the vector, for a part of the action."""
    module = importlib.import_module(f"algorithms.{script}")
    continuous = is_continuous(module)
    names = set(module.Config.__dataclass_fields__)
    changes = {"num_envs": 8, "total_steps": 12_000, "learning_rate": 5e-3, "cell": "none"}
    changes |= {"num_steps": 4 if script in ("drqn", "rsacd", "rsac") else 8, "batch_size": 64}
    changes |= {"gradient_steps": 8 if "sac" in script else 2, "gamma": 0.0, "buffer_size": 4096}
    changes |= {"learning_starts": 256, "alpha": 0.02, "autotune": False, "hidden_size": 32}
    changes |= {"target_network_frequency": 1, "tau": 0.05, "ent_coef": 0.0, "log_every": 500}
    changes = {name: value for name, value in changes.items() if name in names}
    config = tiny(module, env="test::Parts", env_kwargs={"continuous": continuous}, **changes)
    env, state = start(config, module)
    state = module.warmup(state, env, Logger())
    state, _ = module.train(state, env, Logger(), config.total_steps)
    returns = module.evaluate(state, env, 40).returns.mean()
    assert returns >= (6.4 if continuous else 7.0)  # with one part alone at most 6
    if script in REPLAY:
        steps = replayed_steps(state.buffer)
        for obs in (steps.next_obs, steps.inputs.obs if hasattr(steps, "inputs") else steps.obs):
            assert jax.tree.structure(obs) == jax.tree.structure(env.observation_space)
            assert (obs["image"].dtype, obs["body"][0].dtype) == (np.uint8, np.float32)
            assert obs["image"].max() == 255


def test_value_scripts_refuse_parts_that_stay_parts():
    with pytest.raises(
        ValueError, match="have several parts: leave joint_actions True, or use ppo"
    ):
        tiny(dqn, env="test::Parts", env_kwargs={"joint_actions": False})
    with pytest.raises(ValueError, match="those of test::Parts are discrete; sacd.py has them"):
        tiny(importlib.import_module("algorithms.sac"), env="test::Parts", env_kwargs={})
    assert make("test::Parts", joint_actions=True).action_space.n == 6
