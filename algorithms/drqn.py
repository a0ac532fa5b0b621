"""Deep recurrent Q-learning (DRQN), as in R2D2, for discrete actions.

DQN (Mnih et al. 2015, doi 10.1038/nature14236) acts epsilon-greedily, keeps every transition
(s, a, r, s') in a replay buffer, and takes gradient steps on minibatches of

    L = mean[ 0.5 * (Q(s, a) - y)^2 ]
    y = r + gamma * (1 - terminated) * Q'(s', argmax_b Q(s', b))

Q' is the target network, a copy of Q that follows it slowly. In double Q-learning (van Hasselt et
al. 2016, arXiv 1509.06461) Q chooses the action and Q' gives its value, because the maximum of
noisy estimates is too high. Where an episode was truncated, s' is the observation that the time
limit cut off, not the first of the next episode. With `n_step` > 1, y has that many rewards before
the value.

Here s is the state of a memory that has read the episode so far (Hausknecht and Stone 2015,
arXiv 1507.06527). Minibatches are sequences of steps, with the carry that the memory had before
them. Q and Q' both read them from that carry. Older parameters made it, so the first `burn_in`
steps only bring it up to date.

`diff algorithms/dqn.py algorithms/drqn.py` shows what memory changes, and what R2D2 (Kapturowski
et al. 2019, openreview.net/forum?id=r1lyTjAqYX) adds that memory does not need: values on another
scale (`rescale`), and replay that prefers large errors (`prioritized`).

    python algorithms/drqn.py --env gymnax::CartPole-v1 --cell slstm
    python algorithms/drqn.py --env gymnax::CartPole-v1 --mask velocity --cell gru
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from envs import Discrete, Episodes, each_part, make, only_valid, play, random_valid
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
from fast import Conv, Dense, flatten_small
from memory_cells import CELLS, MaskedRNN, as_sequence, make_cell
from replay import SequenceReplay, Transition, blank_step, mean_of_steps, n_step_targets


# --- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Deep recurrent Q-learning (DRQN), as in R2D2, for discrete actions."""

    total_steps: int = 200_000  # environment steps of each seed
    log_every: int = 50  # updates between two reports

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    cell: Literal[tuple(CELLS)] = "gru"  # the memory
    cell_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. num_heads 8
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # memories on top of each other
    prev_action: bool = True  # the memory reads the previous action
    prev_reward: bool = True  # the memory reads the previous reward

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 16  # N, parallel environments
    num_steps: int = 8  # T, steps of every environment between two updates; sequences begin there
    gamma: float = 0.99  # discount per step
    buffer_size: int = 50_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 16  # sequences in a minibatch
    sequence_length: int = 32  # L, steps of a sequence that are learned from
    burn_in: int = 16  # steps before these that bring the memory up to date
    prioritized: bool = False  # prefer sequences with large errors (R2D2, section 2.3)
    priority_exponent: float = 0.9  # of the priority in the probability of a sequence; 0: uniform
    importance_exponent: float = 0.6  # of 1 / probability in the weight of its loss; 0: no weights
    n_step: int = 5  # rewards in a target before the value
    rescale: bool = False  # learn values on R2D2's scale sign(x) (sqrt(|x| + 1) - 1) + 0.001 x
    gradient_steps: int = 4  # minibatches of an update
    target_network_frequency: int = 1  # gradient steps between two steps of the target network
    tau: float = 0.01  # fraction of the way it moves to the online network; 1 copies that
    double_q: bool = True  # the online network chooses the action that the target network values
    start_e: float = 1.0  # probability of a random action at first
    end_e: float = 0.1  # probability of a random action in the end
    exploration_fraction: float = 0.2  # fraction of total_steps in which it falls, linearly
    max_grad_norm: float = 10.0  # gradients are clipped to this global norm

    def make_env(self):
        return make(self.env, **{"mask": self.mask, "joint_actions": True} | self.env_kwargs)

    def make_memory(self):
        cell = make_cell(self.cell, self.hidden_size, self.num_layers, **self.cell_kwargs)
        return MaskedRNN(cell)

    def __post_init__(self):
        check_config(self, Discrete)
        self.make_memory()


# --- Networks ------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


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


class QNetwork(nn.Module):
    """Inputs (T, N, ...) to the values of all actions (T - burn_in, N, num_actions)."""

    config: Config
    num_actions: int

    @nn.compact
    def __call__(self, carry, inputs, starts, burn_in=0):
        config = self.config
        # Nothing precedes an episode's first step: what the last episode ended with is hidden.
        action = nn.one_hot(inputs.action, self.num_actions) * config.prev_action
        reward = inputs.reward[..., None] * config.prev_reward
        previous = jnp.where(starts[..., None], 0.0, jnp.concatenate([action, reward], axis=-1))
        x = jnp.concatenate([encode(inputs.obs, num_axes=2), previous], axis=-1)
        x = nn.relu(dense(config.hidden_size)(x))
        carry, memory = config.make_memory()(carry, x, starts, burn_in=burn_in)
        # Skip connection: the memory need not store what x shows.
        x = x[burn_in:] + memory
        obs = jax.tree.map(lambda x: x[burn_in:], inputs.obs)
        return carry, only_valid(dense(self.num_actions, scale=1.0)(x), obs)

    def step(self, carry, inputs, start):
        """One step: Inputs (N, ...), start (N,) -> carry, values (N, num_actions)."""
        sequence = as_sequence((inputs, start))
        carry, q_values = self(carry, *sequence)
        return carry, q_values[0]

    @nn.nowrap
    def initialize_carry(self, num_envs):
        return self.config.make_memory().initialize_carry((num_envs, self.config.hidden_size))


def make_network(config: Config, env):
    return QNetwork(config, env.action_space.n)


