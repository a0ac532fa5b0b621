"""Environments of one's own: `path/to/file.py::name` or `package.module::name`.

The name is that of a function that returns a `Task`, of an object with gymnax' interface, or of a
class with Gymnasium's. To make one executes the file; harness/own_code.py sees to it that nobody
else's run directory does that.
"""

import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters import contract, host_own
from env_adapters.contract import blaming, describe
from env_adapters.task import Task
from env_adapters.wrappers import check_options, common_options, time_limit
from harness.errors import UsageError, did_you_mean
from harness.own_code import file_of, hash_of, is_path

MAX_STEPS = 1000  # where neither the environment nor max_steps says when episodes end
KINDS = (
    "a function that returns a Task, an object with gymnax' interface, or a class with Gymnasium's"
)
PLAIN = (bool, int, float, str, tuple)  # the options that there are


def make_task(env_id: str, **options) -> Task:
    """The task that a user wrote.

    Args:
      **options: arguments of the function or class; fields of the parameters of a gymnax object;
        max_steps, if nothing else says when episodes end.

    Raises:
      UsageError: it cannot be found, or breaks the contract; says what is wrong.
      ValueError: there is no such option, or its value is not valid.
    """
    thing = find(env_id)
    file = file_of(env_id)
    made, make, own, given = thing, None, {}, {}
    if not (isinstance(thing, Task) or is_environment(thing)):
        if not callable(thing):
            raise UsageError(f"{env_id} is of type {type(thing).__name__}; it must be {KINDS}")
        own = arguments_of(env_id, thing, options)
        given = {name: options[name] for name in options if name in own}
        make = partial(thing, **given | picture_mode(thing))
        with blaming(env_id, file):
            made = make()
    rest = {name: value for name, value in options.items() if name not in own}
    if isinstance(made, Task):
        check_options(env_id, rest, own)
        task = made
    elif not is_environment(made):
        found = f"{env_id} returns an object of type {type(made).__name__}"
        raise UsageError(f"{found}; it must be {KINDS}")
    elif is_of_gymnasium(made):
        if make is None:
            advice = "name its class, or a function that makes one"
            raise UsageError(f"{env_id} is an object, and a run needs several: {advice}")
        limit = limit_of(env_id, made, rest, own | given)
        task = limited(host_own.make_task(env_id, make, made, limit, file))
    else:
        task = gymnax_task(env_id, made, rest, own, file)
    contract.check_task(env_id, task, file)
    return task


def check(env_id: str, seed: int = 0, **options) -> int:
    """Play in an environment of one's own and refuse it if it breaks the contract.

    Returns:
      The number of steps that were played and looked at.

    Raises:
      UsageError: says what is wrong.
    """
    own = {name: value for name, value in options.items() if name not in common_options()}
    task = make_task(env_id, **own)
    return contract.check_behaviour(env_id, task, seed, file_of(env_id), is_replayed(task))


def is_replayed(task: Task) -> bool:
    """Whether a task is a class with Gymnasium's interface, whose states are seeds and actions."""
    state = jax.eval_shape(task.reset, jax.random.key(0))[1]
    return isinstance(getattr(state, "inner", None), host_own.Replay)


# --- Finding -------------------------------------------------------------------------------------


def version_of(env_id: str) -> str:
    """The hash of the file that is executed, "" if there is none; a changed file is another one."""
    return hash_of(env_id) if is_path(env_id.partition("::")[0]) else ""


def find(env_id: str):
    """What a name refers to; executes its file.

    Raises:
      UsageError: there is no such file, module or name, or the code raises an exception.
    """
    place, _, name = env_id.partition("::")
    if not name:
        raise UsageError(f"environment {env_id!r} names only a file: write {place}::name")
    module = execute(place) if is_path(place) else import_module(place)
    if not hasattr(module, name):
        names = [other for other, x in vars(module).items() if is_meant(other, x, module)]
        hint = did_you_mean(name, names)
        listing = f"it has: {', '.join(names)}" if names else "it has no function or class"
        raise UsageError(f"{place} has no {name!r}{hint}; {listing}")
    return getattr(module, name)


def is_meant(name: str, x, module) -> bool:
    """Whether a name in a module may be that of an environment."""
    is_own = getattr(x, "__module__", None) == module.__name__
    return not name.startswith("_") and (is_own and callable(x) or is_environment(x))


