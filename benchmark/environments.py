"""Speed of the environments under a random policy, beside the loops of their libraries.

    python benchmark/environments.py
    python benchmark/environments.py --only gymnax mujoco::Ant-v5 --num-envs 1 64 --rounds 9

Some ids of every namespace are measured. The own loop of a JAX library is its step with its own
auto-reset, under vmap and scan. The own loop of MuJoCo is Gymnasium's SyncVectorEnv, that of Atari
is ale_py's AtariVectorEnv, which uses all cores. Some own loops do less than ours: brax always
returns to the first state; navix, ale_py and Gymnasium spend a step on every reset.

Both loops run for some seconds first, until caches are filled and processes started. Then the two
take turns, so that a busy moment of the machine slows both. Speeds are medians over rounds. The
time over the own loop is the median of the rounds' ratios. Every row is written to
benchmark/results.
"""

import argparse
import importlib
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import results
from rich.live import Live
from rich.table import Table

from envs import NAMESPACES, make
from fast import use_fast_random


def scan_loop(reset, step, sample, num_envs, length):
    """A run function that steps `num_envs` environments `length` times in one program.

    Args:
      reset: key -> carry, of one environment.
      step: (key, carry, action) -> (carry, what must not be optimised away), of one environment.
      sample: key -> action.
    """

    def one_step(carry, key):
        keys = jax.random.split(key, (2, num_envs))
        carry, kept = jax.vmap(step)(keys[0], carry, jax.vmap(sample)(keys[1]))
        return carry, jax.tree.map(lambda x: x.astype(jnp.float32).sum(), kept)

    @jax.jit
    def rollout(key, carry):
        return jax.lax.scan(one_step, carry, jax.random.split(key, length))

    def strong_first(key):
        carry = reset(key)  # libraries give weak types at first and others later
        after = jax.eval_shape(step, key, carry, sample(key))[0]
        return jax.tree.map(lambda x, aval: jnp.asarray(x).astype(aval.dtype), carry, after)

    key = jax.random.key(0)
    carry = jax.jit(jax.vmap(strong_first))(jax.random.split(key, num_envs))
    number = 0

    def run():
        nonlocal carry, number
        number += 1
        carry, _ = jax.block_until_ready(rollout(jax.random.fold_in(key, number), carry))

    return run


def vector_loop(env, length):
    """The same with a vector environment of Gymnasium."""
    env.reset(seed=0)
    env.action_space.seed(0)

    def run():
        for _ in range(length):
            env.step(env.action_space.sample())

    return run


def our_loop(id, options, num_envs, length):
    env = make(id, **options)

    def step(key, state, action):
        obs, state, reward, terminated, truncated, info = env.step(key, state, action)
        return state, (obs, reward, terminated, truncated, info)

    return scan_loop(lambda key: env.reset(key)[1], step, env.action_space.sample, num_envs, length)


def gymnax_loop(name, num_envs, length):
    env, params = importlib.import_module("gymnax").make(name)

    def step(key, state, action):
        obs, state, *rest = env.step(key, state, action, params)
        return state, (obs, *rest[:-1])

    sample = env.action_space(params).sample
    return scan_loop(lambda key: env.reset(key, params)[1], step, sample, num_envs, length)


def craftax_loop(name, num_envs, length):
    module = importlib.import_module("craftax.craftax_env")
    env = module.make_craftax_env_from_name(name, auto_reset=True)
    params = env.default_params

    def step(key, state, action):
        obs, state, reward, done, _ = env.step(key, state, action, params)
        return state, (obs, reward, done)

    sample = env.action_space(params).sample
    return scan_loop(lambda key: env.reset(key, params)[1], step, sample, num_envs, length)


def navix_loop(name, num_envs, length):
    navix = importlib.import_module("navix")
    env = navix.make(name, observation_fn=navix.observations.symbolic_first_person)

    def step(key, timestep, action):
        timestep = env.step(timestep, action)
        return timestep, (timestep.observation, timestep.reward, timestep.step_type)

    def sample(key):
        return jax.random.randint(key, (), 0, len(env.action_set))

    return scan_loop(env.reset, step, sample, num_envs, length)


def arcade_loop(name, num_envs, length):
    """Its step with gymnax's auto-reset written out: with gymnax 1.x the inherited one fails."""
    env, params = importlib.import_module("popgym_arcade").make(name, partial_obs=True)
    env.is_terminated = env.is_terminal

    def step(key, state, action):
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, done, _ = env.step_env(step_key, state, action, params)
        first_obs, first_state = env.reset_env(reset_key, params)
        state = jax.tree.map(lambda first, next: jnp.where(done, first, next), first_state, state)
        return state, (jnp.where(done, first_obs, obs), reward, done)

    def sample(key):
        return jax.random.randint(key, (), 0, 5)

    return scan_loop(lambda key: env.reset_env(key, params)[1], step, sample, num_envs, length)


