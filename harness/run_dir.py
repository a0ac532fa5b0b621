"""The directory of a run: making it, reading it, and checking that a run can be continued.

config.json    the script, its config, and the code, packages and machine that made the run
metrics.jsonl  one JSON object per report (metrics.py), beside the files of the other loggers
checkpoints/   the last training states and the best one (checkpoints.py)
evaluations/   what --evaluate found, one JSON file each time
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

from harness.errors import UsageError, check_types
from harness.metrics import METRICS_FILE
from harness.output import warn
from harness.own_code import check_given, short_name, sources_of

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
NEW = "new"  # begins the name of what is still being written, after a dot where it is a file
CHECKPOINTS_FOLDER = "checkpoints"
VIDEOS_FOLDER = "videos"

# Fields that say what to do, and what to read and write outside of the run's directory: they are
# never taken from a run, which may be a stranger's.
OF_THE_COMMAND = (
    "run_dir",
    "resume",
    "evaluate",
    "video",
    "export",
    "coordinator",
    "num_processes",
    "process_id",
    "compilation_cache",
)
# Fields that may be given beside --resume or --evaluate and differ from the run's own config.
MAY_DIFFER_ON_RESUME = {
    *OF_THE_COMMAND,
    "num_devices",
    "log",
    "wandb_mode",
    "neptune_mode",
    "best",
    "keep_checkpoints",
    "eval_video",
}
MAY_DIFFER_ON_EVALUATE = MAY_DIFFER_ON_RESUME | {
    "seed",
    "env_kwargs",
    "eval_policy",
    "eval_episodes",
    "num_eval_envs",
}

# What the numbers of a run depend on: the modules and packages of this project, and the libraries.
NUMERICAL_SOURCES = (
    "env_adapters",
    "memory_cells",
    "experiment",
    "fast",
    "replay",
    "harness/axes",
    "harness/devices",
)
NUMERICAL_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "flashbax",
    "gymnax",
    "brax",
    "mujoco",
    "craftax",
    "navix",
    "gymnasium",
    "ale-py",
    "popgym-arcade",
)


def script_of(config) -> Path:
    """The file of the script that a config, or its class, belongs to."""
    return Path(inspect.getfile(config if inspect.isclass(config) else type(config)))


def numerical_sources(script: Path) -> dict[str, Path]:
    """The files that decide the numbers of a run of `script`, by their paths in the project."""
    root = Path(__file__).parents[1]
    files = [
        path
        for name in NUMERICAL_SOURCES
        for path in (root / f"{name}.py", *(root / name).rglob("*.py"))
    ]
    return {script.name: script} | {
        str(path.relative_to(root)): path for path in sorted(files) if path.exists()
    }


def provenance(script: Path, env: str = "") -> dict:
    """What made a run: command, code version, packages, machine; None for what is unknown.

    Args:
      env: its environment; if that is the user's own code, its hash is among the `sources`.
    """
    import jax

    def git(*args):
        command = ["git", "-C", str(script.resolve().parent), *args]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            return result.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    distributions = importlib.metadata.distributions()
    return {
        "id": secrets.token_hex(4),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "sources": {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in numerical_sources(script).items()
        }
        | sources_of(env),
        "git": {
            "commit": git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes),
        },
        "python": platform.python_version(),
        "packages": dict(sorted((d.name.lower(), d.version) for d in distributions if d.name)),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        },
    }


def open_run_dir(config):
    """The directory of the run, new or to be resumed, and the lock on it.

    Raises:
      UsageError: it is taken, cannot be written, or is not a run of this script with this config.
    """
    from filelock import FileLock, Timeout

    script = script_of(config)
    path = Path(config.resume or config.run_dir or unused_name(config, script.stem))
    if config.resume:
        refuse_links(path)
        saved = load_config(config.resume, type(config), config.env)
        if config.total_steps < saved.total_steps:
            less = f"total_steps may only grow, from {saved.total_steps} to {config.total_steps}"
            raise UsageError(f"{config.resume!r} cannot be shortened: {less} is less")
        check_same(config, saved, MAY_DIFFER_ON_RESUME | {"total_steps"})
        check_versions(path, provenance(script, config.env))

    def is_taken():
        return not config.resume and any(entry.name[0] != "." for entry in path.iterdir())

    try:
        path.mkdir(parents=True, exist_ok=bool(config.resume or config.run_dir))
        lock = FileLock(path / LOCK_FILE)
        if is_taken():  # asked before anything is written there
            raise FileExistsError
        lock.acquire(timeout=1)  # `is_running` of another process may hold it for a moment
        if is_taken():
            raise FileExistsError
        if not config.resume:
            about = {
                "script": script.stem,
                "config": dataclasses.asdict(config),
                "final_step": config.num_updates * config.steps_per_update,
            }
            write_json(path / CONFIG_FILE, about | provenance(script, config.env))
    except Timeout:
        raise UsageError(f"run directory {str(path)!r} is in use by another process") from None
    except FileExistsError:
        if not path.exists():
            above = next(folder for folder in path.parents if os.path.lexists(folder))
            reason = f"{str(above)!r} is no directory"
            raise UsageError(f"run directory {str(path)!r} cannot be made: {reason}") from None
        if not config.run_dir:  # two runs took the same name at the same moment
            return open_run_dir(config)
        raise UsageError(
            f"run directory {str(path)!r} exists; choose another with --run-dir"
        ) from None
    except OSError as error:
        raise UsageError(
            f"run directory {str(path)!r} cannot be written: {error.strerror}"
        ) from None
    return path, lock


def write_whole(path: Path, text: str) -> None:
    """Write a file that other processes find either complete or not at all.

    A file of the temporary name is never written through: it may be a link that leads elsewhere.
    """
    new = path.with_name(f".{NEW}-{secrets.token_hex(4)}")
    try:
        with open(new, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def write_json(path: Path, contents: dict) -> None:
    write_whole(path, json.dumps(contents, indent=2) + "\n")


def extend(path: Path, config, step: int) -> None:
    """Write down that a run goes on to more steps than it was begun for, after `step` of them.

    Raises:
      UsageError: config.json cannot be written.
    """
    about = read_about(path)
    was = about["config"]["total_steps"]
    if config.total_steps == was:
        return
    about["config"]["total_steps"] = config.total_steps
    about["final_step"] = config.num_updates * config.steps_per_update
    about["extended"] = [
        *about.get("extended", []),
        {"step": step, "from": was, "to": config.total_steps},
    ]
    try:
        write_json(path / CONFIG_FILE, about)
    except OSError as error:
        raise UsageError(f"{path / CONFIG_FILE} cannot be written: {error.strerror}") from None


def save_evaluation(run_dir: Path, contents: dict) -> Path:
    """Write a new file in evaluations/, named after the moment."""
    folder = run_dir / "evaluations"
    if folder.is_symlink():
        raise OSError(errno.ELOOP, f"{str(folder)!r} is a link")
    folder.mkdir(exist_ok=True)
    stem = time.strftime("%Y%m%d-%H%M%S")
    twins = (f"{stem}-{number}" for number in itertools.count(2))
    paths = (folder / f"{name}.json" for name in itertools.chain([stem], twins))
    path = next(path for path in paths if not path.exists())
    write_json(path, contents)
    return path


def unused_name(config, script: str) -> Path:
    """A path under runs/ that says what the run is and that does not exist yet."""
    cell = getattr(config, "cell", "")
    env, moment = short_name(config.env), time.strftime("%Y%m%d-%H%M%S")
    parts = [env, script, cell, f"seed{config.seed}", moment]
    name = "__".join(re.sub(r"[^\w.-]+", "-", part) for part in parts if part)
    twins = (f"{name}-{number}" for number in itertools.count(2))  # started in the same second
    paths = (Path("runs") / name for name in itertools.chain([name], twins))
    return next(path for path in paths if not path.exists())


# The parts of config.json that are read, their types, and whether a run may lack them.
PARTS = {
    "script": (str, False),
    "config": (dict, False),
    "final_step": (int, False),
    "sources": (dict, True),
    "packages": (dict, True),
    "git": (dict, True),
    "extended": (list, True),
}


def read_about(run_dir) -> dict:
    """The contents of a run's config.json, each part of the type that it must have.

    Raises:
      UsageError: there is no such run, or the file is damaged.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        is_other = path.exists() and not path.is_file()  # a pipe would keep its reader waiting
        about = None if is_other else json.loads(path.read_text())
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror})"
        raise UsageError(f"no run in {str(run_dir)!r}: {reason}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: it is not JSON") from None
    if is_other:
        raise UsageError(f"{path} is damaged: it is not a file")
    if not isinstance(about, dict):
        raise UsageError(f"{path} is damaged: it is not the config of a run")
    for part, (kind, may_lack) in PARTS.items():
        if part not in about and not may_lack:
            raise UsageError(f"{path} is damaged: it has no {part!r}")
        if type(about.get(part, kind())) is not kind:
            found = f"{part!r} is {about[part]!r}, not of type {kind.__name__}"
            raise UsageError(f"{path} is damaged: {found}")
    if about["final_step"] <= 0:
        found = f"'final_step' is {about['final_step']}, not greater than 0"
        raise UsageError(f"{path} is damaged: {found}")
    return about


