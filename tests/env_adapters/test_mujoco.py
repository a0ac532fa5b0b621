"""mujoco: Gymnasium's own numbers, to the last bit."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from helpers import check_conformance
from helpers import physics_rollout as rollout

from env_adapters import mujoco as adapter
from env_adapters.physics import quiet
from envs import make

GYMNASIUM = [env_id for env_id in adapter.ids() if env_id not in adapter.PLAYGROUND]
OLD_ARE_SLOW = [
    pytest.param(env_id, marks=pytest.mark.slow if env_id.endswith("4") else ())
    for env_id in GYMNASIUM
]


@pytest.mark.parametrize("env_id", GYMNASIUM)
def test_conformance_of_mujoco(env_id):
    env = make(f"mujoco::{env_id}")
    check_conformance(env)
    assert env.max_steps == gymnasium.spec(env_id).max_episode_steps
    assert (env.action_space.low < env.action_space.high).all()


def test_ids_are_those_of_the_library():
    specs = gymnasium.registry.values()
    registered = {spec.id for spec in specs if "mujoco" in str(spec.entry_point)}
    left_out = registered - set(GYMNASIUM)
    recent = {env_id for env_id in left_out if not env_id.endswith(("-v2", "-v3"))}
    assert recent == {"Pusher-v4"}  # needs mujoco 2
    with pytest.raises(ImportError, match="mujoco<3"), quiet():
        gymnasium.make("Pusher-v4")


@jax.jit
def seed_of(key):
    return jax.random.bits(key, dtype=jnp.uint32)


@pytest.mark.parametrize("env_id", OLD_ARE_SLOW)
def test_episodes_are_those_of_gymnasium(env_id):
    """To the last bit, from the first observation to the end, and on into the next episode."""
    env, key = make(f"mujoco::{env_id}"), jax.random.key(7)
    steps = 20 + gymnasium.spec(env_id).max_episode_steps
    first_obs, results = jax.device_get(rollout(env, key, steps))
    with quiet():
        theirs = gymnasium.make(env_id)
    obs, _ = theirs.reset(seed=int(seed_of(key)))
    np.testing.assert_array_equal(first_obs, np.float32(obs))
    keys = jax.random.split(key, steps)
    rows = zip(keys, *results[:-1], results[-1]["final_obs"], strict=True)
    for step_key, next_obs, action, reward, terminated, truncated, final_obs in rows:
        obs, their_reward, *ends, _ = theirs.step(action)
        np.testing.assert_array_equal(final_obs, np.float32(obs))
        assert (reward, terminated, truncated) == (np.float32(their_reward), *ends)
        if terminated or truncated:
            reset_key = jax.random.split(step_key)[1]
            obs, _ = theirs.reset(seed=int(seed_of(reset_key)))
        np.testing.assert_array_equal(next_obs, np.float32(obs))


def test_keys_decide():
    env = make("mujoco::HalfCheetah-v5")
    one, same, other = (rollout(env, jax.random.key(key), 5) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one[0], other[0])


def test_only_ended_episodes_are_reset_on_the_host(monkeypatch):
    """Gymnasium's reset costs as much as its step: it is called for those episodes that end."""
    env = make("mujoco::Hopper-v5", max_steps=1000, reset_noise_scale=0.004)
    resets, reset_model = [], HopperEnv.reset_model

    def counted(env):
        resets.append(env)
        return reset_model(env)

    monkeypatch.setattr(HopperEnv, "reset_model", counted)
    keys = jax.random.split(jax.random.key(0), 4)
    *_, info = jax.vmap(lambda key: rollout(env, key, 60))(keys)[1]
    ends = np.asarray(info["episode_done"])
    assert ends.any() and len(resets) == 4 + ends.sum() < ends.size / 2


def test_truncation_and_termination_are_told_apart():
    env = make("mujoco::Hopper-v5", max_steps=12)
    keys = jax.random.split(jax.random.key(0), 8)
    _, steps = jax.vmap(lambda key: rollout(env, key, 60))(keys)
    next_obs, _, _, terminated, truncated, info = steps
    assert terminated.any() and truncated.any() and not (terminated & truncated).any()
    assert (info["episode_length"][truncated] == 12).all()
    assert (info["episode_length"][terminated] <= 12).all()
    height, angle = info["final_obs"][..., 0], info["final_obs"][..., 1]
    speed = jnp.abs(info["final_obs"][..., 2:]).max(axis=-1)
    unhealthy = (height <= 0.7) | (jnp.abs(angle) >= 0.2) | (speed >= 100)
    np.testing.assert_array_equal(unhealthy, terminated)
    done = info["episode_done"]
    np.testing.assert_array_equal(next_obs[~done], info["final_obs"][~done])
    assert (jnp.abs(next_obs[done][:, 0] - 1.25) < 0.01).all()  # Hopper starts upright


def test_options_reach_gymnasium():
    base = make("mujoco::HalfCheetah-v5")
    changed = make("mujoco::HalfCheetah-v5", forward_reward_weight=3)
    key = jax.random.key(0)
    (_, one), (_, other) = rollout(base, key, 5), rollout(changed, key, 5)
    np.testing.assert_array_equal(one[0], other[0])
    control = -0.1 * jnp.square(one[1]).sum(axis=-1)
    np.testing.assert_allclose(other[2] - control, 3 * (one[2] - control), rtol=1e-4, atol=1e-5)
    ant = make("mujoco::Ant-v5", include_cfrc_ext_in_observation=False)
    assert ant.observation_space.shape == (27,)


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "mujoco::HalfCheetah-v3",
            {},
            r"'mujoco::HalfCheetah-v3' \(did you mean 'mujoco::HalfCheetah-v",
        ),
        (
            "mujoco::Hopper-v5",
            {"helthy_reward": 1.0},
            r"no option 'helthy_reward' \(did you mean 'healthy_reward'\?\)",
        ),
        (
            "mujoco::Hopper-v5",
            {"healthy_reward": "a"},
            r"healthy_reward of mujoco::Hopper-v5 must be float, got 'a'",
        ),
        (
            "mujoco::Hopper-v5",
            {"xml_file": "no.xml"},
            r"cannot be made with .*no\.xml does not exist",
        ),
        (
            "mujoco::Hopper-v5",
            {"max_steps": -1},
            r"max_steps of mujoco::Hopper-v5 must be at least 1, got -1",
        ),
        ("mujoco::Hopper-v5", {"frame_skip": 10**9}, "frame_skip of .* must be at most 1000"),
        ("mujoco::Hopper-v5", {"healthy_z_range": 5}, "must be a tuple of 2 numbers, got 5"),
        ("mujoco::Hopper-v5", {"camera_id": 1}, "has no option 'camera_id'"),
        ("HalfCheetah-v5", {}, r"has no namespace \(did you mean 'mujoco::HalfCheetah-v5'\?\)"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartpoleBalance", "PendulumSwingup"])
def test_playground(env_id):
    pytest.importorskip("mujoco_playground")
    env = make(f"mujoco::{env_id}", max_steps=3)
    check_conformance(env)
    _, (next_obs, _, _, terminated, truncated, info) = rollout(env, jax.random.key(0), 7)
    assert not terminated.any() and truncated.tolist() == [False, False, True] * 2 + [False]
    assert (next_obs != info["final_obs"]).any(axis=1).tolist() == truncated.tolist()
