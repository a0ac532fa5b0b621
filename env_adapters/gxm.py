"""The namespace `gxm`: Atari and Gymnasium's small tasks on the host, under the ids of gxm.

gxm 0.4 gives many libraries one interface, with ids such as Gymnasium/ALE/Breakout-v5. Its ids are
understood here; its code is not used. Most of its adapters lose the final observation and the
truncation, and the one for Gymnasium ignores the key and hides the state of its simulators.
"""

import contextlib
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.callbacks import call_on_host
from env_adapters.library import import_silently, let_pygame_run_anywhere, refusing
from env_adapters.physics import arguments_of, take_max_steps
from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options, time_limit
from harness.errors import did_you_mean

# gxm's name for a library -> our namespace
LIBRARIES = {"Gymnax": "gymnax", "Brax": "brax", "Craftax": "craftax", "Navix": "navix"}

FROZEN_LAKES = ("4x4", "8x8")
MAX_STEPS = 1000  # of tasks for which Gymnasium has no limit

BOOL = jax.ShapeDtypeStruct((), bool)
FLOAT32 = jax.ShapeDtypeStruct((), np.float32)


def import_gymnasium():
    """Import Gymnasium and, where they are installed, the games of the Arcade Learning Environment.

    Raises:
      ValueError: Gymnasium is missing.
    """
    gymnasium = import_silently("gymnasium", "gxm::Gymnasium", "gymnasium")
    with contextlib.suppress(ImportError):
        importlib.import_module("ale_py")  # enters its games into Gymnasium's registry
    return gymnasium


def ids() -> list[str]:
    """The ids that `make_task` makes; those of other libraries are in their own namespaces."""
    small_tasks = "gymnasium.envs.classic_control", "gymnasium.envs.toy_text"
    return [
        f"Gymnasium/{spec.id}"
        for spec in import_gymnasium().registry.values()
        if is_atari(spec) or str(spec.entry_point).startswith(small_tasks)
    ]


def is_atari(spec) -> bool:
    """Whether a spec of Gymnasium's registry is an Atari game with a vector environment."""
    return spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"


def full_id(env_id: str) -> str:
    """The full id: Gymnax/CartPole-v1 is gymnax::CartPole-v1, Gymnasium/Ant-v5 is mujoco::Ant-v5.

    Raises:
      ValueError: the library is unknown, or this environment is not supported.
    """
    library, separator, name = env_id.partition("/")
    if name.startswith("ALE/"):
        import_silently("ale_py", f"gxm::{env_id}", "ale-py")
    if not separator or library not in LIBRARIES | {"Gymnasium": ""}:
        valid = ", ".join([*LIBRARIES, "Gymnasium"])
        advice = f"write gxm::Library/id, with one of the libraries {valid}"
        raise ValueError(f"unknown environment 'gxm::{env_id}'; {advice}")
    if library in LIBRARIES:
        return f"{LIBRARIES[library]}::{name}"
    spec = import_gymnasium().registry.get(name)
    if spec is None or env_id in ids():
        return f"gxm::{env_id}"
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco."):
        return f"mujoco::{name}"
    reason = "its simulator does not let its state be read and set"
    raise ValueError(f"gxm::{env_id} is not supported: {reason}")


def make_task(env_id: str, **options) -> Task:
    """An environment of Gymnasium, simulated on the host, as a pure function of its state.

    Raises:
      ValueError: a library is missing, there is no such option, or its value is not valid.
    """
    spec = import_gymnasium().registry[env_id.partition("/")[2]]
    make = atari_task if is_atari(spec) else small_task
    return make(f"gxm::{env_id}", spec, **options)


# --- Atari ---------------------------------------------------------------------------------------


