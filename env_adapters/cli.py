"""What `python envs.py` does: list namespaces, list the environments of one, or try one of them with random actions.

python envs.py
python envs.py popjaxrl
python envs.py gymnax::CartPole-v1 --steps 1000 --gif cartpole.gif
"""

import importlib.util
import time
from dataclasses import dataclass, field
from typing import Annotated

import jax
import numpy as np
import tyro

from env_adapters.episodes import check_drawable, record, write_gif
from env_adapters.registry import NAMESPACES, known_ids, make
from env_adapters.task import Discrete
from fast import use_fast_random
from harness.errors import Options, UsageError, did_you_mean
from harness.options import check_gif


@dataclass(frozen=True)
class Command:
    """List environments, or try one with random actions."""

    what: Annotated[str, tyro.conf.Positional] = ""  # a namespace, or an environment as namespace::id; empty: list all
    steps: int = 1000  # steps of each environment
    num_envs: int = 8  # parallel environments
    env_kwargs: Options = field(default_factory=dict)  # options of the environment: delay 3 max_steps_in_episode 50
    mask: tuple[str, ...] = ()  # entries of the observation to hide: indices, or a name such as velocity
    seed: int = 0  # seed of everything random
    gif: str = ""  # write an episode to this .gif


def main(command: Command) -> None:
    """Raises UsageError for what cannot be done."""
    use_fast_random()
    for name in ("steps", "num_envs"):
        if getattr(command, name) < 1:
            raise UsageError(f"{name} must be greater than 0, got {getattr(command, name)}")
    if not command.what:
        return list_namespaces()
    if command.what in NAMESPACES:
        return list_environments(command.what)
    if "::" not in command.what and not did_you_mean(command.what, known_ids(command.what)):
        valid, hint = ", ".join(NAMESPACES), did_you_mean(command.what, list(NAMESPACES))
        raise UsageError(f"{command.what!r} is no namespace{hint}, and no namespace::id; namespaces: {valid}")
    try:
        env = make(command.what, **{"mask": command.mask} | command.env_kwargs)
        if command.gif:
            check_gif("gif", command.gif)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    if command.gif:
        check_drawable(env)
    try_out(env, command)


def list_namespaces() -> None:
    for namespace in NAMESPACES:
        module = "gymnasium" if namespace == "gxm" else namespace  # whose ids it serves without gxm itself
        is_installed = importlib.util.find_spec(module) is not None
        print(f"{namespace:16}{'installed' if is_installed else 'not installed'}")
    print("python envs.py <namespace> lists its environments")


def list_environments(namespace: str) -> None:
    """A line for each, as soon as it is known: some libraries take seconds for one."""
    try:
        ids = NAMESPACES[namespace][0]()
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    width = max(map(len, ids))
    print(f"{'id':{width}}  {'observation':24}{'action':24}max steps")
    for env_id in ids:
        try:
            env = make(f"{namespace}::{env_id}")
            spaces = f"{describe(env.observation_space):24}{describe(env.action_space):24}{env.max_steps:>9}"
        except (ValueError, ImportError) as error:
            spaces = str(error)
        print(f"{env_id:{width}}  {spaces}", flush=True)


def describe(space) -> str:
    """A space in a few characters."""
    if isinstance(space, Discrete):
        return f"{space.n} actions"
    return f"{np.dtype(space.dtype)}{list(space.shape)}"


def random_policy(env):
    """A policy for `envs.record`."""
    return lambda memory, obs, start, action, reward, key: (
        memory,
        jax.vmap(env.action_space.sample)(jax.random.split(key, len(obs))),
    )


def try_out(env, command: Command) -> None:
    """Step it with random actions and report what happens."""

    def step(carry, key):
        obs, state = carry
        action_keys, step_keys = jax.random.split(key, (2, command.num_envs))
        actions = jax.vmap(env.action_space.sample)(action_keys)
        step_envs = jax.vmap(env.step, axis_name="envs")
        obs, state, reward, terminated, truncated, info = step_envs(step_keys, state, actions)
        return (obs, state), (terminated, truncated, info["episode_return"], info["episode_length"])

    def run(key):
        reset_key, key = jax.random.split(key)
        carry = jax.vmap(env.reset, axis_name="envs")(jax.random.split(reset_key, command.num_envs))
        return jax.lax.scan(step, carry, jax.random.split(key, command.steps))[1]

    key, began = jax.random.key(command.seed), time.perf_counter()
    program = jax.jit(run).lower(key).compile()
    compiled = time.perf_counter()
    terminated, truncated, returns, lengths = map(np.asarray, jax.block_until_ready(program(key)))
    speed = command.steps * command.num_envs / (time.perf_counter() - compiled)
    done = terminated | truncated
    print(f"observation  {describe(env.observation_space)}")
    print(f"action       {describe(env.action_space)}")
    print(f"max steps    {env.max_steps}")
    print(f"compiled in  {compiled - began:.1f} s")
    print(f"speed        {speed:,.0f} steps per second, with {command.num_envs} environments")
    print(f"episodes     {terminated.sum()} terminated, {truncated.sum()} truncated")
    if done.any():
        print(f"random agent mean return {returns[done].mean():.4g}, mean length {lengths[done].mean():.4g}")
    if command.gif:
        film = jax.jit(lambda key: record(env, random_policy(env), lambda _: (), key, 1, 1))(key)
        write_gif(command.gif, env, film)
        print(f"film         {command.gif}, {int(film.length)} steps")
