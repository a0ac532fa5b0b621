"""The namespace `popgym_arcade`: the games of POPGym Arcade, in pixels."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently, imported_when_used
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options

NUM_ACTIONS = 5  # up, down, left, right, fire; AutoEncode declares 4, but needs fire to confirm


def import_arcade():
    """Import popgym_arcade, with whichever gymnax is installed (see `env_adapters.gymnax`)."""
    with imported_when_used("seaborn", "matplotlib.pyplot"):
        return import_silently("popgym_arcade", "popgym_arcade", "popgym-arcade")


def ids() -> list[str]:
    """The ids of POPGym Arcade: ten games, each Easy, Medium and Hard.

    Raises:
      ValueError: popgym_arcade is missing.
    """
    return list(import_arcade().registration.REGISTERED_ENVIRONMENTS)


def make_task(env_id: str, **options) -> Task:
    """A game of POPGym Arcade; observations are images (obs_size, obs_size, 3) uint8.

    Args:
      **options:
        partial_obs: True, the default here, hides what a memory must keep; the library's default
          is False.
        obs_size: 128, the default, or 256 pixels.

    Raises:
      ValueError: there is no such option, or its value is not valid.
    """
    owner = f"popgym_arcade::{env_id}"
    arcade = import_arcade()
    defaults = {"partial_obs": True, "obs_size": 128}
    check_options(owner, options, defaults)
    options = defaults | options
    size = options["obs_size"]
    if size not in (128, 256):
        raise ValueError(f"option obs_size of {owner} must be 128 or 256, got {size}")
    env, params = made_compiled(lambda: arcade.make(env_id, **options))
    if hasattr(env, "is_terminal"):
        env.is_terminated = env.is_terminal  # gymnax 1.x looks for it under this name

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        obs, state, reward, done, info = env.step_env(key, state, action, params)
        # info["terminated"] includes the time limit in some games, and `done` lacks it in others.
        truncated = jnp.asarray(info["truncated"], bool)
        return obs, state, reward, jnp.asarray(done, bool) & ~truncated, truncated

    arguments = {"params": params, "key": jax.random.key(0)}  # the key is for the noise
    taken = inspect.signature(env.get_obs).parameters
    arguments = {name: arguments[name] for name in taken if name in arguments}
    draw = jax.jit(lambda state: env.get_obs(state, **arguments))
    return Task(
        reset=reset,
        step=step,
        observation_space=Box(0, 255, (size, size, 3), np.uint8),
        action_space=Discrete(NUM_ACTIONS),
        # The limit is an attribute of the environment; that of `params` is 1 in several games.
        max_steps=int(getattr(env, "max_steps_in_episode", 0) or env.max_episode_length),
        render=lambda state: np.asarray(draw(state)),
        costly_reset=True,
    )


def made_compiled(make_env):
    """What make_env() returns, (env, params), made by one compiled program.

    The constructors draw pictures and keep them as arrays, which takes up to 40 seconds if every
    operation is compiled and run by itself.
    """
    made = []

    def build():
        env, params = make_env()
        made.append((env, params))
        return {name: value for name, value in vars(env).items() if is_made_of_arrays(value)}

    arrays = jax.jit(build)()
    env, params = made[-1]
    vars(env).update(arrays)
    return env, params


def is_made_of_arrays(value):
    """Whether a pytree has leaves, and all of them are JAX arrays."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)
