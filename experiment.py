"""What a run is besides its algorithm: options, checks, seeds, run directory, resuming, evaluating.

A run directory holds
  config.json    the script, every field of its config, and the code, packages and machine that made the run
  metrics.jsonl  one JSON object per report (loggers.py), beside the files of the other loggers
  checkpoints/   the last training states and the best one (checkpoints.py)
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Options = dict[str, int | float | bool | str]  # on the command line: name value name value ...
Backend = Literal["console", "file", "tensorboard", "wandb", "neptune", "dashboard"]

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"


class UsageError(ValueError):
    """Something the user asked for cannot be done; its message is the whole story."""


class RunError(RuntimeError):
    """Training cannot go on; its message is the whole story."""


class Diverged(RunError):
    """No seed has finite losses any more."""


@dataclass(frozen=True)
class Experiment:
    """The options that every script has; a script's own config adds those of its algorithm."""

    # Experiment
    seed: int = 0  # seed of the first run; run i has seed + i
    num_seeds: int = 1  # independent runs, trained side by side in one program
    total_steps: int = 500_000  # environment steps of each seed
    log: tuple[Backend, ...] = ("console", "file", "tensorboard")  # where metrics go, any combination
    log_every: int = 10  # updates between two reports
    wandb_mode: Literal["online", "offline"] = "online"  # offline: into the run directory only; `wandb sync` sends it
    neptune_mode: Literal["async", "offline"] = "async"  # offline: into the run directory only; `neptune sync` sends it
    run_dir: str = ""  # directory for this run, must be new; empty: one under runs/
    resume: str = ""  # directory of a run to go on with, as if it had never stopped; its config is taken from there
    eval_every: int = 50_000  # environment steps between two evaluations; each is followed by a checkpoint
    eval_episodes: Annotated[int, tyro.conf.arg(aliases=("--episodes",))] = 100  # episodes of a greedy evaluation
    num_eval_envs: int = 100  # parallel environments of an evaluation
    keep_checkpoints: int = 2  # how many of the last checkpoints to keep, besides the one with the best evaluation
    evaluate: str = ""  # directory of a run: evaluate its last checkpoint instead of training
    best: bool = False  # with --evaluate: take the checkpoint with the best evaluation
    video: str = ""  # with --evaluate: write an episode of the first seed to this .gif
    compilation_cache: str = "~/.cache/memory-rl"  # keeps compiled programs for the next start; empty: nothing does

    @property
    def num_updates(self) -> int:
        return self.total_steps // self.steps_per_update


# what may be given beside --resume or --evaluate and differ from the run's own config
HARMLESS = {"log", "wandb_mode", "neptune_mode", "run_dir", "resume", "evaluate", "best", "video", "keep_checkpoints"}
HARMLESS |= {"compilation_cache"}
EVALUATION = {"env_kwargs", "eval_episodes", "num_eval_envs"}

# packages that decide what the numbers of a run are
NUMERICAL_PACKAGES = ("jax", "jaxlib", "flax", "optax", "flashbax", "gymnax", "brax", "mujoco", "craftax", "navix")

# config fields with other bounds than "greater than 0"
AT_LEAST_0 = ("seed", "ent_coef", "vf_coef", "bptt", "learning_starts", "burn_in")
UP_TO_1 = ("gamma", "gae_lambda", "q_lambda", "tau", "start_e", "end_e", "exploration_fraction", "target_entropy_ratio")
ANY_SIGN = ("target_entropy",)


def did_you_mean(name: str, valid) -> str:
    """Hint ' (did you mean ...?)' with the valid name closest to `name`, or ''; a dict maps names to what is shown."""
    matches = difflib.get_close_matches(name, list(valid), n=1)
    if not matches:
        return ""
    shown = valid[matches[0]] if isinstance(valid, dict) else matches[0]
    return f" (did you mean {shown!r}?)"


def check_options(owner: str, options: Options, defaults: dict) -> None:
    """Refuse options that `owner` does not have, or whose type is not that of their default.

    Raises:
      ValueError: names the option, its value and what is valid.
    """
    for name, value in options.items():
        if name not in defaults:
            listing = f"valid options: {', '.join(defaults)}" if defaults else "it has none"
            raise ValueError(f"{owner} has no option {name!r}{did_you_mean(name, defaults.keys())}; {listing}")
        wanted = type(defaults[name])
        is_whole = wanted is float and type(value) is int
        if wanted in (bool, int, float, str) and type(value) is not wanted and not is_whole:
            raise ValueError(f"option {name} of {owner} must be {wanted.__name__}, got {value!r}")


