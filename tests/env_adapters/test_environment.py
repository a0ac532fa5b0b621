"""What every environment is, whatever its library: ends, beginnings, normalisation."""

import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward
from helpers import random_rollout as rollout
from helpers import tiny

from algorithms import ppo, rppo
from env_adapters.environment import Moments, branch_where, where
from envs import NAMESPACES, Box, Discrete, Task, make, record
from experiment import seed_keys
from harness.checkpoints import Checkpoints
from loggers import Logger

# --- How episodes end and begin ------------------------------------------------------------------


def test_truncation_and_termination_are_told_apart():
    env = make("gymnax::CartPole-v1", max_steps_in_episode=20)
    obs, next_obs, _, terminated, truncated, info = rollout(env, 2000)
    assert env.max_steps == 20 and truncated.any() and terminated.any()
    assert (info["episode_length"][truncated] == 20).all()
    assert (info["episode_length"][terminated] <= 20).all()
    # Terminal observations are outside the task's bounds, those at the time limit are not.
    place, angle = jnp.abs(info["final_obs"][:, 0]), jnp.abs(info["final_obs"][:, 2])
    outside = (place > 2.4) | (angle > 12 * 2 * jnp.pi / 360)
    np.testing.assert_array_equal(outside, terminated)


def test_final_obs_is_the_true_next_observation():
    env = make("gymnax::CartPole-v1", max_steps_in_episode=20)
    obs, next_obs, _, terminated, truncated, info = rollout(env, 500)
    done = info["episode_done"]
    # Not bit for bit: XLA may compute the same sum twice, with and without a fused multiply-add.
    np.testing.assert_allclose(info["final_obs"][~done], next_obs[~done], atol=1e-6)
    assert (jnp.abs(next_obs[done]) <= 0.05).all()  # CartPole starts within 0.05 of upright
    assert (jnp.abs(info["final_obs"][done]) > 0.05).any(axis=1).all()
    # x' = x + tau * x_dot: the final observation continues the episode that it ends.
    np.testing.assert_allclose(info["final_obs"][:, 0], obs[:, 0] + 0.02 * obs[:, 1], atol=1e-6)


def test_continuous_actions_are_clipped_and_shaped():
    env = make("gymnax::Pendulum-v1")
    _, state = env.reset(jax.random.key(0))
    far = env.step(jax.random.key(1), state, jnp.array([100.0]))
    edge = env.step(jax.random.key(1), state, jnp.array([2.0]))
    np.testing.assert_array_equal(far[0], edge[0])
    np.testing.assert_array_equal(env.step(jax.random.key(1), state, 2.0)[0], edge[0])


def test_a_costly_beginning_is_computed_where_an_episode_ends_only():
    """The branch gives what computing always gives, alone and in batches, in groups of sqrt(n)."""
    calls = []

    def always(key):
        return jax.random.uniform(key, (2,))

    def first(key):
        shape = jax.eval_shape(always, key)
        return jax.pure_callback(counted, shape, always(key), vmap_method="sequential")

    def counted(x):
        calls.append(x)
        return x

    def both(done, key, x):
        return branch_where(done, first, key, x), where(done, always, key, x)

    keys, x = jax.random.split(jax.random.key(0), (8, 9)), jnp.ones((8, 9, 2))
    three = jnp.zeros((8, 9), bool).at[[0, 2, 7], [8, 1, 3]].set(True)
    of_all, of_some, of_one = np.s_[:, :], np.s_[2], np.s_[2, 1:2]
    alone, batch, batches = both, jax.vmap(both), jax.vmap(jax.vmap(both))
    for function, at, ends, computed in [
        (alone, (2, 1), three, 1),
        (alone, (0, 0), three, 0),
        (batch, of_one, three, 1),
        (batch, of_one, ~three, 0),
        (batch, of_some, three, 3),
        (batches, of_all, three, 8),
        (batches, of_all, jnp.zeros_like(three), 0),
        (batches, of_all, jnp.ones_like(three), 72),
    ]:
        calls.clear()
        np.testing.assert_array_equal(*jax.jit(function)(ends[at], keys[at], x[at]))
        assert len(calls) == computed


