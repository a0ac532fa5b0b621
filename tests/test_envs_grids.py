"""craftax, navix, popgym_arcade and gxm against the original libraries, and the truth about how their episodes end."""

import importlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_envs import test_conformance as check_conformance

import envs
from envs import make

CRAFTAX = [f"craftax::{env_id}" for env_id in envs.CRAFTAX]
NAVIX = [f"navix::{env_id}" for env_id in envs.navix_ids()]
ARCADE = [f"popgym_arcade::{env_id}" for env_id in envs.arcade_ids()]
GXM = [f"gxm::{env_id}" for env_id in envs.gxm_ids()]
ATARI = [id for id in GXM if "/ALE/" in id]
TOYS = [id for id in GXM if "/ALE/" not in id]

# A representative of each kind of layout; craftax's pictures take a minute to make.
DEFAULT = ["craftax::Craftax-Symbolic-v1", "craftax::Craftax-Classic-Symbolic-v1"]
DEFAULT += ["navix::Navix-FourRooms-v0", "navix::Navix-DoorKey-8x8-v0", "navix::Navix-Dynamic-Obstacles-5x5-v0"]
DEFAULT += ["popgym_arcade::CartPoleEasy", "popgym_arcade::BreakoutHard", "popgym_arcade::AutoEncodeMedium"]
DEFAULT += ["gxm::Gymnasium/ALE/Breakout-v5", *TOYS]


@pytest.mark.parametrize("id", DEFAULT)
def test_conformance(id):
    check_conformance(id)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [id for id in CRAFTAX + NAVIX + ARCADE + ATARI if id not in DEFAULT])
def test_conformance_of_the_rest(id):
    check_conformance(id)


def test_every_id_is_there():
    assert len(CRAFTAX) == 4 and len(ARCADE) == 30 and len(ATARI) >= 100
    assert len(NAVIX) >= 41 and "navix::Navix-FourRooms-v0" in NAVIX


def rollout(env, steps, num_envs, key=0, actions=None):
    """Arrays (steps, num_envs, ...): the states stepped from, the actions, and all that the steps returned."""

    def step(carry, inputs):
        obs, state = carry
        key, action = inputs
        keys = jax.random.split(key, num_envs)
        action = jax.vmap(env.action_space.sample)(keys) if actions is None else action
        next_obs, next_state, reward, terminated, truncated, info = jax.vmap(env.step)(keys, state, action)
        return (next_obs, next_state), (state, action, next_obs, reward, terminated, truncated, info)

    @jax.jit
    def run(key):
        first = jax.vmap(env.reset)(jax.random.split(key, num_envs))
        return first, jax.lax.scan(step, first, (jax.random.split(key, steps), actions))[1]

    return run(jax.random.key(key))


def checked_ends(steps):
    """The conditions that hold for every library; returns (terminated, truncated, info)."""
    _, _, next_obs, _, terminated, truncated, info = steps
    done = info["episode_done"]
    np.testing.assert_array_equal(done, terminated | truncated)
    assert not (terminated & truncated).any()
    np.testing.assert_array_equal(info["final_obs"][~done], next_obs[~done])
    return np.asarray(terminated), np.asarray(truncated), info


# --- craftax ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "id",
    [
        "craftax::Craftax-Classic-Symbolic-v1",
        *(pytest.param(id, marks=pytest.mark.slow) for id in CRAFTAX if "Classic-Symbolic" not in id),
    ],
)
def test_craftax_steps_are_those_of_the_library(id):
    """Observations, rewards and ends of its own step without reset; here every episode is cut off after 3 steps."""
    env = make(id, max_timesteps=3)
    library = importlib.import_module("craftax.craftax_env").make_craftax_env_from_name(id[9:], auto_reset=False)
    params = library.default_params.replace(max_timesteps=3)
    _, steps = rollout(env, 4, 2)
    states, actions, _, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    np.testing.assert_array_equal(truncated, np.array([[0, 0], [0, 0], [1, 1], [0, 0]], bool))
    assert not terminated.any() and env.max_steps == 3

    @jax.jit
    def theirs(states, actions):
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(jax.random.split(jax.random.key(0), 4))
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
    with pytest.raises(ValueError, match="makes once and writes to .*cache.pbz2: that folder cannot be written to"):
        make("craftax::Craftax-Classic-Pixels-v1", day_length=299)