def launch(main, config_class):
    """Run a script: parse the command line into its config and call `main` with it.

    Errors of the user's end the process with exit code 2 and one sentence, failed runs with 1; Ctrl-C with 130.
    """
    gc.disable()  # tracing makes a lot of objects and no garbage: a sixth of the start; `Run` enables it
    try:
        if not issubclass(config_class, Experiment):
            return main(tyro.cli(config_class))
        config = parse(config_class)
        use_compilation_cache(config.compilation_cache)
        main(config)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(config_class):
    """The config of the command line. With --resume or --evaluate, what is not given is as in that run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--evaluate", nargs="?")
    given, _ = parser.parse_known_args()
    if given.resume and given.evaluate:
        raise UsageError("--resume and --evaluate exclude each other")
    if not (given.resume or given.evaluate):
        return tyro.cli(config_class)
    saved = load_config(given.resume or given.evaluate, config_class)
    default, options = copy.copy(saved), {}
    for name, value in vars(saved).items():
        if isinstance(value, dict) and any(
            word.replace("_", "-") == f"--{name.replace('_', '-')}" for word in sys.argv
        ):
            object.__setattr__(default, name, {})  # tyro takes new keys only where there are none
            options[name] = value
    config = tyro.cli(config_class, default=default)
    return dataclasses.replace(config, **{name: value | getattr(config, name) for name, value in options.items()})


def use_compilation_cache(folder: str) -> None:
    """Let jax keep compiled programs in `folder`, unless the environment already names one."""
    import jax

    if not (folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    if jax.__version_info__ < (0, 10) and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        # It prints pages about every program that comes from the cache, and must be told not to before it is imported.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        os.execv(sys.executable, sys.orig_argv)
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_compilation_cache_max_size", 2**31)  # what was not used for longest goes first


def check_sizes(config):
    """Refuse a config that has a size, count or rate which cannot be.

    Raises:
      ValueError: names the field, its value and what is valid.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in AT_LEAST_0:
            if value < 0:
                raise ValueError(f"{field.name} must be 0 or more, got {value}")
        elif field.name in UP_TO_1:
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be between 0 and 1, got {value}")
        elif field.name in ANY_SIGN:
            if not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value}")
        elif type(value) in (int, float) and not value > 0:  # nan is not either
            raise ValueError(f"{field.name} must be greater than 0, got {value}")
    if getattr(config, "bptt", 0) and config.num_steps % config.bptt:
        raise ValueError(f"bptt ({config.bptt}) must divide num_steps ({config.num_steps})")
    if getattr(config, "learning_starts", 0) >= config.total_steps:
        raise ValueError(
            f"learning_starts ({config.learning_starts}) must be less than total_steps ({config.total_steps})"
        )
    if getattr(config, "buffer_size", config.steps_per_update) < config.steps_per_update:
        update = f"the steps of one update ({config.steps_per_update})"
        raise ValueError(f"buffer_size ({config.buffer_size}) is less than {update}")
    if hasattr(config, "sequence_length"):
        length = config.burn_in + config.sequence_length
        updates = -(-length // config.num_steps)  # that collect the steps of a sequence; a buffer keeps whole ones
        for name, needed in (("learning_starts", updates - 1), ("buffer_size", updates)):
            if getattr(config, name) < needed * config.steps_per_update:
                steps = (
                    f"{needed * config.steps_per_update}, for sequences of burn_in + sequence_length = {length} steps"
                )
                raise ValueError(f"{name} ({getattr(config, name)}) must be at least {steps}")
    if config.seed + config.num_seeds > 2**31:
        raise ValueError(f"seed must be less than 2**31 - num_seeds, got {config.seed}")
    if config.total_steps < config.steps_per_update:
        update = f"one update ({config.steps_per_update} steps)"
        raise ValueError(f"total_steps ({config.total_steps}) is less than {update}")
    if config.video:
        check_gif("video", config.video)
    for option in ("video", "best"):
        if getattr(config, option) and not config.evaluate:
            raise ValueError(f"{option} needs a trained agent: give the run's directory with evaluate")


def check_gif(name: str, path: str) -> None:
    """Refuse a path, the value of option `name`, that no .gif can be written to."""
    if not path.endswith(".gif"):
        raise ValueError(f"{name} must be a file name that ends in .gif, got {path!r}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, got {path!r}")


def check_drawable(env) -> None:
    """Refuse an environment that its library cannot draw."""
    if env.render is None:
        raise UsageError(f"{env.id} cannot be drawn: its library has no renderer for it")


def check_buffer(config, buffer) -> None:
    """Tell the size of a replay buffer, before it is made, from the shapes and dtypes of its arrays.

    Raises:
      UsageError: it is larger than the memory that is free.
    """
    import jax
    import psutil

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(buffer))
    memory = jax.devices()[0].memory_stats() or {"bytes_limit": psutil.virtual_memory().available}
    if size > memory["bytes_limit"]:
        free = f"there are {memory['bytes_limit'] / 2**30:,.1f} GiB"
        raise UsageError(f"a replay buffer of buffer_size {config.buffer_size} takes {size / 2**30:,.1f} GiB, {free}")
    if "console" in config.log:
        print(f"replay buffer: {size / 2**20:,.1f} MiB", flush=True)