def test_equal_beginnings_are_computed_at_once():
    """A function that computes equal keys once is called for all that end, and for nothing else."""
    calls = []

    def first(key):
        number = jax.random.bits(key)
        shape = jax.ShapeDtypeStruct((), number.dtype)
        return jax.pure_callback(counted, shape, number, vmap_method="expand_dims")

    def counted(x):
        calls.append(len(np.unique(x)))
        return np.asarray(x)

    def both(done, key, x):
        once = branch_where(done, first, key, x, equal_once=True)
        return once, where(done, jax.random.bits, key, x)

    keys, x = jax.random.split(jax.random.key(0), (2, 9)), jnp.ones((2, 9), jnp.uint32)
    three = jnp.zeros((2, 9), bool).at[[0, 1, 1], [8, 1, 3]].set(True)
    for ends, computed in [(three, [3]), (jnp.zeros_like(three), []), (~three, [15])]:
        calls.clear()
        np.testing.assert_array_equal(*jax.jit(jax.vmap(jax.vmap(both)))(ends, keys, x))
        assert calls == computed


# --- Normalised observations and rewards, against numpy and against gymnasium's own wrappers -----


BOTH = {"normalize_obs": True, "normalize_reward": True}
SHORT, LONG = {"max_steps_in_episode": 40}, {"max_steps_in_episode": 1000}
PENDULUM = "gymnax::Pendulum-v1"


@functools.cache
def normal_rollout(env, num_envs=4, steps=200, axis_name="envs"):
    """(first obs, each step's outputs (T, N, ...), last state)."""
    reset, step = (jax.vmap(function, axis_name=axis_name) for function in (env.reset, env.step))

    def body(carry, key):
        obs, state = carry
        action_keys, step_keys = jax.random.split(key, (2, num_envs))
        obs, state, *rest = step(step_keys, state, jax.vmap(env.action_space.sample)(action_keys))
        return (obs, state), (obs, *rest, state.statistics)

    @jax.jit
    def run(key):
        reset_key, key = jax.random.split(key)
        obs, state = reset(jax.random.split(reset_key, num_envs))
        carry, results = jax.lax.scan(body, (obs, state), jax.random.split(key, steps))
        return obs, results, carry[1]

    return jax.device_get(run(jax.random.key(0)))


def moments(x):
    """Mean and variance of each prefix of x (T, N, ...); a prior variance of 1 weighs 1e-4."""
    count = 1e-4 + x.shape[1] * np.arange(1, len(x) + 1).reshape(-1, *[1] * (x.ndim - 2))
    mean = x.sum(axis=1, dtype=np.float64).cumsum(axis=0) / count
    square = (x.astype(np.float64) ** 2).sum(axis=1).cumsum(axis=0) + 1e-4
    return mean, square / count - mean**2


def normal(x, mean, var):
    return np.clip((x - mean) / np.sqrt(var + 1e-8), -10, 10)


def discounted(reward, done, gamma):
    total, totals = np.zeros(reward.shape[1]), []
    for r, d in zip(reward, done, strict=True):
        total = gamma * total + r
        totals.append(total)
        total = np.where(d, 0.0, total)
    return np.stack(totals)


