"""Soft actor-critic (SAC, Haarnoja et al. 2018, arXiv 1812.05905) for continuous actions.

Act by a stochastic policy, keep every transition (s, a, r, s') in a replay buffer, and take gradient steps on
minibatches of L_Q + L_pi + L_alpha, each of which trains its own parameters only:

    L_Q     = mean[ 0.5 * sum_i (Q_i(s, a) - y)^2 ]    y = r + gamma * (1 - terminated) * V'(s')
    L_pi    = mean[ alpha * log pi(b|s) - min_i Q_i(s, b) ]    V'(s') = min_i Q'_i(s', b') - alpha * log pi(b'|s')
    L_alpha = mean[ -log(alpha) * (log pi(b|s) + target entropy) ]    b ~ pi(.|s), b' ~ pi(.|s')

Q' is the target network, a copy of Q that follows it slowly; the smaller of two estimates makes up for the maximum of a
noisy one being too high (Fujimoto et al. 2018, arXiv 1802.09477). An episode that was truncated is not over: s' is then
the observation that the time limit cut off, not the first of the next episode.
`diff algorithms/sac.py algorithms/rsac.py` shows what memory changes, a diff with sacd.py what discrete actions do.

    python algorithms/sac.py --env gymnax::Pendulum-v1
    python algorithms/sac.py --env gymnax::MountainCarContinuous-v0 --num-seeds 5
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
from replay import ItemReplay


# --- Config ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Soft actor-critic (SAC) for continuous actions."""

    total_steps: int = 30_000  # environment steps of each seed
    log_every: int = 500  # updates between two reports

    # Environment and networks
    env: str = "gymnax::Pendulum-v1"  # environment, as namespace::id
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
    num_envs: int = 1  # N, parallel environments
    num_steps: int = 1  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    buffer_size: int = 100_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 256  # transitions in a minibatch
    gradient_steps: int = 1  # minibatches of an update
    tau: float = 0.005  # how far the target network is taken to the online network after each
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

    def __post_init__(self):
        check_sizes(self)
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
        self.actor_head = Head(
            self.config, 2 * self.config.make_env().action_space.shape[0], scale=0.01
        )
        self.critic_heads = nn.vmap(Head, {"params": 0}, {"params": True}, axis_size=2)(
            self.config, 1, scale=1.0
        )
        self.log_alpha = self.param(
            "log_alpha", nn.initializers.constant(np.log(self.config.alpha)), ()
        )

    def read(self, obs):
        """obs (..., *obs_shape) -> what actor and critic see in it, (..., size) each."""
        return self.actor_torso(obs), self.critic_torso(obs)

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

    def __call__(self, obs):
        """obs (..., *obs_shape) -> policy, and the values of its mean."""
        features, critic_features = self.read(obs)
        policy = self.policy(features)
        return policy, self.values(critic_features, policy[0])


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
def squashed_normal(noise, policy, space):
    """The action (..., num_actions) that a policy makes of standard normal noise, and its log-probability (...)."""
    (mean, log_std), scale = policy, 0.5 * (space.high - space.low) * np.ones(space.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    # log |d action / d u|, with log(1 - tanh(u)^2) in a form that is finite where tanh(u) is rounded to 1
    log_slope = np.log(scale) + 2.0 * (np.log(2.0) - u - nn.softplus(-2.0 * u))
    return space.low + scale * (1.0 + jnp.tanh(u)), (log_normal - log_slope).sum(axis=-1)


def sac_loss(params, target_params, network, batch, key):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    config, space, constant = (
        network.config,
        network.config.make_env().action_space,
        jax.lax.stop_gradient(params),
    )
    alpha = jnp.exp(constant["params"]["log_alpha"])
    actor_features, features = network.apply(params, batch.obs, method="read")
    next_actor_features, _ = network.apply(constant, batch.next_obs, method="read")
    _, target_features = network.apply(target_params, batch.next_obs, method="read")
    noise, next_noise = jax.random.normal(key, (2, *batch.action.shape))
    action, log_prob = squashed_normal(
        noise, network.apply(params, actor_features, method="policy"), space
    )
    next_policy = network.apply(constant, next_actor_features, method="policy")
    next_action, next_log_prob = squashed_normal(next_noise, next_policy, space)

    next_q = network.apply(target_params, target_features, next_action, method="values").min(axis=0)
    next_value = next_q - alpha * next_log_prob
    targets = batch.reward + config.gamma * jnp.where(batch.terminated, 0.0, next_value)
    q_values = network.apply(params, features, batch.action, method="values")
    td_loss = 0.5 * ((q_values - targets) ** 2).sum(axis=0).mean()

    actor_q = network.apply(constant, jax.lax.stop_gradient(features), action, method="values").min(
        axis=0
    )
    actor_loss = (alpha * log_prob - actor_q).mean()
    entropy = -jax.lax.stop_gradient(log_prob).mean()
    target_entropy = np.sum(
        config.target_entropy + np.log(0.5 * (space.high - space.low)) * np.ones(space.shape)
    )
    alpha_loss = config.autotune * params["params"]["log_alpha"] * (entropy - target_entropy)

    parts = {
        "losses/td_loss": td_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
    }
    parts |= {"losses/alpha": alpha, "losses/entropy": entropy, "losses/q_values": q_values.mean()}
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
        policy, _ = network.apply(state.params, state.obs)
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
        params = network.init(network_key, obs)
        transition = Transition(
            obs[0], jnp.zeros(env.action_space.shape), jnp.float32(0.0), obs[0], jnp.bool(False)
        )
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
            policy, _ = network.apply(state.params, obs)
            return carry, squashed_normal(0.0, policy, env.action_space)[0]

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