def seed_keys(config):
    """Typed keys (num_seeds,): a run with --num-seeds 3 --seed 5 has the keys of the runs with seeds 5, 6 and 7."""
    import jax
    import jax.numpy as jnp

    return jax.vmap(jax.random.key)(config.seed + jnp.arange(config.num_seeds))


def vmap_seeds(function):
    """`jax.vmap` over the leading seed axis of a state; a single seed goes without: that compiles a fifth faster."""
    import jax

    def mapped(state):
        if jax.tree.leaves(state)[0].shape[0] > 1:
            return jax.vmap(function)(state)
        result = function(jax.tree.map(lambda x: x[0], state))
        return jax.tree.map(lambda x: jax.numpy.asarray(x)[None], result)

    return mapped


def script_of(config) -> Path:
    """The file of the script that a config (or its class) belongs to."""
    return Path(inspect.getfile(config if inspect.isclass(config) else type(config)))


def provenance(script: Path) -> dict:
    """What made a run, as far as it can be told: command, code version, packages, machine."""
    import jax

    def git(*args):
        command = ["git", "-C", str(script.resolve().parent), *args]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    here = Path(__file__).parent
    shared = ("envs", "env_wrappers", "fast_cpu", "fast_random", "host_gymnasium", "host_mujoco", "popjaxrl", "replay")
    sources = [script, *(here / f"{name}.py" for name in shared), *sorted((here / "memory_cells").glob("*.py"))]
    return {
        "id": secrets.token_hex(4),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)},
        "python": platform.python_version(),
        "packages": dict(sorted((d.name.lower(), d.version) for d in importlib.metadata.distributions() if d.name)),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        },
    }


def open_run_dir(config):
    """The directory of the run, new or to be resumed, and the lock that keeps other processes out of it.

    Raises:
      UsageError: it is taken, cannot be written, or is not a run of this script with this config.
    """
    from filelock import FileLock, Timeout

    script = script_of(config)
    path = Path(config.resume or config.run_dir or unused_name(config, script.stem))
    if config.resume:
        check_same(config, load_config(config.resume, type(config)), HARMLESS)
        check_versions(path, provenance(script))
    try:
        path.mkdir(parents=True, exist_ok=bool(config.resume or config.run_dir))
        lock = FileLock(path / LOCK_FILE)
        is_taken = lambda: not config.resume and any(entry.name[0] != "." for entry in path.iterdir())  # noqa: E731
        if is_taken():  # asked before anything is written there
            raise FileExistsError
        lock.acquire(timeout=1)  # whoever looks whether a run is alive holds it for a moment
        if is_taken():
            raise FileExistsError
        if not config.resume:
            final_step = config.num_updates * config.steps_per_update
            about = {"script": script.stem, "config": dataclasses.asdict(config), "final_step": final_step}
            (path / ".new").write_text(json.dumps(about | provenance(script), indent=2) + "\n")
            os.replace(path / ".new", path / CONFIG_FILE)
    except Timeout:
        raise UsageError(f"run directory {str(path)!r} is in use by another process") from None
    except FileExistsError:
        if not config.run_dir:  # two runs took the same name at the same moment
            return open_run_dir(config)
        raise UsageError(f"run directory {str(path)!r} exists; choose another with --run-dir") from None
    except OSError as error:
        raise UsageError(f"run directory {str(path)!r} cannot be written: {error.strerror}") from None
    return path, lock


def unused_name(config, script: str) -> Path:
    """A path under runs/ that says what the run is."""
    parts = [config.env, script, getattr(config, "cell", ""), f"seed{config.seed}", time.strftime("%Y%m%d-%H%M%S")]
    name = "__".join(re.sub(r"[^\w.-]+", "-", part) for part in parts if part)
    paths = itertools.chain([name], (f"{name}-{twin}" for twin in itertools.count(2)))  # started in the same second
    return next(path for path in (Path("runs") / name for name in paths) if not path.exists())