@pytest.mark.parametrize("id", ["gymnax::CartPole-v1", PENDULUM])
def test_statistics_are_those_of_all_that_all_environments_saw(id):
    first, (obs, reward, _, _, info, _), _ = normal_rollout(make(id, **SHORT))
    env = make(id, **SHORT, **BOTH, reward_gamma=0.9)
    normal_first, steps, state = normal_rollout(env)
    normal_obs, normal_reward, _, _, normal_info, seen = steps
    done = info["episode_done"]
    assert done.sum() > 10
    np.testing.assert_array_equal(normal_info["episode_return"], info["episode_return"])  # raw
    mean, var = moments(np.concatenate([first[None], obs]))
    for actual, raw, at in (
        (normal_obs, obs, np.s_[1:, None]),
        (normal_info["final_obs"], info["final_obs"], np.s_[1:, None]),
        (normal_first, first, 0),
    ):
        np.testing.assert_allclose(actual, normal(raw, mean[at], var[at]), atol=2e-3)
    var = moments(discounted(reward, done, 0.9))[1]
    np.testing.assert_allclose(normal_reward, normal(reward, 0.0, var[:, None]), rtol=1e-3)
    for x in jax.tree.leaves(seen[:2]):
        for row in range(1, 4):
            np.testing.assert_array_equal(x[:, 0], x[:, row])
    np.testing.assert_allclose(state.statistics.obs.count, 4 * 201, rtol=1e-5)


def test_either_can_be_normalised_alone():
    plain, obs_only, reward_only = (
        make(PENDULUM, **options)
        for options in ({}, {"normalize_obs": True}, {"normalize_reward": True})
    )
    assert obs_only.observation_space.high == 10.0
    np.testing.assert_array_equal(reward_only.observation_space.high, plain.observation_space.high)
    states = [env.reset(jax.random.key(0))[1].statistics for env in (obs_only, reward_only)]
    assert [(x.obs is None, x.returns is None) for x in states] == [(False, True), (True, False)]


def test_without_the_axis_every_environment_has_its_own():
    first, (obs, *_), _ = normal_rollout(make(PENDULUM, **LONG))
    _, (normal_obs, *_), _ = normal_rollout(make(PENDULUM, **LONG, **BOTH), axis_name=None)
    for env in range(4):
        mean, var = moments(np.concatenate([first[None], obs])[:, env : env + 1])
        expected = normal(obs[:, env], mean[1:], var[1:])
        np.testing.assert_allclose(normal_obs[:, env], expected, atol=5e-3)


def test_environments_on_two_devices_share_their_statistics(rng):
    obs = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    update = jax.vmap(Moments.init((3,)).update, axis_name="envs")
    one, two = update(obs), jax.vmap(update, axis_name="devices")(obs.reshape(2, 2, 3))
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(y.reshape(x.shape), x, rtol=1e-6)


