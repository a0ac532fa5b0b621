"""Whole episodes: played for an evaluation, or recorded and drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from env_adapters.environment import Environment, EnvState
from harness.errors import UsageError, import_optional

MAX_RECORDED = 1000  # steps


class Episodes(NamedTuple):
    """Returns and lengths of finished episodes, and what else the environment reports of them."""

    returns: jax.Array  # (episodes,) float32, sums of the task's rewards
    lengths: jax.Array  # (episodes,) int32, steps
    reports: dict[str, jax.Array] = {}  # `Environment.reports`, each (episodes,) float32


def play(
    env: Environment,
    policy: Callable,
    initialize: Callable,
    key,
    num_envs: int,
    episodes: int,
) -> Episodes:
    """Play exactly `episodes` episodes from start to end.

    Every environment plays the same number of episodes, one after the other. Taking the first
    `episodes` that end, whichever they are, would favour short ones.

    Args:
      policy: (memory, obs, start, previous_action, previous_reward, key) -> (memory, action), for
        all environments at once: obs (num_envs, *obs_shape), start (num_envs,) bool. Where start
        is True, obs is the first of an episode, and previous_action and previous_reward still
        belong to the episode before it; they are 0 in the very first step.
      initialize: num_envs -> the memory before the first step, any pytree.
      num_envs: how many environments are played in parallel; fewer if `episodes` is less.
    """
    num_envs = min(num_envs, episodes)
    quota = -(-episodes // num_envs)  # episodes of each environment, rounded up
    key, reset_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset)(jax.random.split(reset_key, num_envs))
    action_space = env.action_space

    class Loop(NamedTuple):
        key: jax.Array
        memory: Any
        obs: jax.Array
        start: jax.Array
        action: jax.Array
        reward: jax.Array
        env_state: EnvState
        finished: jax.Array  # (num_envs,) int32, episodes that have ended so far
        result: Episodes  # (quota, num_envs)

    def is_unfinished(loop):
        return (loop.finished < quota).any()

    def step(loop):
        key, policy_key, step_key = jax.random.split(loop.key, 3)
        memory, action = policy(
            loop.memory, loop.obs, loop.start, loop.action, loop.reward, policy_key
        )
        action = action.astype(action_space.dtype)
        step_keys = jax.random.split(step_key, num_envs)
        obs, env_state, reward, _, _, info = jax.vmap(env.step)(step_keys, loop.env_state, action)
        done = info["episode_done"]

        # The result has no row `quota`: what is written there is dropped.
        row = jnp.where(done, loop.finished, quota)

        def write(result, new):
            return result.at[row, jnp.arange(num_envs)].set(new, mode="drop")

        reports = {name: info[name] for name in env.reports}
        new = Episodes(info["episode_return"], info["episode_length"], reports)
        result = jax.tree.map(write, loop.result, new)
        return Loop(
            key=key,
            memory=memory,
            obs=obs,
            start=done,
            action=action,
            reward=reward,
            env_state=env_state,
            finished=loop.finished + done,
            result=result,
        )

    loop = Loop(
        key=key,
        memory=initialize(num_envs),
        obs=obs,
        start=jnp.ones(num_envs, bool),
        action=jnp.zeros((num_envs, *action_space.shape), action_space.dtype),
        reward=jnp.zeros(num_envs, jnp.float32),
        env_state=env_state,
        finished=jnp.zeros(num_envs, jnp.int32),
        result=Episodes(
            returns=jnp.zeros((quota, num_envs), jnp.float32),
            lengths=jnp.zeros((quota, num_envs), jnp.int32),
            reports={name: jnp.zeros((quota, num_envs), jnp.float32) for name in env.reports},
        ),
    )
    result = jax.lax.while_loop(is_unfinished, step, loop).result
    return jax.tree.map(lambda x: x.reshape(-1)[:episodes], result)


class Recording(NamedTuple):
    """One episode, to be drawn."""

    states: Any  # (T, ...) `EnvState.task` before each step
    length: jax.Array  # () int32, how many of the T states belong to the episode


def record(
    env: Environment,
    policy: Callable,
    initialize: Callable,
    key,
    num_envs: int,
    episodes: int,
) -> Recording:
    """Play one episode, or its first 1,000 steps, and keep its states.

    It takes the arguments of `play`, so that it can take its place, and ignores the last two.
    """
    key, reset_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset)(reset_key[None])
    action_space = env.action_space
    action = jnp.zeros((1, *action_space.shape), action_space.dtype)

    def step(carry, _):
        key, memory, obs, start, action, reward, env_state = carry
        key, policy_key, step_key = jax.random.split(key, 3)
        memory, action = policy(memory, obs, start, action, reward, policy_key)
        action = action.astype(action_space.dtype)
        obs, next_state, reward, _, _, info = jax.vmap(env.step)(step_key[None], env_state, action)
        done = info["episode_done"]
        return (key, memory, obs, done, action, reward, next_state), (env_state.task, done)

    carry = (
        key,
        initialize(1),
        obs,
        jnp.ones(1, bool),
        action,
        jnp.zeros(1, jnp.float32),
        env_state,
    )
    _, (states, done) = jax.lax.scan(step, carry, length=min(env.max_steps, MAX_RECORDED))
    length = jnp.where(done.any(), done.argmax() + 1, len(done)).astype(jnp.int32)
    return Recording(jax.tree.map(lambda x: x[:, 0], states), length)


def write_gif(path: str, env: Environment, recording: Recording, width: int = 300) -> None:
    """Draw a recording into a .gif, `width` pixels wide, at 25 frames per second.

    Raises:
      UsageError: MuJoCo finds no way to draw on this machine.
      OSError: the file cannot be written.
    """
    Image = import_optional("PIL.Image", "a film", "pillow")  # noqa: N806
    frames = []
    states = jax.device_get(recording.states)
    for t in range(int(recording.length)):
        frame = Image.fromarray(env.render(jax.tree.map(lambda x, t=t: x[t], states)))
        height = frame.height * width // frame.width
        smooth_or_sharp = Image.Resampling.BOX if frame.width > width else Image.NEAREST
        frames.append(frame.resize((width, height), smooth_or_sharp))
    first, *others = frames
    first.save(path, save_all=True, append_images=others, duration=40, loop=0, optimize=True)


def check_drawable(env) -> None:
    """Refuse an environment that its library cannot draw.

    Raises:
      UsageError: names the environment.
    """
    if env.render is None:
        raise UsageError(f"{env.id} cannot be drawn: its library has no renderer for it")
