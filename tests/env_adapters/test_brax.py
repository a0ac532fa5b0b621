"""brax: the library's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CHEAP_BRAX, check_conformance

from env_adapters import brax as adapter
from env_adapters.library import import_silently
from env_adapters.physics import quiet
from envs import make

SLOW_IDS = [pytest.param(env_id, marks=pytest.mark.slow) for env_id in adapter.IDS]


@pytest.mark.parametrize("env_id", SLOW_IDS)
def test_conformance_of_brax(env_id):
    env = make(f"brax::{env_id}", backend="spring")
    check_conformance(env)
    assert env.max_steps == 1000


def test_ids_are_those_of_the_library():
    brax = import_silently("brax.envs", "brax", "brax")
    assert set(adapter.ids()) == set(brax._envs) - {"fast", "swimmer"}


def test_brax_steps_are_those_of_brax():
    """Every step from the state that our environment was in, every beginning from the same key."""
    brax = import_silently("brax.envs", CHEAP_BRAX, "brax")
    env, steps = make(CHEAP_BRAX, backend="spring", max_steps=15), 60
    with quiet():
        library = brax.get_environment("inverted_pendulum", backend="spring")

    def step(carry, key):
        obs, state = carry
        action = env.action_space.sample(key)
        next_obs, next_state, *rest = env.step(key, state, action)
        return (next_obs, next_state), (state.task[0], action, next_obs, *rest)

    keys = jax.random.split(jax.random.key(1), steps)
    carry = jax.jit(env.reset)(jax.random.key(0))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[1])
    physics, action, next_obs, reward, terminated, truncated, info = run(carry)
    zeros = jnp.zeros(steps)
    states = brax.State(physics, zeros, zeros, zeros, info={"time_out": zeros})
    theirs = jax.jit(jax.vmap(library.step))(states, action)
    np.testing.assert_allclose(info["final_obs"], theirs.obs, atol=1e-5)
    np.testing.assert_allclose(reward, theirs.reward, atol=1e-5)
    np.testing.assert_array_equal(terminated, theirs.done > 0.5)
    assert terminated.any() and truncated.any() and not (terminated & truncated).any()
    assert (info["episode_length"][truncated] == 15).all()
    done, reset_keys = info["episode_done"], jax.vmap(lambda key: jax.random.split(key)[1])(keys)
    first_obs = jax.jit(jax.vmap(lambda key: library.reset(key).obs))(reset_keys)
    expected = jnp.where(done[:, None], first_obs, info["final_obs"])
    np.testing.assert_allclose(next_obs, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "brax::ant",
            {"backend": "sprin"},
            r"backend 'sprin' of brax::ant \(did you mean 'spring'\?\); valid: general",
        ),
        (
            "brax::ant",
            {"max_step": 3},
            r"brax::ant has no option 'max_step' \(did you mean 'max_steps'\?\)",
        ),
        ("brax::ant", {"max_steps": 0}, r"max_steps of brax::ant must be at least 1, got 0"),
        ("brax::swimmer", {}, r"unknown environment 'brax::swimmer'"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)
