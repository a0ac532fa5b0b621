"""The namespace `navix`: MiniGrid in JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently, imported_when_used
from env_adapters.physics import take_max_steps
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options
from harness.errors import did_you_mean

OBSERVATIONS = ("symbolic", "symbolic_first_person", "categorical", "categorical_first_person")
OBSERVATIONS += ("rgb", "rgb_first_person")


ENTITIES = 10  # the greatest of its EntityIds


def import_navix():
    """navix, without the second that its training code spends on importing what it logs and draws with."""
    with imported_when_used("wandb", "wandb.util", "matplotlib.pyplot"):
        return import_silently("navix", "navix", "navix")


def ids() -> list[str]:
    """The ids of navix: of its version 0.7, which Python 3.11 gets, about half of those of version 4."""
    return sorted(import_navix().registry())


def full_id(env_id: str) -> str:
    """FourRooms is short for Navix-FourRooms-v0."""
    return f"navix::{env_id if env_id.startswith('Navix-') else f'Navix-{env_id}-v0'}"


def make_task(env_id: str, **options) -> Task:
    """A navix grid world.

    Options:
      observation: one of OBSERVATIONS, by default symbolic_first_person, the 7 x 7 cells before the agent.
        symbolic: (type, colour, state) of every cell as float32 numbers; rgb: uint8 pixels.
        categorical: the type, one-hot; in navix -1 is a wall, 0 the floor, 100 what is not seen: first, second, last.
      max_steps: by default that of navix 4, whatever the version: navix 0.7 would end all tasks after 100 steps.
    """
    owner = f"navix::{env_id}"
    navix = import_navix()
    library = navix.make(env_id)
    limit = library.max_steps if hasattr(library, "disable_autoreset") else 4 * library.height * library.width
    defaults = {"observation": "symbolic_first_person", "max_steps": int(limit)}
    check_options(owner, options, defaults)
    observation = options.get("observation", defaults["observation"])
    max_steps = take_max_steps(owner, options, defaults["max_steps"])
    if observation not in OBSERVATIONS:
        hint = did_you_mean(observation, OBSERVATIONS)
        raise ValueError(f"{owner} has no observation {observation!r}{hint}; valid: {', '.join(OBSERVATIONS)}")
    env = navix.make(env_id, observation_fn=getattr(navix.observations, observation), max_steps=max_steps)
    is_categorical, is_rgb = observation.startswith("categorical"), observation.startswith("rgb")

    def observe(timestep):
        if is_categorical:
            return jax.nn.one_hot(jnp.minimum(timestep.observation, ENTITIES + 1) + 1, ENTITIES + 3)
        return timestep.observation

    def reset(key):
        timestep = env.reset(key)
        return observe(timestep), timestep.replace(observation=())

    def step(key, timestep, action):
        timestep = env._step(timestep, action)  # `step` would reset a finished episode instead
        ends = timestep.is_termination(), timestep.is_truncation()
        return observe(timestep), timestep.replace(observation=()), timestep.reward, *ends

    draw = jax.jit(lambda timestep: navix.observations.rgb(timestep.state))
    obs = jax.eval_shape(reset, jax.random.key(0))[0]
    high = 255 if is_rgb else 1.0 if is_categorical else ENTITIES
    space = Box(0, high, obs.shape, np.uint8 if is_rgb else np.float32)
    actions = Discrete(len(env.action_set))
    return Task(reset, step, space, actions, max_steps, lambda state: np.asarray(draw(state)), costly_reset=True)
