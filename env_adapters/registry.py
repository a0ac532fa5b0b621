"""The namespaces, and `make`."""

import contextlib
import functools
from collections.abc import Callable

from env_adapters import brax, craftax, gxm, gymnax, mujoco, navix, own, popgym_arcade, popjaxrl
from env_adapters.environment import Environment, Preprocessed
from env_adapters.task import Task
from env_adapters.wrappers import (
    DEFAULTS,
    HIDING,
    check_options,
    common_options,
    enable_x64,
    from_zero,
    in_32_bits,
    keep_full,
    mask_observation,
    with_vectors,
    wrap,
)
from harness.errors import did_you_mean
from harness.own_code import names_code

# namespace -> (its ids, (id, **options) -> Task). Both import the library when they are called.
NAMESPACES: dict[str, tuple[Callable[[], list[str]], Callable[..., Task]]] = {
    "gymnax": (gymnax.ids, gymnax.make_task),
    "brax": (brax.ids, brax.make_task),
    "mujoco": (mujoco.ids, mujoco.make_task),
    "popjaxrl": (popjaxrl.ids, popjaxrl.make_task),
    "craftax": (craftax.ids, craftax.make_task),
    "navix": (navix.ids, navix.make_task),
    "popgym_arcade": (popgym_arcade.ids, popgym_arcade.make_task),
    "gxm": (gxm.ids, gxm.make_task),
}
# namespace -> (id -> the namespace::id that it is short for)
ALIASES: dict[str, Callable[[str], str]] = {"navix": navix.full_id, "gxm": gxm.full_id}

# Namespaces that take seconds to list their ids, each with a word. `known_ids` lists them only if
# they are asked for by name, or if the user wrote that word.
SLOW_TO_LIST = {"navix": "MiniGrid", "popgym_arcade": "Arcade"}


def make(id: str, /, mask: str | tuple[str, ...] = (), **options) -> Environment:
    """The environment `namespace::id`, or one's own, `path/to/file.py::name`.

    Equal arguments give the same object. It has no state, and is a static argument of jitted
    functions.

    Args:
      id: the namespace and the library's own id, as in "gymnax::CartPole-v1". A file or a module
        with a dot in the place of the namespace is executed; own.py says what `name` may be.
      mask: entries of the observation to remove, see `mask_observation`.
      **options: parameters of the task, as memory_length=10 of gymnax::MemoryChain-bsuite, and for
        every task
          sticky_actions, noise, mask_probability, flicker, delay, frame_stack, time_limit,
            trials, rescale_actions, joint_actions: wrappers.py describes them and their order;
          normalize_obs, normalize_reward: running normalisation, see `Preprocessed`;
          reward_gamma: the discount of normalize_reward.

    Raises:
      ValueError: a namespace, id, mask or option is unknown (names what is valid, and the closest
        match), or its library is missing (names the package).
    """
    return _make(*arguments(id, mask, options))


def make_asymmetric(id: str, /, mask: str | tuple[str, ...] = (), **options) -> Environment:
    """What `make` returns, with observations in two parts, `AsymmetricObs`, for actor and critic.

    The critic's part is the observation that the environment would show at this moment without
    mask, noise, mask_probability, flicker and delay; or `Task.privileged` of the task, if it has
    that. `frozen` environments show the actor's part only.
    """
    return _make(*arguments(id, mask, options), asymmetric=True)


def arguments(id: str, mask, options: dict) -> tuple:
    """The arguments of `_make`, equal for environments that are the same.

    Raises:
      ValueError: the value of an option has another type than options have.
    """
    masks = tuple(map(str, mask)) if isinstance(mask, (tuple, list)) else (str(mask),)
    for name, value in options.items():
        if not isinstance(value, (bool, int, float, str, tuple)):
            valid = "a number, True or False, a text, or a tuple"
            raise ValueError(f"option {name} of {id} must be {valid}, got {value!r}")
    kinds = tuple(type(options[name]) for name in sorted(options))  # 1, 1.0 and True are equal
    version = own.version_of(id) if names_code(id) else ""
    return full_id(id), masks, tuple(sorted(options.items())), kinds, version


