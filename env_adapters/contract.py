"""Whether a `Task` that a user wrote keeps the contract, and what is wrong, in plain words.

`check_task` looks at types, spaces, shapes and dtypes: nothing is compiled, so that every run can
afford it. `check_behaviour` plays, for `python envs.py`.
"""

import contextlib
import math
import re
import traceback
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.environment import branch_where
from env_adapters.task import (
    Box,
    Discrete,
    MaskedObs,
    MultiDiscrete,
    Task,
    first_of,
    numbers_of,
    only_valid,
    parts_of,
    random_valid,
)
from harness.errors import UsageError

NUM_ENVS = 4  # that `check_behaviour` plays side by side
MOST_STEPS = 1000  # that it plays
HINTS = {
    "TracerBoolConversionError": "JAX compiles it: use jnp.where instead of if, and & for and",
    "TracerArrayConversionError": "JAX compiles it: use jax.numpy instead of numpy",
    "TracerIntegerConversionError": "JAX compiles it: index jax.numpy arrays, not lists",
    "ConcretizationTypeError": "JAX compiles it: sizes and conditions must not depend on arrays",
    "UnexpectedTracerError": "keep what a step changes in the state, not in self or a global",
}


# --- Errors of the user's code -------------------------------------------------------------------


@contextlib.contextmanager
def blaming(what: str, file=None):
    """Inside the block, a user's code runs.

    Args:
      what: what runs, for the error: "step of my.py::Walk".
      file: where the code is, to find the line.

    Raises:
      UsageError: it raises an exception; names that, the file and the line.
    """
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} raises {describe(error, file)}") from None


def describe(error: BaseException, file=None) -> str:
    """An exception in a sentence: where in the file, which, its message, and what to do."""
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file and is_same(frame.filename, file)]
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        file, lines = error.filename, [error.lineno]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    if "Traceback (most recent call last)" in message:  # of a function on the host, JAX's words
        found = re.findall(r'File "(.*)", line (\d+)', message)
        lines = [number for name, number in found if file and is_same(name, file)]
        kind, _, message = message.strip().splitlines()[-1].partition(": ")
    where = f" in {Path(file).name}, line {lines[-1]}" if lines else ""
    message = f": {message.splitlines()[0].strip()}" if message.strip() else ""
    hint = f" ({HINTS[kind]})" if kind in HINTS else ""
    return f"{kind}{where}{message}{hint}"


def is_same(filename: str, file) -> bool:
    return Path(filename).absolute() == Path(file).absolute()


# --- Spaces, shapes and dtypes -------------------------------------------------------------------


def check_task(owner: str, task: Task, file=None) -> None:
    """Refuse a task whose spaces, shapes or dtypes break the contract.

    Args:
      owner: the name of the environment.
      file: where its code is, to name lines.

    Raises:
      UsageError: says what is wrong.
    """
    check_observation_space(owner, task.observation_space)
    check_action_space(owner, task.action_space)
    steps = task.max_steps
    if type(steps) is not int or steps < 1:
        valid = "a whole number of at least 1, after which every episode has ended"
        raise UsageError(f"max_steps of {owner} must be {valid}, got {steps!r}")
    for name in ("reset", "step"):
        if not callable(getattr(task, name)):
            raise UsageError(f"{name} of {owner} must be a function, got {getattr(task, name)!r}")
    if task.render is not None and not callable(task.render):
        raise UsageError(f"render of {owner} must be a function or None, got {task.render!r}")

    if task.action_mask is not None and not isinstance(task.action_space, Discrete):
        kind = f"a {type(task.action_space).__name__}"
        raise UsageError(f"action_mask of {owner} is for Discrete actions, and these are {kind}")

    key = jax.eval_shape(lambda: jax.random.key(0))
    with blaming(f"reset of {owner}", file):
        first = jax.eval_shape(task.reset, key)
    check_number(f"reset of {owner}", first, "obs, state")
    obs, state = first
    check_obs(f"reset of {owner}", obs, task.observation_space)

    action = jax.ShapeDtypeStruct(task.action_space.shape, task.action_space.dtype)
    with blaming(f"step of {owner}", file):
        later = jax.eval_shape(task.step, key, state, action)
    what = f"step of {owner}"
    check_number(what, later, "obs, state, reward, terminated, truncated")
    obs, next_state, reward, terminated, truncated = later
    check_obs(what, obs, task.observation_space)
    check_state(owner, state, next_state)
    check_scalar(what, "reward", reward, "one number", np.number, np.bool_)
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        check_scalar(what, name, flag, "one True or False", np.bool_)
    if task.action_mask is not None:
        with blaming(f"action_mask of {owner}", file):
            mask = jax.eval_shape(task.action_mask, state)
        size = (task.action_space.n,)
        if getattr(mask, "shape", None) != size or mask.dtype != np.bool_:
            found = f"{mask.dtype} of shape {mask.shape}" if hasattr(mask, "shape") else repr(mask)
            raise UsageError(f"action_mask of {owner} must be bool of shape {size}, not {found}")
    if task.privileged is not None:
        with blaming(f"privileged of {owner}", file):
            full = jax.eval_shape(task.privileged, state)
        if not (getattr(full, "shape", ()) and full.dtype.kind in "fiub"):
            valid = "an array of numbers with at least one axis"
            found = f"{full.dtype} of shape ()" if hasattr(full, "shape") else type(full).__name__
            raise UsageError(f"privileged of {owner} must return {valid}, not {found}")


