"""From a `Task` to an `Environment`: casting, auto-reset, episode bookkeeping and preprocessing.

All libraries share this code, so an adapter has to supply the bare task only.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.task import (
    AsymmetricObs,
    Box,
    Discrete,
    MaskedObs,
    Task,
    as_joint,
    as_parts,
    cast,
    first_of,
    scale,
    seen_by,
    strong,
    unscale,
    without_mask,
)
from harness.axes import DEVICES, axes_in_use


class EnvState(NamedTuple):
    """The state of one environment."""

    task: Any  # the library's own state
    time: jax.Array  # () int32, steps since the episode began
    episode_return: jax.Array  # () float32, sum of rewards since the episode began
    statistics: Any = ()  # what `Preprocessed` keeps across episodes
    stuck: Any = ()  # () int32, with an action mask: the first time at which it allowed nothing


NEVER = -1  # of `EnvState.stuck`


class Environment:
    """A single environment with same-step auto-reset; `envs.py` describes the interface.

    `info` has the keys
      final_obs: the true next observation; `obs` differs from it only in a step that ends an
        episode, where it is the first observation of the next episode;
      episode_done: () bool, terminated or truncated;
      episode_return: () float32, sum of the episode's rewards as the task gives them, this step
        included;
      episode_length: () int32, number of the episode's steps, this one included;
      action_mask: (num_actions,) bool, with a task that has one: which actions are valid next;
      and those in `reports`: () float32, about the episode that ends in this step.

    With an action mask observations are `MaskedObs`, `final_obs` among them. Those of
    `make_asymmetric` are `AsymmetricObs`, of which `observation_space` describes the actor's part.

    Attributes:
      id: the name it was made with.
      observation_space: a `Box`; observations are float32, or uint8 if they are images. Where they
        have parts, a dict or tuple of boxes, also nested; None for a part that `mask` hides.
      action_space: a `Box`, `Discrete` or `MultiDiscrete`; actions outside a `Box` are clipped to
        it, discrete ones count from 0.
      task_action_space: the same, or the task's own, where these are in other units or count from
        another number, or where `joint_actions` has made one action of several parts.
      max_steps: an upper bound of an episode's length.
      render: `EnvState.task` -> uint8 image (height, width, 3), outside of JAX; or None.
      has_action_mask: whether the task says which actions are valid.
      hides: whether a critic could see more than the actor: a mask or a wrapper hides or disturbs
        what the task shows, or the task has a privileged observation.
      reports: names of what `info` says of an episode that ends, besides the above: those of
        `Task.report`.
      raw: the environment for replay buffers: its observations and rewards are those of the task,
        and `preprocess` makes of them what a learner reads. Here it is this environment.
    """

    def __init__(self, id: str, task: Task, hides: bool = False, asymmetric: bool = False):
        self.id = id
        self.hides = hides
        self.observation_space = task.observation_space
        self.action_space = task.action_space
        self.task_action_space = task.own_actions or task.action_space
        self.max_steps = task.max_steps
        self.has_action_mask = task.action_mask is not None
        self.render = task.render
        self.raw = self
        self._task = task
        self._state_avals = jax.eval_shape(task.reset, jax.random.key(0))[1]
        report = jax.eval_shape(task.report, self._state_avals) if task.report else {}
        self.reports = tuple(report)
        self._full_space = privileged_space(task, self._state_avals) if asymmetric else None

    def __repr__(self):
        return f"make({self.id!r})"

    def reset(self, key):
        """key -> (obs, EnvState)."""
        obs, task_state = self._task.reset(key)
        state = EnvState(
            task=self._cast_state(task_state),
            time=jnp.int32(0),
            episode_return=jnp.float32(0.0),
        )
        obs = self._cast_obs(obs, state.task)
        return obs, self._note_stuck(state, obs, NEVER)

    def step(self, key, state, action):
        """(key, EnvState, action) -> (obs, EnvState, reward, terminated, truncated, info)."""
        step_key, reset_key = jax.random.split(key)
        stuck = state.stuck
        action = self._cast_action(action)
        final_obs, task_state, reward, terminated, truncated = self._task.step(
            step_key, state.task, action
        )
        reward = strong(jnp.asarray(reward, jnp.float32).reshape(()))
        terminated = jnp.asarray(terminated, bool).reshape(())
        truncated = jnp.asarray(truncated, bool).reshape(()) & ~terminated
        done = terminated | truncated

        state = EnvState(
            task=self._cast_state(task_state),
            time=state.time + 1,
            episode_return=state.episode_return + reward,
            stuck=state.stuck,
        )
        final_obs = self._cast_obs(final_obs, state.task)
        info = {
            "final_obs": final_obs,
            "episode_done": done,
            "episode_return": state.episode_return,
            "episode_length": state.time,
        }
        if self._task.report:
            info |= self._task.report(state.task)
        reset = functools.partial(Environment.reset, self)  # not that of `Preprocessed`
        if self._task.costly_reset:
            once = self._task.equal_resets_once
            obs, state = branch_where(done, reset, reset_key, (final_obs, state), once)
        else:
            obs, state = where(done, reset, reset_key, (final_obs, state))
        state = self._note_stuck(state, obs, stuck)
        if self.has_action_mask:
            info["action_mask"] = seen_by("actor", obs).action_mask
        return obs, state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in, without what a critic sees; no statistics are frozen."""
        return Environment(self.id, self._task) if self._full_space else self

    def preprocess(self, env_state, steps):
        """Steps of `raw` as a learner reads them: here as they are."""
        return steps

    def preprocess_obs(self, env_state, obs):
        """Observations of `raw` as a learner reads them: here as they are."""
        return obs

    def with_mask(self, obs, action_mask=None):
        """The observation as `step` returns it: with the action mask, if there is one."""
        return MaskedObs(obs, action_mask) if self.has_action_mask else obs

    def to_task(self, action):
        """Actions of this environment, with any leading axes, as the task itself executes them.

        They are clipped to its bounds, in its units, and count from its first number.
        """
        space = self.action_space
        own = self._task.own_actions
        action = jnp.asarray(action, space.dtype)
        if isinstance(space, Box):
            action = jnp.clip(action, space.low, space.high)
            return action if own is None else scale(action, own).astype(own.dtype)
        if own is None:
            return action
        is_joint = isinstance(space, Discrete) and own.shape
        return first_of(own) + (as_parts(action, own) if is_joint else action)

    def from_task(self, action):
        """The inverse of `to_task`, for actions within bounds."""
        space, own = self.action_space, self._task.own_actions
        if isinstance(own, Box):
            action = unscale(action, own)
        elif own is not None:
            action = action - first_of(own)
            if isinstance(space, Discrete) and own.shape:
                action = as_joint(action, own)
        return jnp.asarray(action, space.dtype)

    def _cast_action(self, action):
        space = self.action_space
        action = jnp.asarray(action, space.dtype).reshape(space.shape)
        return jnp.clip(action, space.low, space.high) if isinstance(space, Box) else action

    def _cast_obs(self, obs, task_state):
        obs = jax.tree.map(strong, cast(obs, self._task.observation_space))
        if self._task.action_mask:
            obs = MaskedObs(obs, jnp.asarray(self._task.action_mask(task_state), bool))
        if not self._full_space:
            return obs
        full = cast(self._task.privileged(task_state), self._full_space)
        return AsymmetricObs(obs, jax.tree.map(strong, full))

    def _note_stuck(self, state, obs, before):
        """Remember when the mask first allowed nothing: `Run` ends with an error for it."""
        if not self._task.action_mask:
            return state
        now = jnp.where(seen_by("actor", obs).action_mask.any(), NEVER, state.time)
        return state._replace(stuck=jnp.where(before == NEVER, now, before))

    def _cast_state(self, task_state):
        """The state with the dtypes it has after a reset, and without weak types.

        Some libraries return other types from step than from reset, and JAX would compile
        everything a second time for them.
        """

        def cast_leaf(leaf, aval):
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                return leaf
            return strong(jnp.asarray(leaf).astype(aval.dtype))

        return jax.tree.map(cast_leaf, task_state, self._state_avals)


