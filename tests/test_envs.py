"""Environments against the original libraries, and the truth about how episodes end."""

import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import Box, Discrete, make

GYMNAX = [f"gymnax::{env_id}" for env_id in envs.gymnax_ids()]
POPJAXRL = [f"popjaxrl::{env_id}" for env_id in envs.popjaxrl_ids()]
FAST = [id for id in GYMNAX if "MinAtar" not in id]


@pytest.mark.parametrize("id", GYMNAX + POPJAXRL)
def test_conformance(id):
    """Shapes and dtypes are those of the spaces, reset and step agree in structure, and nothing is weakly typed."""
    env = make(id)

    def one_step(key):
        obs, state = env.reset(key)
        return (obs, state), env.step(key, state, env.action_space.sample(key))

    (first_obs, first_state), (obs, state, reward, terminated, truncated, info) = jax.eval_shape(
        one_step, jax.random.key(0)
    )
    for actual in (first_obs, obs, info["final_obs"]):
        assert (actual.shape, actual.dtype) == (env.observation_space.shape, env.observation_space.dtype)
    assert jax.tree.structure(first_state) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(first_state), jax.tree.leaves(state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((first_obs, first_state, obs, state, reward, info)))
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    assert [(x.shape, x.dtype) for x in (terminated, truncated, info["episode_done"])] == [((), jnp.bool_)] * 3
    assert sorted(info) == ["episode_done", "episode_length", "episode_return", "final_obs"]
    assert info["episode_length"].dtype == jnp.int32 and info["episode_return"].dtype == jnp.float32
    assert isinstance(env.action_space, (Box, Discrete)) and isinstance(env.max_steps, int)


@pytest.mark.parametrize("id", FAST)
def test_steps_are_those_of_the_library(id):
    """A rollout equals one with the library's own non-resetting functions, flags and bookkeeping worked out by hand."""
    env, steps = make(id), 120
    library, params = gymnax.make(id.partition("::")[2])
    discrete_obs = hasattr(library.observation_space(params), "n")

    def flat(obs):
        obs = jax.nn.one_hot(obs, library.observation_space(params).n) if discrete_obs else obs
        return jnp.asarray(obs, jnp.float32)

    def ours(carry, key):
        obs, state = carry
        action = env.action_space.sample(key)
        obs, state, *rest = env.step(key, state, action)
        return (obs, state), (obs, action, *rest)

    def theirs(carry, inputs):
        state, total, length = carry
        key, action = inputs
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, done, _ = library.step_env(step_key, state, action, params)
        reached = state.time >= params.max_steps_in_episode
        terminated = done if hasattr(library, "is_truncated") else done & ~reached
        truncated = (library.is_truncated(state, params) if hasattr(library, "is_truncated") else reached) & ~terminated
        ended, total, length = terminated | truncated, total + reward, length + 1
        first_obs, first_state = library.reset_env(reset_key, params)
        next_state = jax.tree.map(lambda a, b: jnp.where(ended, a, b).astype(jnp.asarray(b).dtype), first_state, state)
        out = jnp.where(ended, flat(first_obs), flat(obs)), reward, terminated, truncated, flat(obs), total, length
        return (next_state, jnp.where(ended, 0.0, total), jnp.where(ended, 0, length)), out

    keys = jax.random.split(jax.random.key(1), steps)
    _, (obs, action, reward, terminated, truncated, info) = jax.jit(lambda c: jax.lax.scan(ours, c, keys))(
        env.reset(jax.random.key(0))
    )
    _, state = library.reset_env(jax.random.key(0), params)
    state = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), state, env.reset(jax.random.key(0))[1].task)
    expected = jax.jit(lambda c: jax.lax.scan(theirs, c, (keys, action)))((state, jnp.float32(0), jnp.int32(0)))[1]
    got = obs, reward, terminated, truncated, info["final_obs"], info["episode_return"], info["episode_length"]
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(other, np.float32), rtol=1e-5, atol=1e-5)
    assert (info["episode_done"] == (terminated | truncated)).all()
    assert not (terminated & truncated).any()


def rollout(env, steps, key=0, policy=lambda key, space: space.sample(key)):
    def step(carry, key):
        obs, state = carry
        next_obs, state, reward, terminated, truncated, info = env.step(key, state, policy(key, env.action_space))
        return (next_obs, state), (obs, next_obs, reward, terminated, truncated, info)

    keys = jax.random.split(jax.random.key(key), steps)
    return jax.jit(lambda c: jax.lax.scan(step, c, keys)[1])(env.reset(jax.random.key(key)))