def check_number(what: str, result, names: str) -> None:
    """Refuse a result that is not a tuple of these."""
    wanted = len(names.split(", "))
    if not isinstance(result, tuple | list):
        raise UsageError(f"{what} returns one {type(result).__name__}, not ({names})")
    if len(result) != wanted:
        raise UsageError(f"{what} returns {len(result)} values, not the {wanted} of ({names})")


def check_observation_space(owner: str, space, name: str = "") -> None:
    """Refuse a space of observations that is not of ours, or the part of this name of one."""
    what = f"{f'part {name} of ' if name else ''}observation_space of {owner}"
    if isinstance(space, dict) or type(space) in (tuple, list):
        is_dict = isinstance(space, dict)
        parts = space if is_dict else {str(i): part for i, part in enumerate(space)}
        if not parts:
            raise UsageError(f"{what} has no parts")
        for own, part in parts.items():
            if not isinstance(own, str) or not own or "." in own:
                valid = "a text without dots"
                raise UsageError(f"the name of every part of {what} must be {valid}, got {own!r}")
            check_observation_space(owner, part, f"{name}.{own}" if name else own)
        return
    check_is_ours(what, space, Box, Discrete, MultiDiscrete)
    if not isinstance(space, Box):
        return check_numbers(what, space)
    check_box(what, space)
    if np.dtype(space.dtype) not in (np.float32, np.uint8):
        valid = "float32, or uint8 for images"
        raise UsageError(f"{what} has the dtype {np.dtype(space.dtype)}, not {valid}")


def check_action_space(owner: str, space) -> None:
    what = f"action_space of {owner}"
    check_is_ours(what, space, Box, Discrete, MultiDiscrete)
    if isinstance(space, Box):
        return check_box(what, space)
    check_numbers(what, space)


def check_numbers(what: str, space: Discrete | MultiDiscrete) -> None:
    """Refuse a space of integers that has none, or no whole number of them."""
    if isinstance(space, MultiDiscrete):
        starts = space.start or (0,) * len(space.nvec)
        is_valid = len(space.nvec) == len(starts) > 0
        is_valid &= all(isinstance(n, int | np.integer) and n > 0 for n in space.nvec)
        is_valid &= all(isinstance(n, int | np.integer) for n in starts)
        if not is_valid:
            found = f"MultiDiscrete({space.nvec!r}, start={space.start!r})"
            raise UsageError(f"{what} must have a number of values for each part, got {found}")
        return
    is_whole = all(isinstance(x, int | np.integer) for x in (space.n, space.start))
    if not is_whole or space.n < 1 or space.shape != ():
        kind = "actions" if what.startswith("action") else "values"
        raise UsageError(f"{what} must have a number of {kind}, got Discrete({space.n!r})")


def check_is_ours(what: str, space, *kinds) -> None:
    *first, last = [kind.__name__ for kind in kinds]
    names = f"{', '.join(first)} or {last}"
    if space is None:
        raise UsageError(f"{what} is missing: it must be a {names}")
    if not isinstance(space, kinds):
        found = f"{type(space).__module__}.{type(space).__name__}"
        raise UsageError(f"{what} is a {found}, and must be a {names} of envs.py")


