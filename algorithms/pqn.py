"""Parallelised Q-network (PQN, Gallici et al. 2025, arXiv 2407.04811) for discrete actions.

Collect T steps of N environments epsilon-greedily, then take several epochs of minibatch gradient steps on

    L = mean[ 0.5 * (Q(s, a) - G)^2 ]     G[t] = r[t] + gamma * (1 - terminated[t]) * future[t]

with the targets of Q(lambda): future[t] = (1 - lambda) * max_a Q(s'[t], a) + lambda * G[t + 1] within an episode, and
max_a Q(s'[t], a) at the last step of an episode or of the rollout. There is no replay buffer and no target network:
steps of many environments are varied enough, and layer normalisation keeps Q from diverging.
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
    """Parallelised Q-network (PQN) for discrete actions."""

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id
    env_kwargs: Options = field(
        default_factory=dict, hash=False
    )  # its parameters, and wrappers: frame_stack 4
    mask: tuple[
        str, ...
    ] = ()  # entries of the observation to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and head

    # Algorithm
    learning_rate: float = 5e-4  # step size of RAdam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at total_steps
    num_envs: int = 32  # N, parallel environments
    num_steps: int = 64  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    q_lambda: float = 0.95  # lambda of the targets
    update_epochs: int = 4  # passes over the collected steps in one update
    num_minibatches: int = 16  # gradient steps in one pass
    start_e: float = 1.0  # probability of a random action at first
    end_e: float = 0.05  # and in the end
    exploration_fraction: float = 0.2  # it falls linearly for this part of total_steps
    max_grad_norm: float = 10.0  # gradients are clipped to this global norm

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps

    def make_env(self):
        return make(self.env, **{"mask": self.mask} | self.env_kwargs)

    def __post_init__(self):
        check_sizes(self)
        if self.steps_per_update % self.num_minibatches:
            raise ValueError(
                f"num_minibatches ({self.num_minibatches}) must divide a batch ({self.steps_per_update})"
            )
        if not isinstance(self.make_env().action_space, Discrete):
            raise ValueError(
                f"this script needs discrete actions, those of {self.env} are continuous"
            )


# --- Networks --------------------------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


class QNetwork(nn.Module):
    """Observations (..., *obs_shape) to the values of all actions (..., num_actions)."""

    config: Config

    @nn.compact
    def __call__(self, obs):
        config, env = self.config, self.config.make_env()
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
                x = nn.relu(nn.LayerNorm()(conv(x)))
        x = x.reshape(*obs.shape[: obs.ndim - obs_ndim], -1)
        x = nn.relu(nn.LayerNorm()(dense(config.hidden_size)(x)))
        for _ in range(config.num_layers):
            x = nn.relu(nn.LayerNorm()(dense(config.hidden_size)(x)))
        return dense(env.action_space.n, scale=1.0)(x)


def make_optimizer(config: Config):
    learning_rate = config.learning_rate
    if config.anneal_lr:
        gradient_steps = config.num_updates * config.update_epochs * config.num_minibatches
        learning_rate = optax.linear_schedule(config.learning_rate, 0.0, gradient_steps)
    radam = optax.radam(learning_rate)
    return flatten_small(optax.chain(optax.clip_by_global_norm(config.max_grad_norm), radam))


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
    q_value: jax.Array  # Q(obs[t], action[t])
    next_q: (
        jax.Array
    )  # max Q(next_obs[t]) of the true next observation, not of the one after an auto-reset
    reward: jax.Array
    terminated: jax.Array  # next_obs[t] ends the task: it is worth nothing, whatever next_q says
    done: jax.Array  # terminated or truncated: obs[t + 1] begins another episode
    episode_return: jax.Array
    episode_length: jax.Array


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


def q_lambda_targets(reward, next_q, terminated, done, config):
    """Q(lambda) targets G of the docstring, from arrays (T, N); next_q is the best value of the next observation.

    Two things can end: `terminated` ends the future (nothing to bootstrap from), `done` the episode (no trace from the
    next one). A truncated step bootstraps from next_q, and so does the last step of the rollout.
    """

    def backward(next_target, step):
        reward, next_q, terminated, done = step
        mixture = (1.0 - config.q_lambda) * next_q + config.q_lambda * next_target
        future = jnp.where(done, next_q, mixture)
        target = reward + config.gamma * jnp.where(terminated, 0.0, future)
        return target, target

    _, targets = jax.lax.scan(
        backward, next_q[-1], (reward, next_q, terminated, done), reverse=True
    )
    return targets


def td_loss(params, network, batch, targets):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    q_values = network.apply(params, batch.obs)
    q_value = jnp.take_along_axis(q_values, batch.action[..., None], axis=-1)[..., 0]
    loss = 0.5 * ((q_value - targets) ** 2).mean()
    return loss, {
        "losses/td_loss": loss,
        "losses/q_values": q_value.mean(),
        "losses/first_q_error": jnp.abs(q_value - batch.q_value).max(),
    }


# --- One update of one seed ------------------------------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments: the state after them, and transitions (T, N, ...)."""
    config, network = state.config, QNetwork(state.config)
    step_envs = jax.vmap(
        env.step, axis_name="envs"
    )  # the name lets them share what they normalise with

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        q_values = network.apply(state.params, state.obs)
        action = epsilon_greedy(action_key, q_values, epsilon(state.updates, config))
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        next_q = network.apply(state.params, info["final_obs"])
        q_value = jnp.take_along_axis(q_values, action[:, None], axis=-1)[:, 0]
        ending = terminated, info["episode_done"], info["episode_return"], info["episode_length"]
        transition = Transition(state.obs, action, q_value, next_q.max(axis=-1), reward, *ending)
        return state.replace(env_state=env_state, obs=obs, key=key), transition

    return jax.lax.scan(env_step, state, length=config.num_steps)