def load_config(run_dir: str, config_class):
    """The config of a run of the script of `config_class`.

    Raises:
      UsageError: no such run, of another script, or with fields this version does not have.
    """
    path, script = Path(run_dir) / CONFIG_FILE, script_of(config_class).stem
    try:
        saved = json.loads(path.read_text())
        fields = saved["config"]
    except OSError as error:
        raise UsageError(f"no run in {run_dir!r}: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged: it is not the config of a run") from None
    if saved.get("script") != script:
        raise UsageError(f"{run_dir!r} is a run of {saved.get('script')}.py, not of {script}.py")
    valid = {field.name for field in dataclasses.fields(config_class)}
    if fields.keys() != valid:
        different = ", ".join(sorted(fields.keys() ^ valid))
        raise UsageError(f"{run_dir!r} was made by another version of {script}.py: its config differs in {different}")
    try:
        return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    except ValueError as error:
        raise UsageError(f"the config of {run_dir!r} is not valid here: {error}") from None


def check_same(config, saved, may_differ) -> None:
    """Refuse a config that is not the one a run was trained with.

    Raises:
      UsageError: names a field, its value then, and its value now.
    """
    for name, value in vars(config).items():
        if name not in may_differ and value != getattr(saved, name):
            run = config.resume or config.evaluate
            raise UsageError(f"{run!r} was trained with {name} = {getattr(saved, name)!r}, not with {value!r}")


def check_versions(run_dir: Path, here: dict) -> None:
    """Refuse to go on with a run that other code began: it could not go on bit for bit.

    Raises:
      UsageError: names a source file or package that is not the same.
    """
    began = json.loads((run_dir / CONFIG_FILE).read_text())
    for name, digest in here["sources"].items():
        if began.get("sources", {}).get(name) != digest:
            commit = began.get("git", {}).get("commit")
            hint = f"; it was made at commit {commit[:10]}" if commit else ""
            raise UsageError(f"{str(run_dir)!r} was begun with another version of {name}{hint}")
    for name in NUMERICAL_PACKAGES:
        was, now = began.get("packages", {}).get(name), here["packages"].get(name)
        if was != now:
            raise UsageError(
                f"{str(run_dir)!r} was begun with {name} {was}, not {now}: install that, or start a new run"
            )


