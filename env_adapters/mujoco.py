"""The namespace `mujoco`: Gymnasium's MuJoCo tasks on the host, and MuJoCo Playground in JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters import playground
from env_adapters.callbacks import call_on_host
from env_adapters.library import import_silently, refusing
from env_adapters.physics import (
    arguments_of,
    kinematic_masks,
    quiet,
    take_max_steps,
    without_screen,
)
from env_adapters.task import Box, Task
from env_adapters.wrappers import check_options, time_limit

PLAYGROUND = playground.ids()
MOST_SUBSTEPS = 1000


def ids() -> list[str]:
    """Gymnasium's ids that run with today's MuJoCo, then those of MuJoCo Playground."""
    gymnasium = import_silently("gymnasium", "mujoco", "gymnasium[mujoco]")
    specs = gymnasium.registry.values()
    ours = [spec for spec in specs if str(spec.entry_point).startswith("gymnasium.envs.mujoco.")]
    # Versions 2 and 3 have moved to another package, and Pusher-v4 needs mujoco < 3.
    working = [spec.id for spec in ours if spec.version >= 4 and spec.id != "Pusher-v4"]
    return working + PLAYGROUND


def make_task(env_id: str, **options) -> Task:
    """An environment of Gymnasium, simulated on the host, or one of MuJoCo Playground.

    Observations are Gymnasium's, rounded to float32. One callback steps all environments of a
    vmap. It is a pure function of their states, see `host_mujoco`.

    Args:
      **options: max_steps, by default Gymnasium's limit; and the arguments of the environment's
        constructor.

    Raises:
      ValueError: a library is missing, there is no such option, or Gymnasium refuses its value.
    """
    if env_id in PLAYGROUND:
        return playground.make_task(env_id, **options)
    owner = f"mujoco::{env_id}"
    gymnasium = import_silently("gymnasium", owner, "gymnasium[mujoco]")
    import_silently("mujoco", owner, "gymnasium[mujoco]")
    from env_adapters.host_mujoco import HostMujoco

    spec = gymnasium.spec(env_id)
    arguments = arguments_of(gymnasium.envs.registration.load_env_creator(spec.entry_point))
    check_options(owner, options, {"max_steps": spec.max_episode_steps} | arguments)
    max_steps = take_max_steps(owner, options, spec.max_episode_steps)
    if options.get("frame_skip", 1) > MOST_SUBSTEPS:
        option = f"option frame_skip of {owner}"
        value = options["frame_skip"]
        raise ValueError(f"{option} must be at most {MOST_SUBSTEPS}, got {value}")
    with refusing(owner, options), quiet():
        host = HostMujoco(gymnasium.make(env_id, render_mode="rgb_array", **options))
    env = host.env
    (num_entries,) = env.observation_space.shape

    obs_aval = jax.ShapeDtypeStruct((num_entries,), np.float32)
    state_aval = jax.ShapeDtypeStruct((host.state_size,), np.uint32)
    reward_aval = jax.ShapeDtypeStruct((), np.float32)
    terminated_aval = jax.ShapeDtypeStruct((), bool)

    def reset(key):
        seed = jax.random.bits(key, dtype=jnp.uint32)
        obs, state = call_on_host(host.reset, (obs_aval, state_aval), seed)
        return obs, state

    def step(key, state, action):
        results = obs_aval, state_aval, reward_aval, terminated_aval
        obs, state, reward, terminated = call_on_host(host.step, results, state, action)
        return obs, state, reward, terminated, False

    actions = env.action_space
    task = Task(
        reset=reset,
        step=step,
        observation_space=Box(-np.inf, np.inf, (num_entries,)),
        action_space=Box(actions.low, actions.high, actions.shape),
        max_steps=max_steps,
        render=without_screen(host.render, owner),
        masks=masks_of(env_id, env, num_entries),
        costly_reset=True,
        equal_resets_once=True,
    )
    return time_limit(task, max_steps)


def masks_of(env_id: str, env, num_entries: int) -> dict[str, tuple[int, ...]]:
    """The masks "position" and "velocity" of one of Gymnasium's robots."""
    num_bodies = env.model.nbody
    sizes = {"cinert": 10 * num_bodies, "cvel": 6 * num_bodies}  # of the humanoids' version 4
    sizes |= getattr(env, "observation_structure", {})  # of version 5
    masks = kinematic_masks(
        env_id,
        env,
        nq=env.model.nq,
        nv=env.model.nv,
        cinert=sizes["cinert"],
        cvel=sizes["cvel"],
    )
    # Some observations leave out the last entries.
    return {name: tuple(i for i in mask if i < num_entries) for name, mask in masks.items()}
