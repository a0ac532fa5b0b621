"""Proximal policy optimisation (PPO, Schulman et al. 2017, arXiv 1707.06347) for discrete actions.

Collect T steps of N environments with the current policy, then take several epochs of minibatch gradient steps on

    L = mean[ -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) ]     ratio = pi(a|s) / pi_old(a|s)
      + vf_coef * mean[ 0.5 * (V(s) - R)^2 ]
      - ent_coef * mean[ entropy(pi(.|s)) ]

with advantages A by GAE (Schulman et al. 2016, arXiv 1506.02438) and returns R = A + V.
`diff algorithms/ppo.py algorithms/rppo.py` shows what memory changes.

    python algorithms/ppo.py --env gymnax::CartPole-v1
    python algorithms/ppo.py --env gymnax::Acrobot-v1 --num-seeds 5
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from envs import Discrete, Episodes, make, play
from experiment import (
    Experiment,
    Options,
    Run,
    check_sizes,
    compile_updates,
    environment_steps,
    launch,
    report_chunks,
    run_updates,
    show,
    vmap_seeds,
)
from fast import Conv, Dense, flatten_small


# --- Config ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Proximal policy optimisation (PPO) for discrete actions."""

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its parameters, and wrappers: frame_stack 4
    mask: tuple[str, ...] = ()  # entries of the observation to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and heads
    shared_torso: bool = False  # actor and critic share all but their heads, instead of nothing

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at total_steps
    num_envs: int = 16  # N, parallel environments
    num_steps: int = 128  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    update_epochs: int = 4  # passes over the collected steps in one update
    num_minibatches: int = 4  # gradient steps in one pass
    normalize_advantage: bool = True  # give each minibatch's advantages mean 0 and standard deviation 1
    clip_coef: float = 0.2  # eps, how far the probability ratio may move and still gain
    clip_vloss: bool = False  # keep the value within clip_coef of its old one, too
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients are clipped to this global norm

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps

    def make_env(self):
        return make(self.env, **{"mask": self.mask} | self.env_kwargs)

    def __post_init__(self):
        check_sizes(self)
        if self.steps_per_update % self.num_minibatches:
            raise ValueError(f"num_minibatches ({self.num_minibatches}) must divide a batch ({self.steps_per_update})")
        if not isinstance(self.make_env().action_space, Discrete):
            raise ValueError(f"this script needs discrete actions, those of {self.env} are continuous")


# --- Networks --------------------------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


class Torso(nn.Module):
    """Observations (..., *obs_shape) to the features (..., hidden_size) that policy or value are read from."""

    config: Config

    @nn.compact
    def __call__(self, obs):
        config, env = self.config, self.config.make_env()
        obs_ndim = len(env.observation_space.shape)
        x = obs / 255.0 if obs.dtype == jnp.uint8 else obs
        if obs_ndim == 3:  # images: the convolutions of DQN (Mnih et al. 2015), or a single one if they are small
            layers = ((32, 8, 4), (64, 4, 2), (64, 3, 1)) if min(obs.shape[-3:-1]) >= 36 else ((16, 3, 1),)
            for features, size, stride in layers:
                conv = Conv(features, (size, size), (stride, stride), "VALID")
                x = nn.relu(conv(x))
        x = x.reshape(*obs.shape[: obs.ndim - obs_ndim], -1)
        x = nn.tanh(dense(config.hidden_size)(x))
        for _ in range(config.num_layers):
            x = nn.tanh(dense(config.hidden_size)(x))
        return x


class ActorCritic(nn.Module):
    """Policy and value, on one torso or on one each."""

    config: Config

    def setup(self):
        self.torsos = [Torso(self.config) for _ in range(1 if self.config.shared_torso else 2)]
        self.actor_head = dense(self.config.make_env().action_space.n, scale=0.01)
        self.critic_head = dense(1, scale=1.0)

    def __call__(self, obs):
        """obs (..., *obs_shape) -> logits (..., num_actions), value (...)."""
        features = [torso(obs) for torso in self.torsos]
        return self.actor_head(features[0]), self.critic_head(features[-1])[..., 0]


