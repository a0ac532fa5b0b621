"""Recurrent PPO: proximal policy optimisation with a memory, for discrete actions.

PPO (Schulman et al. 2017, arXiv 1707.06347) collects T steps of N environments with the current
policy. It then takes several epochs of minibatch gradient steps on

    L    = L_pi + vf_coef * L_V - ent_coef * mean[ entropy(pi(.|s)) ]
    L_pi = mean[ -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) ]
    L_V  = mean[ 0.5 * (V(s) - R)^2 ]

where ratio = pi(a|s) / pi_old(a|s), the advantages A are by GAE (Schulman et al. 2016,
arXiv 1506.02438), and R = A + V are the returns. Of actions with several parts, pi is the product
of the policies of the parts: log-probabilities and entropies are sums over the parts.

Here s is the state of a memory that has read the episode so far. The memory is trained by
backpropagation through time: a minibatch consists of whole environments, and the memory reads
their steps in order, from the carry that it had when the rollout began.

`diff algorithms/ppo.py algorithms/rppo.py` shows what memory changes.

    python algorithms/rppo.py --env gymnax::CartPole-v1 --cell slstm
    python algorithms/rppo.py --env gymnax::CartPole-v1 --mask velocity --cell gru
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from envs import (
    Discrete,
    Episodes,
    MultiDiscrete,
    each_part,
    make,
    make_asymmetric,
    only_valid,
    play,
    seen_by,
)
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
from memory_cells import CELLS, MaskedRNN, as_sequence, make_cell, take


# --- Config --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(Experiment):
    """Recurrent PPO: proximal policy optimisation with a memory, for discrete actions."""

    # Environment and networks
    env: str = "gymnax::CartPole-v1"  # environment, as namespace::id or file.py::name
    env_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. frame_stack 4
    mask: tuple[str, ...] = ()  # observation entries to hide: indices, or a name such as velocity
    cell: Literal[tuple(CELLS)] = "gru"  # the memory
    cell_kwargs: Options = field(default_factory=dict, hash=False)  # its options, e.g. num_heads 8
    hidden_size: int = 128  # features of every layer
    num_layers: int = 1  # memories on top of each other
    shared_torso: bool = False  # actor and critic share everything but their heads
    critic_obs: Literal["same", "full"] = "same"  # full: the critic sees what the actor does not
    prev_action: bool = True  # the memory reads the previous action
    prev_reward: bool = True  # the memory reads the previous reward

    # Algorithm
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 at total_steps
    num_envs: int = 16  # N, parallel environments
    num_steps: int = 128  # T, steps of every environment between two updates
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    update_epochs: int = 4  # passes over the collected steps in one update
    num_minibatches: int = 4  # gradient steps in one pass
    bptt: int = 0  # cut gradients through time at every multiple of this many steps; 0: nowhere
    normalize_advantage: bool = True  # give each minibatch's advantages mean 0 and deviation 1
    clip_coef: float = 0.2  # eps, how far the ratio may move from 1 and still gain
    clip_vloss: bool = False  # also clip the change of the value, to clip_coef
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients are clipped to this global norm
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
    """Inputs (T, N, ...) to the features (T, N, hidden_size) that policy or value are read from."""

    config: Config
    action_space: Discrete | MultiDiscrete
    reader: Literal["actor", "critic"]  # whose part of observations it reads

    @nn.compact
    def __call__(self, carry, inputs, starts):
        config = self.config
        # Nothing precedes an episode's first step: what the last episode ended with is hidden.
        action = self.action_space.one_hot(inputs.action) * config.prev_action
        reward = inputs.reward[..., None] * config.prev_reward
        previous = jnp.where(starts[..., None], 0.0, jnp.concatenate([action, reward], axis=-1))
        obs = encode(seen_by(self.reader, inputs.obs), num_axes=2)
        x = jnp.concatenate([obs, previous], axis=-1)
        x = nn.tanh(dense(config.hidden_size)(x))
        carry, memory = config.make_memory()(carry, x, starts, bptt=config.bptt)
        return carry, x + memory  # skip connection: the memory need not store what x shows


class ActorCritic(nn.Module):
    """Policy and value, on one torso or on one each."""

    config: Config
    action_space: Discrete | MultiDiscrete

    def setup(self):
        num_torsos = 1 if self.config.shared_torso else 2
        readers = ("actor", "critic")[:num_torsos]
        self.torsos = [Torso(self.config, self.action_space, reader) for reader in readers]
        self.actor_head = dense(self.action_space.num_outputs, scale=0.01)
        self.critic_head = dense(1, scale=1.0)

    def __call__(self, carry, inputs, starts):
        """Inputs (T, N, ...), starts (T, N) -> carry, logits (T, N, num_actions), value (T, N)."""
        outputs = [torso(c, inputs, starts) for torso, c in zip(self.torsos, carry, strict=True)]
        carry, features = zip(*outputs, strict=True)
        logits = only_valid(self.action_space.logits(self.actor_head(features[0])), inputs.obs)
        value = self.critic_head(features[-1])[..., 0]
        return carry, logits, value

    def step(self, carry, inputs, start):
        """One step: Inputs (N, ...), start (N,) -> carry, logits (N, num_actions), value (N,)."""
        sequence = as_sequence((inputs, start))
        carry, logits, value = self(carry, *sequence)
        return carry, logits[0], value[0]

    def act(self, carry, inputs, start):
        """One step of the actor: Inputs (N, ...), start (N,) -> carry, logits (N, num_actions)."""
        sequence = as_sequence((inputs, start))
        carry, features = self.torsos[0](carry[0], *sequence)
        logits = self.action_space.logits(self.actor_head(features[0]))
        return (carry,), only_valid(logits, inputs.obs)

    @nn.nowrap
    def initialize_carry(self, num_envs, num_torsos=2):
        carry = self.config.make_memory().initialize_carry((num_envs, self.config.hidden_size))
        return (carry,) * (1 if self.config.shared_torso else num_torsos)


def make_network(config: Config, env):
    return ActorCritic(config, env.action_space)


def make_optimizer(config: Config):
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.scale_by_adam(eps=1e-5)  # `update` applies the learning rate
    return flatten_small(optax.chain(clip, adam))


# --- State ---------------------------------------------------------------------------------------
class State(struct.PyTreeNode):
    """Everything needed to continue a run; `init` gives all arrays a leading seed axis."""

    params: Any
    opt_state: Any
    env_state: Any  # (N, ...)
    carry: Any  # (N, ...), the memory before it reads inputs
    inputs: Inputs  # (N, ...), what the next action is chosen from
    start: jax.Array  # (N,), inputs.obs is the first of an episode
    key: jax.Array  # ()
    updates: jax.Array  # (), how many have been done
    config: Config = struct.field(pytree_node=False)


class Transition(NamedTuple):
    """The step obs[t] -> next_obs[t] of every environment; a rollout stacks T of them, (T, N, ...).

    next_obs[t] is the true next observation, also where obs[t + 1] begins another episode.
    """

    inputs: Inputs
    start: jax.Array  # inputs[t].obs is the first of an episode: the memory is reset first
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array  # V(obs[t])
    next_value: jax.Array  # V(next_obs[t])
    reward: jax.Array
    terminated: jax.Array  # next_obs[t] ends the task: its value is 0, next_value is not used
    done: jax.Array  # terminated or truncated: obs[t + 1] begins another episode
    episode_return: jax.Array
    episode_length: jax.Array


# --- Mathematics ---------------------------------------------------------------------------------
def gae(reward, value, next_value, terminated, done, config):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16).

    `terminated` ends the future: there is nothing to bootstrap from. `done` ends the episode: the
    advantages of the next one do not reach back into it. A truncated step is done but not
    terminated, so it bootstraps from next_value.

    The arguments are fields of `Transition`, (T, N); so are the results, advantages and returns.
    """
    delta = reward + config.gamma * jnp.where(terminated, 0.0, next_value) - value

    def backward(advantage, step):
        delta, done = step
        advantage = delta + config.gamma * config.gae_lambda * ~done * advantage
        return advantage, advantage

    last = jnp.zeros_like(delta[0])
    _, advantages = jax.lax.scan(backward, last, (delta, done), reverse=True)
    return advantages, advantages + value


