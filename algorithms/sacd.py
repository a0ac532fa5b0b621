"""Soft actor-critic for discrete actions (SACD, Christodoulou 2019, arXiv 1910.07207).

Act by a stochastic policy, keep every transition (s, a, r, s') in a replay buffer, and take gradient steps on
minibatches of L_Q + L_pi + L_alpha, each of which trains its own parameters only:

    L_Q     = mean[ 0.5 * sum_i (Q_i(s, a) - y)^2 ]    y = r + gamma * (1 - terminated) * V'(s')
    L_pi    = mean[ sum_b pi(b|s) * (alpha * log pi(b|s) - min_i Q_i(s, b)) ]
    L_alpha = mean[ -log(alpha) * (sum_b pi(b|s) * log pi(b|s) + target entropy) ]

with V'(s') = sum_b pi(b|s') * (min_i Q'_i(s', b) - alpha * log pi(b|s')): expectations over all actions, not samples.
Q' is the target network, a copy of Q that follows it slowly; the smaller of two estimates makes up for the maximum of a
noisy one being too high (Fujimoto et al. 2018, arXiv 1802.09477). An episode that was truncated is not over: s' is then
the observation that the time limit cut off, not the first of the next episode.
`diff algorithms/sacd.py algorithms/rsacd.py` shows what memory changes, a diff with sac.py what discrete actions do.

    python algorithms/sacd.py --env gymnax::CartPole-v1
    python algorithms/sacd.py --env gymnax::Acrobot-v1 --num-seeds 5
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
from replay import ItemReplay


# --- Config ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Soft actor-critic for discrete actions (SACD)."""

    total_steps: int = 100_000  # environment steps of each seed
    log_every: int = 500  # updates between two reports

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id
    env_kwargs: Options = field(
        default_factory=dict, hash=False
    )  # its parameters, and wrappers: frame_stack 4
    mask: tuple[
        str, ...
    ] = ()  # entries of the observation to hide: indices, or a name such as velocity
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # layers between encoder and heads

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at total_steps
    num_envs: int = 4  # N, parallel environments
    num_steps: int = 1  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 128  # transitions in a minibatch
    gradient_steps: int = 1  # minibatches of an update
    tau: float = 0.02  # how far the target network is taken to the online network after each
    alpha: float = 0.2  # weight of the entropy, to begin with if it is tuned
    autotune: bool = True  # tune alpha so that the entropy comes to its target
    target_entropy_ratio: float = (
        0.7  # target entropy over that of the uniform policy, log(num_actions)
    )

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps

    def make_env(self):
        return make(self.env, **{"mask": self.mask} | self.env_kwargs)

    def __post_init__(self):
        check_sizes(self)
        if not isinstance(self.make_env().action_space, Discrete):
            raise ValueError(
                f"this script needs discrete actions, those of {self.env} are continuous"
            )


# --- Networks --------------------------------------------------------------------------------------------------------
def dense(features, scale=2**0.5):
    return Dense(features, kernel_init=nn.initializers.orthogonal(scale))


class Torso(nn.Module):
    """Observations (..., *obs_shape) to the features (..., size) that policy or values are read from."""

    config: Config

    @nn.compact
    def __call__(self, obs):
        obs_ndim = len(self.config.make_env().observation_space.shape)
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
        return x.reshape(*obs.shape[: obs.ndim - obs_ndim], -1)


class Head(nn.Module):
    """Features (..., size) to outputs (..., num_outputs)."""

    config: Config
    num_outputs: int
    scale: float

    @nn.compact
    def __call__(self, x):
        for _ in range(1 + self.config.num_layers):
            x = nn.relu(dense(self.config.hidden_size)(x))
        return dense(self.num_outputs, self.scale)(x)


class ActorCritic(nn.Module):
    """Policy, two estimates of the values, and the logarithm of alpha."""

    config: Config

    def setup(self):
        self.actor_torso, self.critic_torso = Torso(self.config), Torso(self.config)
        self.actor_head = Head(self.config, self.config.make_env().action_space.n, scale=0.01)
        twins = nn.vmap(Head, {"params": 0}, {"params": True}, axis_size=2)
        self.critic_heads = twins(self.config, self.config.make_env().action_space.n, scale=1.0)
        self.log_alpha = self.param(
            "log_alpha", nn.initializers.constant(np.log(self.config.alpha)), ()
        )

    def read(self, obs):
        """obs (..., *obs_shape) -> what actor and critic see in it, (..., size) each."""
        return self.actor_torso(obs), self.critic_torso(obs)

    def policy(self, features):
        """features (..., size) -> logits (..., num_actions)."""
        return self.actor_head(features)

    def values(self, features):
        """features (..., size) -> Q_1 and Q_2 of all actions (2, ..., num_actions)."""
        return self.critic_heads(
            jnp.broadcast_to(features, (2, *features.shape))
        )  # copies are faster than sharing

    def __call__(self, obs):
        """obs (..., *obs_shape) -> logits and values of all actions."""
        features, critic_features = self.read(obs)
        return self.policy(features), self.values(critic_features)


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
    obs: jax.Array  # (N, *obs_shape), what the next action is chosen from
    buffer: Any  # Transition (1, buffer_size, ...), and where in it the next one goes
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


