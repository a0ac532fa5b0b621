"""JAX_ENABLE_X64: spaces, states and rewards stay what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import batch_rollout, check_conformance

from env_adapters.registry import _make
from env_adapters.wrappers import enable_x64
from envs import make, record

EVERY_WRAPPER = {
    "mask": "velocity",
    "sticky_actions": 0.1,
    "noise": 0.1,
    "mask_probability": 0.1,
    "flicker": 0.1,
    "delay": 2,
    "frame_stack": 2,
    "time_limit": 5,
    "trials": 3,
    "normalize_obs": True,
    "normalize_reward": True,
}
CASES = [
    ("gymnax::CartPole-v1", EVERY_WRAPPER),
    ("gymnax::Pendulum-v1", {"rescale_actions": True}),
    ("gymnax::Freeway-MinAtar", {}),
    ("gymnax::GaussianBandit-misc", {}),
    ("popjaxrl::MultiArmedBanditEasy", {}),
    ("navix::Empty-5x5", {"trials": 2}),
    ("mujoco::Hopper-v5", {}),
    ("gxm::Gymnasium/Taxi-v4", {"trials": 2}),
    ("gxm::Gymnasium/ALE/Breakout-v5", {}),
]


@pytest.mark.parametrize(("id", "options"), CASES)
def test_nothing_has_64_bits(id, options):
    env = make(id, **options)
    with enable_x64(True):
        check_conformance(env)
        results = jax.eval_shape(env.reset, jax.random.key(0))
        assert env.action_space.sample(jax.random.key(0)).dtype == env.action_space.dtype
    wide = {jnp.dtype("int64"), jnp.dtype("uint64"), jnp.dtype("float64")}
    assert not wide & {leaf.dtype for leaf in jax.tree.leaves(results)}


def test_results_are_those_of_32_bits():
    """Made, rolled out in a batch with its ends, and recorded."""

    def policy(memory, obs, start, action, reward, key):
        return memory, jnp.zeros_like(action)

    def results():
        env = make("gxm::Gymnasium/Pendulum-v1", time_limit=5, normalize_obs=True)
        film = jax.jit(lambda key: record(env, policy, lambda _: (), key, 1, 1))(jax.random.key(0))
        return film, batch_rollout(env, 12, 4)

    _make.cache_clear()
    with enable_x64(True):
        wide = results()
    _make.cache_clear()
    jax.tree.map(np.testing.assert_array_equal, wide, results())
