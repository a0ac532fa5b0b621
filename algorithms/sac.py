"""Soft actor-critic (SAC), for continuous actions.

SAC (Haarnoja et al. 2018, arXiv 1812.05905) acts by a stochastic policy, keeps every transition
(s, a, r, s') in a replay buffer, and takes gradient steps on minibatches of L_Q + L_pi + L_alpha,
each of which trains its own parameters only:

    L_Q     = mean[ 0.5 * sum_i (Q_i(s, a) - y)^2 ]
    y       = r + gamma * (1 - terminated) * (min_i Q'_i(s', b') - alpha * log pi(b'|s'))
    L_pi    = mean[ alpha * log pi(b|s) - min_i Q_i(s, b) ]
    L_alpha = mean[ -log(alpha) * (log pi(b|s) + target entropy) ]

with b drawn from pi(.|s) and b' from pi(.|s'). Q' is the target network, a copy of Q that follows
it slowly. The smaller of two estimates counteracts overestimation (Fujimoto et al. 2018, arXiv
1802.09477). Where an episode was truncated, s' is the observation that the time limit cut off, not
the first of the next episode. With `n_step` > 1, y has that many rewards before the value, without
the entropies in between.

`diff algorithms/sac.py algorithms/rsac.py` shows what memory changes,
`diff algorithms/sac.py algorithms/sacd.py` what discrete actions change.

    python algorithms/sac.py --env gymnax::Pendulum-v1
    python algorithms/sac.py --env gymnax::MountainCarContinuous-v0 --num-seeds 5
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from envs import Box, Episodes, each_part, make, play
from experiment import (
    Experiment,
    Options,
    Run,
    check_config,
    compile_updates,
    episode_metrics,
    fill_buffer,
    launch,
    mean_over_devices,
    report_chunks,
    run_updates,
    show,
    vmap_seeds,
)
from fast import Conv, Dense, clip_by_global_norm, flatten_small
from replay import ItemReplay, joined


# --- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Soft actor-critic (SAC), for continuous actions."""

    total_steps: int = 30_000  # environment steps of each seed
    log_every: int = 500  # updates between two reports

    # Environment and networks
    env: str = "gymnax::Pendulum-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and heads

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 1  # N, parallel environments
    num_steps: int = 1  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 256  # transitions in a minibatch
    n_step: int = 1  # rewards in a target before the value
    gradient_steps: int = 1  # minibatches of an update
    tau: float = 0.005  # fraction of the way the target network moves to the online one after each
    alpha: float = 0.2  # weight of the entropy; the initial one if it is tuned
    autotune: bool = True  # tune alpha so that the entropy approaches target_entropy
    target_entropy: float = -1.0  # nats per action dimension, for actions scaled to -1 and 1
    max_grad_norm: float = 1e9  # gradients are clipped to this global norm; by default never
    layer_norm: bool = False  # normalise hidden layers, before their activation
    eval_policy: Literal["greedy", "sample", "both"] = "both"  # most likely actions, draws, or both

    def make_env(self):
        return make(self.env, **{"mask": self.mask} | self.env_kwargs)

    def __post_init__(self):
        check_config(self, Box, bounded=True)


# --- Networks ------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


def hidden(x, config):
    """A layer with relu; `layer_norm` normalises what relu reads."""
    x = dense(config.hidden_size)(x)
    return nn.relu(nn.LayerNorm()(x) if config.layer_norm else x)


@each_part
def encode(obs, num_axes):
    """Observations (..., *obs_shape) with `num_axes` leading axes to vectors (..., size)."""
    x = obs / 255.0 if obs.dtype == jnp.uint8 else obs
    if obs.ndim - num_axes == 3:  # images: the convolutions of DQN (Mnih et al. 2015)
        is_small = min(obs.shape[-3:-1]) < 36  # too small for these
        layers = ((16, 3, 1),) if is_small else ((32, 8, 4), (64, 4, 2), (64, 3, 1))
        for features, size, stride in layers:
            x = nn.relu(Conv(features, (size, size), (stride, stride), "VALID")(x))
    return x.reshape(*obs.shape[:num_axes], -1)