def load_config(run_dir: str, config_class, env: str | None = None):
    """The config of a run of the script of `config_class`; to make it makes the environment.

    Args:
      env: the environment that the user named, if any. One that is code is executed only if it is
        this one.

    Raises:
      UsageError: there is no such run, it is damaged, or it is of another script or version, or
        its environment is code that the user has not named.
    """
    script = script_of(config_class).stem
    about = read_about(run_dir)
    if about["script"] != script:
        raise UsageError(f"{run_dir!r} is a run of {about['script']}.py, not of {script}.py")
    # A run lacks the options of commands that are newer than it.
    fields = {name: v for name, v in about["config"].items() if name not in OF_THE_COMMAND}
    valid = {field.name for field in dataclasses.fields(config_class)} - {*OF_THE_COMMAND}
    if fields.keys() != valid:
        different = ", ".join(sorted(fields.keys() ^ valid))
        made = f"{run_dir!r} was made by another version of {script}.py"
        raise UsageError(f"{made}: its config differs in {different}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    defaults = config_class.__dataclass_fields__
    values |= {name: defaults[name].default for name in OF_THE_COMMAND}
    try:
        check_types(config_class, values)
        check_given(run_dir, values["env"], env)
        return config_class(**values)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"the config of {run_dir!r} is not valid here: {error}") from None