def maker_of(id: str) -> Callable[..., Task]:
    """The function (**options) -> Task of an environment.

    Raises:
      ValueError: the namespace or id is unknown; names the closest match.
    """
    if names_code(id):
        return functools.partial(own.make_task, id)
    namespace, separator, env_id = id.partition("::")
    if not separator:
        hint = did_you_mean(id, known_ids(id))
        advice = "write namespace::id, as in gymnax::CartPole-v1"
        raise ValueError(f"environment {id!r} has no namespace{hint}; {advice}")
    if namespace not in NAMESPACES:
        hint = did_you_mean(env_id, known_ids(env_id))
        valid = f"this version has: {', '.join(NAMESPACES)}"
        raise ValueError(f"unknown environment namespace {namespace!r} in {id!r}{hint}; {valid}")
    ids, make_task = NAMESPACES[namespace]
    if env_id not in ids():
        hint = did_you_mean(env_id, known_ids(env_id, [namespace]))
        hint = hint or did_you_mean(env_id, known_ids(env_id))
        valid = f"valid ids of {namespace}: {', '.join(ids())}"
        raise ValueError(f"unknown environment {id!r}{hint}; {valid}")
    return functools.partial(make_task, env_id)


@functools.cache
def _make(id, mask, options, kinds=(), version="", asymmetric=False):
    make_task = maker_of(id)
    common = common_options()
    its_own = {name: value for name, value in options if name not in common}
    given = {name: value for name, value in options if name in common}
    check_options(id, given, {})
    common |= given
    gamma = common["reward_gamma"]
    if not 0 <= gamma <= 1:
        raise ValueError(f"option reward_gamma of {id} must be between 0 and 1, got {gamma}")

    with enable_x64(False):
        task = with_vectors(from_zero(make_task(**its_own)))
        if common["trials"] != 1 and names_code(id) and own.is_replayed(task):
            reason = "its random numbers would be the same in every trial"
            raise ValueError(f"trials is not for classes with Gymnasium's interface: {reason}")
        hides = any(common[name] != DEFAULTS[name] for name in HIDING)
        hides = hides or bool(mask) or task.privileged is not None
        if asymmetric and task.privileged is None:
            task = keep_full(task, common["frame_stack"])
        if mask:
            task = mask_observation(id, task, mask)
        task = in_32_bits(wrap(task, id, {name: common[name] for name in DEFAULTS}))
    if task.clip_reward or common["normalize_obs"] or common["normalize_reward"]:
        return Preprocessed(
            id=id,
            task=task,
            observations=common["normalize_obs"],
            rewards=common["normalize_reward"],
            gamma=gamma,
            hides=hides,
            asymmetric=asymmetric,
        )
    return Environment(id, task, hides=hides, asymmetric=asymmetric)


def full_id(id: str) -> str:
    """The namespace::id that `id` is short for, or `id` itself.

    Raises:
      ValueError: the part after gxm:: does not name a library, or is not supported.
    """
    namespace, separator, env_id = id.partition("::")
    if not (separator and namespace in ALIASES):
        return id
    longer = ALIASES[namespace](env_id)
    return id if longer == id else full_id(longer)


def known_ids(wanted: str, namespaces=()) -> dict[str, str]:
    """Names that a user may have in mind, and the full ids that they stand for.

    Known are full ids, ids without their namespace, and ids without what libraries put before or
    after the name of a task: Catch is gymnax::Catch-bsuite. Libraries that are not installed are
    left out.

    Args:
      wanted: what the user wrote; decides whether slow namespaces are listed.
      namespaces: the namespaces to list; all if empty.
    """
    known: dict[str, str] = {}
    listed = namespaces or NAMESPACES
    for namespace, (ids, _) in NAMESPACES.items():
        if namespace not in listed:
            continue
        if not namespaces and SLOW_TO_LIST.get(namespace, "") not in wanted:
            continue
        with contextlib.suppress(ImportError, ValueError):  # the library is missing
            for env_id in ids():
                full = f"{namespace}::{env_id}"
                for name in (full, *names_of(env_id)):
                    known.setdefault(name, full)
    if "popjaxrl" in listed:
        for theirs, ours in popjaxrl.POPGYM_NAMES.items():
            known |= {theirs + level: f"popjaxrl::{ours}{level}" for level in popjaxrl.LEVELS}
    return {name: full for name, full in known.items() if name}


def names_of(env_id: str) -> list[str]:
    """What a user may call an id: Gymnasium/ALE/Pong-v5 is also Pong-v5 and Pong."""
    name = env_id.rpartition("/")[2]
    without_suffix = name.rpartition("-")[0]
    without_prefix = name.partition("-")[2]
    return [env_id, name, without_suffix, without_prefix]