class Run:
    """One training run: its directory, logger and checkpoints; new, or gone on with where --resume finds it.

        with Run(config, init) as run:
            state = warmup(run.state, env, run.logger)
            while num_steps := run.next_chunk(state):
                state, _ = train(state, env, run.logger, num_steps)
                if run.evaluation_is_due(state):
                    run.save(state, evaluate(state, env, config.eval_episodes))

    Reports and evaluations happen after the same updates whether or not the run was interrupted. SIGTERM and Ctrl-C end
    the loop at the next report and save first; a second Ctrl-C ends it at once.

    Raises:
      UsageError: the directory or a logger cannot be used.
    """

    def __init__(self, config, init):
        import jax

        from checkpoints import Checkpoints
        from loggers import GREEDY, check_keys, make_logger, read_metrics

        check_keys(config)
        has_buffer = hasattr(config, "buffer_size")
        if has_buffer or config.resume:
            like = jax.eval_shape(lambda: init(config, seed_keys(config)))
        if has_buffer:
            check_buffer(config, like.buffer)
        self.config, self.signal, self.episodes, self.handlers = config, None, None, {}
        self.dir, self.lock = open_run_dir(config)
        self.checkpoints = Checkpoints(self.dir, config.keep_checkpoints)
        self.saved_step, notes = None, {"metrics_bytes": 0, "diverged": ()}
        if config.resume and self.checkpoints.steps():
            self.state, self.saved_step, notes = self.checkpoints.restore(like)
        else:
            evaluations = sum(GREEDY in record for record in read_metrics(self.dir / METRICS_FILE))
            if config.resume and evaluations > 1:  # one may have been killed before its checkpoint was written
                raise UsageError(f"the checkpoints of {config.resume!r} are gone, there is nothing to go on from")
            self.state = init(config, seed_keys(config))
        forget_after(self.dir / METRICS_FILE, notes["metrics_bytes"])
        self.logger = make_logger(config, self.dir, notes["diverged"])

    def __enter__(self):
        return self

    def step(self, state) -> int:
        """Environment steps so far, of each seed."""
        return int(state.updates[0]) * self.config.steps_per_update

    @property
    def updates_per_evaluation(self) -> int:
        return max(1, self.config.eval_every // self.config.steps_per_update)

    def next_chunk(self, state) -> int:
        """Steps to train until the next report; 0 when the run is complete, or was told to stop and has saved."""
        self._listen()
        config, done, period = self.config, int(state.updates[0]), self.updates_per_evaluation
        if self.signal and self.saved_step != self.step(state):
            self._checkpoint(state)
        if self.signal:
            return 0
        end = min(config.num_updates, (done // period + 1) * period)
        return min(config.log_every, end - done) * config.steps_per_update

    def evaluation_is_due(self, state) -> bool:
        """After every `eval_every` steps, rounded down to whole updates, and at the end."""
        done = int(state.updates[0])
        return done % self.updates_per_evaluation == 0 or done == self.config.num_updates

    def save(self, state, episodes) -> None:
        """Report an evaluation and write a checkpoint."""
        import numpy as np

        from loggers import GREEDY, summarize_episodes

        self.episodes, report = episodes, summarize_episodes(episodes)
        self.logger.log(report, self.step(state))
        self._checkpoint(state, float(np.mean(np.delete(report[GREEDY], list(self.logger.diverged)))))

    def _checkpoint(self, state, score=float("nan")):
        metrics, step = self.dir / METRICS_FILE, self.step(state)
        size = metrics.stat().st_size if metrics.exists() else 0
        try:
            self.checkpoints.save(state, step, score, metrics_bytes=size, diverged=list(self.logger.diverged.items()))
        except OSError as error:
            free = shutil.disk_usage(self.dir).free / 2**20
            reason = error.strerror or str(error).splitlines()[0]
            where = f"{self.checkpoints.folder} ({free:,.0f} MiB free)"
            way_on = self._way_on("make room and go on from there with --resume")
            raise RunError(
                f"the checkpoint of step {step:,} cannot be written to {where}: {reason}; {way_on}"
            ) from None
        self.saved_step = step

    def _way_on(self, advice="go on from there with --resume"):
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is of step {self.saved_step:,}, {advice} {self.dir}"

    def _listen(self):
        """From the first chunk on (before, there is nothing to save) signals wait for the next report."""
        gc.enable()
        if self.handlers or threading.current_thread() is not threading.main_thread():
            return

        def stop(number, _):
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping at the next report; press Ctrl-C again to stop at once\n")

        self.handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, kind, error, _):
        complete = self.saved_step == self.config.num_updates * self.config.steps_per_update
        if kind is KeyboardInterrupt:
            print(f"interrupted; {self._way_on()}", file=sys.stderr)
        elif kind is None and not complete:
            print(f"stopped; {self._way_on()}", file=sys.stderr)
        try:
            self.logger.close()
            self.checkpoints.close()
        finally:
            self.lock.release()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if kind is Diverged:
            raise RunError(
                f"{error}; {self._way_on('which is the last good one: look at it with --evaluate')}"
            ) from None
        if kind is None and not complete:
            sys.exit(128 + self.signal)
        if kind is None:
            from loggers import describe

            result = describe(self.episodes, self.logger.diverged) if self.episodes else "the run was complete"
            print(f"{result}\nsaved to {self.dir}")


def forget_after(path: Path, size: int) -> None:
    """Cut a file of metrics to what it held when the checkpoint was written: the rest will be written again."""
    if path.exists():
        try:
            os.truncate(path, min(size, path.stat().st_size))
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def show(config, env, init, evaluate) -> None:
    """What --evaluate does: print the greedy return of a trained agent; with --video, write one of its episodes.

    Raises:
      UsageError: no such run, no checkpoint, or the library cannot draw this environment.
    """
    import jax

    from checkpoints import Checkpoints
    from envs import record, write_gif
    from loggers import describe

    check_same(config, load_config(config.evaluate, type(config)), HARMLESS | EVALUATION)
    if config.video:
        check_drawable(env)
    like = jax.eval_shape(lambda: init(config, seed_keys(config)))
    state, step, notes = Checkpoints(config.evaluate).restore(like, config.best)
    diverged = dict(notes["diverged"])
    print(f"checkpoint of step {step:,}: {describe(evaluate(state, env, config.eval_episodes), diverged)}")
    if config.video:
        seed = min(set(range(config.num_seeds)) - set(diverged))
        episode = jax.tree.map(lambda x: x[seed], evaluate(state, env, 1, play=record))
        try:
            write_gif(config.video, env, episode)
        except OSError as error:
            raise UsageError(f"{config.video!r} cannot be written: {error.strerror}") from None
        print(f"video of {int(episode.length)} steps: {config.video}")
