"""What `python envs.py` does: list namespaces, list the environments of one, or try one.

python envs.py
python envs.py popjaxrl
python envs.py gymnax::CartPole-v1 --steps 1000 --gif cartpole.gif
python envs.py path/to/file.py::name
"""

import importlib.util
import time
from dataclasses import dataclass, field
from typing import Annotated

import jax
import numpy as np
import tyro

from env_adapters import own
from env_adapters.contract import NUM_ENVS, random_action
from env_adapters.episodes import check_drawable, record, write_gif
from env_adapters.registry import NAMESPACES, known_ids, make
from env_adapters.task import Discrete, MultiDiscrete, numbers_of, parts_of
from env_adapters.wrappers import enable_x64
from fast import use_fast_random
from harness.errors import Options, UsageError, did_you_mean
from harness.options import check_gif
from harness.own_code import names_code

# namespace -> the module it needs, where that is not the one of its name
MODULES = {
    "gxm": "gymnasium",  # only the ids are gxm's
    "popjaxrl": "env_adapters.popjaxrl",  # needs no library
}


@dataclass(frozen=True)
class Command:
    """List environments, or try one with random actions."""

    # a namespace, or an environment as namespace::id or file.py::name; empty: list the namespaces
    what: Annotated[str, tyro.conf.Positional] = ""
    steps: int = 1000  # steps of each environment
    num_envs: int = 8  # parallel environments
    # options of the environment, as delay 3 max_steps_in_episode 50
    env_kwargs: Options = field(default_factory=dict)
    # entries of the observation to remove: indices, or a name such as velocity
    mask: tuple[str, ...] = ()
    seed: int = 0  # seed of everything random
    gif: str = ""  # write an episode to this .gif


def main(command: Command) -> None:
    """Do what the command says.

    Raises:
      UsageError: it cannot be done.
    """
    use_fast_random()
    for name in ("steps", "num_envs"):
        value = getattr(command, name)
        if not 0 < value < 2**31:
            valid = "greater than 0 and less than 2**31"
            raise UsageError(f"{name} must be {valid}, got {value}")
    if not 0 <= command.seed < 2**31:
        raise UsageError(f"seed must be 0 or more and less than 2**31, got {command.seed}")
    if not command.what:
        list_namespaces()
    elif command.what in NAMESPACES:
        list_environments(command.what)
    else:
        env = make_environment(command)
        if names_code(command.what):
            check_own(command)
        try_out(env, command)


def make_environment(command: Command):
    """The environment that the command names.

    Raises:
      UsageError: it cannot be made, or cannot be drawn and a .gif is asked for.
    """
    what = command.what
    is_known = "::" in what or names_code(what)
    if not is_known and not did_you_mean(what, known_ids(what)):
        hint = did_you_mean(what, list(NAMESPACES))
        valid = f"namespaces: {', '.join(NAMESPACES)}"
        raise UsageError(f"{what!r} is no namespace{hint}, and no namespace::id; {valid}")
    try:
        env = make(what, **{"mask": command.mask} | command.env_kwargs)
        if command.gif:
            check_gif("gif", command.gif)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    if command.gif:
        check_drawable(env)
    return env


def check_own(command: Command) -> None:
    """Play in an environment of one's own, and say whether it keeps the contract.

    Raises:
      UsageError: it does not; says what is wrong.
    """
    with enable_x64(False):
        num_steps = own.check(command.what, command.seed, **command.env_kwargs)
    print(f"contract     kept in {num_steps:,} random steps of {NUM_ENVS} environments")


def list_namespaces() -> None:
    """Print every namespace, and whether its library is installed."""
    for namespace in NAMESPACES:
        module = MODULES.get(namespace, namespace)
        is_installed = importlib.util.find_spec(module) is not None
        print(f"{namespace:16}{'installed' if is_installed else 'not installed'}")
    print("python envs.py <namespace> lists its environments")


def list_environments(namespace: str) -> None:
    """Print a line for every environment, at once: some libraries take seconds for each.

    Raises:
      UsageError: the library is missing.
    """
    ids, _ = NAMESPACES[namespace]
    try:
        env_ids = ids()
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    width = max(map(len, env_ids))
    print(f"{'id':{width}}  {'observation':24}{'action':24}max steps")
    for env_id in env_ids:
        try:
            env = make(f"{namespace}::{env_id}")
            observation = describe(env.observation_space)
            action = describe(env.action_space)
            facts = f"{observation:24}{action:24}{env.max_steps:>9}"
        except (ValueError, ImportError) as error:
            facts = str(error)
        print(f"{env_id:{width}}  {facts}", flush=True)


def describe(space) -> str:
    """A space in a few characters: "2 actions", "float32[4]", or "image uint8[8, 8, 3], ..."."""
    if isinstance(space, Discrete | MultiDiscrete):
        return f"{' x '.join(map(str, np.ravel(numbers_of(space))))} actions"
    parts = parts_of(space).items()
    return ", ".join(f"{name} {np.dtype(x.dtype)}{list(x.shape)}".strip() for name, x in parts)


def random_actions(env, keys, obs):
    """Valid actions (N, ...) for observations (N, ...)."""
    return jax.vmap(lambda key, obs: random_action(key, env.action_space, obs))(keys, obs)


def random_policy(env):
    """A policy for `record` that takes random actions."""

    def policy(memory, obs, start, action, reward, key):
        return memory, random_actions(env, jax.random.split(key, len(start)), obs)

    return policy


def try_out(env, command: Command) -> None:
    """Step an environment with random actions, and print what happens."""
    num_envs = command.num_envs

    def step(carry, key):
        obs, state = carry
        action_keys, step_keys = jax.random.split(key, (2, num_envs))
        actions = random_actions(env, action_keys, obs)
        step_envs = jax.vmap(env.step, axis_name="envs")
        obs, state, _, terminated, truncated, info = step_envs(step_keys, state, actions)
        return (obs, state), (terminated, truncated, info["episode_return"], info["episode_length"])

    def run(key):
        reset_key, key = jax.random.split(key)
        reset_keys = jax.random.split(reset_key, num_envs)
        carry = jax.vmap(env.reset, axis_name="envs")(reset_keys)
        _, results = jax.lax.scan(step, carry, jax.random.split(key, command.steps))
        return results

    key = jax.random.key(command.seed)
    began = time.perf_counter()
    program = jax.jit(run).lower(key).compile()
    compiled = time.perf_counter()
    results = jax.block_until_ready(program(key))
    ended = time.perf_counter()
    terminated, truncated, returns, lengths = map(np.asarray, results)
    speed = command.steps * num_envs / (ended - compiled)
    print(f"observation  {describe(env.observation_space)}")
    print(f"action       {describe(env.action_space)}")
    print(f"max steps    {env.max_steps}")
    print(f"compiled in  {compiled - began:.1f} s")
    print(f"speed        {speed:,.0f} steps per second, with {num_envs} environments")
    print(f"episodes     {terminated.sum()} terminated, {truncated.sum()} truncated")
    done = terminated | truncated
    if done.any():
        mean_return = returns[done].mean()
        mean_length = lengths[done].mean()
        print(f"random agent mean return {mean_return:.4g}, mean length {mean_length:.4g}")
    if command.gif:
        policy = random_policy(env)
        film = jax.jit(lambda key: record(env, policy, lambda _: (), key, 1, 1))(key)
        write_gif(command.gif, env, film)
        print(f"film         {command.gif}, {int(film.length)} steps")