def ppo_loss(params, network, config, carry, batch, advantage, returns):
    """L of the docstring over one minibatch, and its parts for the log."""
    _, logits, value = network.apply(params, carry, batch.inputs, batch.start)

    # L_pi
    log_prob = -optax.softmax_cross_entropy(logits, nn.one_hot(batch.action, logits.shape[-1]))
    log_ratio = network.action_space.sum_parts(log_prob) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    if config.normalize_advantage and advantage.size > 1:  # one alone would become 0
        mean = mean_over_devices(advantage.mean())
        variance = mean_over_devices(((advantage - mean) ** 2).mean())
        advantage = (advantage - mean) / (jnp.sqrt(variance) + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip_coef, 1.0 + config.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    # L_V
    value_error = (value - returns) ** 2
    if config.clip_vloss:
        change = jnp.clip(value - batch.value, -config.clip_coef, config.clip_coef)
        value_error = jnp.maximum(value_error, (batch.value + change - returns) ** 2)
    value_loss = 0.5 * value_error.mean()

    # Entropy
    entropy = -network.action_space.sum_actions(nn.softmax(logits) * nn.log_softmax(logits)).mean()

    loss = policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1.0 - log_ratio).mean(),  # k3 of joschu.net/blog/kl-approx
        "losses/clipfrac": (jnp.abs(ratio - 1.0) > config.clip_coef).mean(),
        "losses/first_ratio_error": jnp.abs(ratio - 1.0).max(),
    }


