"""Whole episodes: played for evaluation, or recorded and drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from env_adapters.environment import Environment, EnvState
from harness.errors import UsageError


class Episodes(NamedTuple):
    """What finished episodes were like."""

    returns: jax.Array  # (episodes,) float32
    lengths: jax.Array  # (episodes,) int32


def play(env: Environment, policy: Callable, initialize: Callable, key, num_envs: int, episodes: int) -> Episodes:
    """Play exactly `episodes` episodes from start to end.

    Each environment plays the same number of them in turn; taking the first `episodes` to end would favour short ones.

    Args:
      policy: (memory, obs, start, previous_action, previous_reward, key) -> (memory, action), for all environments at
        once; start (num_envs,) is True where obs begins an episode, the previous_ ones are then those of the last.
      initialize: num_envs -> the memory to begin with, any pytree.
      num_envs: environments played in parallel; fewer if `episodes` is less.
    """
    num_envs = min(num_envs, episodes)
    quota = -(-episodes // num_envs)
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
        finished: jax.Array  # episodes ended so far, of each environment
        result: Episodes  # (quota, num_envs)

    def unfinished(loop):
        return (loop.finished < quota).any()

    def step(loop):
        key, policy_key, step_key = jax.random.split(loop.key, 3)
        memory, action = policy(loop.memory, loop.obs, loop.start, loop.action, loop.reward, policy_key)
        action = action.astype(action_space.dtype)
        step_keys = jax.random.split(step_key, num_envs)
        obs, env_state, reward, _, _, info = jax.vmap(env.step)(step_keys, loop.env_state, action)
        done = info["episode_done"]
        row = jnp.where(done, loop.finished, quota)  # there is no row `quota`: what is written to it is dropped
        new = Episodes(info["episode_return"], info["episode_length"])
        result = jax.tree.map(lambda x, y: x.at[row, jnp.arange(num_envs)].set(y, mode="drop"), loop.result, new)
        return Loop(key, memory, obs, done, action, reward, env_state, loop.finished + done, result)

    loop = Loop(
        key=key,
        memory=initialize(num_envs),
        obs=obs,
        start=jnp.ones(num_envs, bool),
        action=jnp.zeros((num_envs, *action_space.shape), action_space.dtype),
        reward=jnp.zeros(num_envs, jnp.float32),
        env_state=env_state,
        finished=jnp.zeros(num_envs, jnp.int32),
        result=Episodes(jnp.zeros((quota, num_envs), jnp.float32), jnp.zeros((quota, num_envs), jnp.int32)),
    )
    result = jax.lax.while_loop(unfinished, step, loop).result
    return jax.tree.map(lambda x: x.reshape(-1)[:episodes], result)


class Recording(NamedTuple):
    """One episode to look at."""

    states: Any  # (T, ...) states of the library, those that the actions were chosen in
    length: jax.Array  # () int32, how many of them belong to the episode


def record(env: Environment, policy: Callable, initialize: Callable, key, num_envs: int, episodes: int) -> Recording:
    """Play one episode, or its first 1,000 steps, and keep what happened; the arguments are those of `play`."""
    key, reset_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset)(reset_key[None])
    action = jnp.zeros((1, *env.action_space.shape), env.action_space.dtype)

    def step(carry, _):
        key, memory, obs, start, action, reward, env_state = carry
        key, policy_key, step_key = jax.random.split(key, 3)
        memory, action = policy(memory, obs, start, action, reward, policy_key)
        action = action.astype(env.action_space.dtype)
        obs, next_state, reward, _, _, info = jax.vmap(env.step)(step_key[None], env_state, action)
        done = info["episode_done"]
        return (key, memory, obs, done, action, reward, next_state), (env_state.task, done)

    carry = (key, initialize(1), obs, jnp.ones(1, bool), action, jnp.zeros(1), env_state)
    _, (states, done) = jax.lax.scan(step, carry, length=min(env.max_steps, 1000))
    length = jnp.where(done.any(), done.argmax() + 1, len(done))
    return Recording(jax.tree.map(lambda x: x[:, 0], states), length)


def write_gif(path: str, env: Environment, recording: Recording, width: int = 300) -> None:
    """Draw a recording, `width` pixels wide, at 25 frames per second."""
    from PIL import Image

    frames = []
    states = jax.device_get(recording.states)
    for t in range(int(recording.length)):
        frame = Image.fromarray(env.render(jax.tree.map(lambda x, t=t: x[t], states)))
        height = frame.height * width // frame.width
        frames.append(frame.resize((width, height), Image.Resampling.BOX if frame.width > width else Image.NEAREST))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0, optimize=True)


def check_drawable(env) -> None:
    """Refuse an environment that its library cannot draw."""
    if env.render is None:
        raise UsageError(f"{env.id} cannot be drawn: its library has no renderer for it")