def check_box(what: str, space: Box) -> None:
    is_tuple = isinstance(space.shape, tuple)
    if not (is_tuple and all(isinstance(n, int | np.integer) and n > 0 for n in space.shape)):
        raise UsageError(f"{what} must have a tuple of sizes as its shape, got {space.shape!r}")
    for name in ("low", "high"):
        bound = np.asarray(getattr(space, name))
        if bound.dtype.kind not in "fiub" or np.isnan(bound).any():
            raise UsageError(f"{name} of {what} must consist of numbers, got {bound!r}")
        try:
            np.broadcast_to(bound, space.shape)
        except ValueError:
            sizes = f"has the shape {bound.shape}, which does not fit the shape {space.shape}"
            raise UsageError(f"{name} of {what} {sizes}") from None
    if (np.asarray(space.low) > np.asarray(space.high)).any():
        raise UsageError(f"low of {what} is greater than high: {space.low} and {space.high}")


def check_obs(what: str, obs, space) -> None:
    """Refuse observations that are not of the space's parts and shapes, or would be rounded."""
    has_parts = not isinstance(space, Box | Discrete | MultiDiscrete)
    found, parts = parts_of(obs), parts_of(space)
    if has_parts and jax.tree.structure(obs) != jax.tree.structure(space):
        names = f"with the parts {' and '.join(found)}, observation_space has {' and '.join(parts)}"
        if "" in found:
            names = f"that is one array, observation_space has the parts {' and '.join(parts)}"
        elif found.keys() == parts.keys():
            names = f"that is a {type(obs).__name__}, observation_space is a {type(space).__name__}"
        raise UsageError(f"{what} returns an observation {names}")
    for name, part in parts.items():
        check_part(what, found[name] if has_parts else obs, part, name)


def check_part(what: str, obs, space, name: str = "") -> None:
    """Refuse one part of an observation, "" for the whole."""
    of, has = ("an observation", "observation_space has")
    if name:
        of, has = (f"an observation whose part {name} is", "observation_space says")
    if not hasattr(obs, "shape"):
        raise UsageError(f"{what} returns an observation that is a {type(obs).__name__}, no array")
    is_box = isinstance(space, Box)
    if obs.shape != space.shape:
        found = f"{what} returns {of} of shape {obs.shape}"
        raise UsageError(f"{found}, {has} the shape {space.shape}")
    is_rounded = np.dtype(space.dtype) == np.uint8 and obs.dtype != np.uint8
    if is_rounded or obs.dtype.kind not in ("fiub" if is_box else "iub"):
        found = f"{what} returns {of} of dtype {obs.dtype}"
        raise UsageError(f"{found}, {has} the dtype {np.dtype(space.dtype)}")