def test_truncation_and_termination_are_told_apart():
    env = make("gymnax::CartPole-v1", max_steps_in_episode=20)
    obs, next_obs, _, terminated, truncated, info = rollout(env, 2000)
    assert env.max_steps == 20 and truncated.any() and terminated.any()
    assert (info["episode_length"][truncated] == 20).all() and (info["episode_length"][terminated] <= 20).all()
    # Terminal observations are outside the track's bounds, those at the time limit are not.
    outside = (jnp.abs(info["final_obs"][:, 0]) > 2.4) | (jnp.abs(info["final_obs"][:, 2]) > 12 * 2 * jnp.pi / 360)
    np.testing.assert_array_equal(outside, terminated)


def test_final_obs_is_the_true_next_observation():
    obs, next_obs, _, terminated, truncated, info = rollout(make("gymnax::CartPole-v1", max_steps_in_episode=20), 500)
    done = info["episode_done"]
    # Not bit for bit: XLA may compute the same sum for each of the two, with and without a fused multiply-add.
    np.testing.assert_allclose(info["final_obs"][~done], next_obs[~done], atol=1e-6)
    assert (jnp.abs(next_obs[done]) <= 0.05).all()  # CartPole starts within 0.05 of upright
    assert (jnp.abs(info["final_obs"][done]) > 0.05).any(axis=1).all()
    # x' = x + tau * x_dot: the final observation continues the episode that it ends.
    np.testing.assert_allclose(info["final_obs"][:, 0], obs[:, 0] + 0.02 * obs[:, 1], atol=1e-6)


def test_continuous_actions_are_clipped_and_shaped():
    env = make("gymnax::Pendulum-v1")
    _, state = env.reset(jax.random.key(0))
    far = env.step(jax.random.key(1), state, jnp.array([100.0]))
    edge = env.step(jax.random.key(1), state, jnp.array([2.0]))
    np.testing.assert_array_equal(far[0], edge[0])
    np.testing.assert_array_equal(env.step(jax.random.key(1), state, 2.0)[0], edge[0])


def test_options_reach_the_task():
    _, _, reward, terminated, _, info = rollout(make("gymnax::MemoryChain-bsuite", memory_length=3), 50)
    short = np.unique(info["episode_length"][terminated])
    _, _, _, terminated, _, info = rollout(make("gymnax::MemoryChain-bsuite", memory_length=9), 50)
    assert len(short) == 1 and np.unique(info["episode_length"][terminated]) == short + 6
    assert make("gymnax::DeepSea-bsuite", size=5).observation_space.shape == (5, 5)  # an argument of the constructor


def test_equal_arguments_give_the_same_object():
    assert make("gymnax::CartPole-v1") is make("gymnax::CartPole-v1")
    assert make("gymnax::CartPole-v1") is not make("gymnax::CartPole-v1", mask=("velocity",))


# --- Masks -----------------------------------------------------------------------------------------------------------


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
    with jax.disable_jit():  # compiled as a whole, two programs may round differently
        full, masked = rollout(make(id), 60), rollout(make(id, mask=mask), 60)
    np.testing.assert_array_equal(masked[0], full[0][:, kept])
    np.testing.assert_array_equal(masked[1], full[1][:, kept])
    np.testing.assert_array_equal(masked[5]["final_obs"], full[5]["final_obs"][:, kept])
    np.testing.assert_array_equal(masked[2], full[2])
    space = make(id, mask=mask).observation_space
    assert space.shape == (len(kept),) == space.low.shape == space.high.shape


