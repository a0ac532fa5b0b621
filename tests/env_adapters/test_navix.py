"""navix against the original library, and the truth about how its episodes end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import batch_rollout as rollout
from helpers import check_conformance, check_picture, checked_ends

from env_adapters import navix as adapter
from envs import make

NAVIX = [f"navix::{env_id}" for env_id in adapter.ids()]
DEFAULT = [
    "navix::Navix-FourRooms-v0",
    "navix::Navix-DoorKey-8x8-v0",
    "navix::Navix-Dynamic-Obstacles-5x5-v0",
]


@pytest.mark.parametrize("id", DEFAULT)
def test_conformance(id):
    check_conformance(make(id))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [id for id in NAVIX if id not in DEFAULT])
def test_conformance_of_the_rest(id):
    check_conformance(make(id))


@pytest.mark.parametrize(
    "id", ["navix::Navix-DoorKey-5x5-v0", "navix::Navix-Dynamic-Obstacles-5x5-v0"]
)
def test_navix_steps_are_those_of_the_library(id):
    """Within an episode they equal its own step, which would reset in the step after the end."""
    import navix

    env = make(id, max_steps=9)
    symbols = navix.observations.symbolic_first_person
    library = navix.make(id.partition("::")[2], max_steps=9, observation_fn=symbols)
    (first_obs, _), steps = rollout(env, 40, 4)
    _, actions, _, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    assert truncated.any() and (info["episode_length"][truncated] == 9).all()
    assert terminated.any() or "Obstacles" not in id  # they are run into

    @jax.jit
    def theirs(actions):
        first = jax.vmap(library.reset)(jax.random.split(jax.random.key(0), 4))
        step = jax.vmap(library.step)
        return first, jax.lax.scan(lambda ts, action: (step(ts, action),) * 2, first, actions)[1]

    first, expected = theirs(actions)
    np.testing.assert_array_equal(first_obs, first.observation)
    for row in range(4):
        length = int(np.argmax(terminated[:, row] | truncated[:, row])) + 1
        for ours, other in (
            (info["final_obs"], expected.observation),
            (reward, expected.reward),
            (terminated, expected.step_type == 2),
            (truncated, expected.step_type == 1),
        ):
            np.testing.assert_array_equal(ours[:length, row], other[:length, row])


@pytest.mark.parametrize(
    ("observation", "shape", "dtype"),
    [
        ("symbolic", (8, 8, 3), np.float32),
        ("symbolic_first_person", (7, 7, 3), np.float32),
        ("rgb_first_person", (56, 56, 3), np.uint8),
        ("rgb", (64, 64, 3), np.uint8),
    ],
)
def test_navix_observations(observation, shape, dtype):
    space = make("navix::DoorKey-8x8", observation=observation).observation_space
    assert (space.shape, space.dtype) == (shape, dtype)


def test_navix_categories_are_one_hot():
    env = make("navix::Empty-5x5", observation="categorical_first_person")
    obs, _ = jax.jit(env.reset)(jax.random.key(0))
    assert obs.shape[:2] == (7, 7) and obs.dtype == jnp.float32
    np.testing.assert_array_equal(obs.sum(axis=-1), 1)


def test_navix_short_names_and_limits():
    env = make("navix::FourRooms")
    assert env is make("navix::Navix-FourRooms-v0") is make("gxm::Navix/FourRooms")
    assert env.max_steps == 4 * 19 * 19  # whatever the version of navix
    assert make("navix::FourRooms", max_steps=50).max_steps == 50


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "navix::FourRoms",
            {},
            r"'navix::Navix-FourRoms-v0' \(did you mean 'navix::Navix-FourRooms-v0'",
        ),
        (
            "navix::FourRooms",
            {"observation": "rgb_first"},
            r"observation 'rgb_first' \(did you mean 'rgb_first_person'",
        ),
        (
            "navix::FourRooms",
            {"max_steps": 0},
            "max_steps of navix::Navix-FourRooms-v0 must be at least 1, got 0",
        ),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.parametrize("id", ["navix::Empty-5x5"])
def test_pictures(id):
    check_picture(make(id))


def test_trials_have_one_layout_and_luck_of_their_own():
    """The obstacles' moves follow from a key in the state."""
    id = "navix::Dynamic-Obstacles-8x8"
    env = make(id, max_steps=4, observation="symbolic", trials=3)
    obs, state = jax.jit(env.reset)(jax.random.key(0))
    wait = 5  # which may end no trial before its time
    seen = [obs]
    for key in jax.random.split(jax.random.key(1), 11):
        obs, state, *_ = jax.jit(env.step)(key, state, wait)
        seen.append(obs)
    first, *others = np.array(seen).reshape(3, 4, 8, 8, 4)
    assert (first[0, ..., 3] == 1).all() and (first[1:, ..., 3] == 0).all()
    for other in others:
        np.testing.assert_array_equal(other[0], first[0])
        assert (other[1:] != first[1:]).any()