# --- One update of one seed ----------------------------------------------------------------------
def rollout(state, env):
    """T steps of N environments: the state after them, and transitions (T, N, ...)."""
    config = state.config
    apply = partial(make_network(config, env).apply, method="step")
    step_envs = jax.vmap(env.step, axis_name="envs")  # they share normalisation statistics

    def env_step(state, _):
        key, action_key, step_key = jax.random.split(state.key, 3)
        carry, logits, value = apply(state.params, state.carry, state.inputs, state.start)
        action = jax.random.categorical(action_key, logits)
        log_prob = -optax.softmax_cross_entropy(logits, nn.one_hot(action, logits.shape[-1]))
        step_keys = jax.random.split(step_key, config.num_envs)
        obs, env_state, reward, terminated, _, info = step_envs(step_keys, state.env_state, action)
        done = info["episode_done"]
        # The true next observation continues the episode: the memory that has just read this
        # observation reads it next, without a reset.
        next_inputs = Inputs(info["final_obs"], action, reward)
        no_start = jnp.zeros_like(state.start)
        *_, next_value = apply(state.params, carry, next_inputs, no_start)
        transition = Transition(
            inputs=state.inputs,
            start=state.start,
            action=action,
            log_prob=env.action_space.sum_parts(log_prob),
            value=value,
            next_value=next_value,
            reward=reward,
            terminated=terminated,
            done=done,
            episode_return=info["episode_return"],
            episode_length=info["episode_length"],
        )
        inputs = Inputs(obs, action, reward)
        state = state.replace(env_state=env_state, carry=carry, inputs=inputs, start=done, key=key)
        return state, transition

    return jax.lax.scan(env_step, state, length=config.num_steps)


def update(state, env):
    """Collect a batch and learn from it: the new state, and the metrics of this update."""
    config = state.config
    network = make_network(config, env)
    optimizer = make_optimizer(config)
    progress = config.progress(state.updates)
    learning_rate = config.learning_rate * (1.0 - config.anneal_lr * progress)
    first_carry = state.carry
    state, batch = rollout(state, env)
    steps = (batch.reward, batch.value, batch.next_value, batch.terminated, batch.done)
    advantages, returns = gae(*steps, config)

    flat, unflatten = flatten_params(state.params)

    def gradient_step(learner, envs):
        params, opt_state = learner
        carry = take(first_carry, envs)
        minibatch = jax.tree.map(lambda x: x[:, envs], (batch, advantages, returns))
        gradient = jax.grad(lambda flat, *rest: ppo_loss(unflatten(flat), *rest), has_aux=True)
        gradients, parts = gradient(params, network, config, carry, *minibatch)
        gradients = mean_over_devices(gradients)
        parts["losses/grad_norm"] = optax.tree.norm(gradients)
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, optax.tree.scale(-learning_rate, changes))
        return (params, opt_state), parts

    def epoch(learner, key):
        # Minibatches of whole environments: the memory reads their steps in order.
        random_bits = jax.random.bits(key, (config.num_envs,))
        order = jnp.argsort(random_bits)  # one sort; jax.random.permutation takes two
        minibatches = order.reshape(config.num_minibatches, -1)
        return jax.lax.scan(gradient_step, learner, minibatches)

    key, shuffle_key = jax.random.split(state.key)
    epoch_keys = jax.random.split(shuffle_key, config.update_epochs)
    learner = (flat, state.opt_state)
    (flat, opt_state), parts = jax.lax.scan(epoch, learner, epoch_keys)
    params = unflatten(flat)

    metrics = jax.tree.map(jnp.mean, parts) | {
        # The first minibatch is evaluated with the parameters that collected it: a ratio other
        # than 1 is a bug.
        "losses/first_ratio_error": parts["losses/first_ratio_error"][0, 0],
        "losses/explained_variance": 1.0 - (returns - batch.value).var() / (returns.var() + 1e-8),
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
        no_action = jnp.zeros((config.num_envs, *env.action_space.shape), env.action_space.dtype)
        inputs = Inputs(obs, no_action, jnp.zeros(config.num_envs))
        start = jnp.ones(config.num_envs, bool)
        carry = network.initialize_carry(config.num_envs)
        params = network.init(network_key, carry, inputs, start, method="step")
        return State(
            params=params,
            opt_state=optimizer.init(params),
            env_state=env_state,
            carry=carry,
            inputs=inputs,
            start=start,
            key=key,
            updates=jnp.int32(0),
            config=config,
        )

    return jax.jit(vmap_seeds(init_seed))(key.reshape(-1))


def warmup(state: State, env, logger) -> State:
    """Compile the update, so that `train` reports the speed of training; PPO needs nothing else."""
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