def make_optimizer(config: Config):
    learning_rate = config.learning_rate
    if config.anneal_lr:
        gradient_steps = config.num_updates * config.update_epochs * config.num_minibatches
        learning_rate = optax.linear_schedule(config.learning_rate, 0.0, gradient_steps)
    adam = optax.adam(learning_rate, eps=1e-5)
    return flatten_small(optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam))


# --- State -----------------------------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """All that a run needs to go on. `init` gives arrays a leading seed axis; `rollout` and `update` see one seed."""

    params: Any
    opt_state: Any
    env_state: Any  # (N, ...)
    obs: jax.Array  # (N, *obs_shape), what the next action is chosen from
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


class Transition(NamedTuple):
    """The step obs[t] -> next_obs[t] of every environment; a rollout stacks T of them to (T, N, ...)."""

    obs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array  # V(obs[t])
    next_value: jax.Array  # V(next_obs[t]) of the true next observation, not of the one after an auto-reset
    reward: jax.Array
    terminated: jax.Array  # next_obs[t] ends the task: it is worth nothing, whatever next_value says
    done: jax.Array  # terminated or truncated: obs[t + 1] begins another episode
    episode_return: jax.Array
    episode_length: jax.Array


# --- Mathematics -----------------------------------------------------------------------------------------------------
def gae(reward, value, next_value, terminated, done, config):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) of (T, N) arrays: advantages and returns, (T, N).

    Two things can end: `terminated` ends the future (nothing to bootstrap from), `done` the episode (no trace from the
    next one). A truncated step bootstraps from next_value, and stops the trace.
    """
    delta = reward + config.gamma * jnp.where(terminated, 0.0, next_value) - value

    def backward(advantage, step):
        delta, done = step
        advantage = delta + config.gamma * config.gae_lambda * ~done * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(delta[0]), (delta, done), reverse=True)
    return advantages, advantages + value


def ppo_loss(params, network, config, batch, advantage, returns):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    logits, value = network.apply(params, batch.obs)
    log_ratio = -optax.softmax_cross_entropy_with_integer_labels(logits, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip_coef, 1.0 + config.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    value_error = (value - returns) ** 2
    if config.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -config.clip_coef, config.clip_coef)
        value_error = jnp.maximum(value_error, (clipped_value - returns) ** 2)
    value_loss = 0.5 * value_error.mean()
    entropy = -(nn.softmax(logits) * nn.log_softmax(logits)).sum(axis=-1).mean()
    loss = policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1.0 - log_ratio).mean(),  # k3 of joschu.net/blog/kl-approx
        "losses/clipfrac": (jnp.abs(ratio - 1.0) > config.clip_coef).mean(),
        "losses/first_ratio_error": jnp.abs(ratio - 1.0).max(),
    }


# --- One update of one seed ------------------------------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments: the state after them, and transitions (T, N, ...)."""
    config, network = state.config, ActorCritic(state.config)
    step_envs = jax.vmap(env.step, axis_name="envs")  # the name lets them share what they normalise with

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        logits, value = network.apply(state.params, state.obs)
        action = jax.random.categorical(action_key, logits)
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        _, next_value = network.apply(state.params, info["final_obs"])
        log_prob = -optax.softmax_cross_entropy_with_integer_labels(logits, action)  # log pi(action)
        ending = terminated, info["episode_done"], info["episode_return"], info["episode_length"]
        transition = Transition(state.obs, action, log_prob, value, next_value, reward, *ending)
        return state.replace(env_state=env_state, obs=obs, key=key), transition

    return jax.lax.scan(env_step, state, length=config.num_steps)


