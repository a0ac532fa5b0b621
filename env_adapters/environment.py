"""From a `Task` to an `Environment`: casting, auto-reset, episode bookkeeping and normalisation, once for all libraries."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.task import Box, Task, cast, strong


class EnvState(NamedTuple):
    """The state of one environment."""

    task: Any  # the library's own state
    time: jax.Array  # () int32, steps since the episode began
    episode_return: jax.Array  # () float32, rewards since the episode began
    statistics: Any = ()  # what `Normalized` keeps, across episodes


class Environment:
    """A single environment with same-step auto-reset: the interface of this module's docstring.

    `info` has the keys
      final_obs: the true next observation, also where the returned one begins the next episode;
      episode_done: () bool, terminated or truncated;
      episode_return: () float32, sum of rewards of the episode up to and including this step;
      episode_length: () int32, its steps; both count the whole episode where episode_done.
    """

    def __init__(self, id: str, task: Task):
        self.id = id
        self.observation_space = task.observation_space
        self.action_space = task.action_space
        self.max_steps = task.max_steps
        self.render = task.render
        self._task = task
        self._state_avals = jax.eval_shape(task.reset, jax.random.key(0))[1]

    def __repr__(self):
        return f"make({self.id!r})"

    def reset(self, key):
        """key -> (obs, EnvState)."""
        obs, task_state = self._task.reset(key)
        return self._cast_obs(obs), EnvState(self._cast_state(task_state), jnp.int32(0), jnp.float32(0.0))

    def step(self, key, state, action):
        """key, EnvState, action -> (obs, EnvState, reward, terminated, truncated, info)."""
        step_key, reset_key = jax.random.split(key)
        action = jnp.asarray(action, self.action_space.dtype).reshape(self.action_space.shape)
        if isinstance(self.action_space, Box):
            action = jnp.clip(action, self.action_space.low, self.action_space.high)
        final_obs, task_state, reward, terminated, truncated = self._task.step(step_key, state.task, action)
        final_obs = self._cast_obs(final_obs)
        reward = strong(jnp.asarray(reward, jnp.float32).reshape(()))
        terminated = jnp.asarray(terminated, bool).reshape(())
        truncated = jnp.asarray(truncated, bool).reshape(()) & ~terminated
        done = terminated | truncated

        state = EnvState(self._cast_state(task_state), state.time + 1, state.episode_return + reward)
        info = {
            "final_obs": final_obs,
            "episode_done": done,
            "episode_return": state.episode_return,
            "episode_length": state.time,
        }
        begin = branch_where if self._task.costly_reset else where
        obs, state = begin(done, functools.partial(Environment.reset, self), reset_key, (final_obs, state))
        return obs, state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in; see `Normalized.frozen`."""
        return self

    def _cast_obs(self, obs):
        return strong(cast(obs, self._task.observation_space))

    def _cast_state(self, task_state):
        # Libraries return weak types, and other dtypes from step than from reset: either compiles everything twice.
        def cast_leaf(leaf, aval):
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                return leaf
            return strong(jnp.asarray(leaf).astype(aval.dtype))

        return jax.tree.map(cast_leaf, task_state, self._state_avals)


def where(condition, function, key, otherwise):
    """function(key) where the condition holds, else `otherwise`; all may have leading axes, those of the condition."""

    def select(x, y):
        return jnp.where(condition.reshape(condition.shape + (1,) * (y.ndim - condition.ndim)), x, y)

    return jax.tree.map(select, function(key), otherwise)


