"""The command line of a script: the options that all scripts share, their checks, and `launch`."""

import argparse
import copy
import dataclasses
import gc
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from harness.errors import RunError, UsageError
from harness.output import keep_output_open, lost_output
from harness.run_dir import load_config
from harness.signals import answered, end_at_once

BackendName = Literal["console", "file", "tensorboard", "wandb", "neptune", "dashboard"]
DEFAULT_LOG: tuple[BackendName, ...] = ("console", "file", "tensorboard")
EvalEpisodes = Annotated[int, tyro.conf.arg(aliases=("--episodes",))]


@dataclass(frozen=True)
class Experiment:
    """The options that every script has; a script's own config adds those of its algorithm."""

    # Experiment
    seed: int = 0  # seed of the first run; run i has seed + i
    num_seeds: int = 1  # independent runs, trained side by side in one program
    total_steps: int = 500_000  # environment steps of each seed
    log: tuple[BackendName, ...] = DEFAULT_LOG  # where metrics go, any combination
    log_every: int = 10  # updates between two reports
    wandb_mode: Literal["online", "offline"] = "online"  # offline: only into the run directory
    neptune_mode: Literal["async", "offline"] = "async"  # offline: only into the run directory
    run_dir: str = ""  # directory for this run, must be new; empty: one under runs/
    resume: str = ""  # directory of a run to continue, bit for bit; its config is taken from there
    eval_every: int = 50_000  # environment steps between two evaluations; a checkpoint follows each
    eval_episodes: EvalEpisodes = 100  # episodes of an evaluation, of each policy
    num_eval_envs: int = 100  # parallel environments of an evaluation
    keep_checkpoints: int = 2  # last checkpoints to keep, besides the one with the best evaluation
    evaluate: str = ""  # directory of a run: evaluate its last checkpoint instead of training
    best: bool = False  # with --evaluate: take the checkpoint with the best evaluation
    video: str = ""  # with --evaluate: write an episode of the first seed to this .gif
    compilation_cache: str = "~/.cache/memory-rl"  # folder of compiled programs; empty: keep none

    @property
    def num_updates(self) -> int:
        return self.total_steps // self.steps_per_update

    def progress(self, updates):
        """How much of the run so many updates are, from 0 to 1 (float32).

        All schedules follow it. Steps are not counted here, as int32 holds too few of them.
        """
        import jax.numpy as jnp

        return jnp.clip(jnp.asarray(updates, jnp.float32) / self.num_updates, 0.0, 1.0)


# Config fields whose valid range is not "greater than 0".
AT_LEAST_0 = ("seed", "ent_coef", "vf_coef", "bptt", "learning_starts", "burn_in")
BETWEEN_0_AND_1 = (
    "gamma",
    "gae_lambda",
    "q_lambda",
    "tau",
    "start_e",
    "end_e",
    "exploration_fraction",
    "target_entropy_ratio",
    "priority_exponent",
    "importance_exponent",
)
ANY_SIGN = ("target_entropy",)


def launch(main, config_class):
    """Parse the command line into `config_class` and call `main` with the result.

    The process exits with code 2 and one sentence after a mistake of the user's, with 1 after a run
    that failed, and with 130 after Ctrl-C.
    """
    # Tracing makes many objects and no garbage: collecting it is a sixth of the start. `Run`
    # enables it again.
    gc.disable()
    keep_output_open()
    keep_32_bits()
    try:
        if not issubclass(config_class, Experiment):
            main(tyro.cli(config_class))
            return check_output()
        config = parse(config_class)
        use_compilation_cache(config.compilation_cache)

        from fast import use_fast_random

        use_fast_random()
        with answered(end_at_once):
            main(config)
        if config.evaluate:
            check_output()
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def check_output() -> None:
    """Raise a RunError if what was printed did not arrive; a closed pipe is none."""
    if error := lost_output():
        raise RunError(f"the output cannot be written: {error.strerror}")