class Transition(NamedTuple):
    """The step obs -> next_obs of an environment, as the replay buffer keeps it; a minibatch is (batch_size, ...)."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array  # the true next observation, not the one after an auto-reset
    terminated: jax.Array  # next_obs ends the task: it is worth nothing, whatever V' says


def make_replay(config: Config):
    return ItemReplay(config.buffer_size, config.batch_size)


# --- Mathematics -----------------------------------------------------------------------------------------------------
def sacd_loss(params, target_params, network, batch):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    config, constant = network.config, jax.lax.stop_gradient(params)
    alpha = jnp.exp(constant["params"]["log_alpha"])
    logits, q_values = network.apply(params, batch.obs)
    log_policy = nn.log_softmax(logits)
    policy = jnp.exp(log_policy)

    next_log_policy = nn.log_softmax(network.apply(constant, batch.next_obs)[0])
    next_q = network.apply(target_params, batch.next_obs)[1].min(axis=0)
    next_value = (jnp.exp(next_log_policy) * (next_q - alpha * next_log_policy)).sum(axis=-1)
    targets = batch.reward + config.gamma * jnp.where(batch.terminated, 0.0, next_value)
    q_value = jnp.take_along_axis(q_values, batch.action[None, ..., None], axis=-1)[..., 0]
    td_loss = 0.5 * ((q_value - targets) ** 2).sum(axis=0).mean()

    actor_q = jax.lax.stop_gradient(q_values).min(axis=0)
    actor_loss = (policy * (alpha * log_policy - actor_q)).sum(axis=-1).mean()
    entropy = -jax.lax.stop_gradient(policy * log_policy).sum(axis=-1).mean()
    target_entropy = config.target_entropy_ratio * np.log(logits.shape[-1])
    alpha_loss = config.autotune * params["params"]["log_alpha"] * (entropy - target_entropy)

    parts = {
        "losses/td_loss": td_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
    }
    parts |= {"losses/alpha": alpha, "losses/entropy": entropy, "losses/q_values": q_value.mean()}
    return td_loss + actor_loss + alpha_loss, parts


# --- One update of one seed ------------------------------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and what episodes ended in them."""
    config, network = state.config, ActorCritic(state.config)
    step_envs = jax.vmap(
        env.step, axis_name="envs"
    )  # the name lets them share what they normalise with

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        logits, _ = network.apply(state.params, state.obs)
        action = jax.random.categorical(action_key, logits)
        random_action = jax.vmap(env.action_space.sample)(
            jax.random.split(action_key, config.num_envs)
        )
        action = jnp.where(
            state.updates < config.learning_starts // config.steps_per_update, random_action, action
        )
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        transition = Transition(state.obs, action, reward, info["final_obs"], terminated)
        state = state.replace(env_state=env_state, obs=obs, key=key)
        return state, (transition, info)

    state, (batch, info) = jax.lax.scan(env_step, state, length=config.num_steps)
    metrics = {
        "charts/episodic_return": info["episode_return"].sum(where=info["episode_done"]),
        "charts/episodic_length": info["episode_length"].sum(where=info["episode_done"]),
        "charts/episodes": info["episode_done"].sum(),
    }
    buffer = make_replay(config).add(state.buffer, batch)
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
        key, sample_key = jax.random.split(state.key)
        batch = make_replay(config).sample(state.buffer, sample_key)
        gradients, parts = jax.grad(sacd_loss, has_aux=True)(
            state.params, state.target_params, network, batch
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
        params = network.init(network_key, obs)
        transition = Transition(obs[0], jnp.int32(0), jnp.float32(0.0), obs[0], jnp.bool(False))
        buffer, opt_state = make_replay(config).init(transition), optimizer.init(params)
        return State(params, params, opt_state, env_state, obs, buffer, key, jnp.int32(0), config)

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
        def policy(carry, obs, *_):
            logits, _ = network.apply(state.params, obs)
            return carry, logits.argmax(axis=-1)

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