def check_state(owner: str, before, after) -> None:
    """Refuse a state that step returns with other parts, shapes or dtypes than reset."""
    what = f"the state of {owner}"
    leaves = [dict(jax.tree_util.tree_leaves_with_path(state)) for state in (before, after)]
    first, later = ({show(path): x for path, x in found.items()} for found in leaves)
    for name in first.keys() | later.keys():
        if name not in later:
            raise UsageError(f"{what} has a part {name} after reset that is gone after step")
        if name not in first:
            raise UsageError(f"{what} has a part {name} after step that reset does not return")
    for name, x in first.items():
        y = later[name]
        if x.shape != y.shape:
            shapes = f"the shape {x.shape} after reset and {y.shape} after step"
            raise UsageError(f"{what} changes: {name} has {shapes}")
        if not is_kept(y.dtype, x.dtype):
            dtypes = f"is {x.dtype} after reset and {y.dtype} after step"
            advice = "begin with the dtype that it has later"
            raise UsageError(f"{what} changes: {name} {dtypes}, and would be rounded; {advice}")
    kinds = [jax.tree.structure(state) for state in (before, after)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{what} is {kinds[0]} after reset and {kinds[1]} after step")


def is_kept(dtype, other) -> bool:
    """Whether values of a dtype become values of another without loss."""
    if dtype == other:
        return True
    is_key = any(jnp.issubdtype(x, jax.dtypes.extended) for x in (dtype, other))
    return not is_key and jnp.promote_types(dtype, other) == other


def show(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "(the whole)"


def check_scalar(what: str, name: str, x, valid: str, *kinds) -> None:
    """Refuse what is not a single value of these kinds of dtypes."""
    if not hasattr(x, "shape"):
        raise UsageError(f"{what} returns a {name} that is a {type(x).__name__}, not {valid}")
    if x.shape != () or not any(np.issubdtype(x.dtype, kind) for kind in kinds):
        found = f"{x.dtype} of shape {x.shape}" if x.shape else str(x.dtype)
        raise UsageError(f"{what} returns a {name} that is {found}, not {valid}")


# --- Behaviour -----------------------------------------------------------------------------------


def check_behaviour(owner: str, task: Task, seed: int, file=None, on_host=False) -> int:
    """Play with random actions, twice alike, and refuse a task that breaks the contract.

    Args:
      seed: of everything random.
      file: where the code is, to name lines.
      on_host: whether the task is a class that gets a seed instead of keys.

    Returns:
      The number of steps of each environment that were looked at.

    Raises:
      UsageError: says what is wrong.
    """
    num_steps = min(task.max_steps + 1, MOST_STEPS)
    key = jax.random.key(seed)
    with blaming(owner, file):
        first = rollout(task, key, num_steps)
        jax.clear_caches()  # also of functions that the user has compiled: trace them again
        again = rollout(task, key, num_steps)
    check_reset_key(owner, task, first)
    check_values(owner, task, first)
    check_repeated(owner, first, again, on_host)
    return num_steps


def rollout(task: Task, key, num_steps: int) -> dict:
    """What several environments return, as numpy arrays (NUM_ENVS, ...) and (T, NUM_ENVS, ...)."""

    def step(carry, key):
        state, time = carry
        action_key, step_key, reset_key = jax.random.split(key, 3)
        mask = task.action_mask(state) if task.action_mask else None
        obs = () if mask is None else MaskedObs((), mask)
        action = random_action(action_key, task.action_space, obs)
        obs, state, reward, terminated, truncated = task.step(step_key, state, action)
        time = time + 1
        results = {
            "obs": jax.tree.map(jnp.asarray, obs),
            "reward": jnp.asarray(reward, jnp.float32),
            "terminated": jnp.asarray(terminated),
            "truncated": jnp.asarray(truncated),
            "time": time,
            "is_stuck": jnp.bool_(False) if mask is None else ~mask.any(),
        }
        done = results["terminated"] | results["truncated"]
        restart = lambda key: (as_after_reset(task.reset(key)[1]), jnp.int32(0))  # noqa: E731
        carry = branch_where(
            done, restart, reset_key, (as_after_reset(state), time), task.equal_resets_once
        )
        return carry, results

    avals = jax.eval_shape(task.reset, key)[1]

    def as_after_reset(state):
        def cast(x, aval):
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                return x
            return jax.lax.convert_element_type(x, aval.dtype)

        return jax.tree.map(cast, state, avals)

    def play(key):
        reset_key, key = jax.random.split(key)
        obs, state = task.reset(reset_key)
        carry = (as_after_reset(state), jnp.int32(0))
        _, results = jax.lax.scan(step, carry, jax.random.split(key, num_steps))
        return (obs, state), results

    keys = jax.random.split(key, NUM_ENVS)
    # A new function, so that jax traces the user's once more.
    (obs, state), results = jax.jit(jax.vmap(lambda key: play(key), out_axes=(0, 1)))(keys)
    return {"first": as_numpy(obs), "state": as_numpy(state)} | as_numpy(results)


def as_numpy(tree):
    def convert(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(convert, tree)


def random_action(key, space: Box | Discrete | MultiDiscrete, obs):
    """A random action that the observation does not rule out."""
    if isinstance(space, Discrete):
        return space.start + random_valid(key, only_valid(jnp.zeros(space.n), obs))
    return bounded(space).sample(key) if isinstance(space, Box) else space.sample(key)


def bounded(space: Box) -> Box:
    """The space with -1 and 1 in place of infinite bounds, so that it can be sampled."""
    low = np.where(np.isfinite(space.low), space.low, np.minimum(-1.0, space.high))
    high = np.where(np.isfinite(space.high), space.high, np.maximum(1.0, low))
    return replace(space, low=low, high=high)


def check_reset_key(owner: str, task: Task, first: dict) -> None:
    """Refuse a reset that draws random numbers which its key does not decide."""
    program = str(jax.make_jaxpr(task.reset)(jax.random.key(0)))
    draws = "random_bits" in program or "threefry2x32" in program
    if not (draws and all_same((first["first"], first["state"]))):
        return
    keys = jax.random.split(jax.random.key(1), 64)  # a few may have drawn the same by chance
    if all_same(as_numpy(jax.jit(jax.vmap(task.reset))(keys))):
        fault = "draws random numbers, but gives the same result for every key"
        raise UsageError(f"reset of {owner} {fault}: draw them from the key that it is given")


def all_same(tree) -> bool:
    """Whether the rows of every array are equal."""
    return all((x == x[:1]).all() for x in jax.tree.leaves(tree))


def check_values(owner: str, task: Task, results: dict) -> None:
    """Refuse observations outside of their space, numbers that are none, and wrong ends."""
    space = task.observation_space
    check_bounds(f"reset of {owner}", results["first"], space)
    check_bounds(f"step of {owner}", results["obs"], space)
    if not np.isfinite(results["reward"]).all():
        wrong = results["reward"][~np.isfinite(results["reward"])][0]
        raise UsageError(f"step of {owner} returns a reward that is {wrong}")
    if results["is_stuck"].any():
        time = results["time"][results["is_stuck"]][0] - 1
        raise UsageError(f"action_mask of {owner} allows nothing at step {time} of an episode")
    both = results["terminated"] & results["truncated"]
    if both.any():
        time = results["time"][both][0]
        fault = f"says both terminated and truncated, in step {time} of an episode"
        advice = "truncated is for time limits that end what has not terminated"
        raise UsageError(f"step of {owner} {fault}: {advice}")
    if results["time"].max() > task.max_steps:
        fault = f"an episode of {owner} has not ended after its max_steps = {task.max_steps} steps"
        raise UsageError(f"{fault}: return truncated = True then")


def check_bounds(what: str, obs, space) -> None:
    """Refuse observations, each part (..., *shape), outside of the space, up to rounding."""
    parts = parts_of(obs)
    for name, part in parts_of(space).items():
        check_part_bounds(what, parts[name], part, name)


def check_part_bounds(what: str, obs, space, part: str) -> None:
    kind = f"an observation whose part {part}" if part else "an observation"
    rows = obs.astype(np.float64).reshape(-1, math.prod(space.shape))
    if np.isnan(rows).any():
        raise UsageError(f"{what} returns {kind}{' contains' if part else ' that contains'} nan")
    for name, sign, most in (("high", 1, "most"), ("low", -1, "least")):
        bound = np.broadcast_to(np.asarray(bounds_of(space)[name], np.float64), space.shape)
        bound = bound.reshape(-1)
        excess = sign * (rows - bound) > 1e-5 * (1 + np.where(np.isfinite(bound), abs(bound), 0))
        if excess.any():
            row, i = np.argwhere(excess)[0]
            entry = tuple(map(int, np.unravel_index(i, space.shape)))
            entry = f"entry {entry[0] if len(entry) == 1 else entry}" if entry else "it"
            limit = f"observation_space says at {most} {bound[i]:g}"
            outside = f"{kind}{' is' if part else ''} outside of its space"
            raise UsageError(f"{what} returns {outside}: {entry} is {rows[row, i]:g}, {limit}")


def bounds_of(space) -> dict:
    """The smallest and the greatest values of a space."""
    if isinstance(space, Box):
        return {"low": space.low, "high": space.high}
    return {"low": first_of(space), "high": first_of(space) + numbers_of(space) - 1}


def check_repeated(owner: str, first: dict, again: dict, on_host: bool) -> None:
    """Refuse a task that does not repeat itself."""
    given = {"reset": "the same key", "step": "the same key, state and action"}
    advice = "draw from the key, and keep what changes in the state"
    if on_host:
        given = {"reset": "the same seed", "step": "the same seed and actions"}
        advice = "draw from self.np_random, and set all that changes in reset"
    names = ("reward", "terminated", "truncated")
    parts = [("reset", "first", "observation"), ("reset", "state", "state")]
    parts += [("step", "obs", "observation"), *(("step", name, name) for name in names)]
    for function, part, name in parts:
        if not is_equal(first[part], again[part]):
            fault = f"{function} of {owner} is not pure: {given[function]} gave another {name}"
            raise UsageError(f"{fault} the second time; {advice}")


def is_equal(x, y) -> bool:
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)