def brax_loop(name, num_envs, length):
    env = importlib.import_module("brax.envs").create(name, episode_length=1000, backend="spring")

    def step(key, state, action):
        state = env.step(state, action)
        return state, (state.obs, state.reward, state.done)

    def sample(key):
        return jax.random.uniform(key, (env.action_size,), minval=-1.0)

    return scan_loop(env.reset, step, sample, num_envs, length)


def mujoco_loop(name, num_envs, length):
    gymnasium = importlib.import_module("gymnasium")
    return vector_loop(
        gymnasium.make_vec(name, num_envs=num_envs, vectorization_mode="sync"), length
    )


def atari_loop(name, num_envs, length):
    importlib.import_module("ale_py")
    gymnasium = importlib.import_module("gymnasium")
    return vector_loop(gymnasium.make_vec(name.partition("/")[2], num_envs=num_envs), length)


FAMILIES = {  # id: (options, the library's own loop, steps per call)
    "gymnax::CartPole-v1": ({}, gymnax_loop, 1000),
    "brax::inverted_pendulum": ({"backend": "spring"}, brax_loop, 100),
    "brax::halfcheetah": ({"backend": "spring"}, brax_loop, 100),
    "mujoco::InvertedPendulum-v5": ({}, mujoco_loop, 200),
    "mujoco::HalfCheetah-v5": ({}, mujoco_loop, 100),
    "mujoco::Ant-v5": ({}, mujoco_loop, 50),
    "craftax::Craftax-Classic-Symbolic-v1": ({}, craftax_loop, 20),
    "navix::Navix-DoorKey-8x8-v0": ({}, navix_loop, 100),
    "gxm::Gymnasium/ALE/Breakout-v5": ({}, atari_loop, 10),
    "popgym_arcade::BreakoutEasy": ({}, arcade_loop, 10),
    "popjaxrl::RepeatPreviousEasy": ({}, None, 1000),
}


NUM_ENVS = (1, 8, 64, 512)
WARM_UP_SECONDS = 4.0
VECTOR_LOOPS = {
    mujoco_loop: "Gymnasium's SyncVectorEnv",
    atari_loop: "ale_py's AtariVectorEnv",
}


def timed(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(id, num_envs, rounds):
    """The values of a row: steps per second, overhead of the layer, seconds of compilation."""
    options, own_loop, length = FAMILIES[id]
    runs = {"ours": our_loop(id, options, num_envs, length)}
    if own_loop:
        runs["own"] = own_loop(id.partition("::")[2], num_envs, length)
    first = {name: timed(run) for name, run in runs.items()}
    warm = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < warm:
        for run in runs.values():
            run()
    seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in sorted(runs, reverse=turn % 2):
            seconds[name].append(timed(runs[name]))
    seconds = {name: np.array(times) for name, times in seconds.items()}

    def speed(name):
        usual = statistics.median(seconds[name])
        return {
            "steps_per_second": round(num_envs * length / usual),
            "compile_seconds": round(first[name] - usual, 2),
        }

    values = {"id": id, "options": options, "num_envs": num_envs, "rounds": rounds}
    values |= speed("ours") | {"own_loop": None, "time_over_own": None}
    if own_loop:
        name = VECTOR_LOOPS.get(own_loop, "the library's own step under vmap and scan")
        values["own_loop"] = {"name": name} | speed("own")
        if name in VECTOR_LOOPS.values():  # these compile nothing
            values["own_loop"]["compile_seconds"] = None
        values["time_over_own"] = round(np.median(seconds["ours"] / seconds["own"]) - 1, 4)
    return values


def cells_of(values):
    """A row of the table on the screen."""
    own = values["own_loop"] or {"steps_per_second": None, "compile_seconds": None}
    over = values["time_over_own"]
    row = [
        values["id"],
        values["num_envs"],
        f"{values['steps_per_second']:,}",
        "" if own["steps_per_second"] is None else f"{own['steps_per_second']:,}",
        "" if over is None else f"{over:+.0%}",
        f"{values['compile_seconds']:.1f}",
        "" if own["compile_seconds"] is None else f"{own['compile_seconds']:.1f}",
    ]
    return map(str, row)


def main():
    use_fast_random()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(NAMESPACES), metavar="NAMESPACE_OR_ID")
    parser.add_argument("--num-envs", nargs="*", type=int, default=list(NUM_ENVS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    columns = (
        "id",
        "environments",
        "steps/s",
        "own loop",
        "time over own",
        "compile s",
        "own loop",
    )
    table = Table(*columns, title=f"{jax.default_backend()}, medians of {args.rounds} rounds")
    ids = [id for id in FAMILIES if {id, id.partition("::")[0]} & set(args.only)]
    device = results.folder(results.environment()["machine"])
    with Live(table):
        for id, num_envs in itertools.product(ids, args.num_envs):
            values = measure(id, num_envs, args.rounds)
            table.add_row(*cells_of(values))
            name = f"environments/{device}/{results.slug(id)}-{num_envs}"
            results.record(name, values, results.this_command())


if __name__ == "__main__":
    main()
