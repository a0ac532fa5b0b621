"""Normalised observations and rewards, against numpy and against gymnasium's own wrappers."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward

import envs
from algorithms import ppo, rppo
from envs import make

BOTH = {"normalize_obs": True, "normalize_reward": True}
SHORT = {"max_steps_in_episode": 40}


def rollout(env, num_envs=4, steps=200, axis_name="envs"):
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
        (_, state), steps_ = jax.lax.scan(body, (obs, state), jax.random.split(key, steps))
        return obs, steps_, state

    return jax.device_get(run(jax.random.key(0)))


def moments(x):
    """Mean and variance of each prefix of x (T, N, ...), over T and N; with a prior variance of 1 that weighs 1e-4."""
    count = 1e-4 + x.shape[1] * np.arange(1, len(x) + 1).reshape(-1, *[1] * (x.ndim - 2))
    mean = x.sum(axis=1, dtype=np.float64).cumsum(axis=0) / count
    square = (x.astype(np.float64) ** 2).sum(axis=1).cumsum(axis=0) + 1e-4
    return mean, square / count - mean**2


def discounted(reward, done, gamma):
    total, totals = np.zeros(reward.shape[1]), []
    for r, d in zip(reward, done, strict=True):
        total = gamma * total + r
        totals.append(total)
        total = np.where(d, 0.0, total)
    return np.stack(totals)


@pytest.mark.parametrize("id", ["gymnax::CartPole-v1", "gymnax::Pendulum-v1"])
def test_statistics_are_those_of_all_that_all_environments_saw(id):
    first, (obs, reward, _, _, info, _), _ = rollout(make(id, **SHORT))
    normal_first, (normal_obs, normal_reward, _, _, normal_info, seen), state = rollout(
        make(id, **SHORT, **BOTH, reward_gamma=0.9)
    )
    done = info["episode_done"]
    assert done.sum() > 10
    np.testing.assert_array_equal(normal_info["episode_return"], info["episode_return"])  # raw
    mean, var = moments(np.concatenate([first[None], obs]))
    normal = lambda x: np.clip((x - mean[1:, None]) / np.sqrt(var[1:, None] + 1e-8), -10, 10)  # noqa: E731
    np.testing.assert_allclose(normal_obs, normal(obs), atol=2e-3)
    np.testing.assert_allclose(normal_info["final_obs"], normal(info["final_obs"]), atol=2e-3)
    np.testing.assert_allclose(normal_first, np.clip((first - mean[0]) / np.sqrt(var[0] + 1e-8), -10, 10), atol=2e-3)
    var = moments(discounted(reward, done, 0.9))[1]
    np.testing.assert_allclose(normal_reward, np.clip(reward / np.sqrt(var + 1e-8)[:, None], -10, 10), rtol=1e-3)
    for row in range(1, 4):
        jax.tree.map(lambda x, row=row: np.testing.assert_array_equal(x[:, 0], x[:, row]), seen[:2])
    np.testing.assert_allclose(state.statistics.obs.count, 4 * 201, rtol=1e-5)


def test_without_the_axis_every_environment_has_its_own():
    obs = [rollout(make("gymnax::Pendulum-v1", **options), axis_name=None)[1][0] for options in ({}, BOTH)]
    first = rollout(make("gymnax::Pendulum-v1"), axis_name=None)[0]
    for env in range(4):
        mean, var = moments(np.concatenate([first[None], obs[0]])[:, env : env + 1])
        expected = np.clip((obs[0][:, env] - mean[1:]) / np.sqrt(var[1:] + 1e-8), -10, 10)
        np.testing.assert_allclose(obs[1][:, env], expected, atol=5e-3)


class Replay(gymnasium.vector.VectorEnv):
    """Hands gymnasium's wrappers what ours has seen."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, first, obs, reward, ends):
        self.num_envs, self.first, self.steps = len(first), first, iter(zip(obs, reward, ends, strict=True))
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, first.shape[1:])
        self.single_action_space = gymnasium.spaces.Discrete(2)

    def reset(self, **_):
        return self.first, {}

    def step(self, _):
        obs, reward, ends = next(self.steps)
        return obs, reward.astype(np.float64), ends, np.zeros_like(ends), {}


