"""MuJoCo Playground: its limits and flags, with a library of one small task in its place.

Playground itself is large and is not among the requirements; a slow test in test_mujoco.py runs it
where it is installed.
"""

import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_conformance, random_rollout

from env_adapters import playground
from env_adapters.registry import _make


class State(NamedTuple):
    data: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array


class Pole:
    """Shows a number of the episode, and its steps; it falls in step 6 if the number is < 0.5."""

    observation_size = 2
    action_size = 3

    def reset(self, key):
        number = jax.random.uniform(key)
        return State((number, 0.0), jnp.stack([number, 0.0]), jnp.float32(0), jnp.float32(0))

    def step(self, state, action):
        number, time = state.data
        time += 1.0
        done = ((time >= 6) & (number < 0.5)).astype(jnp.float32)
        return State((number, time), jnp.stack([number, time]), action.sum(), done)


@pytest.fixture
def make_pole(monkeypatch):
    registry = types.SimpleNamespace(
        get_default_config=lambda env_id: types.SimpleNamespace(episode_length=8),
        load=lambda env_id, config_overrides: Pole(),
    )
    library = types.ModuleType("mujoco_playground")
    library.registry = registry
    monkeypatch.setitem(sys.modules, "mujoco_playground", library)
    return lambda **options: _make.__wrapped__(
        "mujoco::CartpoleBalance", (), tuple(options.items())
    )


@pytest.mark.parametrize(("options", "limit"), [({}, 8), ({"max_steps": 7}, 7)])
def test_episodes_end_at_the_limit(make_pole, options, limit):
    env = make_pole(**options)
    check_conformance(env)
    assert env.max_steps == limit and env.action_space.shape == (3,)
    obs, next_obs, _, terminated, truncated, info = random_rollout(env, 100)
    lengths = info["episode_length"]
    np.testing.assert_array_equal(truncated, lengths == limit)
    np.testing.assert_array_equal(terminated, (lengths == 6) & (obs[:, 0] < 0.5))
    assert terminated.any() and truncated.any() and lengths.max() == limit
    np.testing.assert_array_equal(info["final_obs"][:, 1], lengths)
    np.testing.assert_array_equal(next_obs[:, 1] == 0, info["episode_done"])


def test_ids_are_known():
    assert "CartpoleBalance" in playground.ids() and len(playground.ids()) == 25
