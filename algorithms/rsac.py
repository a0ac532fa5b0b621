"""Recurrent SAC: soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905) with memories; continuous actions.

Act by a stochastic policy, keep every transition (s, a, r, s') in a replay buffer, and take gradient steps on
minibatches of L_Q + L_pi + L_alpha, each of which trains its own parameters only:

    L_Q     = mean[ 0.5 * sum_i (Q_i(s, a) - y)^2 ]    y = r + gamma * (1 - terminated) * V'(s')
    L_pi    = mean[ alpha * log pi(b|s) - min_i Q_i(s, b) ]    V'(s') = min_i Q'_i(s', b') - alpha * log pi(b'|s')
    L_alpha = mean[ -log(alpha) * (log pi(b|s) + target entropy) ]    b ~ pi(.|s), b' ~ pi(.|s')

Q' is the target network, a copy of Q that follows it slowly; the smaller of two estimates makes up for the maximum of a
noisy one being too high (Fujimoto et al. 2018, arXiv 1802.09477). An episode that was truncated is not over: s' is then
the observation that the time limit cut off, not the first of the next episode.
Here s is the state of two memories that have read the steps taken so far: the actor's, and the critic's, whose heads
read a or b beside it (Ni et al. 2022, arXiv 2110.05038). Minibatches are sequences, with the carry before them; their
first `burn_in` steps bring it up to date (R2D2). `diff algorithms/sac.py algorithms/rsac.py` shows what memory changes.

    python algorithms/rsac.py --env gymnax::Pendulum-v1 --cell slstm
    python algorithms/rsac.py --env gymnax::Pendulum-v1 --mask velocity --cell gru
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

from envs import Box, Episodes, make, play
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
from memory_cells import CELLS, MaskedRNN, make_cell
from replay import SequenceReplay, Transition


# --- Config ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Recurrent SAC: soft actor-critic with memory, for continuous actions."""

    total_steps: int = 60_000  # environment steps of each seed
    log_every: int = 50  # updates between two reports

    # Environment and networks
    env: str = "gymnax::Pendulum-v1"  # environment, as namespace::id
    env_kwargs: Options = field(
        default_factory=dict, hash=False
    )  # its parameters, and wrappers: frame_stack 4
    mask: tuple[
        str, ...
    ] = ()  # entries of the observation to hide: indices, or a name such as velocity
    cell: Literal[tuple(CELLS)] = "gru"  # the memory
    cell_kwargs: Options = field(
        default_factory=dict, hash=False
    )  # options of the memory: num_heads 8
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # memories on top of each other
    shared_torso: bool = False  # the actor reads the memory of the critic, which trains it, instead of one of its own
    prev_action: bool = True  # the memory reads the previous action
    prev_reward: bool = True  # the memory reads the previous reward

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at total_steps
    num_envs: int = 4  # N, parallel environments
    num_steps: int = 8  # T, steps of every environment between two updates; replayed sequences begin at every T-th
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 32  # sequences in a minibatch
    sequence_length: int = 16  # L, steps of a sequence that are learned from
    burn_in: int = 8  # steps before these that bring the memory up to date
    gradient_steps: int = 8  # minibatches of an update
    tau: float = 0.02  # how far the target network is taken to the online network after each
    alpha: float = 0.2  # weight of the entropy, to begin with if it is tuned
    autotune: bool = True  # tune alpha so that the entropy comes to target_entropy
    target_entropy: float = (
        -1.0
    )  # nats for each dimension of the action, as if its bounds were -1 and 1

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps

    def make_env(self):
        return make(self.env, **{"mask": self.mask} | self.env_kwargs)

    def make_memory(self):
        return MaskedRNN(
            make_cell(self.cell, self.hidden_size, self.num_layers, **self.cell_kwargs)
        )

    def __post_init__(self):
        check_sizes(self)
        self.make_memory()
        if (
            not isinstance(space := self.make_env().action_space, Box)
            or not np.isfinite([space.low, space.high]).all()
        ):
            raise ValueError(
                f"this script needs continuous actions with bounds, those of {self.env} are not"
            )


# --- Networks --------------------------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


class Inputs(NamedTuple):
    """What the memory reads at time t, besides whether t starts an episode."""

    obs: jax.Array
    action: jax.Array  # a[t - 1]
    reward: jax.Array  # r[t - 1]


