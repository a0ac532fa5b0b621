"""Soft actor-critic for discrete actions (SACD).

SACD (Christodoulou 2019, arXiv 1910.07207) acts by a stochastic policy, keeps every transition
(s, a, r, s') in a replay buffer, and takes gradient steps on minibatches of L_Q + L_pi + L_alpha,
each of which trains its own parameters only:

    L_Q     = mean[ 0.5 * sum_i (Q_i(s, a) - y)^2 ]
    y       = r + gamma * (1 - terminated) * V'(s')
    V'(s')  = sum_b pi(b|s') * (min_i Q'_i(s', b) - alpha * log pi(b|s'))
    L_pi    = mean[ sum_b pi(b|s) * (alpha * log pi(b|s) - min_i Q_i(s, b)) ]
    L_alpha = mean[ -log(alpha) * (sum_b pi(b|s) * log pi(b|s) + target entropy) ]

with sums over all actions b instead of SAC's samples. Q' is the target network, a copy of Q that
follows it slowly. The smaller of two estimates counteracts overestimation (Fujimoto et al. 2018,
arXiv 1802.09477). Where an episode was truncated, s' is the observation that the time limit cut
off, not the first of the next episode. With `n_step` > 1, y has that many rewards before the value,
without the entropies in between. Of actions with several parts, pi is the product over these and Q
the sum (in DecQN, arXiv 2210.12566, the mean); min_i is taken part by part.

`diff algorithms/sacd.py algorithms/rsacd.py` shows what memory changes,
`diff algorithms/sac.py algorithms/sacd.py` what discrete actions change.

    python algorithms/sacd.py --env gymnax::CartPole-v1
    python algorithms/sacd.py --env gymnax::Acrobot-v1 --num-seeds 5
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

from envs import (
    Discrete,
    Episodes,
    MultiDiscrete,
    each_part,
    greatest_entropy,
    make,
    only_valid,
    play,
    random_valid,
)
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
    """Soft actor-critic for discrete actions (SACD)."""

    total_steps: int = 100_000  # environment steps of each seed
    log_every: int = 500  # updates between two reports

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and heads

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 4  # N, parallel environments
    num_steps: int = 1  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 128  # transitions in a minibatch
    n_step: int = 1  # rewards in a target before the value
    gradient_steps: int = 1  # minibatches of an update
    tau: float = 0.02  # fraction of the way the target network moves to the online one after each
    alpha: float = 0.2  # weight of the entropy; the initial one if it is tuned
    autotune: bool = True  # tune alpha so that the entropy approaches its target
    target_entropy_ratio: float = 0.7  # that target over the greatest entropy, log(num_actions)
    max_grad_norm: float = 1e9  # gradients are clipped to this global norm; by default never
    layer_norm: bool = False  # normalise hidden layers, before their activation
    eval_policy: Literal["greedy", "sample", "both"] = "both"  # most likely actions, draws, or both

    def make_env(self):
        return make(self.env, **{"mask": self.mask} | self.env_kwargs)

    def __post_init__(self):
        check_config(self, Discrete, MultiDiscrete)


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
    action_space: Discrete | MultiDiscrete

    def setup(self):
        config = self.config
        self.actor_torso = Torso()
        self.critic_torso = Torso()
        self.actor_head = Head(config, self.action_space.num_outputs, scale=0.01)
        twins = nn.vmap(Head, {"params": 0}, {"params": True}, axis_size=2)
        self.critic_heads = twins(config, self.action_space.num_outputs, scale=1.0)
        self.log_alpha = self.param("log_alpha", nn.initializers.constant(np.log(config.alpha)), ())

    def read(self, obs):
        """Observations (B, ...) -> features of actor and critic (B, size)."""
        return self.actor_torso(obs), self.critic_torso(obs)

    def policy(self, features, obs):
        """Features (..., size) of observations (..., *obs_shape) -> logits (..., num_actions)."""
        return only_valid(self.action_space.logits(self.actor_head(features)), obs)

    def values(self, features):
        """Features (..., size) -> Q_1 and Q_2 of all actions (2, ..., num_actions)."""
        copies = jnp.broadcast_to(features, (2, *features.shape))  # faster than sharing
        return self.action_space.values(self.critic_heads(copies))

    def __call__(self, obs):
        """Observations (B, ...) -> logits (B, A), values (2, B, A)."""
        features, critic_features = self.read(obs)
        return self.policy(features, obs), self.values(critic_features)


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
def sacd_loss(params, target_params, network, sample):
    """L_Q + L_pi + L_alpha of the docstring over one minibatch, and their parts for the log."""
    config = network.config
    space = network.action_space
    constant = jax.lax.stop_gradient(params)
    alpha = jnp.exp(constant["params"]["log_alpha"])
    logits, q_values = network.apply(params, sample.obs)
    next_logits, _ = network.apply(constant, sample.next_obs)
    _, target_q = network.apply(target_params, sample.next_obs)

    log_policy = nn.log_softmax(logits)
    policy = jnp.exp(log_policy)
    next_log_policy = nn.log_softmax(next_logits)

    # L_Q
    next_q = target_q.min(axis=0)
    next_value = space.sum_actions(jnp.exp(next_log_policy) * (next_q - alpha * next_log_policy))
    targets = sample.reward + sample.discount * jnp.where(sample.terminated, 0.0, next_value)
    action = sample.action[None, ..., None]
    q_value = space.sum_parts(jnp.take_along_axis(q_values, action, axis=-1)[..., 0])
    td_loss = 0.5 * ((q_value - targets) ** 2).sum(axis=0).mean()

    # L_pi
    actor_q = jax.lax.stop_gradient(q_values).min(axis=0)
    actor_loss = space.sum_actions(policy * (alpha * log_policy - actor_q)).mean()

    # L_alpha
    entropy = -space.sum_actions(jax.lax.stop_gradient(policy * log_policy)).mean()
    target_entropy = config.target_entropy_ratio * greatest_entropy(space, sample.obs).mean()
    alpha_loss = config.autotune * params["params"]["log_alpha"] * (entropy - target_entropy)

    return td_loss + actor_loss + alpha_loss, {
        "losses/td_loss": td_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
        "losses/alpha": alpha,
        "losses/entropy": entropy,
        "losses/q_values": q_value.mean(),
    }


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and their metrics."""
    config = state.config
    apply = make_network(config, env).apply
    step_envs = jax.vmap(env.raw.step, axis_name="envs")  # they share normalisation statistics
    num_random_updates = config.learning_starts // config.steps_per_update

    def env_step(state, _):
        key, action_key, random_key, step_key = jax.random.split(state.key, 4)
        logits, _ = apply(state.params, env.preprocess_obs(state.env_state, state.obs))
        action = jax.random.categorical(action_key, logits)
        random_keys = jax.random.split(random_key, config.num_envs)
        random_action = jax.vmap(random_valid)(random_keys, logits)
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
        key, sample_key = jax.random.split(state.key)
        steps = env.preprocess(state.env_state, replay.sample(state.buffer, sample_key))
        sample = joined(steps, config.gamma)
        gradient = jax.grad(sacd_loss, has_aux=True)
        gradients, parts = gradient(state.params, state.target_params, network, sample)
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
            logits, _ = network.apply(state.params, obs)
            draw = jax.random.categorical(key, logits)
            return carry, logits.argmax(axis=-1) if greedy else draw

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
