"""What a critic sees: what the environment would show without masks, noise, flicker and delays."""

import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import (
    AsymmetricObs,
    Environment,
    MaskedObs,
    Preprocessed,
    greatest_entropy,
    make,
    make_asymmetric,
    only_valid,
    seen_by,
)
from harness.errors import UsageError

NUM_STEPS = 25
COUNTING = "test::Counting"  # it shows what its state is: a number of the episode, and the time
HIDDEN = [
    {"mask": ("1",)},
    {"noise": 0.5},
    {"mask_probability": 0.5},
    {"flicker": 0.5},
    {"delay": 3},
]
ALL = {key: value for options in HIDDEN for key, value in options.items()}


class Step(NamedTuple):
    obs: Any
    next_obs: Any


def innermost(state):
    """The state of a task below its wrappers."""
    while hasattr(state, "inner"):
        state = state.inner
    return state


def rollout(env, num_steps=NUM_STEPS, num_envs=3):
    """Everything that environments with shared statistics return, (T, N, ...)."""
    reset_key, key = jax.random.split(jax.random.key(0))
    first = jax.vmap(env.reset, axis_name="envs")(jax.random.split(reset_key, num_envs))

    def step(state, key):
        action_key, step_key = jax.random.split(key)
        action = jax.random.randint(action_key, (num_envs,), 0, 3)
        keys = jax.random.split(step_key, num_envs)
        obs, next_state, *rest = jax.vmap(env.step, axis_name="envs")(keys, state, action)
        return next_state, (obs, state, next_state, *rest)

    return first, jax.jit(lambda: jax.lax.scan(step, first[1], jax.random.split(key, num_steps)))()


def counted(number, time):
    return np.stack([number, time / np.float32(7)], axis=-1)


@pytest.mark.parametrize(
    "options", [*HIDDEN, ALL, ALL | {"time_limit": 4}, ALL | {"sticky_actions": 0.5}]
)
def test_the_critic_sees_what_is_hidden_from_the_actor(options):
    """At every step, after resets, and in the true next observation of an episode that ends."""
    env = make_asymmetric(COUNTING, **options)
    (first, state), (_, (obs, before, after, *_, info)) = rollout(env)
    # Compiled programs may round the last digit in another way.
    np.testing.assert_allclose(first.full, counted(*innermost(state.task)), rtol=1e-6)
    np.testing.assert_allclose(obs.full, counted(*innermost(after.task)), rtol=1e-6)
    number, time = innermost(before.task)
    np.testing.assert_allclose(info["final_obs"].full, counted(number, time + 1), rtol=1e-6)
    assert info["episode_done"].sum() >= 9
    shown = np.broadcast_to(obs.obs, obs.full.shape)  # a mask has left one entry
    assert (shown != obs.full).any()


@pytest.mark.parametrize(
    "options",
    [ALL, ALL | {"frame_stack": 2, "normalize_obs": True}, {"noise": 0.5, "trials": 2}],
)
def test_the_actor_sees_what_it_sees_without_a_critic(options):
    first, (_, (obs, *_, reward, terminated, truncated, info)) = rollout(make(COUNTING, **options))
    expected = first[0], obs, reward, terminated, truncated, info
    asymmetric = make_asymmetric(COUNTING, **options)
    first, (_, (obs, *_, reward, terminated, truncated, info)) = rollout(asymmetric)
    info |= {"final_obs": seen_by("actor", info["final_obs"])}
    actual = seen_by("actor", first[0]), seen_by("actor", obs), reward, terminated, truncated, info
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert asymmetric.observation_space.shape == make(COUNTING, **options).observation_space.shape


@pytest.mark.parametrize(
    "options",
    [{"frame_stack": 3}, {"trials": 2}, {"time_limit": 3, "trials": 3, "frame_stack": 2}],
)
def test_what_hides_nothing_is_there_for_the_critic_too(options):
    """Masks and delays draw no random numbers: without them everything else happens alike."""
    (first, _), (_, (obs, *_, info)) = rollout(make(COUNTING, **options))
    hiding = make_asymmetric(COUNTING, mask=("1",), delay=2, **options)
    (full, _), (_, (fuller, *_, more)) = rollout(hiding)
    expected = first, obs, info["final_obs"]
    actual = full.full, fuller.full, more["final_obs"].full
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- Normalisation -------------------------------------------------------------------------------


def test_each_part_is_normalised_by_its_own_moments():
    options = {"mask": ("0",), "noise": 3.0}
    env = make_asymmetric(COUNTING, **options, normalize_obs=True)
    _, (_, (plain, *_)) = rollout(make_asymmetric(COUNTING, **options))
    _, (end, (obs, _, after, *_, info)) = rollout(env)
    statistics = jax.tree.map(lambda x: x[0], end.statistics)
    for part, moments in (("obs", statistics.obs), ("full", statistics.full)):
        values = np.asarray(getattr(plain, part)).reshape(-1, moments.mean.size)
        np.testing.assert_allclose(moments.mean, values.mean(axis=0), atol=0.15)
        last = getattr(plain, part)[-1]
        scaled = (last - moments.mean) / np.sqrt(moments.var + 1e-8)
        np.testing.assert_allclose(getattr(obs, part)[-1], scaled, rtol=1e-4, atol=1e-5)
    assert statistics.obs.mean.shape == (1,) and statistics.full.mean.shape == (2,)
    assert abs(np.asarray(info["final_obs"].full)).max() < 10


