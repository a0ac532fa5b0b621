"""MuJoCo Playground, in JAX: the part of the namespace `mujoco` that Gymnasium does not have.

The shortest adapter: copy it to add a library (README.md). brax.py has what is missing here, masks
and drawing.
"""

import numpy as np

from env_adapters.library import import_silently
from env_adapters.physics import quiet, take_max_steps
from env_adapters.task import Box, Task
from env_adapters.wrappers import check_options, time_limit

# The DeepMind Control Suite. Playground's other environments download their robots.
IDS = (
    "AcrobotSwingup",
    "AcrobotSwingupSparse",
    "BallInCup",
    "CartpoleBalance",
    "CartpoleBalanceSparse",
    "CartpoleSwingup",
    "CartpoleSwingupSparse",
    "CheetahRun",
    "FingerSpin",
    "FingerTurnEasy",
    "FingerTurnHard",
    "FishSwim",
    "HopperHop",
    "HopperStand",
    "HumanoidStand",
    "HumanoidWalk",
    "HumanoidRun",
    "PendulumSwingup",
    "PointMass",
    "ReacherEasy",
    "ReacherHard",
    "SwimmerSwimmer6",
    "WalkerRun",
    "WalkerStand",
    "WalkerWalk",
)


def ids() -> list[str]:
    """The ids of MuJoCo Playground that need no download."""
    return list(IDS)


def make_task(env_id: str, **options) -> Task:
    """An environment of MuJoCo Playground.

    Args:
      **options: max_steps, by default the length in the environment's config.

    Raises:
      ValueError: Playground is missing, there is no such option, or max_steps is less than 1.
    """
    owner = f"mujoco::{env_id}"
    registry = import_silently("mujoco_playground", owner, "playground").registry
    default = int(registry.get_default_config(env_id).episode_length)
    check_options(owner, options, {"max_steps": default})
    max_steps = take_max_steps(owner, options, default)
    with quiet():
        env = registry.load(env_id, config_overrides={"impl": "jax"})  # the default needs a GPU

    def reset(key):
        state = env.reset(key)
        return state.obs, state

    def step(key, state, action):
        state = env.step(state, action)
        return state.obs, state, state.reward, state.done > 0.5, False

    task = Task(
        reset=reset,
        step=step,
        observation_space=Box(-np.inf, np.inf, (env.observation_size,)),
        action_space=Box(-1.0, 1.0, (env.action_size,)),
        max_steps=max_steps,
        costly_reset=True,
    )
    return time_limit(task, max_steps)
