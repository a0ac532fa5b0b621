"""The namespace `craftax`: Craftax and Craftax-Classic, as symbols or pixels."""

import contextlib
import functools
import importlib
import io
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options

IDS = (
    "Craftax-Symbolic-v1",
    "Craftax-Pixels-v1",
    "Craftax-Classic-Symbolic-v1",
    "Craftax-Classic-Pixels-v1",
)


def ids() -> list[str]:
    """The ids of Craftax."""
    return list(IDS)


def make_task(env_id: str, **options) -> Task:
    """Craftax or Craftax-Classic.

    Args:
      **options: numbers and flags among the parameters of the environment, as max_timesteps.

    Raises:
      ValueError: craftax is missing, there is no such option, or it cannot store its textures.
    """
    owner = f"craftax::{env_id}"
    library = import_silently("craftax.craftax_env", owner, "craftax")
    package = "craftax_classic" if "Classic" in env_id else "craftax"
    constants = importlib.import_module(f"craftax.{package}.constants")
    has_pixels = "Pixels" in env_id
    with craftax_textures(owner, constants) if has_pixels else contextlib.nullcontext():
        env = library.make_craftax_env_from_name(env_id, auto_reset=False)
    params = env.default_params
    numbers = {name: value for name, value in vars(params).items() if not isinstance(value, tuple)}
    check_options(owner, options, numbers)
    params = params.replace(**options)
    without_limit = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        obs, state, reward, _, _ = env.step_env(key, state, action, params)
        terminated = env.is_terminal(state, without_limit)  # `params` would include the time limit
        return obs, state, reward, terminated, state.timestep >= params.max_timesteps

    @functools.cache
    def renderer():
        module = importlib.import_module(f"craftax.{package}.renderer")
        with craftax_textures(owner, constants):
            return jax.jit(module.make_craftax_pixel_renderer(constants.BLOCK_PIXEL_SIZE_IMG))

    def render(state):
        return np.asarray(renderer()(state)).clip(0, 255).astype(np.uint8)

    return Task(
        reset=reset,
        step=step,
        observation_space=Box(0.0, 1.0, env.observation_space(params).shape),
        action_space=Discrete(env.action_space(params).n),
        max_steps=int(params.max_timesteps),
        render=render,
        costly_reset=True,
    )


@contextlib.contextmanager
def craftax_textures(owner, constants):
    """Inside the block, craftax loads its textures.

    The first time craftax makes them, which takes about a minute, and stores them in its own
    folder. What it prints then goes to stderr; later it is suppressed.

    Raises:
      ValueError: that folder cannot be written to.
    """
    cache = constants.TEXTURE_CACHE_FILE
    exists = os.path.exists(cache)
    if not exists and not os.access(os.path.dirname(cache), os.W_OK):
        what = f"the pictures of {owner} need craftax's textures"
        where = f"which it makes once and writes to {cache}"
        raise ValueError(f"{what}, {where}: that folder cannot be written to")
    with contextlib.redirect_stdout(io.StringIO() if exists else sys.stderr):
        yield
