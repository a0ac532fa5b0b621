"""Recurrent SACD: soft actor-critic with memories, for discrete actions.

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

Here s is the state of two memories that have read the episode so far, the actor's and the
critic's (Ni et al. 2022, arXiv 2110.05038). Minibatches are sequences of steps, with the carry that
the memories had before them; the first `burn_in` steps only bring this older carry up to date.

`diff algorithms/sacd.py algorithms/rsacd.py` shows what memory changes.

    python algorithms/rsacd.py --env gymnax::CartPole-v1 --cell slstm
    python algorithms/rsacd.py --env gymnax::CartPole-v1 --mask velocity --cell gru
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
    make_asymmetric,
    only_valid,
    play,
    random_valid,
    seen_by,
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
from memory_cells import CELLS, MaskedRNN, as_sequence, make_cell
from replay import SequenceReplay, Transition, blank_step, mean_of_steps, n_step_targets


# --- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Recurrent SACD: soft actor-critic with memories, for discrete actions."""

    total_steps: int = 150_000  # environment steps of each seed
    log_every: int = 50  # updates between two reports

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    cell: Literal[tuple(CELLS)] = "gru"  # the memory
    cell_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. num_heads 8
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # memories on top of each other
    shared_torso: bool = False  # the actor reads the critic's memory, which L_Q alone trains
    critic_obs: Literal["same", "full"] = "same"  # full: the critic sees what the actor does not
    prev_action: bool = True  # the memory reads the previous action
    prev_reward: bool = True  # the memory reads the previous reward

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 8  # N, parallel environments
    num_steps: int = 8  # T, steps of every environment between two updates; sequences begin there
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 32  # sequences in a minibatch
    sequence_length: int = 16  # L, steps of a sequence that are learned from
    burn_in: int = 8  # steps before these that bring the memories up to date
    n_step: int = 1  # rewards in a target before the value
    gradient_steps: int = 4  # minibatches of an update
    tau: float = 0.02  # fraction of the way the target network moves to the online one after each
    alpha: float = 0.2  # weight of the entropy; the initial one if it is tuned
    autotune: bool = True  # tune alpha so that the entropy approaches its target
    target_entropy_ratio: float = 0.7  # that target over the greatest entropy, log(num_actions)
    max_grad_norm: float = 1e9  # gradients are clipped to this global norm; by default never
    layer_norm: bool = False  # normalise hidden layers, before their activation
    eval_policy: Literal["greedy", "sample", "both"] = "both"  # most likely actions, draws, or both

    def make_env(self):
        make_it = make_asymmetric if self.critic_obs == "full" else make
        return make_it(self.env, **{"mask": self.mask} | self.env_kwargs)

    def make_memory(self):
        cell = make_cell(self.cell, self.hidden_size, self.num_layers, **self.cell_kwargs)
        return MaskedRNN(cell)

    def __post_init__(self):
        check_config(self, Discrete, MultiDiscrete)
        self.make_memory()


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


class Inputs(NamedTuple):
    """What the memory reads at time t, besides whether t starts an episode."""

    obs: jax.Array
    action: jax.Array  # a[t - 1]
    reward: jax.Array  # r[t - 1]


class Torso(nn.Module):
    """Inputs (T, N, ...) to the features (T - burn_in, N, hidden_size) of policy or values."""

    config: Config
    action_space: Discrete | MultiDiscrete
    reader: Literal["actor", "critic"]  # whose part of observations it reads

    @nn.compact
    def __call__(self, carry, inputs, starts, burn_in):
        config = self.config
        # Nothing precedes an episode's first step: what the last episode ended with is hidden.
        action = self.action_space.one_hot(inputs.action) * config.prev_action
        reward = inputs.reward[..., None] * config.prev_reward
        previous = jnp.where(starts[..., None], 0.0, jnp.concatenate([action, reward], axis=-1))
        obs = encode(seen_by(self.reader, inputs.obs), num_axes=2)
        x = jnp.concatenate([obs, previous], axis=-1)
        x = hidden(x, config)
        carry, memory = config.make_memory()(carry, x, starts, burn_in=burn_in)
        return carry, x[burn_in:] + memory  # skip connection: memory need not store what x shows