def parse(config_class):
    """The config of the command line; with --resume or --evaluate the rest is as in that run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--evaluate", nargs="?")
    given, _ = parser.parse_known_args()
    if given.resume and given.evaluate:
        raise UsageError("--resume and --evaluate exclude each other")
    if not (given.resume or given.evaluate):
        return tyro.cli(config_class)
    saved = load_config(given.resume or given.evaluate, config_class)
    flags = {word.replace("_", "-") for word in sys.argv}
    default = copy.copy(saved)
    options = {}
    for name, value in vars(saved).items():
        if isinstance(value, dict) and f"--{name.replace('_', '-')}" in flags:
            object.__setattr__(default, name, {})  # tyro adds keys only to an empty dict
            options[name] = value
    config = tyro.cli(config_class, default=default)
    merged = {name: value | getattr(config, name) for name, value in options.items()}
    return dataclasses.replace(config, **merged)


def keep_32_bits() -> None:
    """Ignore JAX_ENABLE_X64: with it libraries change the types and results of environments."""
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_enable_x64", False)


def use_compilation_cache(folder: str) -> None:
    """Let jax keep compiled programs in `folder`; JAX_COMPILATION_CACHE_DIR takes precedence."""
    import jax

    if not (folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    if jax.__version_info__ < (0, 10) and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        # jax 0.9 prints pages about every program it loads from the cache, unless the level is set
        # before its import.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        os.execv(sys.executable, sys.orig_argv)
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # Beyond this size the least recently used programs are deleted.
        jax.config.update("jax_compilation_cache_max_size", 2**31)


def check_sizes(config) -> None:
    """Refuse a config with an impossible size, count or rate.

    Raises:
      ValueError: names the field, its value and what is valid.
    """
    check_ranges(config)
    steps_per_update = config.steps_per_update
    if getattr(config, "bptt", 0) and config.num_steps % config.bptt:
        raise ValueError(f"bptt ({config.bptt}) must divide num_steps ({config.num_steps})")
    if hasattr(config, "num_minibatches"):
        # With a memory, a minibatch consists of whole environments.
        unit, size = (
            ("num_envs", config.num_envs)
            if hasattr(config, "cell")
            else ("a batch", steps_per_update)
        )
        if size % config.num_minibatches:
            raise ValueError(
                f"num_minibatches ({config.num_minibatches}) must divide {unit} ({size})"
            )
    if getattr(config, "learning_starts", 0) >= config.total_steps:
        limit = f"must be less than total_steps ({config.total_steps})"
        raise ValueError(f"learning_starts ({config.learning_starts}) {limit}")
    if getattr(config, "buffer_size", steps_per_update) < steps_per_update:
        update = f"the steps of one update ({steps_per_update})"
        raise ValueError(f"buffer_size ({config.buffer_size}) is less than {update}")
    if hasattr(config, "sequence_length"):
        length = config.burn_in + config.sequence_length
        # A sequence consists of whole chunks, the steps of one update each.
        chunks = -(-length // config.num_steps)
        for name, needed in (("learning_starts", chunks - 1), ("buffer_size", chunks)):
            steps = needed * steps_per_update
            if getattr(config, name) < steps:
                reason = f"for sequences of burn_in + sequence_length = {length} steps"
                raise ValueError(
                    f"{name} ({getattr(config, name)}) must be at least {steps}, {reason}"
                )
    if config.seed + config.num_seeds > 2**31:
        raise ValueError(f"seed must be less than 2**31 - num_seeds, got {config.seed}")
    if config.total_steps < steps_per_update:
        update = f"one update ({steps_per_update} steps)"
        raise ValueError(f"total_steps ({config.total_steps}) is less than {update}")
    if config.video:
        check_gif("video", config.video)
    for option in ("video", "best"):
        if getattr(config, option) and not config.evaluate:
            raise ValueError(
                f"{option} needs a trained agent: give the run's directory with evaluate"
            )


def check_ranges(config) -> None:
    """The part of `check_sizes` that looks at one field at a time."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in AT_LEAST_0:
            if value < 0:
                raise ValueError(f"{field.name} must be 0 or more, got {value}")
        elif field.name in BETWEEN_0_AND_1:
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be between 0 and 1, got {value}")
        elif field.name in ANY_SIGN:
            if not math.isfinite(value):
                raise ValueError(f"{field.name} must be finite, got {value}")
        elif type(value) in (int, float) and not value > 0:  # true for nan as well
            raise ValueError(f"{field.name} must be greater than 0, got {value}")


def check_gif(name: str, path: str) -> None:
    """Refuse a path, the value of option `name`, to which no .gif can be written.

    Raises:
      ValueError: names the option, the path and what is valid.
    """
    if not path.endswith(".gif"):
        raise ValueError(f"{name} must be a file name that ends in .gif, got {path!r}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, got {path!r}")
