"""Gymnasium's simulators on the host: exact, and harmless whatever their states contain."""

import pickle

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Bomb

from env_adapters import gxm
from env_adapters.host_gymnasium import SmallTask, reseeded
from env_adapters.library import let_pygame_run_anywhere
from envs import make

SMALL = [env_id.partition("/")[2] for env_id in gxm.ids() if "/ALE/" not in env_id]
OTHERS = [
    ("CartPole-v1", {"sutton_barto_reward": True}),
    ("Pendulum-v1", {"g": 3.0}),
    ("MountainCarContinuous-v0", {"goal_velocity": 1}),
    ("Blackjack-v1", {"natural": True}),
    ("Blackjack-v1", {"sab": True}),
    ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}),
    ("FrozenLake-v1", {"success_rate": 0.9}),
    ("CliffWalking-v1", {"is_slippery": True}),
    ("Taxi-v4", {"is_rainy": True, "rainy_probability": 0.5}),
    ("Taxi-v4", {"fickle_passenger": True, "fickle_probability": 1.0}),
]


def library(env_id, **options):
    return gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True, **options)


def plain(env):
    """The attributes of an environment that are numbers, texts, or made of these."""
    kinds = (int, float, str, list, tuple, np.generic, np.ndarray, type(None))
    return {name: value for name, value in vars(env).items() if isinstance(value, kinds)}


@pytest.mark.parametrize(("env_id", "options"), [(env_id, {}) for env_id in SMALL] + OTHERS)
def test_small_tasks_are_those_of_gymnasium(env_id, options):
    """To the last bit, in two episodes at a time; a state contains everything that changes."""
    host = SmallTask(library(env_id, **options))
    theirs = [library(env_id, **options).unwrapped for _ in range(2)]
    rng = np.random.default_rng(0)
    for seeds in ([0, 1], [2, 3], [4, 5]):
        obs, state = host.reset(seeds)
        expected = [env.reset(seed=seed)[0] for env, seed in zip(theirs, seeds, strict=True)]
        running = np.ones(2, bool)
        for t in range(25):
            for row in np.flatnonzero(running):
                np.testing.assert_array_equal(obs[row], host._obs(expected[row]))
                if t < 4 or t == 24:
                    assert_in_state(host, state[row], theirs[row])
            if host.env.action_space.shape == ():
                actions = rng.integers(host.env.action_space.n, size=2).astype(np.int32)
            else:
                actions = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
            obs, state, reward, terminated = host.step(state, actions)
            for row in np.flatnonzero(running):
                expected[row], *rest = theirs[row].step(actions[row])
                assert [reward[row], terminated[row]] == [np.float32(rest[0]), rest[1]]
            running &= ~terminated


def assert_in_state(host, state, env):
    """Another environment that is set to the state is like `env` in everything."""
    host._write_state(state)
    any_seed = {"_np_random_seed": None}
    np.testing.assert_equal(plain(host.env) | any_seed, plain(env) | any_seed)
    random = env.np_random.bit_generator.state
    assert host.env.np_random.bit_generator.state == random


def crafted(state, content: bytes):
    """A state whose simulator has this content, as far as it goes."""

    def craft(leaf):
        leaf = np.array(leaf)
        if leaf.nbytes >= 80:
            room = leaf.reshape(-1).view(np.uint8)
            room[:] = np.frombuffer(content.ljust(len(room), b"\0")[: len(room)], np.uint8)
        return jnp.asarray(leaf)

    return jax.tree.map(craft, state)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Taxi-v4"])
def test_a_strangers_state_runs_nothing(env_id, tmp_path):
    """A state that is a pickle with a command in it is stepped and drawn like any other."""
    env = make(f"gxm::Gymnasium/{env_id}")
    step = jax.jit(env.step)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    content = pickle.dumps(Bomb(f"touch {tmp_path / 'ran'}"), protocol=0)
    stranger = state._replace(task=crafted(state.task, content))
    assert any(
        (x != y).any() for x, y in zip(*map(jax.tree.leaves, (state, stranger)), strict=True)
    )
    obs, after, reward, *_ = step(jax.random.key(1), stranger, 0)
    assert env.render(jax.device_get(stranger.task)).dtype == np.uint8
    assert obs.shape == env.observation_space.shape and np.isfinite(reward)
    assert not list(tmp_path.iterdir())
    one, same = (step(jax.random.key(1), state, 0) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, same)  # it has left no traces


@pytest.mark.timeout(60)
@pytest.mark.parametrize("env_id", SMALL)
def test_any_bits_are_a_state(env_id, rng):
    """Numbers that no task can have, nan and infinity among them: it neither fails nor hangs."""
    host = SmallTask(library(env_id))
    rows = rng.integers(2**32, size=(50, host.state_size), dtype=np.uint32)
    rows[20:30] = 0
    rows[30:40] = np.frombuffer(np.float64(np.nan).tobytes(), np.uint32)[1]
    rows[40:50, 12:].view(np.float64)[:] = rng.normal(size=(10, host.state_size // 2 - 6)) * 1e7
    rows[:5] = 2**32 - 1
    actions = np.zeros((50, *host.env.action_space.shape), host.env.action_space.dtype)
    let_pygame_run_anywhere()
    pictures = [host.picture(row) for row in rows[[0, 5, 20, 30, 40, 41]]]
    assert all(picture.dtype == np.uint8 for picture in pictures)
    for _ in range(3):
        obs, rows, reward, _ = host.step(rows, actions)
        assert np.isfinite(obs).all() and np.isfinite(reward).all()


@pytest.mark.parametrize("env_id", ["Blackjack-v1", "Taxi-v4"])
def test_a_reseeded_state_has_other_random_numbers_and_nothing_else(env_id):
    host = SmallTask(library(env_id))
    _, state = host.reset(0)
    drawn = []
    for words in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]):
        host._write_state(np.asarray(reseeded(jnp.asarray(state), jnp.array(words, jnp.uint32))))
        now = plain(host.env)
        drawn.append(host.env.np_random.integers(2**32, size=2).tolist())
        host._write_state(state)
        np.testing.assert_equal(now, plain(host.env))
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != drawn[2]
    host._write_state(state)
    host.env.np_random.integers(2**32, dtype=np.uint32)  # leaves half of a number behind
    half = host._read_state()
    assert half[8] == 1 and reseeded(jnp.asarray(half), jnp.ones(4, jnp.uint32))[8] == 0


def test_trials_slip_differently():
    env = make("gxm::Gymnasium/FrozenLake-v1", max_episode_steps=5, trials=20)
    step = jax.jit(env.step)
    obs, state = env.reset(jax.random.key(0))
    places = set()
    for key in jax.random.split(jax.random.key(1), 60):
        begins = obs[-1] == 1
        obs, state, *_ = step(key, state, 2)
        if begins:
            places.add(int(obs[:-1].argmax()))
    assert len(places) > 1  # where the first step of a trial leads to
