"""Schedules over runs of any length: all follow `Config.progress`."""

import importlib

import jax.numpy as jnp
import numpy as np
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
    np.testing.assert_allclose(epsilon, [config.start_e, config.end_e, config.end_e], rtol=1e-6)