def test_as_gymnasium_does_it():
    """The same observations and, within an episode, the same rewards as gymnasium's wrappers, prior included."""
    options = {"max_steps_in_episode": 1000}
    first, (obs, reward, *_), _ = rollout(make("gymnax::Pendulum-v1", **options))
    normal_first, (normal_obs, normal_reward, *_), _ = rollout(make("gymnax::Pendulum-v1", **options, **BOTH))
    ends = np.zeros(reward.shape, bool)
    oracle = NormalizeReward(NormalizeObservation(Replay(first, obs, reward, ends)))
    np.testing.assert_allclose(normal_first, oracle.reset()[0], atol=1e-4)
    for t in range(len(obs)):
        expected_obs, expected_reward, *_ = oracle.step(None)
        np.testing.assert_allclose(normal_obs[t], np.clip(expected_obs, -10, 10), atol=1e-3)
        np.testing.assert_allclose(normal_reward[t], np.clip(expected_reward, -10, 10), rtol=1e-3)


def test_frozen():
    env = make("gymnax::Pendulum-v1", max_steps_in_episode=40, **BOTH)
    plain = make("gymnax::Pendulum-v1", max_steps_in_episode=40)
    state = rollout(env)[2]
    statistics = jax.tree.map(lambda x: x[0], state.statistics)
    first, (obs, reward, _, _, info, _), frozen_state = rollout(env.frozen(state))
    plain_first, (plain_obs, plain_reward, _, _, plain_info, _), _ = rollout(plain)
    normal = lambda x: np.clip((x - statistics.obs.mean) / np.sqrt(statistics.obs.var + 1e-8), -10, 10)  # noqa: E731
    assert frozen_state.statistics == ()
    np.testing.assert_allclose(first, normal(plain_first), atol=1e-5)
    np.testing.assert_allclose(obs, normal(plain_obs), atol=1e-5)  # the first step and the last by the same numbers
    np.testing.assert_allclose(info["final_obs"], normal(plain_info["final_obs"]), atol=1e-5)
    np.testing.assert_allclose(reward, plain_reward / np.sqrt(statistics.returns.var + 1e-8), rtol=1e-5)
    np.testing.assert_array_equal(info["episode_return"], plain_info["episode_return"])
    assert plain.frozen(None) is plain


@pytest.mark.parametrize(("script", "num_seeds"), [(rppo, 1), (ppo, 2)])
def test_a_trained_agent_is_evaluated_with_its_statistics(script, num_seeds, tmp_path):
    """Raw returns, statistics as before, and the same result from a checkpoint."""
    from checkpoints import Checkpoints

    from experiment import seed_keys
    from loggers import Logger

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
    policy = lambda memory, obs, *_: (memory, jnp.zeros(len(obs), jnp.int32))  # noqa: E731
    film = jax.jit(lambda state: envs.record(env.frozen(state), policy, lambda _: (), jax.random.key(0), 1, 1))(state)
    frame = env.render(jax.tree.map(lambda x: x[0], jax.device_get(film.states)))
    assert film.length > 3 and frame.dtype == np.uint8


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("test::Image", {"normalize_obs": True}, "normalize_obs is not for images, which test::Image has"),
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
        ("gymnax::CartPole-v1", {"reward_gamma": 1.5}, "reward_gamma of .* must be between 0 and 1, got 1.5"),
    ],
)
def test_what_cannot_be_normalised(id, options, message, monkeypatch):
    reset = lambda key: (jnp.zeros((4, 4, 3), jnp.uint8), ())  # noqa: E731
    image = envs.Task(reset, None, envs.Box(0, 255, (4, 4, 3), np.uint8), envs.Discrete(2), 3)
    monkeypatch.setitem(envs.NAMESPACES, "test", (lambda: ["Image"], lambda *_: image))
    with pytest.raises(ValueError, match=message):
        make(id, **options)
