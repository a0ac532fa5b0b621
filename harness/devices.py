"""Several devices: how a run is divided among them, and how the parts become one again.

    parts = divide(config)                      # seeds first, then the environments of each seed
    state = place(state, parts)
    on_devices(function, parts)(state)          # function sees the part of one device

A device has all of some seeds, or a part of their environments. In the second case its part is a
run of its own, with fewer environments, a smaller buffer and smaller minibatches, whose gradients
are averaged over the axis "devices" (axes.py). Parameters are then the same everywhere.
"""

import copy
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from harness.axes import DEVICES
from harness.errors import UsageError
from harness.options import check_sizes
from harness.processes import DEVICES_PER_CORE, cores_of_all

SEEDS = "seeds"

# Fields of a State whose arrays have the environments as their first axis after the seeds, if they
# have any after them: the place in a buffer where the next step goes is the same for all.
OF_ENVIRONMENTS = ("env_state", "carry", "obs", "inputs", "start", "buffer")
OF_ALL = ("params", "target_params", "opt_state", "key", "updates")
# Fields of a Config that count environments, or steps of all environments together.
DIVIDED = ("num_envs", "total_steps", "learning_starts", "buffer_size", "batch_size")


class Parts(NamedTuple):
    """Into how many parts a run is divided; their product is the number of devices."""

    seeds: int
    envs: int  # of each seed

    @property
    def count(self) -> int:
        return self.seeds * self.envs


ONE_PART = Parts(1, 1)


# --- How a run is divided ------------------------------------------------------------------------


def divide(config) -> Parts:
    """The parts of a run on `num_devices` devices, or on as many as make it fast here if that is 0.

    Raises:
      UsageError: there are not so many devices, or the run cannot be divided into so many parts.
    """
    processes = jax.process_count()
    # Each process gives as many.
    owners = [device.process_index for device in jax.devices()]
    available = processes * min(map(owners.count, range(processes)))
    asked = config.num_devices
    if asked > available:
        raise UsageError(f"num_devices is {asked}, and jax finds {available} here")
    if asked % processes:
        raise UsageError(f"num_devices {asked} cannot be used by {processes} processes")
    if asked:
        parts = parts_of(config, asked)
        if reason := why_not(config, parts):
            raise UsageError(f"num_devices {asked} cannot be used: {reason}")
        return parts
    counts = range(available, 1, -1)
    if jax.default_backend() == "cpu":
        counts = counts_for_cores(config.num_seeds, cores_of_all(), available)
    for count in counts:
        parts = parts_of(config, count)
        if not count % processes and pays(config, parts) and not why_not(config, parts):
            return parts
    if processes > 1:
        advice = "give it more seeds, or --num-devices"
        raise UsageError(f"this run gains nothing from {processes} processes: {advice}")
    return ONE_PART


def counts_for_cores(num_seeds: int, cores: int, available: int) -> list[int]:
    """How many devices of a CPU to try, the best first.

    A few more than there are cores, if the seeds can be divided among them: five seeds on two cores
    are faster as five parts than as one. Otherwise one for each core, or less.
    """
    most = min(available, DEVICES_PER_CORE * cores)
    more = [count for count in range(cores, most + 1) if num_seeds % count == 0]
    return [*more, *range(min(available, cores), 1, -1)]


