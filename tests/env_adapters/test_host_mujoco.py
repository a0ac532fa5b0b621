"""MuJoCo on the host: the same numbers whatever else is stepped at the same time."""

import threading

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from helpers import physics_rollout as rollout

from env_adapters import host_mujoco, mujoco
from env_adapters.physics import quiet
from envs import make

GYMNASIUM = [env_id for env_id in mujoco.ids() if env_id not in mujoco.PLAYGROUND]


def assert_row(together, at, alone):
    """The results of one environment among several are those of the environment alone."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[at], y), together, alone)


def test_vmaps_compute_what_single_environments_do(monkeypatch):
    """8 environments of 3 seeds, in threads, some of which fall: each as if it were alone."""
    monkeypatch.setattr(host_mujoco, "THREAD_SECONDS", 1e-9)
    env, steps = make("mujoco::Hopper-v5"), 30
    keys = jax.random.split(jax.random.key(1), (3, 8))
    nested = jax.vmap(jax.vmap(lambda key: rollout(env, key, steps)))(keys)
    assert nested[1][3].any() and not nested[1][3].any(axis=-1).all()  # terminated
    for at in [(0, 0), (1, 5), (2, 7)]:
        assert_row(nested, at, rollout(env, keys[at], steps))


@pytest.mark.parametrize("thread_seconds", [1e-9, 1e9])
def test_rewards_compare_places_of_the_same_environment(thread_seconds, monkeypatch):
    """Ant looks at the place of its torso before a step: each of several ants at its own."""
    monkeypatch.setattr(host_mujoco, "THREAD_SECONDS", thread_seconds)
    env, keys = make("mujoco::Ant-v5"), jax.random.split(jax.random.key(1), 3)
    together = jax.vmap(lambda key: rollout(env, key, 5))(keys)
    for row, key in enumerate(keys):
        assert_row(together, row, rollout(env, key, 5))


def test_only_those_who_look_at_places_carry_them():
    with_places = set()
    for env_id in GYMNASIUM:
        with quiet():
            host = host_mujoco.HostMujoco(gymnasium.make(env_id))
        size = host_mujoco.mujoco.mj_stateSize(host.env.model, host_mujoco.STATE)
        with_places |= {env_id} if host.state_size > 2 * size else set()
    assert with_places == {"Reacher-v4", "Ant-v4", "Ant-v5", "Humanoid-v4", "Humanoid-v5"}


def test_a_step_that_reads_what_states_do_not_have_is_refused():
    class Peeking(HopperEnv):
        def step(self, action):
            self.data.cvel.sum()
            return super().step(action)

    message = r"reads \['cvel'\] before it simulates"
    with quiet(), pytest.raises(NotImplementedError, match=message):
        host_mujoco.HostMujoco(Peeking())


def test_more_environments_than_are_simulated_at_once(monkeypatch):
    env = make("mujoco::InvertedPendulum-v5")
    run = jax.jit(jax.vmap(lambda key: rollout(env, key, 3)))
    keys = jax.random.split(jax.random.key(2), 5)
    whole = jax.device_get(run(keys))
    monkeypatch.setattr(host_mujoco, "MAX_ROWS", 2)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(run(keys)))


@pytest.mark.parametrize("seeds", [[3, 5, 3], [[7]], 2])
def test_equal_seeds_are_reset_once(seeds, monkeypatch):
    with quiet():
        host = host_mujoco.HostMujoco(gymnasium.make("InvertedPendulum-v5"))
    seeds = np.array(seeds, np.uint32)
    alone = [[x[0] for x in host.reset(seed[None])] for seed in np.ravel(seeds)]
    reset, computed = host.env.reset, []
    monkeypatch.setattr(host.env, "reset", lambda seed: computed.append(seed) or reset(seed=seed))
    for x, y in zip(host.reset(seeds), zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(x, np.reshape(y, x.shape))
        assert x.shape[:-1] == seeds.shape
    assert sorted(computed) == np.unique(seeds).tolist()


def test_programs_at_the_same_time_do_not_meet():
    """Threads that step one environment, and programs that start before others have ended."""
    env = make("mujoco::HalfCheetah-v5")
    run = jax.jit(jax.vmap(lambda key: rollout(env, key, 50)))
    keys = [jax.random.split(jax.random.key(key), 4) for key in range(3)]
    alone = [jax.device_get(run(key)) for key in keys]
    dispatched = jax.device_get([run(key) for key in keys])
    together = [None] * len(keys)

    def work(i):
        together[i] = jax.device_get(run(keys[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jax.tree.map(np.testing.assert_array_equal, alone, dispatched)
    jax.tree.map(np.testing.assert_array_equal, alone, together)
