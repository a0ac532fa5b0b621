"""Deep Q-learning (DQN) with double Q-learning, for discrete actions.

DQN (Mnih et al. 2015, doi 10.1038/nature14236) acts epsilon-greedily, keeps every transition
(s, a, r, s') in a replay buffer, and takes gradient steps on minibatches of

    L = mean[ 0.5 * (Q(s, a) - y)^2 ]
    y = r + gamma * (1 - terminated) * Q'(s', argmax_b Q(s', b))

Q' is the target network, a copy of Q that follows it slowly. In double Q-learning (van Hasselt et
al. 2016, arXiv 1509.06461) Q chooses the action and Q' gives its value, because the maximum of
noisy estimates is too high. Where an episode was truncated, s' is the observation that the time
limit cut off, not the first of the next episode. With `n_step` > 1, y has that many rewards before
the value.

`diff algorithms/dqn.py algorithms/drqn.py` shows what memory changes.

    python algorithms/dqn.py --env gymnax::CartPole-v1
    python algorithms/dqn.py --env gymnax::Acrobot-v1 --num-seeds 5
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
from replay import ItemReplay, joined


# --- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Deep Q-learning (DQN) with double Q-learning, for discrete actions."""

    total_steps: int = 200_000  # environment steps of each seed
    log_every: int = 500  # updates between two reports

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and head

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 8  # N, parallel environments
    num_steps: int = 1  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    buffer_size: int = 50_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 128  # transitions in a minibatch
    n_step: int = 1  # rewards in a target before the value
    gradient_steps: int = 1  # minibatches of an update
    target_network_frequency: int = 1  # gradient steps between two steps of the target network
    tau: float = 0.01  # fraction of the way it moves to the online network; 1 copies that
    double_q: bool = True  # the online network chooses the action that the target network values
    start_e: float = 1.0  # probability of a random action at first
    end_e: float = 0.05  # probability of a random action in the end
    exploration_fraction: float = 0.2  # fraction of total_steps in which it falls, linearly
    max_grad_norm: float = 10.0  # gradients are clipped to this global norm

    def make_env(self):
        return make(self.env, **{"mask": self.mask, "joint_actions": True} | self.env_kwargs)

    def __post_init__(self):
        check_config(self, Discrete)


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


class QNetwork(nn.Module):
    """Observations (B, ...) to the values of all actions (B, num_actions)."""

    config: Config
    num_actions: int

    @nn.compact
    def __call__(self, obs):
        config = self.config
        x = encode(obs, num_axes=1)
        x = nn.relu(dense(config.hidden_size)(x))
        for _ in range(config.num_layers):
            x = nn.relu(dense(config.hidden_size)(x))
        return only_valid(dense(self.num_actions, scale=1.0)(x), obs)


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


def q_targets(sample, online_q, target_q, config):
    """y of the docstring, (B,), from the values of the next observation (B, num_actions)."""
    best = (online_q if config.double_q else target_q).argmax(axis=-1)
    next_value = jnp.take_along_axis(target_q, best[..., None], axis=-1)[..., 0]
    return sample.reward + sample.discount * jnp.where(sample.terminated, 0.0, next_value)


def td_loss(params, target_params, network, config, sample):
    """L of the docstring over one minibatch, and its parts for the log."""
    q_values = network.apply(params, sample.obs)
    online_q = network.apply(params, sample.next_obs)
    target_q = network.apply(target_params, sample.next_obs)
    both = jax.lax.stop_gradient((online_q, target_q))
    targets = q_targets(sample, *both, config)

    q_value = jnp.take_along_axis(q_values, sample.action[..., None], axis=-1)[..., 0]
    loss = 0.5 * ((q_value - targets) ** 2).mean()
    return loss, {"losses/td_loss": loss, "losses/q_values": q_value.mean()}


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and their metrics."""
    config = state.config
    apply = make_network(config, env).apply
    step_envs = jax.vmap(env.raw.step, axis_name="envs")  # they share normalisation statistics

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        q_values = apply(state.params, env.preprocess_obs(state.env_state, state.obs))
        action = epsilon_greedy(action_key, q_values, epsilon(state.updates, config))
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
    metrics = {
        "charts/epsilon": epsilon(state.updates, config),
        **episode_metrics(info["episode_done"], info["episode_return"], info["episode_length"]),
    }
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
        gradient = jax.grad(td_loss, has_aux=True)
        gradients, parts = gradient(state.params, state.target_params, network, config, sample)
        gradients = mean_over_devices(gradients)
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


@partial(jax.jit, static_argnames=("env", "episodes", "play"))
def evaluate(state: State, env, episodes: int, play=play) -> Episodes:
    """Play `episodes` greedy episodes per seed, in environments of their own: (S, episodes)."""
    config = state.config
    network = make_network(config, env)

    def evaluate_seed(state):
        def policy(carry, obs, *_):
            q_values = network.apply(state.params, obs)
            return carry, q_values.argmax(axis=-1)

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