def branch_where(condition, function, key, otherwise):
    """`where` that computes the function only where the condition holds; under vmap in groups, not for all of a batch.

    Groups of sqrt(n) of n compute little in vain, and n / 16 are not too many turns for a GPU. A group that the
    condition does not fill computes its first member again: a task that looks can spare itself that.
    """

    @jax.custom_batching.custom_vmap  # a plain cond would become a select, which computes both branches
    def branch(condition, key, otherwise):
        if condition.ndim == 0:
            return jax.lax.cond(condition, lambda: function(key), lambda: otherwise)
        if condition.size == 1:  # of a batch of one a loop would compute all outside, always
            return jax.tree.map(lambda x: x[None], branch(*jax.tree.map(lambda x: x[0], (condition, key, otherwise))))

        def body(loop):
            waiting, result = loop
            (rows,) = jnp.nonzero(waiting, size=group_size, fill_value=waiting.argmax())
            computed = jax.vmap(function)(flat_key[rows])
            return waiting.at[rows].set(False), jax.tree.map(lambda x, y: x.at[rows].set(y), result, computed)

        axes, flat_key = condition.ndim, key.reshape(-1)
        group_size = max(math.isqrt(condition.size), condition.size // 16)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), (condition, otherwise))
        _, result = jax.lax.while_loop(lambda loop: loop[0].any(), body, flat)
        return jax.tree.map(lambda x, y: x.reshape(y.shape), result, otherwise)

    @branch.def_vmap
    def _(size, is_batched, *args):
        def batched(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        condition, key, otherwise = jax.tree.map(batched, args, tuple(is_batched))
        result = branch_where(condition, function, key, otherwise)
        return result, jax.tree.map(lambda _: True, result)

    return branch(condition, key, otherwise)


class Moments(NamedTuple):
    """Running mean and variance of everything seen (Chan et al. 1979), with the prior of gymnasium's RunningMeanStd."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # () float32; where it is too large to be counted up, new values keep the weight they had then

    @classmethod
    def init(cls, shape):
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.float32(1e-4))

    def update(self, x):
        """Take in x of this environment, or of all that are vmapped with axis_name="envs"."""
        try:
            number, mean = jax.lax.psum(1, "envs"), jax.lax.pmean(x, "envs")
            var = jax.lax.pmean((x - mean) ** 2, "envs")
        except NameError:  # there is no such axis
            number, mean, var = 1, x, jnp.zeros_like(x)
        count = self.count + number
        weight, change = number / count, mean - self.mean
        var = self.var + weight * (var - self.var + (1.0 - weight) * change**2)
        return Moments(self.mean + weight * change, var, count)


class Statistics(NamedTuple):
    """What normalisation knows; None stands for what is not normalised."""

    obs: Moments | None  # of every observation returned
    returns: Moments | None  # of the discounted return so far, at every step
    discounted: jax.Array  # () float32, the discounted return so far of this episode


class Normalized(Environment):
    """An environment whose observations, rewards or both have a variance of about 1.

      observation: (obs - mean) / sqrt(var + 1e-8), of all observations returned so far, this one included;
      reward: reward / sqrt(var + 1e-8) of the discounted return so far, g <- gamma * g + reward;
    both clipped to +-10, as by CleanRL and Engstrom et al. 2020, arXiv 2005.12729.

    The statistics are part of the state and outlive episodes. Environments under `jax.vmap(env.step, axis_name="envs")`
    (the same for env.reset) share theirs; without that name each has its own. `info["final_obs"]` is normalised with
    the statistics of that step but, as the one observation that is never acted upon, does not count towards them.
    `info["episode_return"]` is that of the task. This is what gymnasium's NormalizeObservation and NormalizeReward for
    vectors do, but that the latter restarts g one step early at a termination, and not at all at a truncation.
    """

    def __init__(self, id, task, observations: bool, rewards: bool, gamma: float, statistics: Statistics | None = None):
        super().__init__(id, task)
        self._observations, self._rewards, self._gamma, self._fixed = observations, rewards, gamma, statistics
        if observations:
            if task.observation_space.dtype == np.uint8:
                raise ValueError(f"normalize_obs is not for images, which {id} has: the networks divide them by 255")
            self.observation_space = Box(-10.0, 10.0, task.observation_space.shape)

    def reset(self, key):
        obs, state = super().reset(key)
        shape, discounted = self.observation_space.shape, jnp.float32(0.0)
        moments = (Moments.init(shape) if self._observations else None), (Moments.init(()) if self._rewards else None)
        statistics = self._fixed or self._see(Statistics(*moments, discounted), obs)
        return self._normalize(obs, statistics), state._replace(statistics=() if self._fixed else statistics)

    def step(self, key, state, action):
        statistics = state.statistics
        obs, state, reward, terminated, truncated, info = super().step(key, state._replace(statistics=()), action)
        if self._fixed:
            statistics = self._fixed
        else:
            statistics = self._see(statistics, obs)
            discounted = self._gamma * statistics.discounted + reward
            returns = statistics.returns.update(discounted) if self._rewards else None
            discounted = jnp.where(info["episode_done"], 0.0, discounted)
            statistics = Statistics(statistics.obs, returns, discounted)
            state = state._replace(statistics=statistics)
        if self._rewards:
            reward = jnp.clip(reward / jnp.sqrt(statistics.returns.var + 1e-8), -10.0, 10.0)
        info |= {"final_obs": self._normalize(info["final_obs"], statistics)}
        return self._normalize(obs, statistics), state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in: it normalises with the statistics of `env_state` and leaves them as they are.

        Its rewards are scaled too, as a policy with memory may read them; `info["episode_return"]` is the raw return.

        Args:
          env_state: states of vmapped environments, (N, ...), of which the mean is taken: they share their statistics.
        """
        statistics = jax.tree.map(lambda x: x.mean(axis=0), env_state.statistics)
        return Normalized(self.id, self._task, self._observations, self._rewards, self._gamma, statistics)

    def _see(self, statistics, obs):
        return statistics._replace(obs=statistics.obs.update(obs)) if self._observations else statistics

    def _normalize(self, obs, statistics):
        if not self._observations:
            return obs
        return jnp.clip((obs - statistics.obs.mean) / jnp.sqrt(statistics.obs.var + 1e-8), -10.0, 10.0)
