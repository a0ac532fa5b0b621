"""The namespace `brax`: robots in JAX, without brax's own wrappers.

It has every part of an adapter, masks and drawing included; playground.py is the shortest one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently, refusing
from env_adapters.physics import (
    arguments_of,
    kinematic_masks,
    quiet,
    take_max_steps,
    without_screen,
)
from env_adapters.task import Box, Task
from env_adapters.wrappers import check_options, time_limit
from harness.errors import did_you_mean

# Not `fast`, which simulates nothing, and not `swimmer`, which brax 0.14 cannot make.
IDS = (
    "ant",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_double_pendulum",
    "inverted_pendulum",
    "pusher",
    "reacher",
    "walker2d",
)
BACKENDS = ("generalized", "spring", "positional", "mjx")
MAX_STEPS = 1000


def ids() -> list[str]:
    """The ids of brax that work."""
    return list(IDS)


def make_task(env_id: str, **options) -> Task:
    """An environment of brax.

    The state is that of the physics. What brax adds to it for its own training (metrics, info) is
    left out, since a step does not read it. brax's AutoResetWrapper is not used: it would lose the
    final observation and begin every episode in the same state.

    Args:
      **options: max_steps, 1000 by default; backend, one of BACKENDS; and the other arguments of
        the environment's constructor.

    Raises:
      ValueError: brax is missing, there is no such option or backend, or max_steps is less than 1.
    """
    owner = f"brax::{env_id}"
    brax = import_silently("brax.envs", owner, "brax")
    check_options(owner, options, {"max_steps": MAX_STEPS} | arguments_of(brax._envs[env_id]))
    max_steps = take_max_steps(owner, options, MAX_STEPS)
    backend = options.get("backend", BACKENDS[0])
    if backend not in BACKENDS:
        hint = did_you_mean(backend, BACKENDS)
        valid = ", ".join(BACKENDS)
        raise ValueError(f"unknown backend {backend!r} of {owner}{hint}; valid: {valid}")
    with refusing(owner, options), quiet():
        env = brax.get_environment(env_id, **options)

    def reset(key):
        state = env.reset(key)
        return state.obs, state.pipeline_state

    def step(key, physics, action):
        zero = jnp.float32(0)
        state = env.step(brax.State(physics, obs=None, reward=zero, done=zero), action)
        return state.obs, state.pipeline_state, state.reward, state.done > 0.5, False

    num_bodies = env.sys.num_links()
    task = Task(
        reset=reset,
        step=step,
        observation_space=Box(-np.inf, np.inf, jax.eval_shape(reset, jax.random.key(0))[0].shape),
        action_space=Box(-1.0, 1.0, (env.action_size,)),
        max_steps=max_steps,
        render=without_screen(make_renderer(env.sys), owner),
        masks=kinematic_masks(
            env_id,
            env,
            nq=env.sys.q_size(),
            nv=env.sys.qd_size(),
            cinert=10 * num_bodies,
            cvel=6 * num_bodies,
        ),
        costly_reset=True,
    )
    return time_limit(task, max_steps)


def make_renderer(system):
    """A function that draws a state of `system` with MuJoCo."""

    @functools.cache
    def simulator_and_renderer():
        import mujoco
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        data = mujoco.MjData(system.mj_model)
        return data, MujocoRenderer(system.mj_model, data, width=480, height=480)

    def render(state):
        import mujoco

        data, renderer = simulator_and_renderer()
        data.qpos[:] = state.q
        mujoco.mj_forward(system.mj_model, data)
        return renderer.render("rgb_array")

    return render
