"""Deep recurrent Q-learning (DRQN, Hausknecht and Stone 2015, arXiv 1507.06527) as in R2D2; discrete actions.

Act epsilon-greedily, keep every transition (s, a, r, s') in a replay buffer, and take gradient steps on minibatches of

    L = mean[ 0.5 * (Q(s, a) - y)^2 ]     y = r + gamma * (1 - terminated) * Q'(s', argmax_a' Q(s', a'))

Q' is the target network, a copy of Q that follows it slowly; that Q chooses the action which Q' values is double
Q-learning (van Hasselt et al. 2016, arXiv 1509.06461): the maximum of a noisy estimate is too high. Here s is the state
of a memory that has read the episode so far. As in R2D2 (Kapturowski et al. 2019, openreview.net/forum?id=r1lyTjAqYX),
minibatches are sequences of steps with the carry that the memory had before them; Q and Q' both read them from there,
the first `burn_in` steps only to bring that carry, which older parameters made, up to date; and y has the rewards of
`n_step` steps before the value, whatever was explored in these.
`diff algorithms/dqn.py algorithms/drqn.py` shows what memory changes.

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
from memory_cells import CELLS, MaskedRNN, make_cell
from replay import SequenceReplay, Transition


# --- Config ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Deep Q-learning with memory (DRQN, R2D2) for discrete actions."""

    total_steps: int = 200_000  # environment steps of each seed
    log_every: int = 50  # updates between two reports

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id
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
    prev_action: bool = True  # the memory reads the previous action
    prev_reward: bool = True  # the memory reads the previous reward

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at total_steps
    num_envs: int = 16  # N, parallel environments
    num_steps: int = 8  # T, steps of every environment between two updates; replayed sequences begin at every T-th
    gamma: float = 0.99  # discount per step
    buffer_size: int = 50_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 16  # sequences in a minibatch
    sequence_length: int = 32  # L, steps of a sequence that are learned from
    burn_in: int = 16  # steps before these that bring the memory up to date
    prioritized: bool = (
        False  # prefer sequences with large errors (Schaul et al. 2016, R2D2 section 2.3)
    )
    n_step: int = 5  # rewards in a target before the value
    rescale: bool = False  # learn values on R2D2's scale sign(x) (sqrt(|x| + 1) - 1) + 0.001 x
    gradient_steps: int = 4  # minibatches of an update
    target_network_frequency: int = 1  # gradient steps between two steps of the target network
    tau: float = 0.01  # how far one takes it to the online network; 1: all the way
    double_q: bool = True  # the online network chooses the action that the target network values
    start_e: float = 1.0  # probability of a random action at first
    end_e: float = 0.1  # and in the end
    exploration_fraction: float = 0.2  # it falls linearly for this part of total_steps
    max_grad_norm: float = 10.0  # gradients are clipped to this global norm

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
        if not isinstance(self.make_env().action_space, Discrete):
            raise ValueError(
                f"this script needs discrete actions, those of {self.env} are continuous"
            )


# --- Networks --------------------------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


class Inputs(NamedTuple):
    """What the memory reads at time t, besides whether t starts an episode."""

    obs: jax.Array
    action: jax.Array  # a[t - 1]
    reward: jax.Array  # r[t - 1]


class QNetwork(nn.Module):
    """Inputs (T, N, ...) to the values of all actions (T - burn_in, N, num_actions)."""

    config: Config

    @nn.compact
    def __call__(self, carry, inputs, starts, burn_in=0):
        config, env, obs = self.config, self.config.make_env(), inputs.obs
        obs_ndim = len(env.observation_space.shape)
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
        action = nn.one_hot(inputs.action, env.action_space.n) * config.prev_action
        reward = inputs.reward[..., None] * config.prev_reward
        previous = jnp.where(starts[..., None], 0.0, jnp.concatenate([action, reward], axis=-1))
        x = jnp.concatenate([x, previous], axis=-1)
        x = nn.relu(dense(config.hidden_size)(x))
        carry, memory = config.make_memory()(carry, x, starts, burn_in=burn_in)
        x = x[burn_in:] + memory  # what is in sight need not be remembered
        return carry, dense(env.action_space.n, scale=1.0)(x)

    def step(self, carry, inputs, start):
        """A sequence of length 1: carry, Inputs (N, ...), start (N,) -> carry, values (N, num_actions)."""
        carry, q_values = self(carry, jax.tree.map(lambda x: x[None], inputs), start[None])
        return carry, q_values[0]

    @nn.nowrap
    def initialize_carry(self, num_envs):
        return self.config.make_memory().initialize_carry((num_envs, self.config.hidden_size))


