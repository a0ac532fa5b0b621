"""The namespace `gymnax`: classic control, bsuite, MinAtar and others, with gymnax 1.x or 0.0.x."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import (
    import_silently,
    imported_when_used,
    let_pygame_run_anywhere,
    refusing,
)
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options

CLASSIC_CONTROL = (
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
)
MASKS: dict[str, dict[str, tuple[int, ...]]] = {
    "CartPole-v1": {"position": (0, 2), "velocity": (1, 3)},
    "Acrobot-v1": {"position": (0, 1, 2, 3), "velocity": (4, 5)},
    "Pendulum-v1": {"position": (0, 1), "velocity": (2,)},
    "MountainCar-v0": {"position": (0,), "velocity": (1,)},
    "MountainCarContinuous-v0": {"position": (0,), "velocity": (1,)},
}

# Masses, lengths and time steps: the physics divide by them.
DIVISOR = re.compile("mass|total_mass|polemass|length$|link_(length|mass|moi)|(dt|tau|m|l)$")
LARGEST_SIZE = 1000  # of boards and the like; some tasks keep the square of it


def import_gymnax():
    """Import gymnax, but not seaborn and matplotlib, which take a second and only draw."""
    with imported_when_used("seaborn", "matplotlib.pyplot"):
        return import_silently("gymnax", "gymnax", "gymnax")


def ids() -> list[str]:
    """The ids of gymnax, without MNISTBandit-bsuite, which downloads its data."""
    return [env_id for env_id in import_gymnax().registered_envs if env_id != "MNISTBandit-bsuite"]


def make_task(env_id: str, **options) -> Task:
    """A task of gymnax.

    gymnax 1.x and stable-gymnax, which is gymnax 0.0.x, install the same package name. Both have
    `reset_env` and `step_env`, which do not auto-reset, so this works with either.

    Args:
      **options: fields of the task's parameters, as memory_length, or arguments of its constructor.

    Raises:
      ValueError: there is no such option, or its value has another type.
    """
    gymnax = import_gymnax()
    env, params = gymnax.make(env_id)
    parameters = {field.name: getattr(params, field.name) for field in fields(params)}
    arguments = {
        argument.name: argument.default
        for argument in inspect.signature(type(env)).parameters.values()
    }
    owner = f"gymnax::{env_id}"
    check_options(owner, options, parameters | arguments)
    check_sizes(owner, options, arguments)
    # A whole number in place of a float would change the dtypes of the task's state.
    floats = [name for name in options if isinstance(parameters.get(name), float)]
    options |= {name: float(options[name]) for name in floats}
    with refusing(owner, options):
        env, params = gymnax.make(env_id, **select(options, arguments))
        params = params.replace(**select(options, parameters))
        observation_space, observe = observation_of(env, params)
    is_gymnax_1 = hasattr(env, "is_truncated")

    def reset(key):
        obs, state = env.reset_env(key, params)
        return observe(obs), state

    def step(key, state, action):
        obs, state, reward, done, _ = env.step_env(key, state, action, params)
        if is_gymnax_1:  # `done` does not include the time limit
            return observe(obs), state, reward, done, env.is_truncated(state, params)
        # In 0.0.x `done` includes it, so a task that terminates in its very last step is truncated.
        truncated = state.time >= params.max_steps_in_episode
        return observe(obs), state, reward, jnp.asarray(done, bool) & ~truncated, truncated

    def first_step(key):
        _, state = reset(key)
        return step(key, state, action_space.sample(key))

    action_space = action_space_of(env, params)
    if options:  # do shapes and dtypes still fit together?
        with refusing(owner, options):
            jax.eval_shape(first_step, jax.random.key(0))
    return Task(
        reset=reset,
        step=step,
        observation_space=observation_space,
        action_space=action_space,
        max_steps=int(params.max_steps_in_episode),  # a float in BernoulliBandit-misc
        render=make_renderer(env_id, env, params),
        masks=MASKS.get(env_id, {}),
    )


def check_sizes(owner: str, options: dict, arguments: dict) -> None:
    """Refuse what would divide by zero, never begin, or not fit into memory.

    Args:
      arguments: those of the constructor; whole numbers among them are sizes.

    Raises:
      ValueError: names the option, its value and what is valid.
    """
    for name, value in options.items():
        option = f"option {name} of {owner}"
        if name == "max_steps_in_episode" and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
        if DIVISOR.match(name) and not value > 0:
            raise ValueError(f"{option} must be greater than 0, got {value}")
        is_size = name in arguments and type(value) is int and not name.endswith("seed")
        if is_size and value > LARGEST_SIZE:
            raise ValueError(f"{option} must be at most {LARGEST_SIZE}, got {value}")


def select(options: dict, names) -> dict:
    """The options with one of these names."""
    return {name: value for name, value in options.items() if name in names}


def observation_of(env, params) -> tuple[Box, Callable]:
    """The observation space, and a function from gymnax's observations into it.

    Several tasks declare another shape or dtype than they return, so the declared space serves for
    the bounds only. Integers, as in FrozenLake-misc, are returned as one-hot vectors.
    """
    declared = env.observation_space(params)
    if hasattr(declared, "n"):
        size = int(declared.n)
        return Box(0.0, 1.0, (size,)), functools.partial(jax.nn.one_hot, num_classes=size)
    actual = jax.eval_shape(lambda key: env.reset_env(key, params)[0], jax.random.key(0))
    space = Box(
        low=np.asarray(declared.low, np.float32),
        high=np.asarray(declared.high, np.float32),
        shape=actual.shape,
        dtype=np.uint8 if actual.dtype == np.uint8 else np.float32,
    )
    return space, jnp.asarray


def action_space_of(env, params) -> Box | Discrete:
    """The action space, as one of ours."""
    space = env.action_space(params)
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    low = np.asarray(space.low, np.float32)
    high = np.asarray(space.high, np.float32)
    return Box(low, high, tuple(space.shape))


def make_renderer(env_id, env, params) -> Callable | None:
    """A renderer for MinAtar and, with gymnax 1.x, for classic control; None for other tasks."""

    def render_classic_control(state):
        let_pygame_run_anywhere()
        import_silently("pygame", f"the picture of gymnax::{env_id}", "pygame")
        from gymnax.visualize.vis_gym import render_gym_frame

        return render_gym_frame(env_id, state, params)

    def render_grid(state):
        """An image (rows, columns, 3) uint8 with a colour per channel, black where none is set."""
        owner = f"the picture of gymnax::{env_id}"
        colormaps = import_silently("matplotlib", owner, "matplotlib").colormaps
        grid = np.asarray(env.get_obs(state), bool)
        num_channels = grid.shape[-1]
        colors = colormaps["tab10"](np.arange(num_channels))[:, :3]
        palette = np.concatenate([np.zeros((1, 3)), colors])
        color = np.where(grid.any(axis=-1), grid.argmax(axis=-1) + 1, 0)
        return (255 * palette[color]).astype(np.uint8)

    if env_id.endswith("-MinAtar"):
        return render_grid
    if env_id in CLASSIC_CONTROL and hasattr(env, "is_truncated"):
        return render_classic_control
    return None