def make_optimizer(config: Config):
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.scale_by_adam(eps=1e-5)  # `update` applies the learning rate
    return flatten_small(optax.chain(clip, adam))


# --- State ---------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """Everything needed to continue a run; `init` gives all arrays a leading seed axis."""

    params: Any
    target_params: Any
    opt_state: Any
    env_state: Any  # (N, ...)
    carry: Any  # (N, ...), the memory before it reads inputs
    inputs: Inputs  # (N, ...), what the next action is chosen from
    start: jax.Array  # (N,), inputs.obs is the first of an episode
    buffer: Any  # chunks of T steps, and where the next one goes; see replay.py
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


def make_replay(config: Config):
    return SequenceReplay.of(
        config,
        prioritized=config.prioritized,
        priority_exponent=config.priority_exponent,
        importance_exponent=config.importance_exponent,
    )


# --- Mathematics ---------------------------------------------------------------------------------
def epsilon(updates, config):
    """The probability of a random action after so many updates, linear in environment steps."""
    progress = config.progress(updates)
    fraction = config.exploration_fraction
    phase = jnp.where(progress < fraction, progress / (fraction or 1.0), 1.0)
    return config.start_e + (config.end_e - config.start_e) * phase


def epsilon_greedy(key, q_values, probability):
    """The best action (N,) of q_values (N, num_actions), or with some probability any valid one."""
    explore_key, action_key = jax.random.split(key)
    shape = q_values.shape[:-1]
    explore = jax.random.bernoulli(explore_key, probability, shape)
    random_action = random_valid(action_key, q_values)
    return jnp.where(explore, random_action, q_values.argmax(axis=-1))


def rescaled(x):
    """Values on R2D2's scale (section 2.3, epsilon = 0.001), which suits rewards of any size."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1.0) - 1.0) + 1e-3 * x


def unscaled(x):
    """The inverse of `rescaled`."""
    root = (jnp.sqrt(1.0 + 4e-3 * (jnp.abs(x) + 1.0 + 1e-3)) - 1.0) / 2e-3
    return jnp.sign(x) * (root**2 - 1.0)


def q_targets(batch, online_q, target_q, config):
    """y of the docstring for all rows but the last, (L, B), from values (L + 1, B, num_actions)."""
    best = (online_q if config.double_q else target_q)[1:].argmax(axis=-1)
    next_value = jnp.take_along_axis(target_q[1:], best[..., None], axis=-1)[..., 0]
    next_value = unscaled(next_value) if config.rescale else next_value
    targets = n_step_targets(batch, next_value, config.gamma, config.n_step)
    return rescaled(targets) if config.rescale else targets


def td_loss(params, target_params, network, config, sample):
    """L of the docstring over one minibatch, and its parts for the log."""
    sequence = (sample.carry, sample.batch.inputs, sample.batch.start, config.burn_in)
    _, q_values = network.apply(params, *sequence)
    _, target_q = network.apply(target_params, *sequence)
    batch = jax.tree.map(lambda x: x[config.burn_in :], sample.batch)
    both = jax.lax.stop_gradient((q_values, target_q))
    targets = q_targets(batch, *both, config)

    rows = jax.tree.map(lambda x: x[:-1], batch)  # the last row is only there to be reached
    q_value = jnp.take_along_axis(q_values[:-1], rows.action[..., None], axis=-1)[..., 0]
    is_step = ~rows.final
    error = jnp.where(is_step, q_value - targets, 0.0)
    loss = mean_of_steps(0.5 * sample.weight * error**2, is_step)
    return loss, {
        "losses/td_loss": loss,
        "losses/q_values": mean_of_steps(q_value, is_step),
        "error": jnp.abs(error),
    }


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and their metrics."""
    config = state.config
    apply = partial(make_network(config, env).apply, method="step")
    step_envs = jax.vmap(env.raw.step, axis_name="envs")  # they share normalisation statistics
    first_carry = state.carry

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        inputs = env.preprocess(state.env_state, state.inputs)
        carry, q_values = apply(state.params, state.carry, inputs, state.start)
        action = epsilon_greedy(action_key, q_values, epsilon(state.updates, config))
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
    metrics = {
        "charts/epsilon": epsilon(state.updates, config),
        **episode_metrics(info["episode_done"], info["episode_return"], info["episode_length"]),
    }
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
        gradient = jax.grad(td_loss, has_aux=True)
        gradients, parts = gradient(state.params, state.target_params, network, config, sample)
        gradients = mean_over_devices(gradients)
        buffer = replay.set_priorities(state.buffer, sample, parts.pop("error"))
        state = state.replace(buffer=buffer)
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(-learning_rate, changes))
        target_params = optax.periodic_update(
            optax.incremental_update(params, state.target_params, config.tau),
            state.target_params,
            optax.tree.get(opt_state, "count"),  # gradient steps so far, this one included
            config.target_network_frequency,
        )
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
        params = network.init(network_key, carry, inputs, start, method="step")
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


@partial(jax.jit, static_argnames=("env", "episodes", "play"))
def evaluate(state: State, env, episodes: int, play=play) -> Episodes:
    """Play `episodes` greedy episodes per seed, in environments of their own: (S, episodes)."""
    config = state.config
    network = make_network(config, env)

    def evaluate_seed(state):
        def policy(carry, obs, start, action, reward, _):
            inputs = Inputs(obs, action, reward)
            carry, q_values = network.apply(state.params, carry, inputs, start, method="step")
            return carry, q_values.argmax(axis=-1)

        key = jax.random.fold_in(state.key, 2**31 - 1)  # a stream that training does not use
        frozen = env.frozen(state.env_state)
        return play(frozen, policy, network.initialize_carry, key, config.num_eval_envs, episodes)

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
