"""Schedules over runs of any length: all follow `Config.progress`."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SCRIPTS, tiny

EXPLORING = ("dqn", "drqn", "pqn", "rpqn")
LONG = {"total_steps": 2**40, "num_envs": 4096, "num_steps": 32, "buffer_size": 2**20}
LONG |= {"learning_starts": 2**19}


def long_run(module):
    """The config of a run whose environment steps do not fit into int32."""
    names = module.Config.__dataclass_fields__
    return tiny(module, **{name: value for name, value in LONG.items() if name in names})


@pytest.mark.parametrize("script", SCRIPTS)
def test_progress_is_right_beyond_two_to_the_31_steps(script):
    config = long_run(importlib.import_module(f"algorithms.{script}"))
    updates = jnp.array([0, 2**14, 2**22, 2**23, 2**30], jnp.int32)
    assert config.num_updates == 2**23
    progress = config.progress(updates)
    assert progress.dtype == jnp.float32
    np.testing.assert_allclose(progress, [0.0, 2.0**-9, 0.5, 1.0, 1.0])  # never past the end


@pytest.mark.parametrize("script", EXPLORING)
def test_epsilon_stays_between_its_ends(script):
    module = importlib.import_module(f"algorithms.{script}")
    config = long_run(module)
    assert config.exploration_fraction < 0.5
    updates = jnp.array([0, 2**14, 2**22, 2**23, 2**30], jnp.int32)
    epsilon = module.epsilon(updates, config)
    fraction = 2.0**-9 / config.exploration_fraction
    second = config.start_e + fraction * (config.end_e - config.start_e)
    expected = [config.start_e, second] + 3 * [config.end_e]
    np.testing.assert_allclose(epsilon, expected, rtol=1e-5)


@pytest.mark.parametrize("script", EXPLORING)
def test_no_exploration_phase_at_all(script):
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module, exploration_fraction=0.0)
    epsilon = module.epsilon(jnp.arange(3), config)
    np.testing.assert_allclose(epsilon, 3 * [config.end_e], rtol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_optimizer_is_the_one_that_is_documented(script):
    """Its steps times the learning rate; RAdam differs from Adam after a few."""
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module)
    expected = optax.radam(0.1) if "pqn" in script else optax.adam(0.1, eps=1e-5)
    if hasattr(config, "max_grad_norm"):
        expected = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), expected)
    own = module.make_optimizer(config)
    params = {"w": jnp.ones(3)}
    own_state, expected_state = own.init(params), expected.init(params)
    for step in range(9):
        gradient = {"w": jnp.array([1.0, -20.0, 1e-3]) * (1.0 + step % 3)}
        own_change, own_state = own.update(gradient, own_state, params)
        expected_change, expected_state = expected.update(gradient, expected_state, params)
        own_change = jax.tree.map(lambda x: -0.1 * x, own_change)
        np.testing.assert_allclose(own_change["w"], expected_change["w"], rtol=1e-5)
    assert optax.tree.get(own_state, "count") == 9