def parts_of(config, count: int) -> Parts:
    """Seeds are divided as far as they can be, then the environments of each seed."""
    seeds = int(np.gcd(count, config.num_seeds))
    return Parts(seeds, count // seeds)


def why_not(config, parts: Parts) -> str:
    """The reason why a run cannot be divided like this, or ""."""
    for name in ("num_envs", "batch_size"):
        size = getattr(config, name, 0)
        if size % parts.envs:
            return f"{name} ({size}) of each seed would be divided by {parts.envs}"
    try:
        check_sizes(part_of(config, parts.envs))
    except ValueError as error:
        return f"of each seed a device would have 1/{parts.envs}, where {error}"
    return ""


def describe_parts(parts: Parts) -> str:
    """What each device has: "each with 1/2 of the seeds"."""
    shares = []
    if parts.seeds > 1:
        shares.append(f"1/{parts.seeds} of the seeds")
    if parts.envs > 1:
        shares.append(f"1/{parts.envs} of the environments of a seed")
    return "each with " + " and ".join(shares)


def pays(config, parts: Parts) -> bool:
    """Whether a run is faster in these parts.

    On CPUs, dividing the environments pays where a gradient step takes long: through the time of a
    rollout. Elsewhere a step is over before the devices have waited for each other.
    """
    if jax.default_backend() != "cpu":
        return True
    reads_rollouts = hasattr(config, "cell") and not hasattr(config, "buffer_size")
    return parts.envs == 1 or reads_rollouts


def part_of(config, envs: int):
    """The config of one of `envs` devices that share the environments of a seed."""
    part = copy.copy(config)
    for name in DIVIDED:
        if hasattr(config, name):
            object.__setattr__(part, name, getattr(config, name) // envs)
    return part


# --- Programs on several devices -----------------------------------------------------------------


def make_mesh(parts: Parts) -> Mesh:
    """As many devices of each process."""
    processes = jax.process_count()
    each = parts.count // processes
    devices = []
    for process in range(processes):
        own = [device for device in jax.devices() if device.process_index == process]
        devices += own[:each]
    return Mesh(np.array(devices).reshape(parts.seeds, parts.envs), (SEEDS, DEVICES))


def partition(state, parts: Parts):
    """Which axes of each array of a State (S, ...) are divided: a State of PartitionSpecs.

    Raises:
      ValueError: the state has a field of which this is not known.
    """
    # As jax writes the shardings of results: another spelling would compile a program again.
    seeds = SEEDS if parts.seeds > 1 else None
    envs = DEVICES if parts.envs > 1 else None

    def spec(path, leaf):
        field = path[0].name
        if field not in OF_ENVIRONMENTS + OF_ALL:
            where = "OF_ENVIRONMENTS or OF_ALL of harness/devices.py"
            raise ValueError(f"to divide a run among devices, add State.{field} to {where}")
        if envs and field in OF_ENVIRONMENTS and leaf.ndim > 1:
            return PartitionSpec(seeds, envs)
        return PartitionSpec(seeds) if seeds else PartitionSpec()

    return jax.tree.map_with_path(spec, state)


def shardings(state, parts: Parts):
    """Where each array of a State (S, ...) belongs: a State of shardings."""
    mesh = make_mesh(parts)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition(state, parts))


def place(state, parts: Parts):
    """The state, each part on its device."""
    if parts.count == 1:
        return state

    def put(leaf, sharding):
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() > 1:  # every process has all of it
            leaf = np.asarray(leaf)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, state, shardings(state, parts))


def on_devices(function, parts: Parts, returns_state: bool = True):
    """A function of a State (S, ...), run on every device with the part of it that is there.

    `function(state, *rest)` returns a State and a pytree (S, ...) that is the same on all devices
    that share a seed; without `returns_state` only the second. The rest of its arguments is the
    same on all devices.
    """
    if parts.count == 1:
        return function

    def call(state, *rest):
        specs = partition(state, parts)
        mesh = make_mesh(parts)

        def call_with_part(state, *rest):
            config = state.config
            results = function(state.replace(config=part_of(config, parts.envs)), *rest)
            if not returns_state:
                return results
            state, results = results
            return state.replace(config=config), results

        seeds = PartitionSpec(SEEDS)
        results = jax.shard_map(
            call_with_part,
            mesh=mesh,
            in_specs=(specs, *[PartitionSpec()] * len(rest)),
            out_specs=(specs, seeds) if returns_state else seeds,
            check_vma=False,
        )(state, *rest)
        # Every process reads the results of all seeds.
        everywhere = NamedSharding(mesh, PartitionSpec())
        if not returns_state:
            return jax.lax.with_sharding_constraint(results, everywhere)
        state, results = results
        return state, jax.lax.with_sharding_constraint(results, everywhere)

    return call


def with_own_keys(update, parts: Parts):
    """An update of one seed, (state, env) -> (state, metrics), with other keys on every device.

    The key of its state is the same on all devices again afterwards, and so are its metrics:
    numbers of episodes are summed, everything else is averaged.
    """
    if parts.envs == 1:
        return update

    def update_part(state, env):
        key, device_key = jax.random.split(state.key)
        device_key = jax.random.fold_in(device_key, jax.lax.axis_index(DEVICES))
        state, metrics = update(state.replace(key=device_key), env)
        for name, value in metrics.items():
            combine = jax.lax.psum if name.startswith("charts/episod") else jax.lax.pmean
            metrics[name] = combine(value, DEVICES)
        return state.replace(key=key), metrics

    return update_part
