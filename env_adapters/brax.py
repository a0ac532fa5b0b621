"""The namespace `brax`: brax' own environments, without its wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently
from env_adapters.physics import arguments_of, kinematic_masks, quiet, take_max_steps, without_screen
from env_adapters.task import Box, Task
from env_adapters.wrappers import check_options, time_limit
from harness.errors import did_you_mean

# all of brax but `fast`, which simulates nothing, and `swimmer`, which brax 0.14 cannot make
IDS = ("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_double_pendulum", "inverted_pendulum")
IDS += ("pusher", "reacher", "walker2d")


BACKENDS = ("generalized", "spring", "positional", "mjx")


def ids() -> list[str]:
    """The ids of brax that work."""
    return list(IDS)


def make_task(env_id: str, **options) -> Task:
    """A brax environment without brax's wrappers; options: its arguments, of which `backend`, and max_steps.

    The state is the physics' alone: what brax adds to it for its own training (metrics, info) is not read by a step.
    """
    owner = f"brax::{env_id}"
    brax = import_silently("brax.envs", owner, "brax")
    check_options(owner, options, {"max_steps": 1000} | arguments_of(brax._envs[env_id]))
    max_steps, backend = take_max_steps(owner, options, 1000), options.get("backend", BACKENDS[0])
    if backend not in BACKENDS:
        hint = did_you_mean(backend, BACKENDS)
        raise ValueError(f"unknown backend {backend!r} of {owner}{hint}; valid: {', '.join(BACKENDS)}")
    with quiet():
        env = brax.get_environment(env_id, **options)

    def reset(key):
        state = env.reset(key)
        return state.obs, state.pipeline_state

    def step(key, physics, action):
        state = env.step(brax.State(physics, obs=None, reward=jnp.float32(0), done=jnp.float32(0)), action)
        return state.obs, state.pipeline_state, state.reward, state.done > 0.5, False

    @functools.cache
    def renderer():
        import mujoco
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        data = mujoco.MjData(env.sys.mj_model)
        return data, MujocoRenderer(env.sys.mj_model, data, width=480, height=480)

    def render(state):
        import mujoco

        data, draw = renderer()
        data.qpos[:] = state.q
        mujoco.mj_forward(env.sys.mj_model, data)
        return draw.render("rgb_array")

    observations = jax.eval_shape(reset, jax.random.key(0))[0].shape
    bodies = env.sys.num_links()
    masks = kinematic_masks(env_id, env, env.sys.q_size(), env.sys.qd_size(), 10 * bodies, 6 * bodies)
    spaces = Box(-np.inf, np.inf, observations), Box(-1.0, 1.0, (env.action_size,))
    task = Task(reset, step, *spaces, max_steps, without_screen(render, owner), masks, costly_reset=True)
    return time_limit(task, max_steps)