def test_named_masks_are_positions_and_velocities():
    """A velocity is what the positions' differences show, whatever the library's order of entries."""
    obs = np.asarray(rollout(make("gymnax::CartPole-v1"), 9)[0])
    np.testing.assert_allclose(np.diff(obs[:, [0, 2]], axis=0), 0.02 * obs[:-1, [1, 3]], atol=1e-6)
    obs, next_obs, *_ = rollout(make("gymnax::MountainCar-v0"), 50)
    np.testing.assert_allclose(next_obs[:, 0] - obs[:, 0], next_obs[:, 1], atol=1e-5)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("CartPole-v1", {}, r"'CartPole-v1' has no namespace \(did you mean 'gymnax::CartPole-v1'\?\)"),
        ("gymnax:CartPole-v1", {}, r"has no namespace \(did you mean 'gymnax::CartPole-v1'\?\)"),
        (
            "gym::CartPole-v1",
            {},
            r"'gym' in 'gym::CartPole-v1' \(did you mean 'gymnax::CartPole-v1'\?\); .* has: gymnax",
        ),
        (
            "atari::Qbert",
            {},
            r"'atari::Qbert' \(did you mean 'gxm::Gymnasium/ALE/Qbert-v5'\?\); this version has: gymnax",
        ),
        ("popjaxrl::Catch", {}, r"'popjaxrl::Catch' \(did you mean 'gymnax::Catch-bsuite'\?\); valid ids of popjaxrl"),
        ("popgym_arcade::SpaceInvaders", {}, r"\(did you mean 'gymnax::SpaceInvaders-MinAtar'\?\)"),
        ("RepeatFirstEasy", {}, r"\(did you mean 'popjaxrl::RepeatFirstEasy'\?\)"),
        (
            "popjaxrl::RepeatFirstEasy",
            {"k": 3},
            "popjaxrl::RepeatFirstEasy has no option 'k'; valid options: sticky_actions",
        ),
        (
            "gymnax::Cartpole-v1",
            {},
            r"'gymnax::Cartpole-v1' \(did you mean 'gymnax::CartPole-v1'\?\); valid ids of gymnax: .*Pong",
        ),
        ("gymnax::MNISTBandit-bsuite", {}, "unknown environment 'gymnax::MNISTBandit-bsuite'"),
        (
            "gymnax::MemoryChain-bsuite",
            {"memory_lenth": 3},
            r"no option 'memory_lenth' \(did you mean 'memory_length'\?\)",
        ),
        (
            "gymnax::CartPole-v1",
            {"mask": ("velocty",)},
            r"mask 'velocty' \(did you mean 'velocity'\?\); valid .* 0 to 3, or",
        ),
        ("gymnax::CartPole-v1", {"mask": ("4",)}, "unknown mask '4'; valid for gymnax::CartPole-v1: indices 0 to 3"),
        ("gymnax::CartPole-v1", {"mask": ("-1",)}, "unknown mask '-1'"),
        ("gymnax::CartPole-v1", {"mask": ("position", "velocity")}, "hides the whole observation"),
        ("gymnax::Pong-misc", {"mask": ("0",)}, r"observations of shape \(30, 40, 3\)"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


# --- Whole episodes --------------------------------------------------------------------------------------------------


def zero_policy(memory, obs, *_):
    return memory, jnp.zeros(len(obs), jnp.int32)


def test_play_does_not_favour_short_episodes():
    episodes = jax.jit(lambda key: envs.play(make("test::Coin"), zero_policy, lambda _: (), key, 10, 4000))(
        jax.random.key(0)
    )
    assert episodes.returns.shape == episodes.lengths.shape == (4000,)
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)
    assert set(np.unique(episodes.lengths)) == {1, 9}
    assert abs(float(episodes.returns.mean()) - 5.0) < 0.3  # standard error 0.06; the first to end would average 1.8


@pytest.mark.parametrize(("num_envs", "episodes"), [(4, 4), (4, 3), (4, 10), (1, 3)])
def test_play_plays_the_number_it_is_asked_for(num_envs, episodes):
    result = envs.play(make("test::Counting"), zero_policy, lambda _: (), jax.random.key(0), num_envs, episodes)
    np.testing.assert_array_equal(result.lengths, np.full(episodes, 7))


def test_play_hands_the_policy_what_a_memory_reads():
    """The policy sees start, previous action and previous reward of the step before; here it checks them itself."""

    def policy(memory, obs, start, action, reward, key):
        steps, last_action, right = memory
        right &= (start == (obs[:, 1] == 0)) & (start | ((action == last_action) & (reward == 1.0)))
        action = (steps % 3) * jnp.ones(len(obs), jnp.int32)
        jax.debug.callback(lambda ok: seen.append(bool(ok)), right.all())
        return (steps + 1, action, right), action

    seen = []
    envs.play(
        make("test::Counting"),
        policy,
        lambda n: (jnp.int32(0), jnp.zeros(n, jnp.int32), jnp.ones(n, bool)),
        jax.random.key(0),
        num_envs=2,
        episodes=4,
    )
    jax.effects_barrier()
    assert len(seen) == 14 and all(seen)


@pytest.mark.slow
def test_the_older_gymnax_interface(tmp_path):
    """gymnax 0.0.x, whose interface stable-gymnax also installs under the name gymnax: the adapter works with both."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "gymnax==0.0.9"]
    subprocess.run(pip, check=True)
    code = (
        "import jax, envs, gymnax\n"
        "assert not hasattr(gymnax.environments.environment.Environment, 'is_truncated')\n"
        "env = envs.make('gymnax::CartPole-v1', max_steps_in_episode=20)\n"
        "_, state = env.reset(jax.random.key(0))\n"
        "step = jax.jit(env.step); ends = []\n"
        "for key in jax.random.split(jax.random.key(1), 300):\n"
        "    _, state, _, terminated, truncated, info = step(key, state, env.action_space.sample(key))\n"
        "    ends.append((bool(terminated), bool(truncated), int(info['episode_length'])))\n"
        "assert any(t for t, _, _ in ends) and all(n == 20 for _, t, n in ends if t) and any(t for _, t, _ in ends)\n"
        "assert not any(a and b for a, b, _ in ends)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)})
