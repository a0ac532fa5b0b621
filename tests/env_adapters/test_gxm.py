"""gxm against Atari's vector environment and Gymnasium, from whatever state."""

import ale_py
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import batch_rollout as rollout
from helpers import check_conformance, check_picture, checked_ends

from env_adapters import craftax, navix, popgym_arcade
from env_adapters import gxm as adapter
from env_adapters.host_atari import Shrink
from envs import make

PONG = "gxm::Gymnasium/ALE/Pong-v5"
LANDER = "gxm::Gymnasium/LunarLander-v3"
PENDULUM = "gxm::Gymnasium/Pendulum-v1"
LAKE = "gxm::Gymnasium/FrozenLake-v1"
GXM = [f"gxm::{env_id}" for env_id in adapter.ids()]
ATARI = [id for id in GXM if "/ALE/" in id]
TOYS = [id for id in GXM if "/ALE/" not in id]
DEFAULT = ["gxm::Gymnasium/ALE/Breakout-v5", *TOYS]


@pytest.mark.parametrize("id", DEFAULT)
def test_conformance(id):
    check_conformance(make(id))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [id for id in ATARI if id not in DEFAULT])
def test_conformance_of_the_rest(id):
    check_conformance(make(id))


def test_every_id_is_there():
    assert len(craftax.ids()) == 4 and len(popgym_arcade.ids()) == 30 and len(ATARI) >= 100
    assert len(navix.ids()) >= 41 and "Navix-FourRooms-v0" in navix.ids()


# --- Atari ---------------------------------------------------------------------------------------


def test_atari_is_the_vector_environment_of_ale():
    """Same frames, rewards and ends; a pixel exactly between two greys may be rounded either way.

    The last step is cut off by the limit of frames, where ale_py shows an older frame.
    """
    from ale_py.vector_env import AtariVectorEnv

    options = {"noop_max": 1, "repeat_action_probability": 0.0, "max_num_frames_per_episode": 400}
    env = make("gxm::Gymnasium/ALE/Breakout-v5", **options)
    assert env.observation_space.shape == (84, 84, 4) and env.observation_space.dtype == np.uint8
    (first_obs, _), steps = rollout(env, 120, 2)
    _, actions, _, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    for row in range(2):
        length = int(np.argmax(terminated[:, row] | truncated[:, row])) + 1
        game = AtariVectorEnv("breakout", 1, **options)
        obs = game.reset(seed=0)[0]
        own_actions = np.asarray(actions[:length, row])
        results = [game.step(np.array([action]))[:4] for action in own_actions]
        frames, *expected = (np.concatenate(x) for x in zip(*results, strict=True))
        final_obs = info["final_obs"][: length - 1, row]
        for mine, other in ((first_obs[row], obs[0]), (final_obs, frames[:-1])):
            difference = np.abs(np.moveaxis(np.asarray(mine, int), -1, -3) - other)
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        for mine, other in zip((reward, terminated, truncated), expected, strict=True):
            np.testing.assert_array_equal(mine[:length, row], other)
        assert terminated[length - 1, row] != truncated[length - 1, row]


def test_atari_depends_on_the_keys_and_on_nothing_else():
    """Equal keys give equal episodes, though others were played between; other keys other ones."""
    env = make(PONG)
    actions = jnp.asarray(np.random.default_rng(0).integers(6, size=(30, 2)))
    again = [rollout(env, 30, 2, key, actions) for key in (0, 1, 0)]
    for first, third in zip(jax.tree.leaves(again[0]), jax.tree.leaves(again[2]), strict=True):
        np.testing.assert_array_equal(first, third)
    assert (again[0][1][2] != again[1][1][2]).any()
    obs = again[0][1][2]
    assert (obs[:, 0] != obs[:, 1]).any()  # two environments of a batch
    single = rollout(env, 30, 1, 0, actions[:, :1])
    assert single[1][2].shape == (30, 1, 84, 84, 4)


def test_a_new_frame_is_the_last_of_four(rng):
    frames = rng.integers(256, size=(3, 84, 84, 4), dtype=np.uint8)
    frame = rng.integers(256, size=(3, 84, 84), dtype=np.uint8)
    expected = np.concatenate([frames[..., 1:], frame[..., None]], axis=-1)
    np.testing.assert_array_equal(adapter.shift_in(frames, frame), expected)


def test_clipping_can_be_switched_off():
    clips = [make(PONG, noop_max=1, reward_clipping=x)._task.clip_reward for x in (True, False)]
    assert clips == [True, False]


def test_atari_actions_stick():
    """With probability 1 they always do: the game sees the idle action of the beginning."""
    actions = jnp.full((20, 1), 3)
    boards = []
    for probability, action in ((1.0, 3), (0.0, 0), (0.0, 3)):
        env = make(PONG, repeat_action_probability=probability)
        _, steps = rollout(env, 20, 1, 0, jnp.full_like(actions, action))
        boards.append(steps[2])
    np.testing.assert_array_equal(boards[0], boards[1])
    assert (boards[0] != boards[2]).any()


