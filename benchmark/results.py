"""Result files: the numbers of the benchmarks, each with the code, machine and command behind it.

A file `results/<kind>/<name>.json` holds one thing that was measured. Its keys are

    measured   what the values are, in one sentence
    values     the numbers; null where a number was not recorded
    command    the command that measures it again
    commit     the commit of the measured code; in transcribed files, the commit that brought the
               number into the README
    dirty      whether the code had changes that were not committed
    date       the day of the measurement
    machine    device ("cpu" or the name of the GPU) and cores (the number of CPU cores)
    versions   Python and the packages that the numbers can depend on
    source     the script that wrote the file, or the README from which it was transcribed

null means "not recorded". `record` writes a file, `load` reads one, and `tables.py` makes the
tables of the READMEs from them. Only `environment` needs more than the standard library, so that
the processes that measure other libraries can call it.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
KEYS = (
    "measured",
    "values",
    "command",
    "commit",
    "dirty",
    "date",
    "machine",
    "versions",
    "source",
)
KINDS = {  # folder: (the script that measures, what it measures)
    "learning": ("learning.py", "greedy return over 100 episodes at the end of training"),
    "memory-chain": (
        "learning.py --memories",
        "greedy return over 100 episodes of MemoryChain, length 10, at the end of training",
    ),
    "study": ("study.py", "greedy return over 100 episodes at the end of training, in a study"),
    "study-cost": ("study.py", "time and memory of the training runs of a study"),
    "recall": ("recall.py", "updates until 98 % accuracy in a supervised task of memory"),
    "throughput": ("throughput.py", "environment steps per second of training, and compile time"),
    "sac-grid": (
        "throughput.py --grid",
        "environment steps per second of SAC by parallel environments and gradient steps",
    ),
    "devices": ("devices.py", "environment steps per second of training on several devices"),
    "scaling": ("scaling.py", "environment steps per second and peak memory, by one size"),
    "environments": ("environments.py", "environment steps per second under a random policy"),
    "cells": ("cells.py", "time and memory of the passes over a sequence, one layer"),
    "overhead": ("overhead.py", "cost of logging, and seconds until the first update is done"),
}
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "flashbax",
    "numpy",
    "gymnax",
    "gymnasium",
    "brax",
    "mujoco",
    "craftax",
    "navix",
    "popgym-arcade",
    "ale-py",
    "memorax",
    "rejax",
    "sbx-rl",
    "sb3-contrib",
)


class NoResult(Exception):
    """A result file is missing or damaged; the message is shown to the user as it is."""


def set_aside(run_dir: Path) -> Path:
    """Rename a run directory to the first free name of NAME-old-1, NAME-old-2, ...; returns it."""
    places = (run_dir.with_name(f"{run_dir.name}-old-{n}") for n in itertools.count(1))
    old = next(path for path in places if not path.exists())
    return run_dir.rename(old)


def last_line(printed: str) -> str:
    """The last line that a process has printed."""
    lines = printed.strip().splitlines()
    return lines[-1] if lines else "it has printed nothing"


def record(name: str, values: dict, command: str, **known) -> Path:
    """Write `results/<name>.json` in one step.

    Args:
      name: "<kind>/<name>", with a kind of `KINDS`.
      values: the numbers; those that are not finite are written as null.
      command: the command that measures them again.
      **known: keys of the file that the caller knows better than this process, such as the
        machine and versions of a worker, or the commit of a run that is over.
    """
    script, measured = KINDS[name.partition("/")[0]]
    entry = {
        "measured": measured,
        "values": _finite(values),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "source": f"benchmark/{script.split()[0]}",
    }
    if "commit" not in known:
        entry |= code()
    if "machine" not in known:
        entry |= environment()
    entry |= known
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(_as_text(entry))
    os.replace(draft, path)
    return path


def load(name: str) -> dict:
    """The result file of that name, and under "path" where it is.

    Raises:
      NoResult: there is none, or it is damaged.
    """
    path = RESULTS / f"{name}.json"
    script, _ = KINDS[name.partition("/")[0]]
    try:
        entry = json.loads(path.read_text())
    except FileNotFoundError:
        advice = f"`python benchmark/{script}` writes it"
        raise NoResult(f"benchmark/results/{name}.json is missing: {advice}") from None
    except ValueError as error:
        raise NoResult(f"benchmark/results/{name}.json is damaged: {error}") from None
    missing = ", ".join(key for key in KEYS if key not in entry)
    if missing:
        raise NoResult(f"benchmark/results/{name}.json is damaged: it has no {missing}")
    return entry | {"path": path}


def exists(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def folder(machine: dict) -> str:
    """The part of a file's name that keeps results of CPUs and GPUs apart."""
    return "cpu" if machine["device"] == "cpu" else "gpu"


def this_command() -> str:
    """The command line of this process, without paths of this machine."""
    words = ["python", f"benchmark/{Path(sys.argv[0]).name}"]
    for word in sys.argv[1:]:
        is_path = Path(word).is_absolute()
        words.append("PYTHON" if is_path and "python" in Path(word).name else word)
    return shlex.join(words)


@functools.cache
def code() -> dict:
    """Commit of the code, and whether anything but documents and results differs from it."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.toml", "*.txt")
    dirty = None if changes is None else bool(changes)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": dirty}


@functools.cache
def environment() -> dict:
    """Machine and versions of this process."""
    import jax

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"machine": {"device": kind, "cores": os.cpu_count()}, "versions": versions}


def of_run(about: dict) -> dict:
    """What `record` should know of a training run that is over, from the run's config.json."""
    packages = about["packages"]
    versions = {name: packages[name] for name in PACKAGES if name in packages}
    platform_name, _, kind = about["machine"]["devices"][0].partition(": ")
    device = "cpu" if platform_name == "cpu" else kind
    return {
        "commit": about["git"]["commit"],
        "dirty": about["git"]["dirty"],
        "date": about["started"].split()[0],
        "machine": {"device": device, "cores": about["machine"]["cpus"]},
        "versions": {"python": about["python"]} | versions,
    }


def _git(*arguments):
    """The output of a git command in the project's root; None where there is no repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()


def _finite(value):
    """`value` with plain Python numbers, and None for those that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy or jax
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _as_text(entry: dict) -> str:
    """JSON with sorted keys, indented, every list of numbers on one line."""
    text = json.dumps(entry, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)

    def one_line(match):
        return "[" + ", ".join(word.strip() for word in match[1].split(",")) + "]"

    return re.sub(r"\[([-+\d.,eE\snul]*)\]", one_line, text) + "\n"