class Replay(gymnasium.vector.VectorEnv):
    """Hands gymnasium's wrappers what ours has seen."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, first, obs, reward, ends):
        self.num_envs = len(first)
        self.first = first
        self.steps = iter(zip(obs, reward, ends, strict=True))
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, first.shape[1:])
        self.single_action_space = gymnasium.spaces.Discrete(2)

    def reset(self, **_):
        return self.first, {}

    def step(self, _):
        obs, reward, ends = next(self.steps)
        return obs, reward.astype(np.float64), ends, np.zeros_like(ends), {}


def test_as_gymnasium_does_it():
    """The same observations and, within an episode, the same rewards, prior included."""
    first, (obs, reward, *_), _ = normal_rollout(make(PENDULUM, **LONG))
    env = make(PENDULUM, **LONG, **BOTH)
    normal_first, (normal_obs, normal_reward, *_), _ = normal_rollout(env)
    ends = np.zeros(reward.shape, bool)
    oracle = NormalizeReward(NormalizeObservation(Replay(first, obs, reward, ends)))
    np.testing.assert_allclose(normal_first, oracle.reset()[0], atol=1e-4)
    for t in range(len(obs)):
        expected_obs, expected_reward, *_ = oracle.step(None)
        np.testing.assert_allclose(normal_obs[t], np.clip(expected_obs, -10, 10), atol=1e-3)
        np.testing.assert_allclose(normal_reward[t], np.clip(expected_reward, -10, 10), rtol=1e-3)


def test_frozen():
    env = make(PENDULUM, **SHORT, **BOTH, reward_gamma=0.9)
    plain = make(PENDULUM, **SHORT)
    state = normal_rollout(env)[2]
    statistics = jax.tree.map(lambda x: x[0], state.statistics)
    moments_of_obs = statistics.obs.mean, statistics.obs.var
    first, (obs, reward, _, _, info, _), frozen_state = normal_rollout(env.frozen(state))
    plain_first, (plain_obs, plain_reward, _, _, plain_info, _), _ = normal_rollout(plain)
    assert frozen_state.statistics == ()
    for actual, raw in (
        (first, plain_first),
        (obs, plain_obs),  # the first step and the last by the same numbers
        (info["final_obs"], plain_info["final_obs"]),
    ):
        np.testing.assert_allclose(actual, normal(raw, *moments_of_obs), atol=1e-5)
    expected = plain_reward / np.sqrt(statistics.returns.var + 1e-8)
    np.testing.assert_allclose(reward, expected, rtol=1e-5)
    np.testing.assert_array_equal(info["episode_return"], plain_info["episode_return"])
    assert plain.frozen(None) is plain


@pytest.mark.parametrize(("script", "num_seeds"), [(rppo, 1), (ppo, 2)])
def test_a_trained_agent_is_evaluated_with_its_statistics(script, num_seeds, tmp_path):
    """Raw returns, statistics as before, and the same result from a checkpoint."""
    config = tiny(script, env_kwargs={"terminal_every": 5} | BOTH, num_seeds=num_seeds)
    env, keys = config.make_env(), seed_keys(config)
    state, _ = script.train(script.init(config, keys), env, Logger(), 64)
    before = jax.device_get(state.env_state.statistics)
    np.testing.assert_allclose(before.obs.count, 4 * (1 + 16), rtol=1e-5)
    episodes = script.evaluate(state, env, 4)
    np.testing.assert_array_equal(episodes.returns, np.full((num_seeds, 4), 5.0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.env_state.statistics), before)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 64)
    restored, *_ = checkpoints.restore(jax.eval_shape(lambda: script.init(config, keys)))
    jax.tree.map(np.testing.assert_array_equal, restored.env_state.statistics, before)
    jax.tree.map(np.testing.assert_array_equal, script.evaluate(restored, env, 4), episodes)


def test_a_frozen_environment_is_filmed():
    env = make("gymnax::CartPole-v1", **BOTH)
    _, state = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 3))

    def policy(memory, obs, *_):
        return memory, jnp.zeros(len(obs), jnp.int32)

    def filmed(state):
        return record(env.frozen(state), policy, lambda _: (), jax.random.key(0), 1, 1)

    film = jax.jit(filmed)(state)
    frame = env.render(jax.tree.map(lambda x: x[0], jax.device_get(film.states)))
    assert film.length > 3 and frame.dtype == np.uint8


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "test::Image",
            {"normalize_obs": True},
            "normalize_obs is not for images, which test::Image has",
        ),
        (
            "gymnax::CartPole-v1",
            {"normalise_obs": True},
            r"no option 'normalise_obs' \(did you mean 'normalize_obs'\?\)",
        ),
        (
            "gymnax::CartPole-v1",
            {"normalize_obs": 1},
            "option normalize_obs of gymnax::CartPole-v1 must be bool, got 1",
        ),
        (
            "gymnax::CartPole-v1",
            {"reward_gamma": 1.5},
            "reward_gamma of .* must be between 0 and 1, got 1.5",
        ),
    ],
)
def test_what_cannot_be_normalised(id, options, message, monkeypatch):
    def reset(key):
        return jnp.zeros((4, 4, 3), jnp.uint8), ()

    image = Task(reset, None, Box(0, 255, (4, 4, 3), np.uint8), Discrete(2), 3)
    monkeypatch.setitem(NAMESPACES, "test", (lambda: ["Image"], lambda *_: image))
    with pytest.raises(ValueError, match=message):
        make(id, **options)