def make_optimizer(config: Config):
    learning_rate = config.learning_rate
    if config.anneal_lr:
        learning_rate = optax.linear_schedule(
            config.learning_rate, 0.0, config.num_updates * config.gradient_steps
        )
    adam = optax.adam(learning_rate, eps=1e-5)
    return flatten_small(optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam))


# --- State -----------------------------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """All that a run needs to go on. `init` gives arrays a leading seed axis; `rollout` and `update` see one seed."""

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
    length = config.burn_in + config.sequence_length
    sizes = config.num_envs, config.num_steps, config.buffer_size, config.batch_size, length
    return SequenceReplay(*sizes, config.prioritized)


# --- Mathematics -----------------------------------------------------------------------------------------------------
def epsilon(updates, config):
    """The probability of a random action after so many updates: from start_e to end_e, linear in environment steps."""
    progress = (
        updates * config.steps_per_update / max(1, config.exploration_fraction * config.total_steps)
    )
    return config.start_e + (config.end_e - config.start_e) * jnp.minimum(progress, 1.0)


def epsilon_greedy(key, q_values, epsilon):
    """The best action (N,) of q_values (N, num_actions), or with probability epsilon any."""
    uniform, num_actions = jax.random.uniform(key, q_values.shape[:-1]), q_values.shape[-1]
    # Where it is less than epsilon, it is uniform below epsilon: one number says whether to explore, and how.
    random_action = jnp.minimum(uniform / epsilon * num_actions, num_actions - 1).astype(int)
    return jnp.where(uniform < epsilon, random_action, q_values.argmax(axis=-1))


def rescaled(x):
    """Values on R2D2's scale (section 2.3, with epsilon = 0.001): rewards of any size, without clipping them."""
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1.0) - 1.0) + 1e-3 * x


def unscaled(x):
    """The inverse of `rescaled`."""
    root = (jnp.sqrt(1.0 + 4e-3 * (jnp.abs(x) + 1.0 + 1e-3)) - 1.0) / 2e-3
    return jnp.sign(x) * (root**2 - 1.0)


def q_targets(batch, online_q, target_q, config):
    """y of the docstring for all but the last row, (L, B), from the values (L + 1, B, num_actions) of both networks.

    With n_step > 1, y = r[t] + ... + gamma^(n - 1) r[t + n - 1] + gamma^n Q'(s[t + n], .), with fewer rewards where the
    episode or the sequence ends before.
    """
    best = (online_q if config.double_q else target_q)[1:].argmax(axis=-1)
    next_value = jnp.take_along_axis(target_q[1:], best[..., None], axis=-1)[..., 0]
    next_value = unscaled(next_value) if config.rescale else next_value
    now, next_is_final = jax.tree.map(lambda x: x[:-1], batch), batch.final[1:].at[-1].set(True)
    following = next_value
    for _ in range(config.n_step):
        targets = now.reward + config.gamma * jnp.where(now.terminated, 0.0, following)
        following = jnp.where(next_is_final, next_value, jnp.roll(targets, -1, axis=0))
    return rescaled(targets) if config.rescale else targets