def execute(place: str) -> types.ModuleType:
    """The module of a file, executed once for each content.

    Raises:
      UsageError: there is no such file, or it raises an exception.
    """
    path = Path(place)
    if path.suffix != ".py":
        hint = f" (did you mean {place + '.py'!r}?)" if Path(place + ".py").is_file() else ""
        valid = "an environment is path/to/file.py::name"
        raise UsageError(f"{place!r} is no Python file{hint}: {valid}")
    try:
        source = path.read_bytes()
    except OSError as error:
        folder = path.parent
        others = [str(other) for other in folder.glob("*.py")] if folder.is_dir() else []
        hint = did_you_mean(place, others)
        raise UsageError(f"{place!r} cannot be read: {error.strerror}{hint}") from None
    name = f"{path.stem}-{hashlib.sha256(bytes(path.absolute()) + source).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # files beside it, as for a script; but ours come first
    module = types.ModuleType(name)
    module.__file__ = str(path.absolute())
    sys.modules[name] = module  # dataclasses look there
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{place} cannot be imported: {describe(error, path)}") from None
    return module


def import_module(place: str) -> types.ModuleType:
    """An installed module, or one in the current folder.

    Raises:
      UsageError: there is none, or it raises an exception.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
        if missing and f"{place}.".startswith(f"{missing}."):
            where = f"neither installed nor in {here!r}"
            raise UsageError(f"there is no module {place!r}: {missing!r} is {where}") from None
        frames = inspect.getinnerframes(error.__traceback__)
        file = next((f.filename for f in reversed(frames) if "importlib" not in f.filename), None)
        raise UsageError(f"{place} cannot be imported: {describe(error, file)}") from None


# --- Kinds and options ---------------------------------------------------------------------------


def is_environment(x) -> bool:
    """Whether this is an object, no class, that can be reset and stepped."""
    has_functions = callable(getattr(x, "reset", None)) and callable(getattr(x, "step", None))
    has_bare = callable(getattr(x, "reset_env", None)) and callable(getattr(x, "step_env", None))
    return (has_functions or has_bare) and not inspect.isclass(x) and not isinstance(x, Task)


def is_of_gymnasium(env) -> bool:
    """Whether an environment has Gymnasium's interface: its reset takes a seed, not a key."""
    return not hasattr(env, "reset_env") and "seed" in parameters_of(env.reset)