@pytest.mark.parametrize(("game", "steps"), [("MsPacman", 150), ("Breakout", 300), ("Pong", 300)])
def test_returns_are_the_score_of_the_game(game, steps):
    """The emulator's own counter, with the same idle frames and actions; rewards are clipped."""
    env = make(f"gxm::Gymnasium/ALE/{game}-v5")
    key, keys = jax.random.key(5), jax.random.split(jax.random.key(0), steps)
    actions = jax.random.randint(jax.random.key(6), (steps,), 0, env.action_space.n)

    def step(carry, inputs):
        _, state, reward, *ends, info = env.step(inputs[0], carry, inputs[1])
        return state, (reward, info["episode_return"], info["episode_done"])

    obs, state = env.reset(key)
    _, (reward, score, done) = jax.jit(lambda s: jax.lax.scan(step, s, (keys, actions)))(state)
    sticks = jax.vmap(lambda key: jax.random.bernoulli(jax.random.split(key)[0], 0.25, (4,)))(keys)

    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 0)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path({"MsPacman": "ms_pacman"}.get(game, game.lower())))
    held = ale_py.Action.NOOP
    if ale_py.Action.FIRE in ale.getMinimalActionSet():
        ale.act(ale_py.Action.FIRE)
    for _ in range(jax.random.randint(key, (), 0, 30)):
        ale.act(held)
    screen = Shrink(*ale.getScreenDims(), 84)(ale.getScreenGrayscale())
    np.testing.assert_array_equal(obs[..., -1], screen)  # after the idle frames
    rewards = []
    for row, action in zip(np.asarray(sticks), np.asarray(actions), strict=True):
        rewards.append(0)
        for stick in row:
            held = held if stick else ale.getMinimalActionSet()[action]
            rewards[-1] += ale.act(held)
        if ale.game_over():
            break
    length = len(rewards)
    assert np.any(rewards) and done[: length - 1].sum() == 0
    np.testing.assert_array_equal(score[:length], np.cumsum(rewards))
    np.testing.assert_array_equal(reward[:length], np.clip(rewards, -1, 1))
    assert game != "MsPacman" or score[length - 1] > 5 * reward[:length].sum()


# --- The rest of Gymnasium -----------------------------------------------------------------------


def test_gymnasium_steps_are_those_of_the_library():
    """CartPole from the states of our episodes, stepped by Gymnasium; both ends."""
    env = make("gxm::Gymnasium/CartPole-v1", max_episode_steps=15)
    (first_obs, _), steps = rollout(env, 60, 3)
    _, actions, next_obs, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    assert terminated.any() and truncated.any()
    assert (info["episode_length"][truncated] == 15).all()
    assert len(np.unique(first_obs[:, 0])) == 3  # each has a seed of its own
    library = gymnasium.make("CartPole-v1").unwrapped
    for row in range(3):
        library.reset(seed=0)
        obs = np.asarray(first_obs[row])
        for t in range(60):
            library.state, library.steps_beyond_terminated = obs.astype(np.float64), None
            expected, _, ended, _, _ = library.step(int(actions[t, row]))
            np.testing.assert_allclose(info["final_obs"][t, row], expected, atol=1e-5)
            assert ended == terminated[t, row]
            obs = np.asarray(next_obs[t, row])


def test_gymnasium_observations_that_are_not_boxes_are_one_hot():
    obs, _ = make("gxm::Gymnasium/FrozenLake-v1").reset(jax.random.key(0))
    np.testing.assert_array_equal(obs, np.eye(16)[0])
    obs, _ = make("gxm::Gymnasium/Blackjack-v1").reset(jax.random.key(0))
    assert obs.shape == (32 + 11 + 2,) and obs.sum() == 3


def test_gxm_ids_of_other_libraries():
    assert make("gxm::Gymnax/CartPole-v1") is make("gymnax::CartPole-v1")


# --- Errors and pictures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("gxm::CartPole-v1", {}, "write gxm::Library/id, with one of the libraries Gymnax, Brax"),
        ("gxm::Gym/CartPole-v1", {}, "write gxm::Library/id"),
        ("gxm::Gymnasium/CartPol-v1", {}, r"did you mean 'gxm::Gymnasium/CartPole-v"),
        (LANDER, {}, "is not supported: its simulator does not let its state be read"),
        (PONG, {"frameskip": 0}, "frameskip of .* must be at least 1, got 0"),
        (PONG, {"noopmax": 3}, r"no option 'noopmax' \(did you mean 'noop_max'\?\)"),
        (PONG, {"frameskip": 10**9}, "frameskip of .* must be at most 60, got 1000000000"),
        (PONG, {"repeat_action_probability": 1.5}, "between 0 and 1, got 1.5"),
        (LAKE, {"render_mode": "human"}, "has no option 'render_mode'; valid options"),
        (LAKE, {"map_name": "../../x"}, "map_name of .* must be 4x4 or 8x8, got '../../x'"),
        (LAKE, {"map_name": ""}, "map_name of .* must be 4x4 or 8x8, got ''"),
        (LAKE, {"success_rate": -1}, "success_rate of .* must be between 0 and 1, got -1"),
        (LAKE, {"success_rate": np.nan}, "success_rate of .* must be finite, got nan"),
        (LAKE, {"is_slippery": 2}, "is_slippery of .* must be bool, got 2"),
        (LAKE, {"desc": "SFFG"}, "desc of .* must be a tuple, got 'SFFG'"),
        (LAKE, {"desc": ("SF", "F")}, r"cannot be made with desc \('SF', 'F'\): "),
        (LAKE, {"reward_schedule": (1, "a", 0)}, "must consist of numbers, got .1, 'a', 0"),
        (LAKE, {"max_episode_steps": 0}, "max_episode_steps of .* must be at least 1, got 0"),
        (PENDULUM, {"g": np.inf}, "option g of .* must be finite, got inf"),
        (PENDULUM, {"gravity": 3}, "no option 'gravity'; valid options: max_episode_steps"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.parametrize("id", [PONG, "gxm::Gymnasium/CartPole-v1"])
def test_pictures(id):
    check_picture(make(id))