def test_replayed_steps_are_normalised_likewise():
    env = make_asymmetric(COUNTING, mask=("0",), noise=3.0, normalize_obs=True)
    first, (end, (obs, *_)) = rollout(env.raw)
    scaled = env.preprocess(end, Step(obs=obs, next_obs=obs))
    moments = jax.tree.map(lambda x: x[0], end.statistics.full)
    expected = (obs.full - moments.mean) / np.sqrt(moments.var + 1e-8)
    for part in scaled:
        np.testing.assert_allclose(part.full, expected, rtol=1e-4, atol=1e-5)
    _, (_, (online, *_)) = rollout(env)
    np.testing.assert_allclose(scaled.obs.obs[-1], online.obs[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.obs.full[-1], online.full[-1], rtol=1e-4, atol=1e-5)


# --- Evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalize_obs": True}, {"normalize_reward": True}])
def test_nothing_of_it_is_there_in_evaluations(options):
    env = make_asymmetric(COUNTING, mask=("1",), **options)
    _, state = jax.vmap(env.reset, axis_name="envs")(jax.random.split(jax.random.key(1), 2))
    plain = make(COUNTING, mask=("1",), **options)
    for frozen in (env.frozen(state), plain.frozen(state)):
        obs, frozen_state = frozen.reset(jax.random.key(0))
        assert obs.shape == (1,)
        obs, *_, info = frozen.step(jax.random.key(0), frozen_state, 0)
        assert obs.shape == info["final_obs"].shape == (1,)
    assert type(env.frozen(state)) is (Preprocessed if options else Environment)


# --- Kinds of observations -----------------------------------------------------------------------


def test_images_of_bytes_stay_what_they_are():
    env = make_asymmetric("test::Picture", flicker=0.5)
    _, (_, (obs, *_)) = rollout(env)
    assert obs.full.dtype == obs.obs.dtype == np.uint8
    is_dark = (obs.obs == 0).all(axis=(-3, -2, -1))
    assert is_dark.any() and not is_dark.all() and (obs.full.max(axis=(-3, -2, -1)) > 0).all()
    with pytest.raises(ValueError, match="normalize_obs is not for images"):
        make_asymmetric("test::Picture", flicker=0.5, normalize_obs=True)


def test_action_masks_belong_to_the_actor():
    env = make_asymmetric("test::Masked", flicker=0.9)
    obs, state = env.reset(jax.random.key(0))
    assert isinstance(obs.obs, MaskedObs)
    values = jnp.arange(3.0)
    np.testing.assert_array_equal(only_valid(values, obs), only_valid(values, obs.obs))
    assert greatest_entropy(values, obs) == greatest_entropy(values, obs.obs)
    obs, state, *_, info = env.step(jax.random.key(1), state, obs.obs.action_mask.argmax())
    np.testing.assert_array_equal(info["action_mask"], obs.obs.action_mask)


OWN = """
import jax, jax.numpy as jnp
from envs import Box, Discrete, Task

def hidden(privileged="goal"):
    def reset(key):
        return jnp.zeros(2), jax.random.uniform(key, (3,))
    def step(key, state, action):
        return jnp.zeros(2), state + 1, 1.0, state.max() > 3, False
    shown = {"goal": lambda state: 2 * state, "number": lambda state: state[0],
             "image": lambda state: jnp.full((4, 4, 1), 7, jnp.uint8),
             "broken": lambda state: state["goal"], "pair": lambda state: (state, state)}
    report = lambda state: {"largest": state.max()}
    return Task(reset, step, Box(-1.0, 1.0, (2,)), Discrete(2), 5,
                privileged=shown[privileged], report=report)
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(textwrap.dedent(OWN))
    return f"{file}::hidden"


@pytest.mark.parametrize("options", [{}, {"mask": ("1",), "delay": 2, "frame_stack": 2}])
def test_a_task_of_ones_own_may_say_what_the_critic_sees(own, options):
    """Wrappers leave it as it is, and what the task reports as well."""
    env = make_asymmetric(own, **options)
    assert env.hides and make(own).hides
    obs, state = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(obs.full, 2 * innermost(state.task))
    obs, state, *_, info = env.step(jax.random.key(1), state, 0)
    np.testing.assert_array_equal(obs.full, 2 * innermost(state.task))
    assert info["largest"] == innermost(state.task).max()
    obs, _ = make(own, **options).reset(jax.random.key(0))
    assert not isinstance(obs, AsymmetricObs)


def test_an_image_for_the_critic_is_not_normalized(own):
    obs, _ = make_asymmetric(own, privileged="image", normalize_obs=True).reset(jax.random.key(0))
    assert obs.full.dtype == np.uint8 and (obs.full == 7).all()


def test_trials_are_marked_in_it(own):
    obs, _ = make_asymmetric(own, trials=2).reset(jax.random.key(0))
    assert obs.full.shape == (4,) and obs.full[-1] == obs.obs[-1] == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("number", "privileged of .* must return an array .* axis, not float32 of shape"),
        ("pair", "privileged of .* must return an array .* axis, not tuple"),
        ("broken", "privileged of .* raises .* in own.py, line 12"),
    ],
)
def test_a_privileged_observation_that_is_none_is_refused(own, kind, message):
    with pytest.raises(UsageError, match=message):
        make(own, privileged=kind)


@pytest.mark.parametrize(("options", "hides"), [({"noise": 0.1}, True), ({"trials": 2}, False)])
def test_an_environment_says_whether_it_hides_something(options, hides):
    for normalized in (False, True):
        assert make(COUNTING, **options, normalize_reward=normalized).hides == hides
    assert make(COUNTING, mask="1").hides


def test_equal_arguments_give_the_same_object():
    assert make_asymmetric(COUNTING, mask="1") is make_asymmetric(COUNTING, mask=("1",))
    assert make_asymmetric(COUNTING, mask="1") is not make(COUNTING, mask="1")