def check_same(config, saved, may_differ) -> None:
    """Refuse a config that is not the one a run was trained with, except for `may_differ`.

    Raises:
      UsageError: names the field, its value then, and its value now.
    """
    for name, value in vars(config).items():
        was = getattr(saved, name)
        if name not in may_differ and value != was:
            run = config.resume or config.evaluate
            raise UsageError(f"{run!r} was trained with {name} = {was!r}, not with {value!r}")


def check_versions(run_dir: Path, here: dict) -> None:
    """Refuse to continue a run that other code began, since it could not be continued bit for bit.

    Raises:
      UsageError: names a source file or package that differs.
    """
    began = read_about(run_dir)
    sources = began.get("sources", {})
    for name in sorted(here["sources"].keys() | sources.keys()):
        if here["sources"].get(name) != sources.get(name):
            commit = began.get("git", {}).get("commit")
            is_known = commit and "::" not in name  # not the user's own file
            hint = f"; it was made at commit {str(commit)[:10]}" if is_known else ""
            raise UsageError(f"{str(run_dir)!r} was begun with another version of {name}{hint}")
    for name in NUMERICAL_PACKAGES:
        was = began.get("packages", {}).get(name)
        now = here["packages"].get(name)
        if was != now:
            advice = "install that, or start a new run"
            raise UsageError(f"{str(run_dir)!r} was begun with {name} {was}, not {now}: {advice}")


def warn_of_changes(run_dir: str, env: str) -> None:
    """Say so if the environment is the user's own, and not the code that a run was trained with."""
    began = read_about(run_dir).get("sources", {})
    now = sources_of(env)
    if now and began.get(env) != now[env]:
        warn(f"{env} is not what {run_dir!r} was trained with: its code has changed")


def refuse_links(run_dir: Path) -> None:
    """Refuse to continue a run whose files are links: what they lead to would be changed.

    Raises:
      UsageError: names the link.
    """
    names = (METRICS_FILE, LOCK_FILE, CHECKPOINTS_FOLDER, VIDEOS_FOLDER, "wandb", ".neptune")
    films = (run_dir / VIDEOS_FOLDER).glob("*")
    for path in [*(run_dir / name for name in names), *films]:
        if path.is_symlink():
            advice = "put there what it leads to"
            raise UsageError(f"{str(path)!r} is a link, a run writes only its own files: {advice}")


def forget_after(path: Path, size: int) -> None:
    """Cut a metrics file to its size at the checkpoint; what came after will be written again.

    Raises:
      UsageError: it cannot be written.
    """
    try:
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            lost = f"{found:,} of {size:,} bytes that it had at the checkpoint"
            warn(f"{str(path)!r} has {lost}: reports are missing")
        elif found > size:
            os.truncate(path, size)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def is_running(run_dir: Path) -> bool:
    """Whether a process holds the lock of this run."""
    from filelock import FileLock, Timeout

    lock = run_dir / LOCK_FILE
    if lock.is_symlink() or not lock.exists():  # older filelocks empty what a link leads to
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # this process may read the directory but not write to it
        return False
