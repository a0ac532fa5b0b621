"""The namespace `mujoco`: Gymnasium's MuJoCo tasks on the host, and MuJoCo Playground's control suite."""

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently
from env_adapters.physics import arguments_of, kinematic_masks, quiet, take_max_steps, without_screen
from env_adapters.task import Box, Task
from env_adapters.wrappers import check_options, time_limit

# of MuJoCo Playground those of the DeepMind Control Suite; the others download their robots
_CONTROL_SUITE = """
    AcrobotSwingup AcrobotSwingupSparse BallInCup CartpoleBalance CartpoleBalanceSparse CartpoleSwingup
    CartpoleSwingupSparse CheetahRun FingerSpin FingerTurnEasy FingerTurnHard FishSwim HopperHop HopperStand
    HumanoidStand HumanoidWalk HumanoidRun PendulumSwingup PointMass ReacherEasy ReacherHard SwimmerSwimmer6
    WalkerRun WalkerStand WalkerWalk
"""


PLAYGROUND = _CONTROL_SUITE.split()


def ids() -> list[str]:
    """Gymnasium's that run with today's MuJoCo, then those of MuJoCo Playground."""
    import gymnasium

    specs = gymnasium.registry.values()
    ours = [spec for spec in specs if str(spec.entry_point).startswith("gymnasium.envs.mujoco.")]
    return [spec.id for spec in ours if spec.version >= 4 and spec.id != "Pusher-v4"] + PLAYGROUND


def make_task(env_id: str, **options) -> Task:
    """A MuJoCo environment of Gymnasium, simulated on the host; options are its arguments and max_steps.

    One callback steps all environments of a vmap: a pure function of states, see `host_mujoco`.
    """
    owner = f"mujoco::{env_id}"
    if env_id in PLAYGROUND:
        return playground_task(env_id, **options)
    gymnasium = import_silently("gymnasium", owner, "gymnasium[mujoco]")
    import_silently("mujoco", owner, "gymnasium[mujoco]")
    from env_adapters.host_mujoco import HostMujoco, call_on_host

    spec = gymnasium.spec(env_id)
    arguments = arguments_of(gymnasium.envs.registration.load_env_creator(spec.entry_point))
    check_options(owner, options, {"max_steps": spec.max_episode_steps} | arguments)
    max_steps = take_max_steps(owner, options, spec.max_episode_steps)
    try:
        with quiet():
            host = HostMujoco(gymnasium.make(env_id, render_mode="rgb_array", **options))
    except Exception as error:  # whatever Gymnasium and MuJoCo think of the values
        raise ValueError(f"{owner} cannot be made with {options}: {error}") from None
    env = host.env
    observation_space = Box(-np.inf, np.inf, env.observation_space.shape)
    low, high = env.action_space.low, env.action_space.high
    size = host.state_size + observation_space.shape[0]

    def reset(key):
        results = call_on_host(host.reset, jax.random.bits(key, (1,), jnp.uint32), size)
        state, obs = jnp.split(results, [host.state_size])
        return jax.lax.bitcast_convert_type(obs, jnp.float32), state

    def step(key, state, action):
        given = jnp.concatenate([state, jax.lax.bitcast_convert_type(action, jnp.uint32)])
        results = call_on_host(host.step, given, size + 2)
        state, results = jnp.split(results, [host.state_size])
        results = jax.lax.bitcast_convert_type(results, jnp.float32)
        return results[:-2], state, results[-2], results[-1] > 0.5, False

    entries = {"cinert": 10 * env.model.nbody, "cvel": 6 * env.model.nbody}  # of the v4 humanoids
    entries |= getattr(env, "observation_structure", {})
    masks = kinematic_masks(env_id, env, env.model.nq, env.model.nv, entries["cinert"], entries["cvel"])
    num_entries = observation_space.shape[0]
    masks = {name: tuple(i for i in entries if i < num_entries) for name, entries in masks.items()}
    action_space = Box(low, high, env.action_space.shape)
    render = without_screen(host.render, owner)
    task = Task(reset, step, observation_space, action_space, max_steps, render, masks, costly_reset=True)
    return time_limit(task, max_steps)


def playground_task(env_id: str, **options) -> Task:
    """An environment of MuJoCo Playground, in JAX; the only option is max_steps."""
    owner = f"mujoco::{env_id}"
    registry = import_silently("mujoco_playground", owner, "playground").registry
    default = int(registry.get_default_config(env_id).episode_length)
    check_options(owner, options, {"max_steps": default})
    max_steps = take_max_steps(owner, options, default)
    with quiet():
        env = registry.load(env_id, config_overrides={"impl": "jax"})  # the default needs an NVIDIA GPU

    def reset(key):
        state = env.reset(key)
        return state.obs, state

    def step(key, state, action):
        state = env.step(state, action)
        return state.obs, state, state.reward, state.done > 0.5, False

    spaces = Box(-np.inf, np.inf, (env.observation_size,)), Box(-1.0, 1.0, (env.action_size,))
    return time_limit(Task(reset, step, *spaces, max_steps, costly_reset=True), max_steps)