class Torso(nn.Module):
    """Observations (B, ...) to the features (B, size) of policy or values."""

    @nn.compact
    def __call__(self, obs):
        return encode(obs, num_axes=1)


class Head(nn.Module):
    """Features (..., size) to outputs (..., num_outputs)."""

    config: Config
    num_outputs: int
    scale: float

    @nn.compact
    def __call__(self, x):
        for _ in range(1 + self.config.num_layers):
            x = hidden(x, self.config)
        return dense(self.num_outputs, self.scale)(x)


class ActorCritic(nn.Module):
    """Policy, two estimates of the values, and the logarithm of alpha."""

    config: Config
    action_space: Box

    def setup(self):
        config = self.config
        self.actor_torso = Torso()
        self.critic_torso = Torso()
        self.actor_head = Head(config, 2 * self.action_space.shape[0], scale=0.01)
        twins = nn.vmap(Head, {"params": 0}, {"params": True}, axis_size=2)
        self.critic_heads = twins(config, 1, scale=1.0)
        self.log_alpha = self.param("log_alpha", nn.initializers.constant(np.log(config.alpha)), ())

    def read(self, obs):
        """Observations (B, ...) -> features of actor and critic (B, size)."""
        return self.actor_torso(obs), self.critic_torso(obs)

    def policy(self, features):
        """Features (..., size) -> mean and log_std (..., A), see `squashed_normal`."""
        mean, log_std = jnp.split(self.actor_head(features), 2, axis=-1)
        return mean, -5.0 + 3.5 * (1.0 + jnp.tanh(log_std))  # between -5 and 2

    def values(self, features, action):
        """Features (..., size), action (..., A) -> Q_1 and Q_2 (2, ...)."""
        x = jnp.concatenate([features, action], axis=-1)
        copies = jnp.broadcast_to(x, (2, *x.shape))  # faster than sharing
        return self.critic_heads(copies)[..., 0]

    def __call__(self, obs):
        """Observations (B, ...) -> policy, values of its mean (2, B)."""
        features, critic_features = self.read(obs)
        policy = self.policy(features)
        return policy, self.values(critic_features, policy[0])


def make_network(config: Config, env):
    return ActorCritic(config, env.action_space)


def make_optimizer(config: Config):
    clip = clip_by_global_norm(config.max_grad_norm)
    adam = optax.scale_by_adam(eps=1e-5)  # `update` applies the learning rate
    return flatten_small(optax.chain(clip, adam))


# --- State ---------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """Everything needed to continue a run; `init` gives all arrays a leading seed axis."""

    params: Any
    target_params: Any
    opt_state: Any
    env_state: Any  # (N, ...)
    obs: jax.Array  # (N, ...), what the next action is chosen from
    buffer: Any  # Transition (N, buffer_size // N, ...), and where the next one goes
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


