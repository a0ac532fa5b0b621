"""The losses of the six scripts with replay are the formulas of their docstrings, in numpy.

Networks are matrices here. The losses of PPO and PQN are in their own tests.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_off_policy
from scipy.special import log_softmax

from algorithms import dqn, drqn, rsac, rsacd, sac, sacd
from envs import Box, Discrete
from replay import Joined, Sample, Sequence

RECURRENT, CONTINUOUS = (drqn, rsac, rsacd), (sac, rsac)
GAMMA, BURN_IN, LENGTH, BATCH = 0.9, 4, 8, 5
SPACE = Box(np.array([-3.0, 0.5]), np.array([2.0, 1.0]), (2,))


class Matrices:
    """A network that multiplies observations, and for continuous actions these, by matrices."""

    def __init__(self, script, config):
        self.is_recurrent, self.config = script in RECURRENT, config
        self.action_space = SPACE if script in CONTINUOUS else Discrete(4)

    def apply(self, params, *args, method=None):
        weights = params["params"]
        carry = ()
        if self.is_recurrent and method in (None, "read"):
            carry, inputs, _, burn_in = args
            args = (inputs.obs[burn_in:],)
            carry = (carry,)
        if method == "read":
            return *carry, args[0], args[0]
        if method == "policy":
            policy = args[0] @ weights["actor"]
            is_discrete = weights["critic"].ndim == 3
            return policy if is_discrete else (policy[..., :2], 0.1 * policy[..., 2:])
        inputs = jnp.concatenate(args, axis=-1)  # observations, and actions if these are continuous
        values = jnp.stack([inputs @ critic for critic in weights["critic"]])
        if method == "values":
            return values
        if "actor" in weights:
            return args[0] @ weights["actor"], values
        return (*carry, values[0]) if carry else values[0]


def random_params(script, rng):
    if script in CONTINUOUS:
        shapes = {"critic": (2, 3 + 2), "actor": (3, 4)}
    elif script in (dqn, drqn):
        shapes = {"critic": (1, 3, 4)}
    else:
        shapes = {"critic": (2, 3, 4), "actor": (3, 4)}
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return {"params": weights | ({"log_alpha": np.log(0.3)} if "actor" in shapes else {})}


def random_sample(script, rng):
    """A minibatch, and its parts that the loss is about: obs, next_obs and so on of all rows."""
    rows = (BURN_IN + LENGTH + 1, BATCH) if script in RECURRENT else (BATCH,)
    obs = rng.normal(size=(*rows, 3))
    action = rng.integers(4, size=rows)
    if script in CONTINUOUS:
        action = SPACE.low + (SPACE.high - SPACE.low) * rng.random((*rows, 2))
    reward, terminated = rng.normal(size=rows), rng.random(rows) < 0.3
    if script not in RECURRENT:
        next_obs = rng.normal(size=obs.shape)
        sample = Joined(obs, action, reward, next_obs, terminated, np.full(rows, GAMMA))
        parts = sample._asdict() | {"is_step": np.ones(rows, bool), "weight": np.ones(BATCH)}
        return sample, SimpleNamespace(**parts)
    final, weight = rng.random(rows) < 0.2, rng.random(BATCH)
    batch = Sequence(
        inputs=script.Inputs(obs, None, None),
        start=None,
        action=action,
        reward=reward,
        terminated=terminated,
        final=final,
    )
    learned = slice(BURN_IN, -1)
    parts = SimpleNamespace(
        obs=obs[learned],
        next_obs=obs[BURN_IN + 1 :],
        action=action[learned],
        reward=reward[learned],
        terminated=terminated[learned],
        is_step=~final[learned],
        weight=weight,
    )
    return Sample((), batch, weight, None), parts


def chosen(values, action):
    return np.take_along_axis(values, action[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("script", [dqn, drqn])
def test_the_loss_of_q_learning(script, double_q, rng):
    config = small_off_policy(script, gamma=GAMMA, double_q=double_q, n_step=1)
    online, target = random_params(script, rng), random_params(script, rng)
    sample, rows = random_sample(script, rng)
    sample = jax.tree.map(jnp.asarray, sample)
    network = Matrices(script, config)
    loss, parts = script.td_loss(online, target, network, config, sample)

    def values(params, obs):
        return obs @ params["params"]["critic"][0]

    best = values(online if double_q else target, rows.next_obs).argmax(axis=-1)
    next_value = chosen(values(target, rows.next_obs), best)
    targets = rows.reward + GAMMA * np.where(rows.terminated, 0.0, next_value)
    q_value = chosen(values(online, rows.obs), rows.action)
    squares = rows.weight * (q_value - targets) ** 2
    np.testing.assert_allclose(loss, 0.5 * squares[rows.is_step].mean(), rtol=1e-4)
    np.testing.assert_allclose(parts["losses/q_values"], q_value[rows.is_step].mean(), rtol=1e-4)
    if script is drqn:
        error = np.where(rows.is_step, np.abs(q_value - targets), 0.0)
        np.testing.assert_allclose(parts["error"], error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("script", [sac, sacd, rsac, rsacd])
def test_the_losses_of_soft_actor_critic(script, rng):
    """L_Q, L_pi and L_alpha; drawn actions and their probabilities are tested in test_sac.py."""
    config = small_off_policy(script, gamma=GAMMA, n_step=1)
    online, target = random_params(script, rng), random_params(script, rng)
    sample, rows = random_sample(script, rng)
    sample = jax.tree.map(jnp.asarray, sample)
    network, key = Matrices(script, config), jax.random.key(3)
    alpha, weights = 0.3, online["params"]

    if script in CONTINUOUS:
        if script is sac:
            noise, next_noise = jax.random.normal(key, (2, BATCH, 2))
        else:
            noise = jax.random.normal(key, (LENGTH + 1, BATCH, 2))
            noise, next_noise = noise[:-1], noise[1:]

        def draw(obs, noise):
            policy = obs @ weights["actor"]
            policy = policy[..., :2], 0.1 * policy[..., 2:]
            return map(np.asarray, script.squashed_normal(noise, policy, SPACE))

        def values(params, obs, action):
            inputs = np.concatenate([obs, action], axis=-1)
            return np.stack([inputs @ critic for critic in params["params"]["critic"]])

        action, log_prob = draw(rows.obs, noise)
        next_action, next_log_prob = draw(rows.next_obs, next_noise)
        next_q = values(target, rows.next_obs, next_action).min(axis=0)
        next_value = next_q - alpha * next_log_prob
        q_values = values(online, rows.obs, rows.action)
        actor_q = values(online, rows.obs, action).min(axis=0)
        actor_loss, entropy = alpha * log_prob - actor_q, -log_prob
        # nats of actions between -1 and 1, here between the bounds of the space
        wanted = 2 * config.target_entropy + np.log(0.5 * (SPACE.high - SPACE.low)).sum()
        loss_of, keys = script.sac_loss, (key,)
    else:

        def values(params, obs):
            return np.stack([obs @ critic for critic in params["params"]["critic"]])

        log_policy = log_softmax(rows.obs @ weights["actor"], axis=-1)
        next_log_policy = log_softmax(rows.next_obs @ weights["actor"], axis=-1)
        next_q = values(target, rows.next_obs).min(axis=0)
        next_value = (np.exp(next_log_policy) * (next_q - alpha * next_log_policy)).sum(axis=-1)
        q_values = np.stack([chosen(q, rows.action) for q in values(online, rows.obs)])
        soft_q = alpha * log_policy - values(online, rows.obs).min(axis=0)
        actor_loss = (np.exp(log_policy) * soft_q).sum(axis=-1)
        entropy = -(np.exp(log_policy) * log_policy).sum(axis=-1)
        wanted = config.target_entropy_ratio * np.log(4)
        loss_of, keys = script.sacd_loss, ()

    online = jax.tree.map(jnp.asarray, online)
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, parts), gradients = gradient(online, target, network, sample, *keys)
    targets = rows.reward + GAMMA * np.where(rows.terminated, 0.0, next_value)
    td_loss = 0.5 * ((q_values - targets) ** 2).sum(axis=0)
    means = [x[rows.is_step].mean() for x in (td_loss, actor_loss, entropy)]
    alpha_loss = np.log(alpha) * (means[2] - wanted)
    for name, expected in (
        ("td_loss", means[0]),
        ("actor_loss", means[1]),
        ("entropy", means[2]),
        ("alpha_loss", alpha_loss),
    ):
        np.testing.assert_allclose(parts[f"losses/{name}"], expected, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(loss, means[0] + means[1] + alpha_loss, rtol=1e-3)
    # The greater the entropy, the smaller becomes alpha, if it is tuned.
    slope = gradients["params"]["log_alpha"]
    np.testing.assert_allclose(slope, means[2] - wanted, rtol=1e-3, atol=1e-5)
    constant = Matrices(script, replace(config, autotune=False))
    slope = jax.grad(loss_of, has_aux=True)(online, target, constant, sample, *keys)[0]
    assert slope["params"]["log_alpha"] == 0.0
