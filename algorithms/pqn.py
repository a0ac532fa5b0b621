"""Parallelised Q-network (PQN), for discrete actions.

PQN (Gallici et al. 2025, arXiv 2407.04811) collects T steps of N environments epsilon-greedily. It
then takes several epochs of minibatch gradient steps on

    L         = mean[ 0.5 * (Q(s, a) - G)^2 ]
    G[t]      = r[t] + gamma * (1 - terminated[t]) * future[t]
    future[t] = (1 - lambda) * max_a Q(s'[t], a) + lambda * G[t + 1]

where future[t] = max_a Q(s'[t], a) at the last step of an episode or of the rollout. There is no
replay buffer and no target network: the steps of many environments are varied enough, and layer
normalisation keeps Q from diverging.

`diff algorithms/pqn.py algorithms/rpqn.py` shows what memory changes.

    python algorithms/pqn.py --env gymnax::CartPole-v1
    python algorithms/pqn.py --env gymnax::Acrobot-v1 --num-seeds 5
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
    launch,
    mean_over_devices,
    report_chunks,
    run_updates,
    show,
    vmap_seeds,
)
from fast import Conv, Dense, flatten_params, flatten_small


# --- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Parallelised Q-network (PQN), for discrete actions."""

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and head

    # Algorithm
    learning_rate: float = 5e-4  # step size of RAdam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 32  # N, parallel environments
    num_steps: int = 64  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    q_lambda: float = 0.95  # lambda of the targets
    update_epochs: int = 4  # passes over the collected steps in one update
    num_minibatches: int = 16  # gradient steps in one pass
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
            conv = Conv(features, (size, size), (stride, stride), "VALID")
            x = nn.relu(nn.LayerNorm()(conv(x)))
    return x.reshape(*obs.shape[:num_axes], -1)


class QNetwork(nn.Module):
    """Observations (B, ...) to the values of all actions (B, num_actions)."""

    config: Config
    num_actions: int

    @nn.compact
    def __call__(self, obs):
        config = self.config
        x = encode(obs, num_axes=1)
        x = nn.relu(nn.LayerNorm()(dense(config.hidden_size)(x)))
        for _ in range(config.num_layers):
            x = nn.relu(nn.LayerNorm()(dense(config.hidden_size)(x)))
        return only_valid(dense(self.num_actions, scale=1.0)(x), obs)


def make_network(config: Config, env):
    return QNetwork(config, env.action_space.n)


def make_optimizer(config: Config):
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    radam = optax.scale_by_radam()  # `update` applies the learning rate
    return flatten_small(optax.chain(clip, radam))


# --- State ---------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """Everything needed to continue a run; `init` gives all arrays a leading seed axis."""

    params: Any
    opt_state: Any
    env_state: Any  # (N, ...)
    obs: jax.Array  # (N, ...), what the next action is chosen from
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


class Transition(NamedTuple):
    """The step obs[t] -> next_obs[t] of every environment; a rollout stacks T of them, (T, N, ...).

    next_obs[t] is the true next observation, also where obs[t + 1] begins another episode.
    """

    obs: jax.Array
    action: jax.Array
    q_value: jax.Array  # Q(obs[t], action[t])
    next_q: jax.Array  # max_a Q(next_obs[t], a)
    reward: jax.Array
    terminated: jax.Array  # next_obs[t] ends the task: its value is 0, next_q is not used
    done: jax.Array  # terminated or truncated: obs[t + 1] begins another episode
    episode_return: jax.Array
    episode_length: jax.Array


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


def q_lambda_targets(reward, next_q, terminated, done, config):
    """The targets G of the docstring.

    `terminated` ends the future: there is nothing to bootstrap from. `done` ends the episode: the
    rewards of the next one do not reach back into it. A truncated step is done but not terminated,
    so it bootstraps from next_q; so does the last step of the rollout.

    The arguments are fields of `Transition`, (T, N); so is the result.
    """

    def backward(next_target, step):
        reward, next_q, terminated, done = step
        mixture = (1.0 - config.q_lambda) * next_q + config.q_lambda * next_target
        future = jnp.where(done, next_q, mixture)
        target = reward + config.gamma * jnp.where(terminated, 0.0, future)
        return target, target

    steps = (reward, next_q, terminated, done)
    _, targets = jax.lax.scan(backward, next_q[-1], steps, reverse=True)
    return targets


