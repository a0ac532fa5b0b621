"""The namespace `gymnax`: classic control, bsuite, MinAtar and others, on gymnax 1.x or 0.0.x."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import imported_when_used, let_pygame_run_anywhere
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options

_CART_POLE = {"position": (0, 2), "velocity": (1, 3)}
_MOUNTAIN_CAR = {"position": (0,), "velocity": (1,)}
MASKS: dict[str, dict[str, tuple[int, ...]]] = {
    "CartPole-v1": _CART_POLE,
    "Acrobot-v1": {"position": (0, 1, 2, 3), "velocity": (4, 5)},
    "Pendulum-v1": {"position": (0, 1), "velocity": (2,)},
    "MountainCar-v0": _MOUNTAIN_CAR,
    "MountainCarContinuous-v0": _MOUNTAIN_CAR,
}


def import_gymnax():
    """gymnax, without the second that its tasks spend on importing what they draw with."""
    with imported_when_used("seaborn", "matplotlib.pyplot"):
        import gymnax
    return gymnax


CLASSIC_CONTROL = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")


def ids() -> list[str]:
    """The ids of gymnax, less the one that downloads its data."""
    return [env_id for env_id in import_gymnax().registered_envs if env_id != "MNISTBandit-bsuite"]


def make_task(env_id: str, **options) -> Task:
    """A gymnax task; options are its environment parameters or its constructor's arguments.

    Works with gymnax 1.x and with the 0.0.x interface, which `stable-gymnax` installs under the same name:
    `reset_env` and `step_env` are common to both, and neither auto-resets.
    """
    gymnax = import_gymnax()
    env, params = gymnax.make(env_id)
    parameters = {field.name: getattr(params, field.name) for field in fields(params)}
    arguments = {name: argument.default for name, argument in inspect.signature(type(env)).parameters.items()}
    check_options(f"gymnax::{env_id}", options, parameters | arguments)
    env, params = gymnax.make(env_id, **{name: value for name, value in options.items() if name in arguments})
    params = params.replace(**{name: value for name, value in options.items() if name in parameters})

    def reset(key):
        obs, state = env.reset_env(key, params)
        return observe(obs), state

    def step(key, state, action):
        obs, state, reward, done, _ = env.step_env(key, state, action, params)
        if hasattr(env, "is_truncated"):  # gymnax 1.x: `done` is natural termination only
            return observe(obs), state, reward, done, env.is_truncated(state, params)
        truncated = state.time >= params.max_steps_in_episode  # 0.0.x: `done` includes the time limit
        return observe(obs), state, reward, jnp.asarray(done, bool) & ~truncated, truncated

    # The declared space serves for bounds only: in several tasks its dtype or shape is not that of the observation.
    declared = env.observation_space(params)
    if hasattr(declared, "n"):
        observation_space = Box(0.0, 1.0, (int(declared.n),))
        observe = functools.partial(jax.nn.one_hot, num_classes=int(declared.n))
    else:
        actual = jax.eval_shape(lambda key: env.reset_env(key, params)[0], jax.random.key(0))
        low, high = np.asarray(declared.low, np.float32), np.asarray(declared.high, np.float32)
        observation_space = Box(low, high, actual.shape, np.uint8 if actual.dtype == np.uint8 else np.float32)
        observe = jnp.asarray
    actions = env.action_space(params)
    if hasattr(actions, "n"):
        action_space = Discrete(int(actions.n))
    else:
        shape = tuple(actions.shape)
        action_space = Box(np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32), shape)
    return Task(
        reset=reset,
        step=step,
        observation_space=observation_space,
        action_space=action_space,
        max_steps=int(params.max_steps_in_episode),
        render=make_renderer(env_id, env, params),
        masks=MASKS.get(env_id, {}),
    )


def make_renderer(env_id, env, params) -> Callable | None:
    """Classic control as gymnasium draws it (with gymnax 1.x); grids with one colour per channel."""

    def render_classic_control(state):
        let_pygame_run_anywhere()
        from gymnax.visualize.vis_gym import render_gym_frame

        return render_gym_frame(env_id, state, params)

    def render_grid(state):
        from matplotlib import colormaps

        grid = np.asarray(env.get_obs(state), bool)
        colors = colormaps["tab10"](np.arange(grid.shape[-1]))[:, :3]
        channel = np.where(grid.any(axis=-1), grid.argmax(axis=-1) + 1, 0)
        return (255 * np.concatenate([np.zeros((1, 3)), colors])[channel]).astype(np.uint8)

    if env_id.endswith("-MinAtar"):
        return render_grid
    return render_classic_control if env_id in CLASSIC_CONTROL and hasattr(env, "is_truncated") else None
