"""Deep Q-learning (DQN, Mnih et al. 2015, doi 10.1038/nature14236) with double Q-learning; discrete actions.

Act epsilon-greedily, keep every transition (s, a, r, s') in a replay buffer, and take gradient steps on minibatches of

    L = mean[ 0.5 * (Q(s, a) - y)^2 ]     y = r + gamma * (1 - terminated) * Q'(s', argmax_a' Q(s', a'))

Q' is the target network, a copy of Q that follows it slowly; that Q chooses the action which Q' values is double
Q-learning (van Hasselt et al. 2016, arXiv 1509.06461): the maximum of a noisy estimate is too high. An episode that was
truncated is not over: s' is then the observation that the time limit cut off, not the first of the next episode.
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
    """Deep Q-learning (DQN) for discrete actions."""

    total_steps: int = 200_000  # environment steps of each seed
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
    num_layers: int = 1  # layers between encoder and head

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at total_steps
    num_envs: int = 8  # N, parallel environments
    num_steps: int = 1  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    buffer_size: int = 50_000  # transitions that are kept for replay
    learning_starts: int = 1_000  # steps before the first update, to begin with a filled buffer
    batch_size: int = 128  # transitions in a minibatch
    gradient_steps: int = 1  # minibatches of an update
    target_network_frequency: int = 1  # gradient steps between two steps of the target network
    tau: float = 0.01  # how far one takes it to the online network; 1: all the way
    double_q: bool = True  # the online network chooses the action that the target network values
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
                x = nn.relu(conv(x))
        x = x.reshape(*obs.shape[: obs.ndim - obs_ndim], -1)
        x = nn.relu(dense(config.hidden_size)(x))
        for _ in range(config.num_layers):
            x = nn.relu(dense(config.hidden_size)(x))
        return dense(env.action_space.n, scale=1.0)(x)


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
    terminated: jax.Array  # next_obs ends the task: it is worth nothing, whatever Q' says


def make_replay(config: Config):
    return ItemReplay(config.buffer_size, config.batch_size)


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


def q_targets(reward, terminated, online_next_q, target_next_q, config):
    """y of the docstring, (B,), from the values (B, num_actions) that both networks give to the next observation."""
    best = (online_next_q if config.double_q else target_next_q).argmax(axis=-1)
    next_value = jnp.take_along_axis(target_next_q, best[..., None], axis=-1)[..., 0]
    return reward + config.gamma * jnp.where(terminated, 0.0, next_value)


def td_loss(params, target_params, network, config, batch):
    """The loss at the top of this file over one minibatch, and its parts for the log."""
    q_values = network.apply(params, batch.obs)
    next_q = network.apply(params, batch.next_obs), network.apply(target_params, batch.next_obs)
    targets = q_targets(batch.reward, batch.terminated, *jax.lax.stop_gradient(next_q), config)
    q_value = jnp.take_along_axis(q_values, batch.action[..., None], axis=-1)[..., 0]
    loss = 0.5 * ((q_value - targets) ** 2).mean()
    return loss, {"losses/td_loss": loss, "losses/q_values": q_value.mean()}


# --- One update of one seed ------------------------------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments, kept for replay: the state after them, and what episodes ended in them."""
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
        transition = Transition(state.obs, action, reward, info["final_obs"], terminated)
        state = state.replace(env_state=env_state, obs=obs, key=key)
        return state, (transition, info)

    state, (batch, info) = jax.lax.scan(env_step, state, length=config.num_steps)
    metrics = {
        "charts/epsilon": epsilon(state.updates, config),
        "charts/episodic_return": info["episode_return"].sum(where=info["episode_done"]),
        "charts/episodic_length": info["episode_length"].sum(where=info["episode_done"]),
        "charts/episodes": info["episode_done"].sum(),
    }
    buffer = make_replay(config).add(state.buffer, batch)
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
        batch = replay.sample(state.buffer, sample_key)
        gradients, parts = jax.grad(td_loss, has_aux=True)(
            state.params, state.target_params, network, config, batch
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