def parameters_of(function) -> dict:
    """The parameters of a function or class by their names; none if they are not known."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def arguments_of(owner: str, function, options: dict) -> dict:
    """The arguments of a function or class and their defaults, once the options are sure to fit.

    Raises:
      UsageError: one that has no default is missing, or has the name of an option of every
        environment.
      ValueError: an option has another type than the default, or makes no sense.
    """
    defaults, takes_all = {}, False
    for name, parameter in parameters_of(function).items():
        if parameter.kind == parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind != parameter.VAR_POSITIONAL and name != "render_mode":
            defaults[name] = default_of(parameter, options)
            if name in common_options():
                taken = f"every environment has an option {name}, which comes first"
                raise UsageError(f"argument {name} of {owner} needs another name: {taken}")
            if parameter.default is parameter.empty and name not in options:
                advice = f"give it with --env-kwargs {name} VALUE, or give it a default"
                raise UsageError(f"{owner} needs its argument {name}: {advice}")
    if takes_all:
        # A class that takes all passes them on to one above it, which knows no max_steps.
        ours = ("max_steps",) if inspect.isclass(function) else ()
        defaults = {name: x for name, x in options.items() if name not in ours} | defaults
    given = {name: value for name, value in options.items() if name in defaults}
    check_options(owner, given, defaults, guess=False)
    return defaults


def picture_mode(function) -> dict:
    """The argument with which an object of Gymnasium draws pictures, if it has that."""
    modes = getattr(function, "metadata", {}).get("render_modes", ())
    can_draw = "rgb_array" in modes and "render_mode" in parameters_of(function)
    return {"render_mode": "rgb_array"} if can_draw else {}


def default_of(parameter, options: dict):
    """The default of an argument, or a value of the type that it must have."""
    default = parameter.default
    if default is parameter.empty or default is None:
        kinds = {"bool": False, "int": 0, "float": 0.0, "str": "", "tuple": ()}
        annotation = parameter.annotation
        name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        return kinds.get(name, options.get(parameter.name))
    is_float = parameter.annotation in (float, "float") and type(default) is int
    return float(default) if is_float else default


def limit_of(owner: str, env, options: dict, own: dict, params=None) -> int:
    """The steps after which episodes are truncated.

    It is the option or argument max_steps, or what the object says itself, or MAX_STEPS.

    Args:
      own: the other options, and the arguments that the object was made with.

    Raises:
      ValueError: there is no such option, or its value is not valid.
    """
    spec = getattr(env, "spec", None)
    says = [own.get("max_steps"), getattr(spec, "max_episode_steps", None)]
    for x in (params, env):
        says += [getattr(x, name, None) for name in ("max_steps_in_episode", "max_steps")]
    whole = [int(x) for x in says if isinstance(x, int | float | np.integer) and x >= 1]
    default = whole[0] if whole else MAX_STEPS
    check_options(owner, options, own | {"max_steps": default})
    return options.get("max_steps", default)


def limited(task: Task) -> Task:
    """The task truncated after its max_steps; what terminates in that step has terminated."""
    task = time_limit(task, task.max_steps)

    def step(key, state, action):
        *rest, terminated, truncated = task.step(key, state, action)
        return *rest, terminated, truncated & ~terminated

    return replace(task, step=step)


# --- gymnax' interface ---------------------------------------------------------------------------


def gymnax_task(owner: str, env, options: dict, own: dict, file=None) -> Task:
    """The task of an object with gymnax' interface, of version 1.x, of 0.0.x, or like them.

    `reset_env` and `step_env` are used, or `reset` and `step` of an object that has no others; none
    of these may reset by itself.

    Raises:
      UsageError: it has no spaces, or step returns something else.
      ValueError: there is no such option, or its value is not valid.
    """
    reset_env = getattr(env, "reset_env", None) or env.reset
    step_env = getattr(env, "step_env", None) or env.step
    params = getattr(env, "default_params", None)
    values = {}
    if is_dataclass(params):
        values = {field.name: getattr(params, field.name) for field in fields(params)}
    values = {name: value for name, value in values.items() if isinstance(value, PLAIN)}
    changes = {name: value for name, value in options.items() if name in values}
    # A whole number in place of a float would change the dtypes of the task's state.
    is_float = {name: isinstance(values[name], float) for name in changes}
    changes = {name: float(x) if is_float[name] else x for name, x in changes.items()}
    check_options(owner, changes, values)
    if changes:
        params = params.replace(**changes)
    rest = {name: value for name, value in options.items() if name not in values}
    if "max_steps_in_episode" in values:
        check_options(owner, rest, values | own)
        max_steps = int(params.max_steps_in_episode)
    else:
        max_steps = limit_of(owner, env, rest, own | values, params)
    extra = () if params is None else (params,)
    with blaming(owner, file):
        declared = space_of(owner, env, "observation_space", extra)
        observation_space = host_own.observation_space_of(owner, declared)
        declared = space_of(owner, env, "action_space", extra)
        action_space = host_own.action_space_of(owner, declared)

    def reset(key):
        result = reset_env(key, *extra)
        contract.check_number(f"reset of {owner}", result, "obs, state")
        return with_parts(result[0], observation_space), result[1]

    def step(key, state, action):
        result = step_env(key, state, action, *extra)
        contract.check_number(f"step of {owner}", result, "obs, state, reward, done, info")
        obs, state, reward, done, _ = result
        truncated = jnp.bool_(False)
        if callable(getattr(env, "is_truncated", None)):  # gymnax 1.x: done is termination
            truncated = jnp.asarray(env.is_truncated(state, *extra), bool) & ~as_flag(done)
        elif "max_steps_in_episode" in values and hasattr(state, "time"):
            truncated = state.time >= params.max_steps_in_episode  # 0.0.x: done includes it
            done = as_flag(done) & ~truncated
        obs = with_parts(obs, observation_space)
        return obs, state, reward, as_flag(done), truncated

    return limited(Task(reset, step, observation_space, action_space, max_steps))


def as_flag(done):
    return jnp.asarray(done, bool)


def space_of(owner: str, env, name: str, extra: tuple):
    """A space of an object with gymnax' interface, which is an attribute or a method.

    Raises:
      UsageError: it has none.
    """
    space = getattr(env, name, None)
    if space is None:
        raise UsageError(f"{owner} has no {name}: gymnax' interface has a method of this name")
    if not hasattr(space, "shape") and not hasattr(space, "n") and callable(space):
        space = space(*extra) if parameters_of(space) else space()
    return space


def with_parts(obs, space):
    """The observation as dicts and tuples, where it has the parts of its space; else as it is."""
    if isinstance(space, dict) and isinstance(obs, Mapping) and obs.keys() == space.keys():
        return {name: with_parts(obs[name], space[name]) for name in space}
    if isinstance(space, tuple) and isinstance(obs, tuple | list) and len(obs) == len(space):
        return tuple(map(with_parts, obs, space))
    return obs
