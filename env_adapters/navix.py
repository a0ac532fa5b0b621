"""The namespace `navix`: MiniGrid in JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently, imported_when_used
from env_adapters.physics import take_max_steps
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options
from harness.errors import did_you_mean

OBSERVATIONS = (
    "symbolic",
    "symbolic_first_person",
    "categorical",
    "categorical_first_person",
    "rgb",
    "rgb_first_person",
)
ENTITIES = 10  # the greatest of navix's EntityIds


def import_navix():
    """Import navix, but not wandb and matplotlib, which take a second and serve its training."""
    with imported_when_used("wandb", "wandb.util", "matplotlib.pyplot"):
        return import_silently("navix", "navix", "navix")


def ids() -> list[str]:
    """The ids of navix. Version 0.7, which Python 3.11 gets, has about half of those of version 4.

    Raises:
      ValueError: navix is missing.
    """
    return sorted(import_navix().registry())


def full_id(env_id: str) -> str:
    """The full id: FourRooms is short for Navix-FourRooms-v0."""
    return f"navix::{env_id if env_id.startswith('Navix-') else f'Navix-{env_id}-v0'}"


def make_task(env_id: str, **options) -> Task:
    """A grid world of navix.

    Args:
      **options:
        observation: one of OBSERVATIONS. The default, symbolic_first_person, shows the 7 x 7
          cells in front of the agent.
            symbolic: (type, colour, state) of every cell as numbers, float32;
            categorical: the type of every cell, one-hot, float32; navix numbers walls -1, the
              floor 0 and unseen cells 100, here they are the first, second and last entry;
            rgb: pixels, uint8.
        max_steps: by default that of navix 4, whatever the version; navix 0.7 would end every task
          after 100 steps.

    Raises:
      ValueError: there is no such option or observation, or max_steps is less than 1.
    """
    owner = f"navix::{env_id}"
    navix = import_navix()
    library = navix.make(env_id)
    is_navix_4 = hasattr(library, "disable_autoreset")
    limit = library.max_steps if is_navix_4 else 4 * library.height * library.width
    defaults = {"observation": "symbolic_first_person", "max_steps": int(limit)}
    check_options(owner, options, defaults)
    max_steps = take_max_steps(owner, options, defaults["max_steps"])
    observation = options.get("observation", defaults["observation"])
    if observation not in OBSERVATIONS:
        hint = did_you_mean(observation, OBSERVATIONS)
        valid = ", ".join(OBSERVATIONS)
        raise ValueError(f"{owner} has no observation {observation!r}{hint}; valid: {valid}")
    observation_fn = getattr(navix.observations, observation)
    env = navix.make(env_id, observation_fn=observation_fn, max_steps=max_steps)
    is_categorical = observation.startswith("categorical")
    is_rgb = observation.startswith("rgb")

    def observe(timestep):
        if is_categorical:
            entity = jnp.minimum(timestep.observation, ENTITIES + 1) + 1  # from -1 ... 11
            return jax.nn.one_hot(entity, ENTITIES + 3)
        return timestep.observation

    def reset(key):
        timestep = env.reset(key)
        return observe(timestep), timestep.replace(observation=())

    def step(key, timestep, action):
        timestep = env._step(timestep, action)  # `step` would reset a finished episode instead
        terminated = timestep.is_termination()
        truncated = timestep.is_truncation()
        state = timestep.replace(observation=())
        return observe(timestep), state, timestep.reward, terminated, truncated

    def reseed(key, timestep):
        return timestep.replace(state=timestep.state.replace(key=key))

    draw = jax.jit(lambda timestep: navix.observations.rgb(timestep.state))
    high = 1.0 if is_categorical else ENTITIES
    return Task(
        reset=reset,
        step=step,
        observation_space=Box(
            low=0,
            high=255 if is_rgb else high,
            shape=jax.eval_shape(reset, jax.random.key(0))[0].shape,
            dtype=np.uint8 if is_rgb else np.float32,
        ),
        action_space=Discrete(len(env.action_set)),
        max_steps=max_steps,
        render=lambda state: np.asarray(draw(state)),
        reseed=reseed,
        costly_reset=True,
    )