def td_loss(params, target_params, network, config, sample):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    carry, batch, weight, _ = sample
    _, q_values = network.apply(params, carry, batch.inputs, batch.start, config.burn_in)
    _, target_q = network.apply(target_params, carry, batch.inputs, batch.start, config.burn_in)
    batch = jax.tree.map(lambda x: x[config.burn_in :], batch)
    targets = q_targets(batch, *jax.lax.stop_gradient((q_values, target_q)), config)
    q_value = jnp.take_along_axis(q_values[:-1], batch.action[:-1, :, None], axis=-1)[..., 0]
    is_step = ~batch.final[:-1]
    error = jnp.where(is_step, q_value - targets, 0.0)
    loss = 0.5 * (weight * error**2).sum() / is_step.sum()
    return loss, {
        "losses/td_loss": loss,
        "losses/q_values": q_value.mean(where=is_step),
        "error": jnp.abs(error),
    }


# --- One update of one seed ------------------------------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and what episodes ended in them."""
    config, network, first_carry = state.config, QNetwork(state.config), state.carry
    step_envs = jax.vmap(
        env.step, axis_name="envs"
    )  # the name lets them share what they normalise with

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        carry, q_values = network.apply(
            state.params, state.carry, state.inputs, state.start, method="step"
        )
        action = epsilon_greedy(action_key, q_values, epsilon(state.updates, config))
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
        "charts/epsilon": epsilon(state.updates, config),
        "charts/episodic_return": info["episode_return"].sum(where=info["episode_done"]),
        "charts/episodic_length": info["episode_length"].sum(where=info["episode_done"]),
        "charts/episodes": info["episode_done"].sum(),
    }
    buffer = make_replay(config).add(state.buffer, first_carry, batch)
    return state.replace(buffer=buffer, updates=state.updates + 1), metrics


def update(state, env):
    """Collect steps and learn from what was collected so far: the new state, and the metrics of this update."""
    config, network, optimizer = state.config, QNetwork(state.config), make_optimizer(state.config)
    replay, first_step = make_replay(config), state.updates * config.gradient_steps
    learning_rate = config.learning_rate * (
        1.0 - config.anneal_lr * state.updates / config.num_updates
    )
    state, metrics = rollout(state, env)

    def gradient_step(state, step):
        key, sample_key = jax.random.split(state.key)
        sample = replay.sample(state.buffer, sample_key)
        gradients, parts = jax.grad(td_loss, has_aux=True)(
            state.params, state.target_params, network, config, sample
        )
        state = state.replace(
            buffer=replay.set_priorities(state.buffer, sample.indices, parts.pop("error"))
        )
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        closer = optax.incremental_update(params, state.target_params, config.tau)
        target_params = optax.periodic_update(
            closer, state.target_params, step, config.target_network_frequency
        )
        state = state.replace(
            params=params, target_params=target_params, opt_state=opt_state, key=key
        )
        return state, parts

    steps = first_step + 1 + jnp.arange(config.gradient_steps)
    state, parts = jax.lax.scan(gradient_step, state, steps)
    return state, metrics | jax.tree.map(jnp.mean, parts) | {"charts/learning_rate": learning_rate}


# --- Init, warmup, train, evaluate -----------------------------------------------------------------------------------
def init(config: Config, key) -> State:
    """A fresh state, from one typed key or from an array of them: one per seed."""
    env, network, optimizer = config.make_env(), QNetwork(config), make_optimizer(config)

    def init_seed(key):
        key, network_key, reset_key = jax.random.split(key, 3)
        obs, env_state = jax.vmap(env.reset, axis_name="envs")(
            jax.random.split(reset_key, config.num_envs)
        )
        inputs = Inputs(obs, jnp.zeros(config.num_envs, jnp.int32), jnp.zeros(config.num_envs))
        carry, start = network.initialize_carry(config.num_envs), jnp.ones(config.num_envs, bool)
        params = network.init(network_key, carry, inputs, start, method="step")
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
    config, network = state.config, QNetwork(state.config)

    def evaluate_seed(state):
        def policy(carry, obs, start, action, reward, _):
            carry, q_values = network.apply(
                state.params, carry, Inputs(obs, action, reward), start, method="step"
            )
            return carry, q_values.argmax(axis=-1)

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
