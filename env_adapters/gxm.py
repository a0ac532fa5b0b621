"""The namespace `gxm`: Atari and Gymnasium's small tasks on the host, and the ids of other libraries as gxm writes them.

gxm 0.4 gives many libraries one interface. Its ids are understood here, but its adapters are not used: most lose the
final observation and the truncation, and that of Gymnasium ignores the key and steps simulators that it hides.
"""

import contextlib
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.library import import_silently, let_pygame_run_anywhere
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options

LIBRARIES = {"Gymnax": "gymnax", "Brax": "brax", "Craftax": "craftax", "Navix": "navix"}


def import_gymnasium():
    """Gymnasium with the games of the Arcade Learning Environment, where they are installed."""
    gymnasium = import_silently("gymnasium", "gxm::Gymnasium", "gymnasium")
    with contextlib.suppress(ImportError):
        importlib.import_module("ale_py")  # registers them
    return gymnasium


def ids() -> list[str]:
    """Those of Gymnasium's ids that `make_task` makes; the other libraries' are in their own namespaces."""
    toys = "gymnasium.envs.classic_control", "gymnasium.envs.toy_text"
    specs = import_gymnasium().registry.values()
    return [f"Gymnasium/{spec.id}" for spec in specs if is_atari(spec) or str(spec.entry_point).startswith(toys)]


def is_atari(spec):
    return spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"


def full_id(env_id: str) -> str:
    """Gymnax/CartPole-v1 is gymnax::CartPole-v1, Gymnasium/Ant-v5 is mujoco::Ant-v5."""
    library, separator, name = env_id.partition("/")
    if not separator or library not in LIBRARIES | {"Gymnasium": ""}:
        valid = ", ".join([*LIBRARIES, "Gymnasium"])
        raise ValueError(
            f"unknown environment 'gxm::{env_id}'; write gxm::Library/id, with one of the libraries {valid}"
        )
    if library in LIBRARIES:
        return f"{LIBRARIES[library]}::{name}"
    spec = import_gymnasium().registry.get(name)
    if spec is None or env_id in ids():
        return f"gxm::{env_id}"
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco."):
        return f"mujoco::{name}"
    raise ValueError(f"gxm::{env_id} is not supported: its simulator does not let its state be read and set")


def make_task(env_id: str, **options) -> Task:
    """An environment of Gymnasium, simulated on the host, as a pure function of its state."""
    spec = import_gymnasium().registry[env_id.partition("/")[2]]
    return (atari_task if is_atari(spec) else pickled_task)(f"gxm::{env_id}", spec, **options)


def atari_task(owner: str, spec, **options) -> Task:
    """An Atari game as ale_py's vector environment prepares it, but with the stack of frames as the last axis.

    Observations are the last 4 frames, (84, 84, 4) uint8. The key decides on the number of idle frames at the beginning
    and on which frames repeat the action of the one before; the console itself is deterministic.

    Options: those of the vector environment in `defaults`.
    """
    from env_adapters.host_gymnasium import Atari

    defaults = {
        "repeat_action_probability": 0.25,
        "full_action_space": False,
        "frameskip": 4,
        "noop_max": 30,
        "use_fire_reset": True,
        "reward_clipping": True,
        "max_num_frames_per_episode": 108_000,
    }
    check_options(owner, options, defaults)
    options = defaults | options
    for name in ("frameskip", "noop_max", "max_num_frames_per_episode"):
        if options[name] < 1:
            raise ValueError(f"option {name} of {owner} must be at least 1, got {options[name]}")
    frameskip, max_frames = options["frameskip"], options["max_num_frames_per_episode"]
    host = Atari(spec.kwargs["game"], frameskip, options["full_action_space"], max_frames)
    first_frames, first_states = host.starts(options["noop_max"], options["use_fire_reset"])
    space = Box(0, 255, (84, 84, 4), np.uint8)
    shapes = (
        jax.ShapeDtypeStruct((84, 84), jnp.uint8),
        jax.ShapeDtypeStruct((host.state_size,), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((), bool),
        jax.ShapeDtypeStruct((), bool),
    )

    def reset(key):
        idle = jax.random.randint(key, (), 0, options["noop_max"])
        frames = jnp.zeros(space.shape, jnp.uint8).at[..., -1].set(jnp.asarray(first_frames)[idle])
        return frames, (jnp.asarray(first_states)[idle], frames, jnp.int32(0))

    def step(key, state, action):
        console, frames, held = state
        sticks = jax.random.bernoulli(key, options["repeat_action_probability"], (frameskip,))
        held_actions = []
        for stick in sticks:
            held = jnp.where(stick, held, action)
            held_actions.append(held)
        arguments = console, jnp.stack(held_actions)
        results = jax.pure_callback(host.step, shapes, *arguments, vmap_method="broadcast_all")
        frame, console, reward, terminated, truncated = results
        frames = jnp.concatenate([frames[..., 1:], frame[..., None]], axis=-1)
        reward = jnp.clip(reward, -1, 1) if options["reward_clipping"] else reward
        return frames, (console, frames, held), reward, terminated, truncated

    max_steps = -(-max_frames // frameskip)
    return Task(reset, step, space, Discrete(host.actions), max_steps, lambda state: host.picture(state[0]))


def pickled_task(owner: str, spec, **options) -> Task:
    """A small environment of Gymnasium, carried as its pickle; options are those of `gymnasium.make` and its own."""
    import gymnasium

    from env_adapters.host_gymnasium import Pickled

    constructor = gymnasium.envs.registration.load_env_creator(spec.entry_point)
    arguments = inspect.signature(constructor).parameters.values()
    defaults = {x.name: x.default for x in arguments if x.default is not x.empty} | spec.kwargs
    defaults = {"max_episode_steps": spec.max_episode_steps or 1000} | defaults
    check_options(owner, options, defaults)
    steps = {"max_episode_steps": defaults["max_episode_steps"]}
    env = gymnasium.make(spec, disable_env_checker=True, **{"render_mode": "rgb_array"} | steps | options)
    host = Pickled(env)
    obs = jax.ShapeDtypeStruct(host.space.shape, np.uint8 if host.space.dtype == np.uint8 else np.float32)
    shapes = obs, jax.ShapeDtypeStruct((host.state_size,), jnp.uint8)
    ends = [jax.ShapeDtypeStruct((), jnp.float32), *[jax.ShapeDtypeStruct((), bool)] * 2]

    def reset(key):
        seed = jax.random.bits(key, dtype=jnp.uint32)
        return jax.pure_callback(host.reset, shapes, seed, vmap_method="broadcast_all")

    def step(key, state, action):
        return jax.pure_callback(host.step, (*shapes, *ends), state, action, vmap_method="broadcast_all")

    low, high = host.space.low.astype(np.float32), host.space.high.astype(np.float32)
    space, actions = Box(low, high, obs.shape, obs.dtype), env.action_space
    discrete = hasattr(actions, "n")
    action_space = Discrete(int(actions.n)) if discrete else Box(actions.low, actions.high, actions.shape)
    max_steps = env.spec.max_episode_steps

    def render(state):
        let_pygame_run_anywhere()
        return host.picture(state)

    return Task(reset, step, space, action_space, max_steps, render, costly_reset=True)
