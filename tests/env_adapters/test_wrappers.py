"""Every wrapper against what numpy expects of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import constant_task, random_rollout

from env_adapters.task import scale, unscale
from env_adapters.wrappers import mask_observation, wrap
from envs import Box, Discrete, Environment, Task, make


def clock_task(length=7, obs_shape=()):
    """Observations (a number of the episode, steps so far), or images full of the steps so far."""

    def show(number, time):
        if obs_shape:
            return jnp.full(obs_shape, time, jnp.uint8)
        return jnp.stack([number, 1.0 * time])

    def reset(key):
        number = jax.random.uniform(key, minval=1.0, maxval=2.0)
        return show(number, 0), (number, jnp.int32(0))

    def step(key, state, action):
        number, time = state
        return show(number, time + 1), (number, time + 1), 1.0, time + 1 >= length, False

    bounds = np.array([[1.0, 0.0], [2.0, 7.0]], np.float32)
    space = Box(0, 255, obs_shape, np.uint8) if obs_shape else Box(*bounds, (2,))
    return Task(reset, step, space, Discrete(3), length)


def echo_task(length=50):
    """Observation: the action that was done; zero at first."""

    def reset(key):
        return jnp.zeros(1), jnp.int32(0)

    def step(key, time, action):
        return action[None], time + 1, 0.0, time + 1 >= length, False

    return Task(reset, step, Box(0.0, 9.0, (1,)), Discrete(10), length)


def ones_task():
    def step(key, state, action):
        return jnp.ones(3), (), 0.0, False, False

    return Task(lambda key: (jnp.ones(3), ()), step, Box(1.0, 1.0, (3,)), Discrete(2), 10**6)


def rollout(task, steps=60, **options):
    """Of each step obs acted on, action, next obs, terminated, truncated, info; the environment."""
    env = Environment("test::Any", wrap(task, "test::Any", options))

    def step(carry, key):
        obs, state = carry
        action = env.action_space.sample(key)
        next_obs, state, _, terminated, truncated, info = env.step(key, state, action)
        return (next_obs, state), (obs, action, next_obs, terminated, truncated, info)

    run = jax.jit(lambda key: jax.lax.scan(step, env.reset(key), jax.random.split(key, steps))[1])
    first = jax.eval_shape(env.reset, jax.random.key(0))[0]
    space = env.observation_space
    assert (first.shape, first.dtype) == (space.shape, space.dtype)
    obs, *results = jax.device_get(run(jax.random.key(3)))
    assert (obs >= space.low).all() and (obs <= space.high).all()
    return obs, *results, env


@pytest.mark.parametrize(
    ("options", "ages"),
    [
        ({"delay": 2}, [2]),
        ({"frame_stack": 3}, [2, 1, 0]),
        ({"frame_stack": 2, "delay": 2}, [3, 2]),
    ],
)
def test_the_past_is_seen_and_ends_with_the_episode(options, ages):
    obs, _, _, terminated, _, info, _ = rollout(clock_task(), **options)
    numbers = obs[:, 0]  # of the episode that each step belongs to
    time = np.arange(60) % 7

    def expected(time):
        columns = [x for age in ages for x in (numbers, np.maximum(time - age, 0))]
        return np.stack(columns, axis=1)

    np.testing.assert_array_equal(obs, expected(time))
    np.testing.assert_array_equal(info["final_obs"], expected(time + 1))
    np.testing.assert_array_equal(terminated, time == 6)
    assert len(np.unique(numbers)) == 9


def test_images_are_stacked_along_channels():
    obs, *_, env = rollout(clock_task(obs_shape=(4, 5, 3)), steps=14, frame_stack=2)
    assert obs.shape == (14, 4, 5, 6) and obs.dtype == np.uint8 == env.observation_space.dtype
    time = np.arange(14) % 7
    expected = np.stack([np.maximum(time - 1, 0)] * 3 + [time] * 3, axis=1)
    np.testing.assert_array_equal(obs[:, 0, 0], expected)


def test_noise():
    obs, _, next_obs, *_, info, env = rollout(ones_task(), steps=4000, noise=0.5)
    errors = obs - 1.0
    assert abs(errors.mean()) < 0.03 and abs(errors.std() - 0.5) < 0.02
    assert np.abs(np.corrcoef(errors.T) - np.eye(3)).max() < 0.08  # every entry has its own
    assert abs(np.corrcoef(errors[1:, 0], errors[:-1, 0])[0, 1]) < 0.08  # and every step
    np.testing.assert_array_equal(next_obs, info["final_obs"])  # one observation, seen twice
    assert env.observation_space.high == np.inf


def test_entries_are_hidden_one_by_one_or_all_at_once():
    single, *_ = rollout(ones_task(), steps=4000, mask_probability=0.3)
    together, *_ = rollout(ones_task(), steps=4000, flicker=0.3)
    for obs in (single, together):
        assert set(np.unique(obs)) == {0.0, 1.0} and abs(obs.mean() - 0.7) < 0.03
    assert np.abs(np.corrcoef(single.T) - np.eye(3)).max() < 0.08
    assert (together == together[:, :1]).all()
    assert (rollout(ones_task(), steps=2, flicker=0.3)[-1].observation_space.low == 0.0).all()


def test_what_hides_comes_after_noise_and_before_the_past():
    hiding = {"mask_probability": 0.3, "flicker": 0.3}
    obs, *_ = rollout(ones_task(), steps=1000, noise=0.5, frame_stack=2, **hiding)
    np.testing.assert_array_equal(obs[1:, :3], obs[:-1, 3:])  # seen once, remembered as it was
    dark = (obs[:, 3:] == 0).all(axis=1)
    assert abs(dark.mean() - (0.3 + 0.7 * 0.3**3)) < 0.05
    hidden = (obs[~dark, 3:] == 0).mean()
    assert abs(hidden - 0.3) < 0.06 and len(np.unique(obs)) > 1000


@pytest.mark.parametrize("name", ["sticky_actions", "noise", "mask_probability", "flicker"])
def test_wrappers_have_keys_of_their_own(name):
    """What they draw does not follow from what the task draws in the same step."""

    def reset(key):
        obs = jax.random.uniform(key, (1,), minval=1.0, maxval=2.0)
        return obs, (obs, jnp.int32(0))

    def step(key, state, action):
        obs, _ = reset(key)
        return obs, (obs, action), 0.0, False, False

    task = wrap(Task(reset, step, Box(1.0, 2.0, (1,)), Discrete(2), 9), "test::Any", {name: 0.5})
    key_of_reset, *keys_of_steps = jax.random.split(jax.random.key(0), (3, 2000))
    obs, state = jax.vmap(task.reset)(key_of_reset)
    drawn = [(obs, state)]
    for action, keys in enumerate(keys_of_steps):
        actions = jnp.full(2000, action)
        obs, state, *_ = jax.vmap(task.step)(keys, state, actions)
        drawn.append((obs, state))
    for obs, state in drawn[2:] if name == "sticky_actions" else drawn:
        own, action = state.inner if name == "sticky_actions" else state
        change = action if name == "sticky_actions" else (obs - own)[:, 0]
        change = change if name in ("sticky_actions", "noise") else obs[:, 0] == 0
        assert np.std(change) > 0.3
        assert abs(np.corrcoef(change, own[:, 0])[0, 1]) < 0.1


def test_sticky_actions():
    _, given, _, terminated, _, info, _ = rollout(echo_task(), steps=4000, sticky_actions=0.25)
    done = info["final_obs"][:, 0]
    last, begins = np.roll(done, 1), np.arange(4000) % 50 == 0
    np.testing.assert_array_equal(done[begins], given[begins])
    assert ((done == given) | (done == last)).all()
    undecided = ~begins & (given != last)
    assert abs((done == last)[undecided].mean() - 0.25) < 0.03


def test_time_limit():
    *_, terminated, truncated, info, env = rollout(constant_task(50), steps=40, time_limit=4)
    np.testing.assert_array_equal(truncated, np.arange(40) % 4 == 3)
    assert not terminated.any() and env.max_steps == 4
    assert (info["episode_length"][truncated] == 4).all()
    *_, terminated, truncated, _, env = rollout(clock_task(7), steps=40, time_limit=7)
    np.testing.assert_array_equal(terminated, np.arange(40) % 7 == 6)
    assert not truncated.any()
    *_, env = rollout(clock_task(7), steps=1, time_limit=9)
    assert env.max_steps == 7


def lottery_task():
    """Observations (a secret drawn once, the steps so far, luck); the luck ends some episodes.

    Both ends occur: little luck terminates an episode, its fifth step truncates it. The state keeps
    a key, too, from which another number of the observation follows.
    """

    def show(secret, time, key, luck):
        return jnp.stack([secret, 1.0 * time, luck, jax.random.uniform(key)])

    def reset(key):
        secret, luck = jax.random.uniform(key, (2,))
        return show(secret, 0, key, luck), (secret, 0, key)

    def step(key, state, action):
        secret, time, own_key = state
        luck = jax.random.uniform(key)
        own_key, _ = jax.random.split(own_key)
        obs = show(secret, time + 1, own_key, luck)
        return obs, (secret, time + 1, own_key), luck + action, luck < 0.2, time + 1 >= 5

    def reseed(key, state):
        secret, time, _ = state
        return secret, time, key

    return Task(reset, step, Box(0.0, 5.0, (4,)), Discrete(3), 5, reseed=reseed)


@pytest.mark.parametrize("reseeds", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"delay": 1},
        {"noise": 0.1, "frame_stack": 2},
        {"sticky_actions": 0.5, "flicker": 0.3, "time_limit": 3},
    ],
)
def test_trials_are_episodes_of_one_task(options, reseeds):
    """Against a loop that resets with the same key; the wrappers before it are part of a trial."""
    task = lottery_task() if reseeds else replace(lottery_task(), reseed=None)
    single = mask_observation("test::Any", task, ("3",) if "delay" in options else ("1",))
    single = wrap(single, "test::Any", options)
    joined = wrap(single, "test::Any", {"trials": 3})
    (size,) = single.observation_space.shape
    assert joined.observation_space.shape == (size + 1,)
    assert joined.max_steps == 3 * single.max_steps
    single_reset, single_step = jax.jit(single.reset), jax.jit(single.step)
    joined_reset, joined_step = jax.jit(joined.reset), jax.jit(joined.step)
    lengths = []
    returns = []
    for episode in range(8):
        reset_key, key = jax.random.split(jax.random.key(episode))
        obs, state = joined_reset(reset_key)
        own_key = None
        for trial in range(3):
            expected, inner = single_reset(reset_key)
            if trial and reseeds:
                inner = single.reseed(own_key, inner)
            np.testing.assert_array_equal(obs, [*expected, 1.0])
            ends = False
            length = 0
            trial_return = np.float32(0.0)
            while not ends:
                key, action_key, step_key = jax.random.split(key, 3)
                action = single.action_space.sample(action_key)
                obs, state, reward, terminated, truncated = joined_step(step_key, state, action)
                task_key, own_key = jax.random.split(step_key)
                expected, inner, *rest = single_step(task_key, inner, action)
                ends = rest[1] or rest[2]
                length += 1
                trial_return += rest[0]
                assert reward == rest[0]
                assert (terminated, truncated) == (ends and trial == 2, False)
                if not ends or trial == 2:  # the last one ends with its true observation
                    np.testing.assert_array_equal(obs, [*expected, 0.0])
            lengths.append(length)
            returns.append(float(trial_return))
        reported = {"first_trial_return": returns[-3], "last_trial_return": returns[-1]}
        assert {name: float(x) for name, x in joined.report(state).items()} == reported
    assert min(lengths) == 1 and max(lengths) == (3 if "time_limit" in options else 5)


def test_an_environment_of_trials():
    """An episode has the length and the return of all its trials, and ends by terminating."""
    obs, _, next_obs, terminated, truncated, info, env = rollout(clock_task(), trials=3)
    time = np.arange(60)
    np.testing.assert_array_equal(obs[:, 1], time % 7)
    np.testing.assert_array_equal(obs[:, 2], time % 7 == 0)
    np.testing.assert_array_equal(terminated, time % 21 == 20)
    assert not truncated.any() and env.max_steps == 21
    assert [len(np.unique(obs[i : i + 21, 0])) for i in (0, 21, 42)] == [1, 1, 1]
    assert len(np.unique(obs[:, 0])) == 3  # each episode draws another task
    np.testing.assert_array_equal(info["episode_length"], time % 21 + 1)
    np.testing.assert_array_equal(info["episode_return"], time % 21 + 1)
    np.testing.assert_array_equal(info["final_obs"][~terminated], next_obs[~terminated])
    np.testing.assert_array_equal(info["final_obs"][terminated, 1:], [[7.0, 0.0]] * 2)


def test_the_end_of_the_last_trial_terminates_even_where_trials_are_truncated():
    options = {"trials": 2, "time_limit": 5}
    *_, terminated, truncated, _, env = rollout(constant_task(50), steps=40, **options)
    np.testing.assert_array_equal(terminated, np.arange(40) % 10 == 9)
    assert not truncated.any() and env.max_steps == 10


def test_in_images_a_channel_marks_the_beginning_of_a_trial():
    images = clock_task(obs_shape=(4, 5, 3))
    obs, *_, env = rollout(images, steps=28, trials=2, frame_stack=2)
    assert obs.shape == (28, 4, 5, 7) and obs.dtype == np.uint8 == env.observation_space.dtype
    assert (obs[..., 6] == np.where(np.arange(28) % 7 == 0, 255, 0)[:, None, None]).all()
    np.testing.assert_array_equal(obs[:, 0, 0, 5], np.arange(28) % 7)


def test_trials_with_masks_and_normalisation():
    env = make("gymnax::FourRooms-misc", mask=("2", "3"), trials=3, normalize_obs=True)
    obs, state = env.reset(jax.random.key(0))
    assert obs.shape == env.observation_space.shape == (3,)
    assert state.statistics.obs.mean[2] > 0.9  # the mark, so far 1 in every observation
    assert env.max_steps == 1500


def test_rescaled_actions():
    plain, scaled = make("gymnax::Pendulum-v1"), make("gymnax::Pendulum-v1", rescale_actions=True)
    space = scaled.action_space
    assert (space.low, space.high, space.shape) == (-1.0, 1.0, (1,))
    _, state = plain.reset(jax.random.key(0))
    for action in (-3.0, -1.0, 0.3, 1.0):
        ours, *_ = scaled.step(jax.random.key(1), state, jnp.array([action]))
        theirs, *_ = plain.step(jax.random.key(1), state, jnp.array([2 * action]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_wrapped_environment_is_drawn():
    wrappers = {"frame_stack": 2, "delay": 1, "sticky_actions": 0.1, "time_limit": 3, "trials": 3}
    env = make("gymnax::CartPole-v1", **wrappers, normalize_obs=True)
    _, state = env.reset(jax.random.key(0))
    assert env.observation_space.shape == (9,) and env.max_steps == 9
    assert env.render(jax.device_get(state.task)).shape[-1] == 3


def test_masks_come_first():
    env = make("gymnax::CartPole-v1", mask="velocity", frame_stack=3)
    assert env.reset(jax.random.key(0))[0].shape == env.observation_space.shape == (6,)


@pytest.mark.parametrize(
    ("id", "mask", "kept"),
    [
        ("gymnax::CartPole-v1", ("velocity",), [0, 2]),
        ("gymnax::CartPole-v1", "position", [1, 3]),
        ("gymnax::CartPole-v1", ("0", "3"), [1, 2]),
        ("gymnax::CartPole-v1", ("velocity", "0"), [2]),
        ("gymnax::Acrobot-v1", ("velocity",), [0, 1, 2, 3]),
        ("gymnax::Pendulum-v1", ("velocity",), [0, 1]),
        ("gymnax::MountainCar-v0", ("velocity",), [0]),
        ("gymnax::MountainCarContinuous-v0", ("position",), [1]),
    ],
)
def test_mask_hides_and_changes_nothing_else(id, mask, kept):
    short = {"max_steps_in_episode": 10}  # the rollouts see beginnings and ends, too
    with jax.disable_jit():  # compiled as a whole, two programs may round differently
        full = random_rollout(make(id, **short), 25)
        masked = random_rollout(make(id, mask=mask, **short), 25)
    np.testing.assert_array_equal(masked[0], full[0][:, kept])
    np.testing.assert_array_equal(masked[1], full[1][:, kept])
    np.testing.assert_array_equal(masked[5]["final_obs"], full[5]["final_obs"][:, kept])
    np.testing.assert_array_equal(masked[2], full[2])
    space = make(id, mask=mask).observation_space
    assert space.shape == (len(kept),) == space.low.shape == space.high.shape


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("flicker", 1.0, "option flicker of .* must be at least 0 and less than 1, got 1.0"),
        ("sticky_actions", -0.1, "option sticky_actions of .* less than 1, got -0.1"),
        (
            "mask_probability",
            np.nan,
            "option mask_probability of .* must be finite, got nan",
        ),
        ("noise", -1.0, "option noise of gymnax::CartPole-v1 must be 0 or more, got -1.0"),
        ("noise", np.inf, "option noise of .* must be finite, got inf"),
        ("delay", -1, "option delay of .* must be 0 or more, got -1"),
        ("delay", 1.5, "option delay of .* must be int, got 1.5"),
        ("frame_stack", 0, "option frame_stack of .* must be at least 1, got 0"),
        ("time_limit", -5, "option time_limit of .* must be at least 1, got -5"),
        ("time_limit", 0, "option time_limit of .* must be at least 1, got 0"),
        ("trials", 0, "option trials of gymnax::CartPole-v1 must be at least 1, got 0"),
        ("trials", -2, "option trials of .* must be at least 1, got -2"),
        ("trials", 1.5, "option trials of .* must be int, got 1.5"),
        ("time_limit", 2**31, "option time_limit of .* must be a finite number of 32 bits"),
        ("frame_stack", 10**9, "frame_stack of .* must be at most 262144, .* exceed 4 MiB"),
        ("delay", 10**9, "delay of .* must be at most 262144, got 1000000000"),
        ("sticky_actions", 2, "option sticky_actions of .* less than 1, got 2"),
        ("noise", np.nan, "option noise of .* must be finite, got nan"),
        ("noise", 1e39, "option noise of .* must be a finite number of 32 bits, got 1e"),
        ("noise", [0.1], r"option noise of .* must be a number, .* got \[0.1\]"),
        ("reward_gamma", np.nan, "option reward_gamma of .* must be finite, got nan"),
        ("rescale_actions", True, "is for continuous actions; gymnax::CartPole-v1 has 2 discrete"),
        ("mask", 7, "unknown mask '7'; valid for gymnax::CartPole-v1: indices 0 to 3"),
        ("frame_stak", 2, r"has no option 'frame_stak' \(did you mean 'frame_stack'\?\)"),
    ],
)
def test_what_is_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        make("gymnax::CartPole-v1", **{option: value})


def test_noise_is_not_for_images():
    message = "noise is not for images of whole numbers, which test::Any has"
    with pytest.raises(ValueError, match=message):
        wrap(clock_task(obs_shape=(4, 4, 3)), "test::Any", {"noise": 0.1})


def test_unscaling_reverts_scaling():
    """An action that the bounds leave no choice is shown as a number, too."""
    space = Box(np.array([-2.0, 0.0, 1.0]), np.array([4.0, 1.0, 1.0]), (3,))
    action = np.array([0.5, -0.25, 0.75])
    np.testing.assert_allclose(unscale(scale(action, space), space)[:2], action[:2])
    assert np.isfinite(unscale(scale(action, space), space)).all()