def td_loss(params, network, batch, targets):
    """L of the docstring over one minibatch, and its parts for the log."""
    q_values = network.apply(params, batch.obs)
    q_value = jnp.take_along_axis(q_values, batch.action[..., None], axis=-1)[..., 0]
    loss = 0.5 * ((q_value - targets) ** 2).mean()
    return loss, {
        "losses/td_loss": loss,
        "losses/q_values": q_value.mean(),
        "losses/first_q_error": jnp.abs(q_value - batch.q_value).max(),
    }


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments: the state after them, and transitions (T, N, ...)."""
    config = state.config
    apply = make_network(config, env).apply
    step_envs = jax.vmap(env.step, axis_name="envs")  # they share normalisation statistics

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        q_values = apply(state.params, state.obs)
        action = epsilon_greedy(action_key, q_values, epsilon(state.updates, config))
        q_value = jnp.take_along_axis(q_values, action[..., None], axis=-1)[..., 0]
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        done = info["episode_done"]
        # The true next observation, not the one after an auto-reset.
        next_q_values = apply(state.params, info["final_obs"])
        transition = Transition(
            obs=state.obs,
            action=action,
            q_value=q_value,
            next_q=next_q_values.max(axis=-1),
            reward=reward,
            terminated=terminated,
            done=done,
            episode_return=info["episode_return"],
            episode_length=info["episode_length"],
        )
        state = state.replace(env_state=env_state, obs=obs, key=key)
        return state, transition

    return jax.lax.scan(env_step, state, length=config.num_steps)


def update(state, env):
    """Collect a batch and learn from it: the new state, and the metrics of this update."""
    config = state.config
    network = make_network(config, env)
    optimizer = make_optimizer(config)
    progress = config.progress(state.updates)
    learning_rate = config.learning_rate * (1.0 - config.anneal_lr * progress)
    state, batch = rollout(state, env)
    steps = (batch.reward, batch.next_q, batch.terminated, batch.done)
    targets = q_lambda_targets(*steps, config)

    # One axis for all steps, (T * N, ...).
    samples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch, targets))

    flat, unflatten = flatten_params(state.params)

    def gradient_step(learner, minibatch):
        params, opt_state = learner
        gradient = jax.grad(lambda flat, *rest: td_loss(unflatten(flat), *rest), has_aux=True)
        gradients, parts = gradient(params, network, *minibatch)
        gradients = mean_over_devices(gradients)
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, optax.tree.scale(-learning_rate, changes))
        return (params, opt_state), parts

    def epoch(learner, key):
        # Minibatches of single steps: without a memory their order does not matter.
        random_bits = jax.random.bits(key, (config.steps_per_update,))
        order = jnp.argsort(random_bits)  # one sort; jax.random.permutation takes two
        rows = order.reshape(config.num_minibatches, -1)
        minibatches = jax.tree.map(lambda x: x[rows], samples)
        return jax.lax.scan(gradient_step, learner, minibatches)

    key, shuffle_key = jax.random.split(state.key)
    epoch_keys = jax.random.split(shuffle_key, config.update_epochs)
    learner = (flat, state.opt_state)
    (flat, opt_state), parts = jax.lax.scan(epoch, learner, epoch_keys)
    params = unflatten(flat)

    metrics = jax.tree.map(jnp.mean, parts) | {
        # The first minibatch is evaluated with the parameters that collected it: other values than
        # those of the rollout are a bug.
        "losses/first_q_error": parts["losses/first_q_error"][0, 0],
        "charts/epsilon": epsilon(state.updates, config),
        "charts/learning_rate": learning_rate,
        **episode_metrics(batch.done, batch.episode_return, batch.episode_length),
    }
    updates = state.updates + 1
    return state.replace(params=params, opt_state=opt_state, key=key, updates=updates), metrics


# --- Init, warmup, train, evaluate ---------------------------------------------------------------
def init(config: Config, key) -> State:
    """A fresh state, from one typed key or from an array of them, one per seed."""
    env = config.make_env()
    network = make_network(config, env)
    optimizer = make_optimizer(config)

    def init_seed(key):
        key, network_key, reset_key = jax.random.split(key, 3)
        reset_keys = jax.random.split(reset_key, config.num_envs)
        obs, env_state = jax.vmap(env.reset, axis_name="envs")(reset_keys)
        params = network.init(network_key, obs)
        return State(
            params=params,
            opt_state=optimizer.init(params),
            env_state=env_state,
            obs=obs,
            key=key,
            updates=jnp.int32(0),
            config=config,
        )

    return jax.jit(vmap_seeds(init_seed))(key.reshape(-1))


def warmup(state: State, env, logger) -> State:
    """Compile the update, so that `train` reports the speed of training; PQN needs nothing else."""
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
