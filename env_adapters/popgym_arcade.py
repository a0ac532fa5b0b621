"""The namespace `popgym_arcade`: the games of POPGym Arcade, in pixels."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently, imported_when_used
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options


def import_arcade():
    """popgym_arcade on whichever gymnax is installed, see `env_adapters.gymnax`."""
    with imported_when_used("seaborn", "matplotlib.pyplot"):
        return import_silently("popgym_arcade", "popgym_arcade", "popgym-arcade")


def ids() -> list[str]:
    """The ids of POPGym Arcade: ten games, each Easy, Medium and Hard."""
    return list(import_arcade().registration.REGISTERED_ENVIRONMENTS)


def make_task(env_id: str, **options) -> Task:
    """A game of POPGym Arcade.

    Options:
      partial_obs: True hides what a memory must keep; the library's default is False, but this is about memory.
      obs_size: 128 or 256 pixels.
    """
    owner = f"popgym_arcade::{env_id}"
    arcade = import_arcade()
    defaults = {"partial_obs": True, "obs_size": 128}
    check_options(owner, options, defaults)
    options = defaults | options
    if options["obs_size"] not in (128, 256):
        raise ValueError(f"option obs_size of {owner} must be 128 or 256, got {options['obs_size']}")
    env, params = made_compiled(lambda: arcade.make(env_id, **options))
    if hasattr(env, "is_terminal"):
        env.is_terminated = env.is_terminal  # its name since gymnax 1.0, where the games' step looks for it

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        obs, state, reward, done, info = env.step_env(key, state, action, params)
        truncated = jnp.asarray(info["truncated"], bool)
        # info["terminated"] includes the time limit in some of the games; `done` lacks it in others.
        return obs, state, reward, jnp.asarray(done, bool) & ~truncated, truncated

    takes = inspect.signature(env.get_obs).parameters.values()
    rest = {"params": params, "key": jax.random.key(0)}  # of the noise, in some of the games
    rest = {x.name: rest[x.name] for x in takes if x.name in rest}
    draw = jax.jit(lambda state: env.get_obs(state, **rest))
    space = Box(0, 255, (options["obs_size"], options["obs_size"], 3), np.uint8)
    # Those of `params` mean nothing in several games, and AutoEncode does not count the action that confirms.
    max_steps = int(getattr(env, "max_steps_in_episode", 0) or env.max_episode_length)
    return Task(reset, step, space, Discrete(5), max_steps, lambda state: np.asarray(draw(state)), costly_reset=True)


def made_compiled(make_env):
    """What make_env() makes, (env, params), the arrays it keeps computed by one program, not operation by operation."""
    made = []

    def build():
        made.append(make_env())
        return {name: value for name, value in vars(made[-1][0]).items() if is_made_of_arrays(value)}

    arrays = jax.jit(build)()
    vars(made[-1][0]).update(arrays)
    return made[-1]


def is_made_of_arrays(value):
    return bool(jax.tree.leaves(value)) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