def privileged_space(task: Task, state):
    """The space of a task's privileged observations: float32, or uint8 if they are images."""

    def space_of(obs):
        if obs.dtype == np.uint8:
            return Box(0, 255, obs.shape, np.uint8)
        return Box(-np.inf, np.inf, obs.shape)

    return jax.tree.map(space_of, jax.eval_shape(task.privileged, state))


# --- Choosing between a step and a reset ---------------------------------------------------------


def where(condition, function, key, otherwise):
    """function(key) where the condition holds, `otherwise` elsewhere.

    Args:
      condition: bool, with any leading axes.
      key: one for every entry of the condition; the function takes all of them at once.
      otherwise: a pytree like the function's result; its leaves begin with the axes of the
        condition.
    """

    def select(x, y):
        missing_axes = (1,) * (y.ndim - condition.ndim)
        return jnp.where(condition.reshape(condition.shape + missing_axes), x, y)

    return jax.tree.map(select, function(key), otherwise)


def branch_where(condition, function, key, otherwise, equal_once=False):
    """`where` that computes the function only for entries whose condition holds.

    A plain `jax.lax.cond` becomes a select under vmap, which computes the function for every entry.
    Here a loop computes it for a group of entries at a time, until all have been served. A group
    has sqrt(n) of n entries, so that few are computed in vain, or n / 16 if that is more, so that
    a GPU need not go through the loop often. A group that is not full is filled up with copies of
    its first entry; a task can recognise these by their equal keys.

    Args:
      equal_once: the function computes equal keys of a batch only once. All entries are then
        served as one group, or none if there is nothing to serve.
    """

    @jax.custom_batching.custom_vmap
    def branch(condition, key, otherwise):
        if condition.ndim == 0:
            return jax.lax.cond(condition, lambda: function(key), lambda: otherwise)
        if condition.size == 1:  # XLA would move the body of a loop over one entry out of the loop
            single = jax.tree.map(lambda x: x[0], (condition, key, otherwise))
            return jax.tree.map(lambda x: x[None], branch(*single))

        num_axes = condition.ndim
        flat_key = key.reshape(-1)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[num_axes:]), (condition, otherwise))
        result = serve_at_once(flat_key, *flat) if equal_once else serve_groups(flat_key, flat)
        return jax.tree.map(lambda x, y: x.reshape(y.shape), result, otherwise)

    def serve_at_once(key, waiting, result):
        key = jnp.where(waiting, key, key[waiting.argmax()])
        return jax.lax.cond(
            waiting.any(),
            lambda: where(waiting, jax.vmap(function), key, result),
            lambda: result,
        )

    def serve_groups(key, loop):
        size = key.size
        group_size = max(math.isqrt(size), size // 16)

        def is_waiting(loop):
            waiting, _ = loop
            return waiting.any()

        def serve_group(loop):
            waiting, result = loop
            (rows,) = jnp.nonzero(waiting, size=group_size, fill_value=waiting.argmax())
            computed = jax.vmap(function)(key[rows])
            waiting = waiting.at[rows].set(False)
            return waiting, jax.tree.map(lambda x, y: x.at[rows].set(y), result, computed)

        _, result = jax.lax.while_loop(is_waiting, serve_group, loop)
        return result

    @branch.def_vmap
    def _(size, is_batched, *args):
        def batch(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        condition, key, otherwise = jax.tree.map(batch, args, tuple(is_batched))
        result = branch_where(condition, function, key, otherwise, equal_once)
        return result, jax.tree.map(lambda _: True, result)

    return branch(condition, key, otherwise)


# --- Preprocessing -------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Running mean and variance (Chan et al. 1979).

    The start, a variance of 1 that weighs 1e-4 observations, is that of gymnasium's RunningMeanStd.
    """

    mean: jax.Array  # float32, the shape of one value
    var: jax.Array  # float32, likewise
    count: jax.Array  # () float32; past about 2^24 it stops growing, and new weights stay fixed

    @classmethod
    def init(cls, shape):
        return cls(
            mean=jnp.zeros(shape, jnp.float32),
            var=jnp.ones(shape, jnp.float32),
            count=jnp.float32(1e-4),
        )

    def update(self, x):
        """Take in x, or the x of all environments that are vmapped with axis_name="envs"."""
        axes = axes_in_use("envs")
        if axes:
            axes += axes_in_use(DEVICES)  # which share these environments
        number = jax.lax.psum(1, axes)
        mean = jax.lax.pmean(x, axes)
        var = jax.lax.pmean((x - mean) ** 2, axes)
        count = self.count + number
        weight = number / count
        change = mean - self.mean
        var = self.var + weight * (var - self.var + (1.0 - weight) * change**2)
        return Moments(self.mean + weight * change, var, count)


class Statistics(NamedTuple):
    """What normalisation keeps; None for what is not normalised."""

    obs: Any  # Moments of the observations returned so far, with parts of each that is no image
    returns: Moments | None  # of `discounted` at every step so far
    discounted: jax.Array  # () float32, sum of the episode's past rewards, older ones discounted
    full: Any = None  # like obs, of what the critic sees


class Preprocessed(Environment):
    """An environment whose observations or rewards are scaled or clipped for the learner.

      `Task.clip_reward`: rewards are clipped to [-1, 1];
      observations: (obs - mean) / sqrt(var + 1e-8), with the mean and variance of all observations
        returned so far, this one included;
      rewards: reward / sqrt(var + 1e-8), with the variance of g, the discounted sum of past
        rewards: g <- gamma * g + reward;
    both clipped to [-10, 10], as in CleanRL and Engstrom et al. 2020, arXiv 2005.12729.

    Of observations that have parts, images stay as they are.

    The statistics are part of the state and outlive episodes. Environments under
    `jax.vmap(env.step, axis_name="envs")`, and the same for `env.reset`, share their statistics;
    without that name every environment has its own.

    `info["final_obs"]` is normalised with the statistics of its step, but it does not count towards
    them, as no action follows it. `info["episode_return"]` sums the rewards of the task.

    `step` uses the statistics of that step. What is replayed later was scaled with statistics of
    long ago, so a replay buffer keeps what `raw` returns, and `preprocess` scales it with those of
    today. `raw` collects the same statistics.

    This is what gymnasium's NormalizeObservation and NormalizeReward for vectors do, with one
    difference: g restarts where an episode ends. Gymnasium restarts g one step early at a
    termination, and not at all at a truncation.
    """

    def __init__(
        self,
        id: str,
        task: Task,
        observations: bool,
        rewards: bool,
        gamma: float,
        statistics: Statistics | None = None,
        raw: bool = False,
        hides: bool = False,
        asymmetric: bool = False,
    ):
        """Statistics are fixed if they are given, and collected otherwise; `raw`: only collected.

        Raises:
          ValueError: `observations` are to be normalised and they are images only.
        """
        super().__init__(id, task, hides, asymmetric)
        self._observations = observations
        self._rewards = rewards
        self._gamma = gamma
        self._fixed = statistics
        self._is_raw = raw
        if observations:
            if all(map(is_image, jax.tree.leaves(task.observation_space))):
                reason = "the networks divide them by 255"
                raise ValueError(f"normalize_obs is not for images, which {id} has: {reason}")
            if not raw:
                self.observation_space = jax.tree.map(
                    lambda part: part if is_image(part) else Box(-10.0, 10.0, part.shape),
                    task.observation_space,
                )
        if not raw and not statistics:
            self.raw = Preprocessed(
                id, task, observations, rewards, gamma, raw=True, asymmetric=asymmetric
            )

    def reset(self, key):
        obs, state = super().reset(key)
        if self._fixed:
            return self._scale_obs(obs, self._fixed), state
        has_full = self._observations and self._full_space
        statistics = Statistics(
            obs=no_moments(self._task.observation_space) if self._observations else None,
            returns=Moments.init(()) if self._rewards else None,
            discounted=jnp.float32(0.0),
            full=no_moments(self._full_space) if has_full else None,
        )
        statistics = self._count_obs(statistics, obs)
        state = state._replace(statistics=statistics)
        return obs if self._is_raw else self._scale_obs(obs, statistics), state

    def step(self, key, state, action):
        statistics = state.statistics
        state = state._replace(statistics=())
        obs, state, reward, terminated, truncated, info = super().step(key, state, action)
        if self._fixed:
            statistics = self._fixed
        else:
            statistics = self._count_obs(statistics, obs)
            statistics = self._count_reward(statistics, reward, info["episode_done"])
            state = state._replace(statistics=statistics)
        if not self._is_raw:
            obs = self._scale_obs(obs, statistics)
            reward = self._scale_reward(reward, statistics)
            info |= {"final_obs": self._scale_obs(info["final_obs"], statistics)}
        return obs, state, reward, terminated, truncated, info

    def frozen(self, env_state):
        """The environment to evaluate in, which uses the statistics of `env_state` unchanged.

        It shows what an actor sees, and nothing else.

        Rewards are still scaled, since a policy with memory may read them;
        `info["episode_return"]` is the raw return.

        Args:
          env_state: states of vmapped environments, (N, ...).
        """
        return Preprocessed(
            id=self.id,
            task=self._task,
            observations=self._observations,
            rewards=self._rewards,
            gamma=self._gamma,
            statistics=mean_over_envs(env_state.statistics),
        )

    def preprocess(self, env_state, steps):
        """Steps of `raw` as a learner reads them, scaled with the statistics of `env_state`.

        Args:
          env_state: states of vmapped environments, (N, ...); a frozen environment has statistics
            of its own and does not read it.
          steps: any pytree of named tuples. Their fields `obs`, `next_obs` and `reward` are scaled,
            with any leading axes, and so is what a critic sees; everything else stays as it is.
        """
        statistics = self._fixed or mean_over_envs(env_state.statistics)

        def scale_field(name, x):
            if name in ("obs", "next_obs"):
                return self._scale_obs(x, statistics)
            return self._scale_reward(x, statistics) if name == "reward" else scale_fields(x)

        def scale_fields(steps):
            def scale_tuple(x):
                if not is_named(x):
                    return x
                fields = x._asdict().items()
                return x._replace(**{name: scale_field(name, value) for name, value in fields})

            return jax.tree.map(scale_tuple, steps, is_leaf=is_named)

        return scale_fields(steps)

    def preprocess_obs(self, env_state, obs):
        """Observations of `raw`, with any leading axes, as a learner reads them."""
        return self._scale_obs(obs, mean_over_envs(env_state.statistics))

    def _count_obs(self, statistics, obs):
        if not self._observations:
            return statistics
        if isinstance(obs, AsymmetricObs):
            full = count(self._full_space, statistics.full, obs.full)
            statistics = statistics._replace(full=full)
        obs = without_mask(seen_by("actor", obs))
        return statistics._replace(obs=count(self._task.observation_space, statistics.obs, obs))

    def _count_reward(self, statistics, reward, done):
        discounted = self._gamma * statistics.discounted + self._clip_reward(reward)
        returns = statistics.returns.update(discounted) if self._rewards else None
        discounted = jnp.where(done, 0.0, discounted)
        return statistics._replace(returns=returns, discounted=discounted)

    def _scale_obs(self, obs, statistics):
        if not self._observations:
            return obs
        if isinstance(obs, AsymmetricObs):
            full = rescaled(obs.full, statistics.full, self._full_space)
            return AsymmetricObs(self._scale_obs(obs.obs, statistics), full)
        if isinstance(obs, MaskedObs):
            return obs._replace(obs=self._scale_obs(obs.obs, statistics))
        return rescaled(obs, statistics.obs, self._task.observation_space)

    def _clip_reward(self, reward):
        return jnp.clip(reward, -1.0, 1.0) if self._task.clip_reward else reward

    def _scale_reward(self, reward, statistics):
        reward = self._clip_reward(reward)
        if not self._rewards:
            return reward
        return jnp.clip(reward / jnp.sqrt(statistics.returns.var + 1e-8), -10.0, 10.0)


def is_image(space: Box) -> bool:
    return space.dtype == np.uint8


def is_named(x) -> bool:
    """Whether x is a named tuple."""
    return hasattr(x, "_fields")


def no_moments(space):
    """The moments of every part of the space that is no image, before any observation."""
    return jax.tree.map(lambda part: None if is_image(part) else Moments.init(part.shape), space)


def count(space, moments, obs):
    """The moments of every part, with one more observation."""
    return jax.tree.map(lambda _, moments, x: moments and moments.update(x), space, moments, obs)


def rescaled(obs, moments, space):
    """Every part of an observation, scaled."""
    return jax.tree.map(lambda _, x, moments: scaled(x, moments), space, obs, moments)


def scaled(x, moments: Moments | None):
    """x with a mean of 0 and a variance of 1, clipped to [-10, 10]; as it is without moments."""
    if moments is None:
        return x
    return jnp.clip((x - moments.mean) / jnp.sqrt(moments.var + 1e-8), -10.0, 10.0)


def mean_over_envs(statistics: Statistics) -> Statistics:
    """The mean over the leading axis, which changes nothing where environments share statistics."""
    return jax.tree.map(lambda x: x.mean(axis=0), statistics)