class Torso(nn.Module):
    """Inputs (T, N, ...) to the features (T - burn_in, N, hidden_size) that policy or values are read from."""

    config: Config

    @nn.compact
    def __call__(self, carry, inputs, starts, burn_in):
        config, obs, obs_ndim = (
            self.config,
            inputs.obs,
            len(self.config.make_env().observation_space.shape),
        )
        x = obs / 255.0 if obs.dtype == jnp.uint8 else obs
        if (
            obs_ndim == 3
        ):  # images: the convolutions of DQN (Mnih et al. 2015), or a single one if they are small
            layers = (
                ((32, 8, 4), (64, 4, 2), (64, 3, 1))
                if min(obs.shape[-3:-1]) >= 36
                else ((16, 3, 1),)
            )
            for features, size, stride in layers:
                conv = Conv(features, (size, size), (stride, stride), "VALID")
                x = nn.relu(conv(x))
        x = x.reshape(*obs.shape[: obs.ndim - obs_ndim], -1)
        # Before an episode's first step there was no action and no reward, whatever the last episode ended with.
        action, reward = (
            inputs.action * config.prev_action,
            inputs.reward[..., None] * config.prev_reward,
        )
        previous = jnp.where(starts[..., None], 0.0, jnp.concatenate([action, reward], axis=-1))
        x = nn.relu(dense(config.hidden_size)(jnp.concatenate([x, previous], axis=-1)))
        carry, memory = config.make_memory()(carry, x, starts, burn_in=burn_in)
        return carry, x[burn_in:] + memory  # what is in sight need not be remembered


class Head(nn.Module):
    """Features (..., size) to outputs (..., num_outputs)."""

    config: Config
    num_outputs: int
    scale: float

    @nn.compact
    def __call__(self, x):
        x = nn.relu(dense(self.config.hidden_size)(x))
        return dense(self.num_outputs, self.scale)(x)


class ActorCritic(nn.Module):
    """Policy, two estimates of the values, and the logarithm of alpha."""

    config: Config

    def setup(self):
        self.actor_torso, self.critic_torso = Torso(self.config), Torso(self.config)
        self.actor_head = Head(
            self.config, 2 * self.config.make_env().action_space.shape[0], scale=0.01
        )
        self.critic_heads = nn.vmap(Head, {"params": 0}, {"params": True}, axis_size=2)(
            self.config, 1, scale=1.0
        )
        self.log_alpha = self.param(
            "log_alpha", nn.initializers.constant(np.log(self.config.alpha)), ()
        )

    def read(self, carry, inputs, starts, burn_in=0):
        """carry, Inputs (T, N, ...), starts (T, N) -> carry, what actor and critic see, (T - burn_in, N, size) each."""
        critic_carry, features = self.critic_torso(carry[-1], inputs, starts, burn_in)
        if (
            self.config.shared_torso
        ):  # the critic's; with gradients of both, the actor's would outgrow it
            return (critic_carry,), jax.lax.stop_gradient(features), features
        actor_carry, actor_features = self.actor_torso(carry[0], inputs, starts, burn_in)
        return (actor_carry, critic_carry), actor_features, features

    def policy(self, features):
        """features (..., size) -> mean and log standard deviation (..., num_actions), see `squashed_normal`."""
        mean, log_std = jnp.split(self.actor_head(features), 2, axis=-1)
        return mean, -5.0 + 3.5 * (1.0 + jnp.tanh(log_std))  # between -5 and 2

    def values(self, features, action):
        """features (..., size), action (..., num_actions) -> Q_1 and Q_2 (2, ...)."""
        x = jnp.concatenate([features, action], axis=-1)
        return self.critic_heads(jnp.broadcast_to(x, (2, *x.shape)))[
            ..., 0
        ]  # copies are faster than sharing

    def __call__(self, carry, inputs, start):
        """A sequence of length 1: carry, Inputs (N, ...), start (N,) -> carry, policy, and the values of its mean."""
        carry, features, critic_features = self.read(
            carry, jax.tree.map(lambda x: x[None], inputs), start[None]
        )
        policy = self.policy(features[0])
        return carry, policy, self.values(critic_features[0], policy[0])

    @nn.nowrap
    def initialize_carry(self, num_envs):
        memory = self.config.make_memory().initialize_carry((num_envs, self.config.hidden_size))
        return (memory,) if self.config.shared_torso else (memory, memory)


def make_optimizer(config: Config):
    learning_rate = config.learning_rate
    if config.anneal_lr:
        learning_rate = optax.linear_schedule(
            config.learning_rate, 0.0, config.num_updates * config.gradient_steps
        )
    return flatten_small(optax.adam(learning_rate, eps=1e-5))


