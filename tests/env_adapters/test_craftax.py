"""craftax against the original library."""

import importlib

import jax
import numpy as np
import pytest
from helpers import batch_rollout as rollout
from helpers import check_conformance, check_picture, checked_ends

from env_adapters import craftax as adapter
from envs import make

CRAFTAX = [f"craftax::{env_id}" for env_id in adapter.IDS]
# Craftax' pictures take a minute to make.
DEFAULT = ["craftax::Craftax-Symbolic-v1", "craftax::Craftax-Classic-Symbolic-v1"]
CLASSIC = "craftax::Craftax-Classic-Symbolic-v1"
OTHERS_ARE_SLOW = [
    pytest.param(id, marks=() if id == CLASSIC else pytest.mark.slow) for id in CRAFTAX
]


@pytest.mark.parametrize("id", DEFAULT)
def test_conformance(id):
    check_conformance(make(id))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [id for id in CRAFTAX if id not in DEFAULT])
def test_conformance_of_the_rest(id):
    check_conformance(make(id))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", OTHERS_ARE_SLOW)
def test_craftax_steps_are_those_of_the_library(id):
    """Observations, rewards and ends of its own step without reset, in episodes of 3 steps."""
    env = make(id, max_timesteps=3)
    module = importlib.import_module("craftax.craftax_env")
    library = module.make_craftax_env_from_name(id.partition("::")[2], auto_reset=False)
    params = library.default_params.replace(max_timesteps=3)
    _, steps = rollout(env, 4, 2)
    states, actions, _, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    np.testing.assert_array_equal(truncated, np.array([[0, 0], [0, 0], [1, 1], [0, 0]], bool))
    assert not terminated.any() and env.max_steps == 3

    @jax.jit
    def theirs(states, actions):
        keys = jax.random.split(jax.random.key(0), 4)
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
        step_keys = jax.vmap(jax.vmap(lambda key: jax.random.split(key)[0]))(keys)
        step = jax.vmap(lambda key, state, action: library.step_env(key, state, action, params)[:4])
        return jax.lax.map(lambda inputs: step(*inputs), (step_keys, states, actions))

    obs, _, expected_reward, done = theirs(states.task, actions)
    np.testing.assert_allclose(info["final_obs"], obs, atol=1e-6)
    np.testing.assert_allclose(reward, expected_reward, atol=1e-6)
    np.testing.assert_array_equal(truncated, done)


def test_craftax_says_where_it_cannot_write(monkeypatch, tmp_path):
    constants = importlib.import_module("craftax.craftax_classic.constants")
    monkeypatch.setattr(constants, "TEXTURE_CACHE_FILE", str(tmp_path / "missing" / "cache.pbz2"))
    message = "makes once and writes to .*cache.pbz2: that folder cannot be written to"
    with pytest.raises(ValueError, match=message):
        make("craftax::Craftax-Classic-Pixels-v1", day_length=299)


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "craftax::Craftax-Classic-v1",
            {},
            "unknown environment 'craftax::Craftax-Classic-v1' .did you mean",
        ),
        (
            "craftax::Craftax-Classic-Symbolic-v1",
            {"max_timestep": 3},
            r"has no option 'max_timestep' \(did you mean 'max_timesteps'\?\)",
        ),
        (
            "craftax::Craftax-Symbolic-v1",
            {"god_mode": 1},
            "option god_mode of craftax::.* must be bool, got 1",
        ),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [CLASSIC])
def test_pictures(id):
    check_picture(make(id))