def update(state, env):
    """Collect a batch and learn from it: the new state, and the metrics of this update."""
    config, network, optimizer = state.config, QNetwork(state.config), make_optimizer(state.config)
    state, batch = rollout(state, env)
    targets = q_lambda_targets(batch.reward, batch.next_q, batch.terminated, batch.done, config)

    def gradient_step(learner, steps):
        params, opt_state = learner
        minibatch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[steps], (batch, targets))
        gradients, parts = jax.grad(td_loss, has_aux=True)(params, network, *minibatch)
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
        # The first minibatch meets the very parameters that collected it: other values than then are a bug.
        "losses/first_q_error": parts["losses/first_q_error"][0, 0],
        "charts/epsilon": epsilon(state.updates, config),
        "charts/learning_rate": config.learning_rate
        * (1.0 - config.anneal_lr * state.updates / config.num_updates),
        "charts/episodic_return": batch.episode_return.sum(where=batch.done),
        "charts/episodic_length": batch.episode_length.sum(where=batch.done),
        "charts/episodes": batch.done.sum(),
    }
    return state.replace(
        params=params, opt_state=opt_state, key=key, updates=state.updates + 1
    ), metrics


# --- Init, warmup, train, evaluate -----------------------------------------------------------------------------------
def init(config: Config, key) -> State:
    """A fresh state, from one typed key or from an array of them: one per seed."""
    env, network, optimizer = config.make_env(), QNetwork(config), make_optimizer(config)

    def init_seed(key):
        key, network_key, reset_key = jax.random.split(key, 3)
        obs, env_state = jax.vmap(env.reset, axis_name="envs")(
            jax.random.split(reset_key, config.num_envs)
        )
        params = network.init(network_key, obs)
        return State(params, optimizer.init(params), env_state, obs, key, jnp.int32(0), config)

    return jax.jit(vmap_seeds(init_seed))(key.reshape(-1))


def warmup(state: State, env, logger) -> State:
    """Compile the update, so that the speed reported by `train` is that of training; PQN needs nothing else."""
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
        def policy(carry, obs, *_):
            return carry, network.apply(state.params, obs).argmax(axis=-1)

        key = jax.random.fold_in(state.key, 2**31 - 1)  # far from the numbers that split folds in
        return play(
            env.frozen(state.env_state), policy, lambda _: (), key, config.num_eval_envs, episodes
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
