"""What jax is told before it starts: devices of a CPU, and the other processes of a run.

Several processes, of one machine or of many, train one run together (`jax.distributed`). All run
the same command and the same program. The first one logs and prints, and all of them write the
checkpoints, into a directory that all of them see.
"""

import contextlib
import ctypes
import functools
import os
import signal

import jax
import numpy as np

from harness.errors import UsageError

DEVICES_PER_CORE = 4  # that may wait for it
MOST_DEVICES = 1024  # that are made of one CPU
LONGEST_TEXT = 8192  # bytes that one process can tell the others
HANDLERS = []  # of C signals
# What jax says if a process that it needs to hear from is gone.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "coordination service", "DEADLINE_EXCEEDED", "UNAVAILABLE")


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cores_of_all() -> int:
    """The cores of all processes, the same number in each of them."""
    return -greatest(-num_cores()) * jax.process_count()


def make_cpu_devices(number: int, num_seeds: int = 1) -> None:
    """Let jax make so many devices of the CPU; if it is 0, as many as so many seeds can use.

    Nothing happens if jax was already used.
    """
    cores = num_cores()
    number = number or max(cores, min(num_seeds, DEVICES_PER_CORE * cores))
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(number, MOST_DEVICES))


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Become one of the processes of a run, before anything uses jax.

    Args:
      coordinator: host:port of the first process; "auto": all three numbers are those of the
        cluster's environment variables, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID.

    Raises:
      UsageError: the three do not describe a process, or the others cannot be reached.
    """
    if coordinator == "auto":
        coordinator = num_processes = process_id = None
    elif num_processes is None or process_id is None:
        raise UsageError("coordinator needs --num-processes and --process-id, or is auto")
    say_so_if_jax_aborts()
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"coordinator {coordinator or 'auto'} cannot be used: {reason}") from None


def say_so_if_jax_aborts() -> None:
    """End with a sentence, where jax would end this process with the stack of its C++ code.

    It does so if the first process is gone. It calls abort(), which Python cannot handle.
    """

    def handle(_):
        os.write(2, b"\nerror: jax has failed, or a process of this run is gone; see --resume\n")
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    HANDLERS.append(handler)  # ctypes does not keep it
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def are_several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that logs, prints and makes files."""
    return jax.process_index() == 0


def from_first(function) -> str:
    """The text that `function()` returns in the first process, which alone calls it.

    Raises:
      UsageError: it did so there.
    """
    if not are_several():
        return function()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    said = b""
    if is_first():
        try:
            said = b"+" + os.fsencode(function())
        except UsageError as error:
            said = b"-" + str(error).encode()
    rows = np.frombuffer(said[:LONGEST_TEXT].ljust(LONGEST_TEXT, b"\0"), np.uint8)
    heard = np.asarray(broadcast_one_to_all(rows)).tobytes().rstrip(b"\0")
    if heard[:1] == b"-":
        raise UsageError(heard[1:].decode(errors="replace"))
    return os.fsdecode(heard[1:])


def greatest(number: int) -> int:
    """The greatest of the numbers that the processes have."""
    if not are_several():
        return number
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.int32(number)).max())


def wait_for_all(place: str) -> None:
    """Go on when all processes have come to this place."""
    if are_several():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(place)


def lost_another(error) -> bool:
    """Whether an exception means that another process of this run is gone."""
    return are_several() and any(sign in str(error) for sign in SIGNS_OF_LOSS)