class Head(nn.Module):
    """Features (..., size) to outputs (..., num_outputs)."""

    config: Config
    num_outputs: int
    scale: float

    @nn.compact
    def __call__(self, x):
        x = hidden(x, self.config)
        return dense(self.num_outputs, self.scale)(x)


class ActorCritic(nn.Module):
    """Policy, two estimates of the values, and the logarithm of alpha."""

    config: Config
    action_space: Discrete | MultiDiscrete

    def setup(self):
        config = self.config
        self.actor_torso = Torso(config, self.action_space, "actor")
        self.critic_torso = Torso(config, self.action_space, "critic")
        self.actor_head = Head(config, self.action_space.num_outputs, scale=0.01)
        twins = nn.vmap(Head, {"params": 0}, {"params": True}, axis_size=2)
        self.critic_heads = twins(config, self.action_space.num_outputs, scale=1.0)
        self.log_alpha = self.param("log_alpha", nn.initializers.constant(np.log(config.alpha)), ())

    def read(self, carry, inputs, starts, burn_in=0):
        """Inputs (T, N, ...) -> carry, features of actor and critic (T - burn_in, N, size)."""
        critic_carry, features = self.critic_torso(carry[-1], inputs, starts, burn_in)
        if self.config.shared_torso:  # gradients of L_pi, too, would let its features outgrow Q's
            return (critic_carry,), jax.lax.stop_gradient(features), features
        actor_carry, actor_features = self.actor_torso(carry[0], inputs, starts, burn_in)
        return (actor_carry, critic_carry), actor_features, features

    def policy(self, features, obs):
        """Features (..., size) of observations (..., *obs_shape) -> logits (..., num_actions)."""
        return only_valid(self.action_space.logits(self.actor_head(features)), obs)

    def values(self, features):
        """Features (..., size) -> Q_1 and Q_2 of all actions (2, ..., num_actions)."""
        copies = jnp.broadcast_to(features, (2, *features.shape))  # faster than sharing
        return self.action_space.values(self.critic_heads(copies))

    def __call__(self, carry, inputs, start):
        """One step: Inputs (N, ...), start (N,) -> carry, logits (N, A), values (2, N, A)."""
        sequence = as_sequence((inputs, start))
        carry, features, critic_features = self.read(carry, *sequence)
        return carry, self.policy(features[0], inputs.obs), self.values(critic_features[0])

    def act(self, carry, inputs, start):
        """One step of the actor: Inputs (N, ...), start (N,) -> carry, logits (N, A)."""
        torso = self.critic_torso if self.config.shared_torso else self.actor_torso
        sequence = as_sequence((inputs, start))
        carry, features = torso(carry[0], *sequence, burn_in=0)
        return (carry,), self.policy(features[0], inputs.obs)

    @nn.nowrap
    def initialize_carry(self, num_envs, num_torsos=2):
        carry = self.config.make_memory().initialize_carry((num_envs, self.config.hidden_size))
        return (carry,) * (1 if self.config.shared_torso else num_torsos)


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
    carry: Any  # (N, ...), the memories before they read inputs
    inputs: Inputs  # (N, ...), what the next action is chosen from
    start: jax.Array  # (N,), inputs.obs is the first of an episode
    buffer: Any  # chunks of T steps, and where the next one goes; see replay.py
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


def make_replay(config: Config):
    return SequenceReplay.of(config)