# --- navix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["navix::Navix-DoorKey-5x5-v0", "navix::Navix-Dynamic-Obstacles-5x5-v0"])
def test_navix_steps_are_those_of_the_library(id):
    """Within an episode they equal its own step, which would reset in the step after the end."""
    import navix

    env = make(id, max_steps=9)
    library = navix.make(id[7:], max_steps=9, observation_fn=navix.observations.symbolic_first_person)
    (first_obs, _), steps = rollout(env, 40, 4)
    _, actions, _, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    assert truncated.any() and (info["episode_length"][truncated] == 9).all()
    assert terminated.any() or "Obstacles" not in id  # they are run into

    @jax.jit
    def theirs(actions):
        first = jax.vmap(library.reset)(jax.random.split(jax.random.key(0), 4))
        return first, jax.lax.scan(lambda ts, action: (jax.vmap(library.step)(ts, action),) * 2, first, actions)[1]

    first, expected = theirs(actions)
    np.testing.assert_array_equal(first_obs, first.observation)
    for row in range(4):
        length = int(np.argmax(terminated[:, row] | truncated[:, row])) + 1
        np.testing.assert_array_equal(info["final_obs"][:length, row], expected.observation[:length, row])
        np.testing.assert_array_equal(reward[:length, row], expected.reward[:length, row])
        np.testing.assert_array_equal(terminated[:length, row], expected.step_type[:length, row] == 2)
        np.testing.assert_array_equal(truncated[:length, row], expected.step_type[:length, row] == 1)


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
    assert make("navix::FourRooms") is make("navix::Navix-FourRooms-v0") is make("gxm::Navix/FourRooms")
    assert make("navix::FourRooms").max_steps == 4 * 19 * 19  # whatever the version of navix
    assert make("navix::FourRooms", max_steps=50).max_steps == 50


def test_libraries_are_silent():
    """Their warnings at import, and what the emulator prints at its beginning and at Python's end."""
    code = "from envs import make; [make(i) for i in ('navix::Empty-5x5', 'gxm::Gymnasium/ALE/Pong-v5')]"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}  # XLA itself has remarks on what it reads from there
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == result.stderr == ""


# --- popgym_arcade ---------------------------------------------------------------------------------------------------


def test_arcade_steps_are_those_of_the_library():
    """CartPole, always pushed to the left until it falls; its `done` comes a step late, and so does ours."""
    import popgym_arcade

    library, params = popgym_arcade.make("CartPoleEasy", partial_obs=True, obs_size=128)
    library.is_terminated = library.is_terminal
    env = make("popgym_arcade::CartPoleEasy")
    actions = jnp.full((14, 2), 2)
    (first_obs, _), steps = rollout(env, 14, 2, actions=actions)
    terminated, truncated, info = checked_ends(steps)
    assert terminated.any() and not truncated.any()

    def step(state, inputs):
        key, action = inputs
        step_keys = jax.vmap(lambda key: jax.random.split(key)[0])(jax.random.split(key, 2))
        obs, state, reward, done, _ = jax.vmap(library.step_env, (0, 0, 0, None))(step_keys, state, action, params)
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
    """The library says done only in the step after the limit. The game is set to the step before it."""
    env = make("popgym_arcade::CartPoleEasy")
    step = jax.jit(env.step)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    state = state._replace(task=state.task.replace(time=jnp.int32(198)), time=jnp.int32(198))
    for last in (False, True):
        _, state, _, terminated, truncated, info = step(jax.random.key(1), state, 0)
        assert (bool(truncated), bool(terminated)) == (last, False)
    assert info["episode_length"] == env.max_steps == 200 and state.time == state.task.time == 0


def test_arcade_hides_what_memory_must_keep():
    hidden, shown = (make("popgym_arcade::AutoEncodeEasy", partial_obs=partial) for partial in (True, False))
    assert hidden.action_space.n == 5  # the last one confirms; the library counts four
    small, large = (make("popgym_arcade::BreakoutEasy", obs_size=size).observation_space for size in (128, 256))
    assert small.shape == (128, 128, 3) and large.shape == (256, 256, 3) and small.dtype == np.uint8
    begin = [jax.jit(env.reset)(jax.random.key(0)) for env in (hidden, shown)]
    later = [
        env.render(state.task.replace(timestep=jnp.int32(9)))
        for env, (_, state) in zip((hidden, shown), begin, strict=True)
    ]
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


# --- gxm: Atari ------------------------------------------------------------------------------------------------------


