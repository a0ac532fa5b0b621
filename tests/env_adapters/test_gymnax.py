"""gymnax: the library's own steps, and the truth about how its episodes end."""

import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_conformance
from helpers import random_rollout as rollout

from env_adapters import gymnax as adapter
from envs import make

GYMNAX = [f"gymnax::{env_id}" for env_id in adapter.ids()]
FAST = [id for id in GYMNAX if "MinAtar" not in id]


@pytest.mark.parametrize("id", GYMNAX)
def test_conformance(id):
    check_conformance(make(id))


@pytest.mark.parametrize("id", FAST)
def test_steps_are_those_of_the_library(id):
    """A rollout equals one with the library's own functions, flags and bookkeeping done by hand."""
    env, steps = make(id), 120
    library, params = gymnax.make(id.partition("::")[2])
    discrete_obs = hasattr(library.observation_space(params), "n")

    def flat(obs):
        obs = jax.nn.one_hot(obs, library.observation_space(params).n) if discrete_obs else obs
        return jnp.asarray(obs, jnp.float32)

    def ours(carry, key):
        obs, state = carry
        action = env.action_space.sample(key)
        obs, state, *rest = env.step(key, state, action)
        return (obs, state), (obs, action, *rest)

    def theirs(carry, inputs):
        state, total, length = carry
        key, action = inputs
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, done, _ = library.step_env(step_key, state, action, params)
        reached = state.time >= params.max_steps_in_episode
        if hasattr(library, "is_truncated"):
            terminated, truncated = done, library.is_truncated(state, params) & ~done
        else:
            terminated, truncated = done & ~reached, reached
        ended, total, length = terminated | truncated, total + reward, length + 1
        first_obs, first_state = library.reset_env(reset_key, params)

        def select(first, following):
            return jnp.where(ended, first, following).astype(jnp.asarray(following).dtype)

        next_obs = jnp.where(ended, flat(first_obs), flat(obs))
        next_state = jax.tree.map(select, first_state, state)
        out = next_obs, reward, terminated, truncated, flat(obs), total, length
        return (next_state, jnp.where(ended, 0.0, total), jnp.where(ended, 0, length)), out

    keys = jax.random.split(jax.random.key(1), steps)
    first = env.reset(jax.random.key(0))
    rollout_of_ours = jax.jit(lambda carry: jax.lax.scan(ours, carry, keys)[1])
    obs, action, reward, terminated, truncated, info = rollout_of_ours(first)
    _, state = library.reset_env(jax.random.key(0), params)
    state = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, first[1].task)
    rollout_of_theirs = jax.jit(lambda carry: jax.lax.scan(theirs, carry, (keys, action))[1])
    expected = rollout_of_theirs((state, jnp.float32(0), jnp.int32(0)))
    episode = info["episode_return"], info["episode_length"]
    got = obs, reward, terminated, truncated, info["final_obs"], *episode
    for mine, other in zip(got, expected, strict=True):
        mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
    assert (info["episode_done"] == (terminated | truncated)).all()
    assert not (terminated & truncated).any()


def test_options_reach_the_task():
    lengths = []
    for memory_length in (3, 9):
        env = make("gymnax::MemoryChain-bsuite", memory_length=memory_length)
        _, _, _, terminated, _, info = rollout(env, 50)
        lengths.append(np.unique(info["episode_length"][terminated]))
    short, long = lengths
    assert len(short) == 1 and long == short + 6
    deep_sea = make("gymnax::DeepSea-bsuite", size=5)  # an argument of the constructor
    assert deep_sea.observation_space.shape == (5, 5)


def test_named_masks_are_positions_and_velocities():
    """Velocities are what the positions' differences show, whatever the library's order."""
    position, velocity = map(list, adapter.MASKS["CartPole-v1"].values())
    obs = np.asarray(rollout(make("gymnax::CartPole-v1"), 9)[0])
    moved = np.diff(obs[:, position], axis=0)
    np.testing.assert_allclose(moved, 0.02 * obs[:-1, velocity], atol=1e-6)
    obs, next_obs, *_ = rollout(make("gymnax::MountainCar-v0"), 50)
    np.testing.assert_allclose(next_obs[:, 0] - obs[:, 0], next_obs[:, 1], atol=1e-5)


def test_whole_numbers_serve_where_the_default_is_a_float():
    env = make("gymnax::BernoulliBandit-misc", max_steps_in_episode=50)
    check_conformance(env)
    assert env.max_steps == 50


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("MemoryChain-bsuite", {"memory_length": 0}, "memory_length of .* at least 1, got 0"),
        (
            "CartPole-v1",
            {"max_steps_in_episode": 0},
            "max_steps_in_episode of .* at least 1, got 0",
        ),
        ("BernoulliBandit-misc", {"max_steps_in_episode": 0.5}, "must be at least 1, got 0.5"),
        ("BernoulliBandit-misc", {"reward_prob": 2}, "reward_prob of .* between 0 and 1, got 2"),
        ("CartPole-v1", {"gravity": np.nan}, "gravity of .* must be finite, got nan"),
        ("CartPole-v1", {"length": 0.0}, "length of .* must be greater than 0, got 0.0"),
        ("Acrobot-v1", {"available_torque": 1}, "has no option 'available_torque'; valid options"),
        ("DeepSea-bsuite", {"size": 10**9}, "size of .* must be at most 1000, got 1000000000"),
        ("UmbrellaChain-bsuite", {"n_distractor": -1}, "cannot be made with n_distractor -1: "),
        (
            "FrozenLake-misc",
            {"map_name": "../../x"},
            "made with map_name ../../x: map_name must be",
        ),
        ("FrozenLake-misc", {"reward_schedule": 1}, "must be a tuple of 3 numbers, got 1"),
    ],
)
def test_make_refuses(env_id, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        make(f"gymnax::{env_id}", **options)
    assert "\n" not in str(refused.value)


WITH_THE_OLDER_GYMNAX = """
import jax, envs, gymnax
assert not hasattr(gymnax.environments.environment.Environment, "is_truncated")
env = envs.make("gymnax::CartPole-v1", max_steps_in_episode=20)
_, state = env.reset(jax.random.key(0))
step, ends = jax.jit(env.step), []
for key in jax.random.split(jax.random.key(1), 300):
    _, state, _, terminated, truncated, info = step(key, state, env.action_space.sample(key))
    ends.append((bool(terminated), bool(truncated), int(info["episode_length"])))
assert any(terminated for terminated, _, _ in ends)
assert any(truncated for _, truncated, _ in ends)
assert all(length == 20 for _, truncated, length in ends if truncated)
assert not any(terminated and truncated for terminated, truncated, _ in ends)
"""


@pytest.mark.slow
def test_the_older_gymnax_interface(tmp_path):
    """gymnax 0.0.x, whose interface stable-gymnax also installs under the name gymnax."""
    target = ["--target", str(tmp_path), "gymnax==0.0.9"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *target]
    subprocess.run(pip, check=True)
    environment = {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WITH_THE_OLDER_GYMNAX], check=True, env=environment)