# --- State -----------------------------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """All that a run needs to go on. `init` gives arrays a leading seed axis; `rollout` and `update` see one seed."""

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
    length = config.burn_in + config.sequence_length
    return SequenceReplay(
        config.num_envs, config.num_steps, config.buffer_size, config.batch_size, length
    )


# --- Mathematics -----------------------------------------------------------------------------------------------------
def squashed_normal(noise, policy, space):
    """The action (..., num_actions) that a policy makes of standard normal noise, and its log-probability (...)."""
    (mean, log_std), scale = policy, 0.5 * (space.high - space.low) * np.ones(space.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    # log |d action / d u|, with log(1 - tanh(u)^2) in a form that is finite where tanh(u) is rounded to 1
    log_slope = np.log(scale) + 2.0 * (np.log(2.0) - u - nn.softplus(-2.0 * u))
    return space.low + scale * (1.0 + jnp.tanh(u)), (log_normal - log_slope).sum(axis=-1)


def sac_loss(params, target_params, network, sample, key):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    config, space, constant = (
        network.config,
        network.config.make_env().action_space,
        jax.lax.stop_gradient(params),
    )
    alpha = jnp.exp(constant["params"]["log_alpha"])
    carry, batch, *_ = sample
    sequence = carry, batch.inputs, batch.start, config.burn_in
    _, actor_features, features = network.apply(params, *sequence, method="read")
    *_, target_features = network.apply(target_params, *sequence, method="read")
    batch = jax.tree.map(lambda x: x[config.burn_in :], batch)
    noise, is_step = jax.random.normal(key, batch.action.shape), ~batch.final[:-1]
    action, log_prob = squashed_normal(
        noise, network.apply(params, actor_features, method="policy"), space
    )

    next_q = network.apply(target_params, target_features, action, method="values").min(axis=0)
    next_value = jax.lax.stop_gradient(next_q - alpha * log_prob)[
        1:
    ]  # b of a row is b' of the one before
    targets = batch.reward[:-1] + config.gamma * jnp.where(batch.terminated[:-1], 0.0, next_value)
    q_values = network.apply(params, features[:-1], batch.action[:-1], method="values")
    td_loss = 0.5 * ((q_values - targets) ** 2).sum(axis=0).mean(where=is_step)

    actor_q = network.apply(constant, jax.lax.stop_gradient(features), action, method="values").min(
        axis=0
    )
    actor_loss = (alpha * log_prob - actor_q)[:-1].mean(where=is_step)
    entropy = -jax.lax.stop_gradient(log_prob)[:-1].mean(where=is_step)
    target_entropy = np.sum(
        config.target_entropy + np.log(0.5 * (space.high - space.low)) * np.ones(space.shape)
    )
    alpha_loss = config.autotune * params["params"]["log_alpha"] * (entropy - target_entropy)

    parts = {
        "losses/td_loss": td_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
    }
    parts |= {
        "losses/alpha": alpha,
        "losses/entropy": entropy,
        "losses/q_values": q_values.mean(where=is_step),
    }
    return td_loss + actor_loss + alpha_loss, parts


# --- One update of one seed ------------------------------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and what episodes ended in them."""
    config, network, first_carry = state.config, ActorCritic(state.config), state.carry
    step_envs = jax.vmap(
        env.step, axis_name="envs"
    )  # the name lets them share what they normalise with

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        carry, policy, _ = network.apply(state.params, state.carry, state.inputs, state.start)
        action = squashed_normal(
            jax.random.normal(action_key, policy[0].shape), policy, env.action_space
        )[0]
        random_action = jax.vmap(env.action_space.sample)(
            jax.random.split(action_key, config.num_envs)
        )
        action = jnp.where(
            state.updates < config.learning_starts // config.steps_per_update, random_action, action
        )
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        inputs, start = Inputs(obs, action, reward), info["episode_done"]
        transition = Transition(
            state.inputs, state.start, action, reward, info["final_obs"], terminated, done=start
        )
        state = state.replace(env_state=env_state, carry=carry, inputs=inputs, start=start, key=key)
        return state, (transition, info)

    state, (batch, info) = jax.lax.scan(env_step, state, length=config.num_steps)
    metrics = {
        "charts/episodic_return": info["episode_return"].sum(where=info["episode_done"]),
        "charts/episodic_length": info["episode_length"].sum(where=info["episode_done"]),
        "charts/episodes": info["episode_done"].sum(),
    }
    buffer = make_replay(config).add(state.buffer, first_carry, batch)
    return state.replace(buffer=buffer, updates=state.updates + 1), metrics


def update(state, env):
    """Collect steps and learn from what was collected so far: the new state, and the metrics of this update."""
    config, network, optimizer = (
        state.config,
        ActorCritic(state.config),
        make_optimizer(state.config),
    )
    learning_rate = config.learning_rate * (
        1.0 - config.anneal_lr * state.updates / config.num_updates
    )
    state, metrics = rollout(state, env)

    def gradient_step(state, _):
        key, sample_key, loss_key = jax.random.split(state.key, 3)
        batch = make_replay(config).sample(state.buffer, sample_key)
        gradients, parts = jax.grad(sac_loss, has_aux=True)(
            state.params, state.target_params, network, batch, loss_key
        )
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        target_params = optax.incremental_update(params, state.target_params, config.tau)
        return state.replace(
            params=params, target_params=target_params, opt_state=opt_state, key=key
        ), parts

    state, parts = jax.lax.scan(gradient_step, state, length=config.gradient_steps)
    return state, metrics | jax.tree.map(jnp.mean, parts) | {"charts/learning_rate": learning_rate}


# --- Init, warmup, train, evaluate -----------------------------------------------------------------------------------
def init(config: Config, key) -> State:
    """A fresh state, from one typed key or from an array of them: one per seed."""
    env, network, optimizer = config.make_env(), ActorCritic(config), make_optimizer(config)

    def init_seed(key):
        key, network_key, reset_key = jax.random.split(key, 3)
        obs, env_state = jax.vmap(env.reset, axis_name="envs")(
            jax.random.split(reset_key, config.num_envs)
        )
        inputs = Inputs(
            obs, jnp.zeros((config.num_envs, *env.action_space.shape)), jnp.zeros(config.num_envs)
        )
        carry, start = network.initialize_carry(config.num_envs), jnp.ones(config.num_envs, bool)
        params = network.init(network_key, carry, inputs, start)
        transition = Transition(inputs, start, inputs.action, inputs.reward, obs, start, start)
        buffer, opt_state = make_replay(config).init(carry, transition), optimizer.init(params)
        return State(
            params,
            params,
            opt_state,
            env_state,
            carry,
            inputs,
            start,
            buffer,
            key,
            jnp.int32(0),
            config,
        )

    return jax.jit(vmap_seeds(init_seed))(key.reshape(-1))


@partial(jax.jit, static_argnames="env", donate_argnames="state")
def fill_buffer(state, env):
    """The steps before learning starts."""
    num_rollouts = state.config.learning_starts // state.config.steps_per_update
    return jax.vmap(
        lambda state: jax.lax.fori_loop(0, num_rollouts, lambda _, s: rollout(s, env)[0], state)
    )(state)


def warmup(state: State, env, logger) -> State:
    """Fill the buffer with `learning_starts` steps, unless that was done, and compile the update."""
    state = fill_buffer(state, env) if state.updates[0] == 0 else state
    state, report = compile_updates(update, state, env)
    logger.log(report, environment_steps(state))
    return state


def train(state: State, env, logger, num_steps: int) -> tuple[State, dict]:
    """Train for `num_steps` steps per seed in whole updates, at least one. The state passed in is used up (donated)."""
    for num_updates in report_chunks(state.config, num_steps):
        state, report = run_updates(
            update, state, env, num_updates
        )  # compiled; all seeds side by side
        logger.log(report, environment_steps(state))
    return state, report


@partial(jax.jit, static_argnames=("env", "episodes", "play"))
def evaluate(state: State, env, episodes: int, play=play) -> Episodes:
    """Play `episodes` greedy episodes per seed, in environments of their own; returns and lengths are (S, episodes)."""
    config, network = state.config, ActorCritic(state.config)

    def evaluate_seed(state):
        def policy(carry, obs, start, action, reward, _):
            carry, policy, _ = network.apply(
                state.params, carry, Inputs(obs, action, reward), start
            )
            return carry, squashed_normal(0.0, policy, env.action_space)[0]

        key = jax.random.fold_in(state.key, 2**31 - 1)  # far from the numbers that split folds in
        return play(
            env.frozen(state.env_state),
            policy,
            network.initialize_carry,
            key,
            config.num_eval_envs,
            episodes,
        )

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
