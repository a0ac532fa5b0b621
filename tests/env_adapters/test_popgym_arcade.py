"""popgym_arcade against the original library, and the truth about how its episodes end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import batch_rollout as rollout
from helpers import check_conformance, check_picture, checked_ends

from env_adapters import popgym_arcade as adapter
from envs import make

GAME = "popgym_arcade::BreakoutEasy"
ARCADE = [f"popgym_arcade::{env_id}" for env_id in adapter.ids()]
DEFAULT = [
    "popgym_arcade::CartPoleEasy",
    "popgym_arcade::BreakoutHard",
    "popgym_arcade::AutoEncodeMedium",
]


@pytest.mark.parametrize("id", DEFAULT)
def test_conformance(id):
    check_conformance(make(id))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [id for id in ARCADE if id not in DEFAULT])
def test_conformance_of_the_rest(id):
    check_conformance(make(id))


def test_arcade_steps_are_those_of_the_library():
    """CartPole, pushed to the left until it falls; its `done` comes a step late, as does ours."""
    import popgym_arcade

    library, params = popgym_arcade.make("CartPoleEasy", partial_obs=True, obs_size=128)
    library.is_terminated = library.is_terminal
    env = make("popgym_arcade::CartPoleEasy")
    actions = jnp.full((14, 2), 2)
    (first_obs, _), steps = rollout(env, 14, 2, actions=actions)
    terminated, truncated, info = checked_ends(steps)
    assert terminated.any() and not truncated.any()

    library_step = jax.vmap(library.step_env, (0, 0, 0, None))

    def step(state, inputs):
        key, action = inputs
        step_keys = jax.vmap(lambda key: jax.random.split(key)[0])(jax.random.split(key, 2))
        obs, state, reward, done, _ = library_step(step_keys, state, action, params)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), state, like), (obs, reward, done)

    reset_keys = jax.random.split(jax.random.key(0), 2)
    obs, state = jax.jit(jax.vmap(library.reset_env, (0, None)))(reset_keys, params)
    np.testing.assert_array_equal(first_obs, obs)
    like = jax.eval_shape(lambda: env_state_of(env, 2))
    state = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, like)
    keys = jax.random.split(jax.random.key(0), 14)
    obs, reward, done = jax.jit(lambda state: jax.lax.scan(step, state, (keys, actions))[1])(state)
    for row in range(2):
        length = int(np.argmax(terminated[:, row])) + 1
        np.testing.assert_array_equal(info["final_obs"][:length, row], obs[:length, row])
        np.testing.assert_allclose(steps[3][:length, row], reward[:length, row])
        np.testing.assert_array_equal(terminated[:length, row], done[:length, row])


def env_state_of(env, num_envs):
    return jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_envs))[1].task


def test_arcade_time_limit():
    """The library says done in the step after the limit; the game is set to the one before."""
    env = make("popgym_arcade::CartPoleEasy")
    step = jax.jit(env.step)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    state = state._replace(task=state.task.replace(time=jnp.int32(198)), time=jnp.int32(198))
    for last in (False, True):
        _, state, _, terminated, truncated, info = step(jax.random.key(1), state, 0)
        assert (bool(truncated), bool(terminated)) == (last, False)
    assert info["episode_length"] == env.max_steps == 200 and state.time == state.task.time == 0


def test_arcade_hides_what_memory_must_keep():
    hidden = make("popgym_arcade::AutoEncodeEasy", partial_obs=True)
    shown = make("popgym_arcade::AutoEncodeEasy", partial_obs=False)
    assert hidden.action_space.n == 5  # the last one confirms; the library counts four
    small, large = (make(GAME, obs_size=size).observation_space for size in (128, 256))
    assert small.shape == (128, 128, 3) and small.dtype == np.uint8
    assert large.shape == (256, 256, 3)
    later = []
    for env in (hidden, shown):
        _, state = jax.jit(env.reset)(jax.random.key(0))
        later.append(env.render(state.task.replace(timestep=jnp.int32(9))))
    assert (later[0] != later[1]).any()  # the cards dealt so far


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("id", [id for id in ARCADE if id.endswith("Easy")])
def test_arcade_games_run_to_their_limits(id):
    env = make(id)
    _, steps = rollout(env, min(env.max_steps, 300) + 1, 2)
    terminated, truncated, info = checked_ends(steps)
    assert (info["episode_length"][truncated] == env.max_steps).all()
    assert (info["episode_length"] <= env.max_steps).all()
    assert (terminated | truncated).any() or env.max_steps > 300


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("popgym_arcade::SpaceInvaders", {}, "unknown environment 'popgym_arcade::SpaceInvaders'"),
        (GAME, {"obs_size": 64}, "obs_size of .* must be 128 or 256, got 64"),
        (GAME, {"partial_obs": 1}, "partial_obs of .* must be bool, got 1"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


NOISY = pytest.param("popgym_arcade::NoisyCartPoleEasy", marks=pytest.mark.slow)


@pytest.mark.parametrize("id", [GAME, NOISY])
def test_pictures(id):
    check_picture(make(id))