# --- Mathematics ---------------------------------------------------------------------------------
def sacd_loss(params, target_params, network, sample):
    """L_Q + L_pi + L_alpha of the docstring over one minibatch, and their parts for the log."""
    config = network.config
    space = network.action_space
    constant = jax.lax.stop_gradient(params)
    alpha = jnp.exp(constant["params"]["log_alpha"])
    sequence = (sample.carry, sample.batch.inputs, sample.batch.start, config.burn_in)
    _, actor_features, features = network.apply(params, *sequence, method="read")
    *_, target_features = network.apply(target_params, *sequence, method="read")
    batch = jax.tree.map(lambda x: x[config.burn_in :], sample.batch)
    rows = jax.tree.map(lambda x: x[:-1], batch)  # the last row is only there to be reached
    is_step = ~rows.final

    logits = network.apply(params, actor_features, batch.inputs.obs, method="policy")
    log_policy = nn.log_softmax(logits)
    policy = jnp.exp(log_policy)
    q_values = network.apply(params, features, method="values")

    # L_Q
    next_q = network.apply(target_params, target_features, method="values").min(axis=0)
    next_value = space.sum_actions(jax.lax.stop_gradient(policy * (next_q - alpha * log_policy)))
    targets = n_step_targets(batch, next_value[1:], config.gamma, config.n_step)
    action = batch.action[None, ..., None]
    q_value = space.sum_parts(jnp.take_along_axis(q_values, action, axis=-1)[:, :-1, ..., 0])
    td_loss = mean_of_steps(0.5 * ((q_value - targets) ** 2).sum(axis=0), is_step)

    # L_pi
    actor_q = jax.lax.stop_gradient(q_values).min(axis=0)
    actor_loss = space.sum_actions(policy * (alpha * log_policy - actor_q))
    actor_loss = mean_of_steps(actor_loss[:-1], is_step)

    # L_alpha
    entropy = -space.sum_actions(jax.lax.stop_gradient(policy * log_policy))[:-1]
    target_entropy = config.target_entropy_ratio * greatest_entropy(space, rows.inputs.obs)
    excess = mean_of_steps(entropy - target_entropy, is_step)
    alpha_loss = config.autotune * params["params"]["log_alpha"] * excess

    return td_loss + actor_loss + alpha_loss, {
        "losses/td_loss": td_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
        "losses/alpha": alpha,
        "losses/entropy": mean_of_steps(entropy, is_step),
        "losses/q_values": mean_of_steps(q_value.mean(axis=0), is_step),
    }


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and their metrics."""
    config = state.config
    apply = make_network(config, env).apply
    step_envs = jax.vmap(env.raw.step, axis_name="envs")  # they share normalisation statistics
    first_carry = state.carry
    num_random_updates = config.learning_starts // config.steps_per_update

    def env_step(state, _):
        key, action_key, random_key, step_key = jax.random.split(state.key, 4)
        inputs = env.preprocess(state.env_state, state.inputs)
        carry, logits, _ = apply(state.params, state.carry, inputs, state.start)
        action = jax.random.categorical(action_key, logits)
        random_keys = jax.random.split(random_key, config.num_envs)
        random_action = jax.vmap(random_valid)(random_keys, logits)
        action = jnp.where(state.updates < num_random_updates, random_action, action)
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        done = info["episode_done"]
        transition = Transition(
            inputs=state.inputs,
            start=state.start,
            action=action,
            reward=reward,
            next_obs=info["final_obs"],
            terminated=terminated,
            done=done,
        )
        inputs = Inputs(obs, action, reward)
        state = state.replace(env_state=env_state, carry=carry, inputs=inputs, start=done, key=key)
        return state, (transition, info)

    state, (batch, info) = jax.lax.scan(env_step, state, length=config.num_steps)
    metrics = episode_metrics(info["episode_done"], info["episode_return"], info["episode_length"])
    buffer = make_replay(config).add(state.buffer, first_carry, batch)
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
        sample = env.preprocess(state.env_state, replay.sample(state.buffer, sample_key))
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
        inputs = Inputs(obs, no_action, jnp.zeros(config.num_envs))
        start = jnp.ones(config.num_envs, bool)
        carry = network.initialize_carry(config.num_envs)
        params = network.init(network_key, carry, inputs, start)
        return State(
            params=params,
            target_params=params,
            opt_state=optimizer.init(params),
            env_state=env_state,
            carry=carry,
            inputs=inputs,
            start=start,
            buffer=make_replay(config).init(carry, blank_step(inputs, start)),
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
            inputs = Inputs(obs, action, reward)
            carry, logits = network.apply(state.params, carry, inputs, start, method="act")
            draw = jax.random.categorical(key, logits)
            return carry, logits.argmax(axis=-1) if greedy else draw

        key = jax.random.fold_in(state.key, 2**31 - 1)  # a stream that training does not use
        frozen = env.frozen(state.env_state)
        initialize = partial(network.initialize_carry, num_torsos=1)  # the actor's
        return play(frozen, policy, initialize, key, config.num_eval_envs, episodes)

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
