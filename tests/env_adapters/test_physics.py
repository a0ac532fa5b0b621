"""What the robots of brax and MuJoCo have in common: masks, pictures, silence."""

import os
import subprocess
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CHEAP_BRAX
from helpers import physics_rollout as rollout

from env_adapters import brax, mujoco
from env_adapters.library import import_silently
from env_adapters.physics import quiet
from envs import make

GYMNASIUM = [env_id for env_id in mujoco.ids() if env_id not in mujoco.PLAYGROUND]


def kinds(id, **options):
    """The observation's indices: positions, velocities, the rest."""
    env = make(id, **options)
    position, velocity = (list(env._task.masks[name]) for name in ("position", "velocity"))
    rest = sorted(set(range(env.observation_space.shape[0])) - set(position) - set(velocity))
    assert not set(position) & set(velocity)
    return position, velocity, rest


@pytest.mark.parametrize("env_id", GYMNASIUM)
def test_masks_of_mujoco_are_positions_and_velocities(env_id):
    """Another qvel changes velocities only; another qpos leaves the entries that are qvel's own."""
    with quiet():
        theirs = gymnasium.make(env_id).unwrapped
    position, velocity, rest = kinds(f"mujoco::{env_id}")
    theirs.reset(seed=0)
    qpos, qvel = theirs.data.qpos.copy(), theirs.data.qvel.copy()
    observe = theirs._get_obs
    before = observe()
    theirs.set_state(qpos, qvel + 0.1)
    faster = observe()
    theirs.set_state(qpos + 0.01, qvel)
    moved = observe()
    assert set(np.flatnonzero(faster != before)) <= set(velocity + rest)
    assert set(np.flatnonzero(moved != before)) <= set(position + velocity + rest)
    own = velocity[: theirs.model.nv] if theirs.model.nv <= len(velocity) else velocity
    np.testing.assert_allclose(before[own], np.clip(qvel, -10, 10)[: len(own)])
    np.testing.assert_allclose(moved[own], before[own])
    np.testing.assert_allclose(faster[own] - before[own], 0.1)
    assert (moved != before)[position].any() and len(velocity) >= theirs.model.nv // 2


def test_masks_of_mujoco_count_right():
    def counts(env_id, **options):
        return [len(indices) for indices in kinds(f"mujoco::{env_id}", **options)]

    with_place = {"exclude_current_positions_from_observation": False}
    assert counts("Ant-v5") == [13, 14, 78]  # the rest: contact forces
    assert counts("Ant-v5", **with_place) == [15, 14, 78]
    assert counts("Humanoid-v5") == [22 + 130, 23 + 78, 17 + 78]
    assert counts("Humanoid-v4") == [22 + 140, 23 + 84, 23 + 84]
    assert counts("Humanoid-v5", include_cinert_in_observation=False) == [22, 101, 95]
    full, masked = make("mujoco::Hopper-v5"), make("mujoco::Hopper-v5", mask="velocity")
    assert masked.observation_space.shape == (5,)
    (full_obs, *_), (masked_obs, *_) = (
        rollout(env, jax.random.key(0), 5)[1] for env in (full, masked)
    )
    np.testing.assert_array_equal(full_obs[:, :5], masked_obs)


BRAX = [f"brax::{env_id}" for env_id in brax.IDS]
OTHERS_ARE_SLOW = [
    pytest.param(id, marks=() if id == CHEAP_BRAX else pytest.mark.slow) for id in BRAX
]


@pytest.mark.parametrize("id", OTHERS_ARE_SLOW)
def test_masks_of_brax_are_positions_and_velocities(id):
    position, velocity, rest = kinds(id, backend="spring")
    env_id = id.partition("::")[2]
    library = import_silently("brax.envs", id, "brax").get_environment(env_id, backend="spring")

    def observe(q, qd):
        physics = library.pipeline_init(q, qd)
        arguments = (jnp.zeros(library.action_size),) if env_id.startswith("humanoid") else ()
        return library._get_obs(physics, *arguments)

    state = library.reset(jax.random.key(0)).pipeline_state
    observe = jax.jit(observe)
    before, faster = observe(state.q, state.qd), observe(state.q, state.qd + 0.1)
    changed = np.flatnonzero(np.abs(faster - before) > 1e-4)
    assert len(changed) and set(changed) <= set(velocity + rest)
    moved = np.flatnonzero(np.abs(observe(state.q + 0.01, state.qd) - before) > 1e-4)
    assert len(moved) and set(moved) & set(position)
    if env_id != "reacher":  # which shows the fingertip's velocity
        own = velocity[: library.sys.qd_size()]
        np.testing.assert_allclose(before[np.array(own)], state.qd[: len(own)], atol=1e-6)


@pytest.mark.parametrize(
    ("id", "options"), [("mujoco::Hopper-v5", {}), (CHEAP_BRAX, {"backend": "spring"})]
)
def test_drawing(id, options):
    env = make(id, **options)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    try:
        image = env.render(jax.device_get(state.task))
    except ValueError as error:
        assert "MUJOCO_GL" in str(error)
        pytest.skip("no OpenGL here")
    assert image.shape == (480, 480, 3) and image.dtype == np.uint8 and image.std() > 5


def test_nothing_is_printed_or_left_behind(tmp_path):
    code = (
        "import envs, jax\n"
        "env = envs.make('mujoco::HalfCheetah-v4')\n"
        "jax.block_until_ready(jax.jit(env.reset)(jax.random.key(0)))\n"
        "env = envs.make('brax::inverted_pendulum', backend='spring')\n"
        "jax.eval_shape(env.reset, jax.random.key(0))\n"
    )
    # JAX 0.9 warns when it takes a program from the cache.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", code]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    run = subprocess.run(command, **options, check=True)
    assert run.stdout + run.stderr == "" and not list(tmp_path.iterdir())