def update(state, env):
    """Collect a batch and learn from it: the new state, and the metrics of this update."""
    config, network, optimizer = state.config, ActorCritic(state.config), make_optimizer(state.config)
    state, batch = rollout(state, env)
    advantages, returns = gae(batch.reward, batch.value, batch.next_value, batch.terminated, batch.done, config)

    def gradient_step(learner, steps):
        params, opt_state = learner
        minibatch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[steps], (batch, advantages, returns))
        gradients, parts = jax.grad(ppo_loss, has_aux=True)(params, network, config, *minibatch)
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), parts

    def epoch(learner, key):
        # Minibatches of single steps: without memory it does not matter where in an episode a step was taken.
        random_bits = jax.random.bits(key, (config.steps_per_update,))
        order = jnp.argsort(random_bits)  # one sort; jax.random.permutation takes two
        minibatches = order.reshape(config.num_minibatches, -1)
        return jax.lax.scan(gradient_step, learner, minibatches)

    key, shuffle_key = jax.random.split(state.key)
    epoch_keys = jax.random.split(shuffle_key, config.update_epochs)
    (params, opt_state), parts = jax.lax.scan(epoch, (state.params, state.opt_state), epoch_keys)

    metrics = jax.tree.map(jnp.mean, parts) | {
        # The first minibatch meets the very parameters that collected it: a ratio other than 1 there is a bug.
        "losses/first_ratio_error": parts["losses/first_ratio_error"][0, 0],
        "losses/explained_variance": 1.0 - (returns - batch.value).var() / (returns.var() + 1e-8),
        "charts/learning_rate": config.learning_rate * (1.0 - config.anneal_lr * state.updates / config.num_updates),
        "charts/episodic_return": batch.episode_return.sum(where=batch.done),
        "charts/episodic_length": batch.episode_length.sum(where=batch.done),
        "charts/episodes": batch.done.sum(),
    }
    return state.replace(params=params, opt_state=opt_state, key=key, updates=state.updates + 1), metrics


# --- Init, warmup, train, evaluate -----------------------------------------------------------------------------------
def init(config: Config, key) -> State:
    """A fresh state, from one typed key or from an array of them: one per seed."""
    env, network, optimizer = config.make_env(), ActorCritic(config), make_optimizer(config)

    def init_seed(key):
        key, network_key, reset_key = jax.random.split(key, 3)
        obs, env_state = jax.vmap(env.reset, axis_name="envs")(jax.random.split(reset_key, config.num_envs))
        params = network.init(network_key, obs)
        return State(params, optimizer.init(params), env_state, obs, key, jnp.int32(0), config)

    return jax.jit(vmap_seeds(init_seed))(key.reshape(-1))


def warmup(state: State, env, logger) -> State:
    """Compile the update, so that the speed reported by `train` is that of training; PPO needs nothing else."""
    state, report = compile_updates(update, state, env)
    logger.log(report, environment_steps(state))
    return state


def train(state: State, env, logger, num_steps: int) -> tuple[State, dict]:
    """Train for `num_steps` steps per seed in whole updates, at least one. The state passed in is used up (donated)."""
    for num_updates in report_chunks(state.config, num_steps):
        state, report = run_updates(update, state, env, num_updates)  # compiled; all seeds side by side
        logger.log(report, environment_steps(state))
    return state, report


@partial(jax.jit, static_argnames=("env", "episodes", "play"))
def evaluate(state: State, env, episodes: int, play=play) -> Episodes:
    """Play `episodes` greedy episodes per seed, in environments of their own; returns and lengths are (S, episodes)."""
    config, network = state.config, ActorCritic(state.config)

    def evaluate_seed(state):
        def policy(carry, obs, *_):
            logits, _ = network.apply(state.params, obs)
            return carry, logits.argmax(axis=-1)

        key = jax.random.fold_in(state.key, 2**31 - 1)  # far from the numbers that split folds in
        return play(env.frozen(state.env_state), policy, lambda _: (), key, config.num_eval_envs, episodes)

    return vmap_seeds(evaluate_seed)(state)


# --- Main ------------------------------------------------------------------------------------------------------------
def main(config: Config) -> None:
    env = config.make_env()
    if config.evaluate:
        return show(config, env, init, evaluate)

    with Run(config, init) as run:
        state = warmup(run.state, env, run.logger)
        while num_steps := run.next_chunk(state):
            state, _ = train(state, env, run.logger, num_steps)
            if run.evaluation_is_due(state):
                run.save(state, evaluate(state, env, config.eval_episodes))


if __name__ == "__main__":
    launch(main, Config)