def test_atari_is_the_vector_environment_of_ale():
    """Same frames, rewards and ends as the original; a pixel exactly between two greys may be rounded either way.

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
        results = [game.step(np.array([action]))[:4] for action in np.asarray(actions[:length, row])]
        expected = [np.concatenate(x) for x in zip(*results, strict=True)]
        for mine, other in ((first_obs[row], obs[0]), (info["final_obs"][: length - 1, row], expected[0][:-1])):
            difference = np.abs(np.moveaxis(np.asarray(mine, int), -1, -3) - other)
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        for mine, other in zip((reward, terminated, truncated), expected[1:], strict=True):
            np.testing.assert_array_equal(mine[:length, row], other)
        assert terminated[length - 1, row] != truncated[length - 1, row]


def test_atari_depends_on_the_keys_and_on_nothing_else():
    """Equal keys give equal episodes, though others were played in between; different keys different ones."""
    env = make("gxm::Gymnasium/ALE/Pong-v5")
    actions = jnp.asarray(np.random.default_rng(0).integers(6, size=(30, 2)))
    again = [rollout(env, 30, 2, key, actions) for key in (0, 1, 0)]
    for first, third in zip(jax.tree.leaves(again[0]), jax.tree.leaves(again[2]), strict=True):
        np.testing.assert_array_equal(first, third)
    assert (again[0][1][2] != again[1][1][2]).any()
    obs = again[0][1][2]
    assert (obs[:, 0] != obs[:, 1]).any()  # two environments of a batch
    single = rollout(env, 30, 1, 0, actions[:, :1])
    assert single[1][2].shape == (30, 1, 84, 84, 4)


def test_atari_actions_stick():
    """With probability 1 they always do: the game sees the idle action that an episode begins with."""
    actions = jnp.full((20, 1), 3)
    boards = []
    for probability, action in ((1.0, 3), (0.0, 0), (0.0, 3)):
        env = make("gxm::Gymnasium/ALE/Pong-v5", repeat_action_probability=probability)
        boards.append(rollout(env, 20, 1, 0, jnp.full_like(actions, action))[1][2])
    np.testing.assert_array_equal(boards[0], boards[1])
    assert (boards[0] != boards[2]).any()


# --- gxm: the rest of Gymnasium --------------------------------------------------------------------------------------


def test_gymnasium_steps_are_those_of_the_library():
    """CartPole from the states of our episodes, stepped by Gymnasium; both ends."""
    import gymnasium

    env = make("gxm::Gymnasium/CartPole-v1", max_episode_steps=15)
    (first_obs, _), steps = rollout(env, 60, 3)
    _, actions, next_obs, reward, *_ = steps
    terminated, truncated, info = checked_ends(steps)
    assert terminated.any() and truncated.any() and (info["episode_length"][truncated] == 15).all()
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


# --- Errors and pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("craftax::Craftax-Classic-v1", {}, "unknown environment 'craftax::Craftax-Classic-v1' .did you mean"),
        (
            "craftax::Craftax-Classic-Symbolic-v1",
            {"max_timestep": 3},
            r"has no option 'max_timestep' \(did you mean 'max_timesteps'\?\)",
        ),
        ("craftax::Craftax-Symbolic-v1", {"god_mode": 1}, "option god_mode of craftax::.* must be bool, got 1"),
        ("navix::FourRoms", {}, r"'navix::Navix-FourRoms-v0' \(did you mean 'navix::Navix-FourRooms-v0'"),
        (
            "navix::FourRooms",
            {"observation": "rgb_first"},
            r"observation 'rgb_first' \(did you mean 'rgb_first_person'",
        ),
        ("navix::FourRooms", {"max_steps": 0}, "max_steps of navix::Navix-FourRooms-v0 must be at least 1, got 0"),
        ("popgym_arcade::SpaceInvaders", {}, "unknown environment 'popgym_arcade::SpaceInvaders'"),
        ("popgym_arcade::BreakoutEasy", {"obs_size": 64}, "obs_size of .* must be 128 or 256, got 64"),
        ("popgym_arcade::BreakoutEasy", {"partial_obs": 1}, "partial_obs of .* must be bool, got 1"),
        ("gxm::CartPole-v1", {}, "write gxm::Library/id, with one of the libraries Gymnax, Brax"),
        ("gxm::Gym/CartPole-v1", {}, "write gxm::Library/id"),
        ("gxm::Gymnasium/CartPol-v1", {}, r"did you mean 'gxm::Gymnasium/CartPole-v"),
        ("gxm::Gymnasium/LunarLander-v3", {}, "is not supported: its simulator does not let its state be read"),
        ("gxm::Gymnasium/ALE/Pong-v5", {"frameskip": 0}, "frameskip of .* must be at least 1, got 0"),
        ("gxm::Gymnasium/ALE/Pong-v5", {"noopmax": 3}, r"no option 'noopmax' \(did you mean 'noop_max'\?\)"),
        ("gxm::Gymnasium/Pendulum-v1", {"gravity": 3}, r"no option 'gravity'; valid options: max_episode_steps"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.parametrize(
    ("module", "id", "package"),
    [
        ("craftax", "craftax::Craftax-Symbolic-v1", "craftax"),
        ("navix", "navix::FourRooms", "navix"),
        ("popgym_arcade", "popgym_arcade::BreakoutEasy", "popgym-arcade"),
        ("gymnasium", "gxm::Gymnasium/CartPole-v1", "gymnasium"),
    ],
)
def test_a_missing_library_is_named(module, id, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(module), *sys.meta_path])
    with pytest.raises(ValueError, match=rf"needs {module}.*, which is not installed: pip install '{package}'"):
        envs._make.__wrapped__(envs.full_id(id), (), ())


class Missing:
    """An importer for a library that is not there."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.name)


@pytest.mark.parametrize(
    "id",
    [
        "navix::Empty-5x5",
        "popgym_arcade::BreakoutEasy",
        "gxm::Gymnasium/ALE/Pong-v5",
        "gxm::Gymnasium/CartPole-v1",
        pytest.param("craftax::Craftax-Classic-Symbolic-v1", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param("popgym_arcade::NoisyCartPoleEasy", marks=pytest.mark.slow),
    ],
)
def test_pictures(id):
    env = make(id)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    picture = env.render(jax.device_get(state.task))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2