class Transition(NamedTuple):
    """The step obs -> next_obs of an environment; a sample is (n_step, batch_size, ...)."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array  # the true next observation, not the one after an auto-reset
    terminated: jax.Array  # next_obs ends the task: its value is 0, Q' is not used
    done: jax.Array  # terminated or truncated: the next step is of another episode


def make_replay(config: Config):
    return ItemReplay.of(config)


# --- Mathematics ---------------------------------------------------------------------------------
def squashed_normal(noise, policy, space):
    """An action from standard normal noise: action (..., A) and its log-probability (...)."""
    mean, log_std = policy
    scale = space.half_width
    u = mean + jnp.exp(log_std) * noise
    action = space.low + scale * (1.0 + jnp.tanh(u))
    log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    # log |d action / d u|, with log(1 - tanh(u)^2) in a form that stays finite for large |u|.
    log_slope = np.log(scale) + 2.0 * (np.log(2.0) - u - nn.softplus(-2.0 * u))
    return action, (log_normal - log_slope).sum(axis=-1)


def sac_loss(params, target_params, network, sample, key):
    """L_Q + L_pi + L_alpha of the docstring over one minibatch, and their parts for the log."""
    config = network.config
    space = network.action_space
    constant = jax.lax.stop_gradient(params)
    alpha = jnp.exp(constant["params"]["log_alpha"])
    actor_features, features = network.apply(params, sample.obs, method="read")
    next_actor_features, _ = network.apply(constant, sample.next_obs, method="read")
    _, target_features = network.apply(target_params, sample.next_obs, method="read")

    noise, next_noise = jax.random.normal(key, (2, *sample.action.shape))
    policy = network.apply(params, actor_features, method="policy")
    action, log_prob = squashed_normal(noise, policy, space)
    next_policy = network.apply(constant, next_actor_features, method="policy")
    next_action, next_log_prob = squashed_normal(next_noise, next_policy, space)

    # L_Q
    next_q = network.apply(target_params, target_features, next_action, method="values")
    next_value = next_q.min(axis=0) - alpha * next_log_prob
    targets = sample.reward + sample.discount * jnp.where(sample.terminated, 0.0, next_value)
    q_values = network.apply(params, features, sample.action, method="values")
    td_loss = 0.5 * ((q_values - targets) ** 2).sum(axis=0).mean()

    # L_pi
    features = jax.lax.stop_gradient(features)
    actor_q = network.apply(constant, features, action, method="values").min(axis=0)
    actor_loss = (alpha * log_prob - actor_q).mean()

    # L_alpha; the target entropy is that of actions in the bounds of the environment
    entropy = -jax.lax.stop_gradient(log_prob).mean()
    target_entropy = np.sum(config.target_entropy + np.log(space.half_width))
    alpha_loss = config.autotune * params["params"]["log_alpha"] * (entropy - target_entropy)

    return td_loss + actor_loss + alpha_loss, {
        "losses/td_loss": td_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
        "losses/alpha": alpha,
        "losses/entropy": entropy,
        "losses/q_values": q_values.mean(),
    }


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and their metrics."""
    config = state.config
    apply = make_network(config, env).apply
    step_envs = jax.vmap(env.raw.step, axis_name="envs")  # they share normalisation statistics
    num_random_updates = config.learning_starts // config.steps_per_update

    def env_step(state, _):
        key, noise_key, random_key, step_key = jax.random.split(state.key, 4)
        policy, _ = apply(state.params, env.preprocess_obs(state.env_state, state.obs))
        noise = jax.random.normal(noise_key, policy[0].shape)
        action, _ = squashed_normal(noise, policy, env.action_space)
        random_keys = jax.random.split(random_key, config.num_envs)
        random_action = jax.vmap(env.action_space.sample)(random_keys)
        action = jnp.where(state.updates < num_random_updates, random_action, action)
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        transition = Transition(
            obs=state.obs,
            action=action,
            reward=reward,
            next_obs=info["final_obs"],
            terminated=terminated,
            done=info["episode_done"],
        )
        state = state.replace(env_state=env_state, obs=obs, key=key)
        return state, (transition, info)

    state, (batch, info) = jax.lax.scan(env_step, state, length=config.num_steps)
    metrics = episode_metrics(info["episode_done"], info["episode_return"], info["episode_length"])
    buffer = make_replay(config).add(state.buffer, batch)
    return state.replace(buffer=buffer, updates=state.updates + 1), metrics


