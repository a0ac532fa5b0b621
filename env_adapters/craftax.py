"""The namespace `craftax`: Craftax and Craftax-Classic, in symbols or pixels."""

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

IDS = ("Craftax-Symbolic-v1", "Craftax-Pixels-v1", "Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1")


def ids() -> list[str]:
    """The ids of Craftax."""
    return list(IDS)


def make_task(env_id: str, **options) -> Task:
    """Craftax and Craftax-Classic; options are the numbers and flags of its environment parameters."""
    owner = f"craftax::{env_id}"
    import_silently("craftax.craftax_env", owner, "craftax")
    package = "craftax_classic" if "Classic" in env_id else "craftax"
    constants = importlib.import_module(f"craftax.{package}.constants")
    with craftax_textures(owner, constants) if "Pixels" in env_id else contextlib.nullcontext():
        env = sys.modules["craftax.craftax_env"].make_craftax_env_from_name(env_id, auto_reset=False)
    params = env.default_params
    check_options(owner, options, {name: value for name, value in vars(params).items() if not isinstance(value, tuple)})
    params = params.replace(**options)
    unlimited = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        obs, state, reward, _, _ = env.step_env(key, state, action, params)
        terminated = env.is_terminal(state, unlimited)  # with `params` it is true at the time limit, too
        return obs, state, reward, terminated, state.timestep >= params.max_timesteps

    @functools.cache
    def renderer():
        make_renderer = importlib.import_module(f"craftax.{package}.renderer").make_craftax_pixel_renderer
        with craftax_textures(owner, constants):
            return jax.jit(make_renderer(constants.BLOCK_PIXEL_SIZE_IMG))

    def render(state):
        return np.asarray(renderer()(state)).clip(0, 255).astype(np.uint8)

    observation_space = Box(0.0, 1.0, env.observation_space(params).shape)
    actions = Discrete(env.action_space(params).n)
    return Task(reset, step, observation_space, actions, int(params.max_timesteps), render, costly_reset=True)


@contextlib.contextmanager
def craftax_textures(owner, constants):
    """Within, craftax loads its textures: it makes them for a minute, once, and stores them in its own folder."""
    cache = constants.TEXTURE_CACHE_FILE
    if not os.path.exists(cache) and not os.access(os.path.dirname(cache), os.W_OK):
        raise ValueError(
            f"the pictures of {owner} need craftax's textures, which it makes once and writes to {cache}: "
            f"that folder cannot be written to"
        )
    with contextlib.redirect_stdout(io.StringIO() if os.path.exists(cache) else sys.stderr):
        yield
