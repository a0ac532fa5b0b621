"""The namespaces, and `make`."""

import contextlib
import functools
from collections.abc import Callable

from env_adapters import brax, craftax, gxm, gymnax, mujoco, navix, popgym_arcade, popjaxrl
from env_adapters.environment import Environment, Normalized
from env_adapters.task import Task
from env_adapters.wrappers import DEFAULTS, check_options, common_options, mask_observation, wrap
from harness.errors import did_you_mean

# namespace -> (its ids, (id, **options) -> Task); libraries are imported when one of their ids is asked for
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


def make(id: str, /, mask: str | tuple[str, ...] = (), **options) -> Environment:
    """The environment `namespace::id`.

    Equal arguments give the same object: it has no state, and is a static argument of the scripts' jitted functions.

    Args:
      id: namespace and the library's own id, e.g. "gymnax::CartPole-v1".
      mask: entries of the observation to hide, see `mask_observation`.
      **options: parameters of the task, e.g. memory_length=10 for gymnax::MemoryChain-bsuite, and for every task
        sticky_actions, noise, mask_probability, flicker, delay, frame_stack, time_limit, rescale_actions: see
          wrappers.py, also for the order in which they are applied;
        normalize_obs, normalize_reward: running normalisation, see `Normalized`;
        reward_gamma: discount per step of the return that normalize_reward looks at.

    Raises:
      ValueError: unknown namespace, id, mask or option; names what is valid and what is nearest.
    """
    return _make(full_id(id), (mask,) if isinstance(mask, str) else tuple(mask), tuple(sorted(options.items())))


def full_id(id: str) -> str:
    """The namespace::id that `id` is short for, or `id` itself."""
    namespace, separator, env_id = id.partition("::")
    if not (separator and namespace in ALIASES):
        return id
    longer = ALIASES[namespace](env_id)
    return id if longer == id else full_id(longer)


# Namespaces that take seconds to list their ids: asked only by name, or about what they are likely to have.
SLOW_TO_LIST = {"navix": "MiniGrid", "popgym_arcade": "Arcade"}


def known_ids(wanted: str, namespaces=()) -> dict[str, str]:
    """Names that someone might have in mind, and the full ids they stand for; of all namespaces that are installed.

    An id is also known without what libraries put before or after the name of a task: Catch is gymnax::Catch-bsuite.
    """
    known: dict[str, str] = {}
    for namespace, (ids, _) in NAMESPACES.items():
        if namespace not in (namespaces or NAMESPACES):
            continue
        if not namespaces and SLOW_TO_LIST.get(namespace, "") not in wanted:
            continue
        with contextlib.suppress(ImportError, ValueError):
            for env_id in ids():
                name = env_id.rpartition("/")[2]
                for short in (f"{namespace}::{env_id}", env_id, name, name.rpartition("-")[0], name.partition("-")[2]):
                    known.setdefault(short, f"{namespace}::{env_id}")
    if "popjaxrl" in (namespaces or NAMESPACES):
        for theirs, ours in popjaxrl.POPGYM_NAMES.items():
            known |= {theirs + level: f"popjaxrl::{ours}{level}" for level in popjaxrl.LEVELS}
    return {name: full for name, full in known.items() if name}


@functools.cache
def _make(id, mask, options):
    namespace, separator, env_id = id.partition("::")
    if not separator:
        hint = did_you_mean(id, known_ids(id))
        raise ValueError(f"environment {id!r} has no namespace{hint}; write namespace::id, as in gymnax::CartPole-v1")
    if namespace not in NAMESPACES:
        valid, hint = ", ".join(NAMESPACES), did_you_mean(env_id, known_ids(env_id))
        raise ValueError(f"unknown environment namespace {namespace!r} in {id!r}{hint}; this version has: {valid}")
    ids, make_task = NAMESPACES[namespace]
    if env_id not in ids():
        hint = did_you_mean(env_id, known_ids(env_id, [namespace])) or did_you_mean(env_id, known_ids(env_id))
        raise ValueError(f"unknown environment {id!r}{hint}; valid ids of {namespace}: {', '.join(ids())}")
    common = common_options()
    own = {name: value for name, value in options if name not in common}
    given = {name: value for name, value in options if name in common}
    check_options(id, given, {})
    common |= given
    if not 0 <= common["reward_gamma"] <= 1:
        raise ValueError(f"option reward_gamma of {id} must be between 0 and 1, got {common['reward_gamma']}")
    task = make_task(env_id, **own)
    if mask:
        task = mask_observation(id, task, mask)
    task = wrap(task, id, {name: common[name] for name in DEFAULTS})
    observations, rewards = common["normalize_obs"], common["normalize_reward"]
    if observations or rewards:
        return Normalized(id, task, observations, rewards, common["reward_gamma"])
    return Environment(id, task)