def update(state, env):
    """Collect steps and learn from the buffer: the new state, and the metrics of this update."""
    config = state.config
    network = make_network(config, env)
    optimizer = make_optimizer(config)
    replay = make_replay(config)
    progress = config.progress(state.updates)
    learning_rate = config.learning_rate * (1.0 - config.anneal_lr * progress)
    state, metrics = rollout(state, env)

    def gradient_step(state, _):
        key, sample_key, loss_key = jax.random.split(state.key, 3)
        steps = env.preprocess(state.env_state, replay.sample(state.buffer, sample_key))
        sample = joined(steps, config.gamma)
        gradient = jax.grad(sac_loss, has_aux=True)
        gradients, parts = gradient(state.params, state.target_params, network, sample, loss_key)
        gradients = mean_over_devices(gradients)
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(-learning_rate, changes))
        target_params = optax.incremental_update(params, state.target_params, config.tau)
        state = state.replace(params=params, target_params=target_params, opt_state=opt_state)
        return state.replace(key=key), parts

    state, parts = jax.lax.scan(gradient_step, state, length=config.gradient_steps)
    metrics |= jax.tree.map(jnp.mean, parts)
    metrics["charts/learning_rate"] = learning_rate
    return state, metrics


# --- Init, warmup, train, evaluate ---------------------------------------------------------------
def init(config: Config, key) -> State:
    """A fresh state, from one typed key or from an array of them, one per seed."""
    env = config.make_env()
    network = make_network(config, env)
    optimizer = make_optimizer(config)

    def init_seed(key):
        key, network_key, reset_key = jax.random.split(key, 3)
        reset_keys = jax.random.split(reset_key, config.num_envs)
        obs, env_state = jax.vmap(env.raw.reset, axis_name="envs")(reset_keys)
        no_action = jnp.zeros((config.num_envs, *env.action_space.shape), env.action_space.dtype)
        no_reward = jnp.zeros(config.num_envs)
        params = network.init(network_key, obs)
        transition = Transition(
            obs=obs,
            action=no_action,
            reward=no_reward,
            next_obs=obs,
            terminated=jnp.zeros(config.num_envs, bool),
            done=jnp.zeros(config.num_envs, bool),
        )
        return State(
            params=params,
            target_params=params,
            opt_state=optimizer.init(params),
            env_state=env_state,
            obs=obs,
            buffer=make_replay(config).init(transition),
            key=key,
            updates=jnp.int32(0),
            config=config,
        )

    return jax.jit(vmap_seeds(init_seed))(key.reshape(-1))


def warmup(state: State, env, logger) -> State:
    """Fill the buffer with `learning_starts` steps, unless that was done; compile the update."""
    state = fill_buffer(rollout, state, env)
    state, report = compile_updates(update, state, env)
    logger.log(report, report.step)
    return state


def train(state: State, env, logger, num_steps: int) -> tuple[State, dict]:
    """Train for `num_steps` steps per seed, in whole updates; the state passed in is used up."""
    for num_updates in report_chunks(state.config, num_steps):
        state, report = run_updates(update, state, env, num_updates)  # all seeds side by side
        logger.log(report, report.step)
    return state, report


@partial(jax.jit, static_argnames=("env", "episodes", "greedy", "play"))
def evaluate(state: State, env, episodes: int, greedy=True, play=play) -> Episodes:
    """Play `episodes` of every seed, greedily or as the policy draws actions: (S, episodes)."""
    config = state.config
    network = make_network(config, env)

    def evaluate_seed(state):
        def policy(carry, obs, start, action, reward, key):
            policy, _ = network.apply(state.params, obs)
            noise = 0.0 if greedy else jax.random.normal(key, policy[0].shape)
            action, _ = squashed_normal(noise, policy, env.action_space)
            return carry, action

        key = jax.random.fold_in(state.key, 2**31 - 1)  # a stream that training does not use
        frozen = env.frozen(state.env_state)
        return play(frozen, policy, lambda _: (), key, config.num_eval_envs, episodes)

    return vmap_seeds(evaluate_seed)(state)


# --- Main ----------------------------------------------------------------------------------------
def main(config: Config) -> None:
    env = config.make_env()
    if config.evaluate:
        return show(config, env, init, evaluate)

    with Run(config, init) as run:
        state = warmup(run.state, env, run.logger)
        while num_steps := run.next_chunk(state):
            state, _ = train(state, env, run.logger, num_steps)
            if run.evaluation_is_due(state):
                run.evaluate(evaluate, state, env)


if __name__ == "__main__":
    launch(main, Config)
