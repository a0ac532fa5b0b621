"""Environments that a user wrote: `path/to/file.py::name` or `package.module::name`.

Only names and files are looked at here; env_adapters/own.py imports the code. To import is to
execute, and a run directory may be a stranger's: what it names is imported only if the user has
given the same name (`check_given`).
"""

import hashlib
import shlex
import sys
from pathlib import Path

from harness.errors import UsageError


def names_code(env: str) -> bool:
    """Whether the name of an environment is that of code: a file, or a module with a dot."""
    place, separator, _ = env.partition("::")
    is_module = "." in place and all(part.isidentifier() for part in place.split("."))
    return place.endswith(".py") or bool(separator and (is_module or is_path(place)))


def is_path(place: str) -> bool:
    """Whether what stands before the :: is meant as a path, not as the name of a module."""
    return place.endswith(".py") or "/" in place or "\\" in place


def file_of(env: str) -> Path | None:
    """The file of an environment that `names_code`; of a module only once it is imported."""
    place = env.partition("::")[0]
    if is_path(place):
        return Path(place)
    file = getattr(sys.modules.get(place), "__file__", None)
    return file and Path(file)


def hash_of(env: str) -> str:
    """The SHA-256 of the file of an environment; "" if it is of a library, or there is no file."""
    file = file_of(env) if names_code(env) else None
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
    except OSError:
        return ""


def sources_of(env: str) -> dict[str, str]:
    """What the numbers of a run depend on besides this project: the environment -> its hash."""
    return {env: found} if (found := hash_of(env)) else {}


def short_name(env: str) -> str:
    """The name without the folders of its file, for names of runs."""
    place, separator, name = env.partition("::")
    return f"{Path(place).name}{separator}{name}" if names_code(env) else env


def check_given(run_dir, env: str, given: str | None) -> None:
    """Refuse to execute code that only a run directory names.

    Args:
      env: the environment of the run.
      given: the one that the user named, if any.

    Raises:
      UsageError: the run's is code, and not what the user named.
    """
    if names_code(env) and env != given:
        place = env.partition("::")[0]
        kind = "file" if is_path(place) else "module"
        fact = f"the environment of {str(run_dir)!r} is code in the {kind} {place!r}"
        raise UsageError(f"{fact}: give --env {shlex.quote(env)} again to run it")