def atari_task(owner: str, spec, **options) -> Task:
    """An Atari game, prepared as by ale_py's vector environment.

    Observations are the last 4 frames, oldest first, (84, 84, 4) uint8; ale_py has the frames on
    the first axis. The emulator itself is deterministic: the key decides how many idle frames an
    episode begins with, and which frames repeat the action of the frame before.

    Args:
      **options: those of the vector environment that `defaults` lists.

    Raises:
      ValueError: there is no such option, or its value is not valid.
    """
    from env_adapters.host_atari import Atari

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
    for name, most in {"frameskip": 60, "noop_max": 1000}.items():
        value = options[name]
        if value > most:
            raise ValueError(f"option {name} of {owner} must be at most {most}, got {value}")
    frameskip = options["frameskip"]
    max_frames = options["max_num_frames_per_episode"]
    noop_max = options["noop_max"]
    host = Atari(spec.kwargs["game"], frameskip, options["full_action_space"], max_frames)
    first_frames, first_states = host.starts(noop_max, options["use_fire_reset"])
    space = Box(0, 255, (84, 84, 4), np.uint8)
    results = (
        jax.ShapeDtypeStruct((84, 84), jnp.uint8),  # frame
        jax.ShapeDtypeStruct((host.state_size,), jnp.uint8),  # emulator
        FLOAT32,  # reward
        BOOL,  # terminated
        BOOL,  # truncated
    )

    def reset(key):
        idle = jax.random.randint(key, (), 0, noop_max)
        frames = jnp.zeros(space.shape, jnp.uint8).at[..., -1].set(jnp.asarray(first_frames)[idle])
        emulator = jnp.asarray(first_states)[idle]
        held_action = jnp.int32(0)
        return frames, (emulator, frames, held_action)

    def step(key, state, action):
        emulator, frames, held = state
        sticks = jax.random.bernoulli(key, options["repeat_action_probability"], (frameskip,))
        held_actions = []
        for stick in sticks:
            held = jnp.where(stick, held, action)
            held_actions.append(held)
        frame, emulator, reward, terminated, truncated = call_on_host(
            host.step, results, emulator, jnp.stack(held_actions)
        )
        frames = shift_in(frames, frame)
        return frames, (emulator, frames, held), reward, terminated, truncated

    def render(state):
        emulator, _, _ = state
        return host.picture(emulator)

    return Task(
        reset=reset,
        step=step,
        observation_space=space,
        action_space=Discrete(host.actions),
        max_steps=-(-max_frames // frameskip),
        render=render,
        clip_reward=options["reward_clipping"],
        costly_reset=True,
        equal_resets_once=True,
    )


def shift_in(frames, frame):
    """Frames (..., 4) uint8 without the first one, and `frame` (...) behind them.

    Four frames are one number, which a CPU shifts many times as fast as it moves single bytes.
    """
    number = jax.lax.bitcast_convert_type(frames, jnp.uint32)
    number = (number >> 8) | (frame.astype(jnp.uint32) << 24)
    return jax.lax.bitcast_convert_type(number, jnp.uint8)


# --- Small tasks ---------------------------------------------------------------------------------


def small_task(owner: str, spec, **options) -> Task:
    """A small environment of Gymnasium.

    Args:
      **options: max_episode_steps, and the arguments of the environment's constructor.

    Raises:
      ValueError: there is no such option, or its value is not valid.
    """
    import gymnasium

    from env_adapters.host_gymnasium import SmallTask, reseeded

    constructor = gymnasium.envs.registration.load_env_creator(spec.entry_point)
    arguments = arguments_of(constructor)
    del arguments["render_mode"]  # `Task.render` is the only way to draw
    if "desc" in arguments:
        arguments["desc"] = ()  # the rows of a lake; by default that of map_name
    default = spec.max_episode_steps or MAX_STEPS
    check_options(owner, options, {"max_episode_steps": default} | arguments | spec.kwargs)
    max_steps = take_max_steps(owner, options, default, "max_episode_steps")
    if "map_name" in options and options["map_name"] not in FROZEN_LAKES:
        hint = did_you_mean(options["map_name"], FROZEN_LAKES)
        valid = " or ".join(FROZEN_LAKES)
        wrong = f"option map_name of {owner} must be {valid}"
        raise ValueError(f"{wrong}, got {options['map_name']!r}{hint}")
    with refusing(owner, options):
        spec = dataclasses.replace(spec, max_episode_steps=None)
        host = SmallTask(gymnasium.make(spec, render_mode="rgb_array", **options))
    obs = jax.ShapeDtypeStruct(
        shape=host.space.shape,
        dtype=np.uint8 if host.space.dtype == np.uint8 else np.float32,
    )
    state = jax.ShapeDtypeStruct((host.state_size,), jnp.uint32)

    def reset(key):
        seed = jax.random.bits(key, dtype=jnp.uint32)
        return tuple(call_on_host(host.reset, (obs, state), seed))

    def step(key, state_before, action):
        obs_after, state_after, reward, terminated = call_on_host(
            host.step, (obs, state, FLOAT32, BOOL), state_before, action
        )
        return obs_after, state_after, reward, terminated, False

    def reseed(key, state):
        return reseeded(state, jax.random.bits(key, (4,), jnp.uint32))

    def render(state):
        let_pygame_run_anywhere()
        import_silently("pygame", f"the picture of {owner}", "pygame")
        return host.picture(state)

    task = Task(
        reset=reset,
        step=step,
        observation_space=Box(
            low=host.space.low.astype(np.float32),
            high=host.space.high.astype(np.float32),
            shape=obs.shape,
            dtype=obs.dtype,
        ),
        action_space=action_space_of(host.env),
        max_steps=max_steps,
        render=render,
        reseed=reseed,
        costly_reset=True,
        equal_resets_once=True,
    )
    return time_limit(task, max_steps)


def action_space_of(env) -> Box | Discrete:
    """The action space of one of Gymnasium's environments, as one of ours."""
    space = env.action_space
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    return Box(space.low, space.high, space.shape)
