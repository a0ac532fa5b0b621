"""The command line of a script: the options that all scripts share, their checks, and `launch`."""

import argparse
import contextlib
import dataclasses
import decimal
import gc
import inspect
import math
import os
import re
import sys
import traceback
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from harness.errors import RunError, UsageError, check_types
from harness.output import keep_output_open, lost_output
from harness.run_dir import load_config, read_about, script_of
from harness.signals import answered, end_at_once
from harness.text import clean

BackendName = Literal["console", "file", "tensorboard", "wandb", "neptune", "dashboard"]
DEFAULT_LOG: tuple[BackendName, ...] = ("console", "file", "tensorboard")
EvalEpisodes = Annotated[int, tyro.conf.arg(aliases=("--episodes",))]


@dataclass(frozen=True)
class Experiment:
    """The options that every script has; a script's own config adds those of its algorithm."""

    # Experiment
    seed: int = 0  # seed of the first run; run i has seed + i
    num_seeds: int = 1  # independent runs, trained side by side in one program
    num_devices: int = 0  # that share them, or a seed's environments; 0: all that make it faster
    total_steps: int = 500_000  # environment steps of each seed
    log: tuple[BackendName, ...] = DEFAULT_LOG  # where metrics go, any combination
    log_every: int = 10  # updates between two reports
    wandb_mode: Literal["online", "offline"] = "online"  # offline: only into the run directory
    neptune_mode: Literal["async", "offline"] = "async"  # offline: only into the run directory
    run_dir: str = ""  # directory for this run, must be new; empty: one under runs/
    resume: str = ""  # directory of a run to continue, bit for bit, or with more --total-steps
    init_from: str = ""  # directory of a run: begin with its parameters and normalisation
    eval_every: int = 50_000  # environment steps between two evaluations; a checkpoint follows each
    eval_episodes: EvalEpisodes = 100  # episodes of an evaluation, of each policy
    num_eval_envs: int = 100  # parallel environments of an evaluation
    eval_video: bool = False  # film a greedy episode of every evaluation, into the run's videos/
    keep_checkpoints: int = 2  # last checkpoints to keep, besides the one with the best evaluation
    evaluate: str = ""  # directory of a run that plays fresh episodes; --sample draws its actions
    best: bool = False  # with --evaluate, --init-from: take the checkpoint of the best evaluation
    video: str = ""  # with --evaluate: write an episode of the first seed to this .gif
    export: tuple[str, ...] = ()  # with --evaluate: write its greedy agent to .onnx, .jaxexport
    coordinator: str = ""  # host:port of the first of several processes, or auto: on a cluster
    num_processes: int = 1  # that share the devices of a run, each started with this command
    process_id: int = 0  # which of them this is
    compilation_cache: str = "~/.cache/memory-rl"  # folder of compiled programs; empty: keep none

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps  # fields that every script's own config has

    @property
    def num_updates(self) -> int:
        return self.total_steps // self.steps_per_update

    def progress(self, updates):
        """How much of the run so many updates are, from 0 to 1 (float32).

        All schedules follow it. Steps are not counted here, as int32 holds too few of them.
        """
        import jax.numpy as jnp

        return jnp.clip(jnp.asarray(updates, jnp.float32) / self.num_updates, 0.0, 1.0)


# Options that --help shows first.
COMMON = (
    "env",
    "env_kwargs",
    "mask",
    "cell",
    "cell_kwargs",
    "seed",
    "num_seeds",
    "total_steps",
    "num_envs",
    "learning_rate",
    "log",
    "run_dir",
    "evaluate",
    "resume",
)
# Config fields whose valid range is not "greater than 0".
AT_LEAST_0 = (
    "seed",
    "num_devices",
    "process_id",
    "ent_coef",
    "vf_coef",
    "bptt",
    "learning_starts",
    "burn_in",
)
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
# Whole numbers that no compiled program counts in int32, or whose limit has a sentence of its own.
MAY_BE_LARGE = (
    "seed",
    "total_steps",
    "log_every",
    "eval_every",
    "keep_checkpoints",
    "buffer_size",
    "learning_starts",
    "num_layers",
    "n_step",
)
EXPORTED = (".onnx", ".jaxexport")  # the kinds of files that --export writes
MAX_LAYERS = 1000  # every layer is traced on its own
MAX_DIGITS = 100  # of a whole number; 1e999999999 would fill the memory


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
            main(tyro.cli(config_class, registry=registry))
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
        print(f"error: {clean(error)}", file=sys.stderr)
        leave(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        # Of jax: a `check_memory` that counted too little.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
            leave(1)
        if not is_one_of_several():
            raise
        traceback.print_exc()
        leave(1)


def is_one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def leave(code: int) -> None:
    """End the process; at its usual end jax would wait for processes that wait for this one."""
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_output() -> None:
    """Raise a RunError if what was printed did not arrive; a closed pipe is none."""
    if error := lost_output():
        raise RunError(f"the output cannot be written: {error.strerror}")


# -------------------------------------------------------------------------------------------------
# The command line


def parse(config_class):
    """The config of the command line; with --resume or --evaluate the rest is as in that run.

    Raises:
      UsageError: an option or a combination of options is not valid.
    """
    words = without_short_forms(sys.argv[1:], config_class)
    check_memory_options(words, config_class)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--evaluate", nargs="?")
    parser.add_argument("--init-from", nargs="?")
    parser.add_argument("--env", nargs="?")
    fields = ("num_seeds", "num_devices", "coordinator", "num_processes", "process_id")
    for field in fields:
        parser.add_argument(f"--{field.replace('_', '-')}", nargs="?")
    # tyro takes --num_seeds for --num-seeds.
    spelled = {f"--{field}": f"--{field.replace('_', '-')}" for field in fields}
    given, _ = parser.parse_known_args([spelled.get(word, word) for word in words])
    for option in ("resume", "evaluate", "init_from"):
        if getattr(given, option) == "":  # an unset variable of the shell, perhaps
            raise UsageError(f"{option} needs the directory of a run, got ''")
    if given.resume and given.evaluate:
        raise UsageError("--resume and --evaluate exclude each other")
    if not {"-h", "--help"} & set(words):
        prepare_devices(given)
    saved = {}
    if given.resume or given.evaluate:
        run = given.resume or given.evaluate
        saved = vars(load_config(run, config_class, given.env)).copy()
    if given.evaluate:
        saved["best"] = False  # it was about --init-from
    flags = {word.partition("=")[0].replace("_", "-") for word in words}
    added = [name for name, value in saved.items() if isinstance(value, dict)]
    added = [name for name in added if f"--{name.replace('_', '-')}" in flags]
    # tyro adds keys only to an empty dict.
    values = read_words(words, config_class, saved | dict.fromkeys(added, {}))
    values |= {name: saved[name] | values[name] for name in added}
    if "--log" in flags and not values["log"]:
        valid = ", ".join(typing.get_args(BackendName))
        raise UsageError(f"log needs at least one of {valid}; nothing else records a run")
    check_device()
    try:
        check_types(config_class, values)
        return config_class(**values)
    except ValueError as error:
        raise UsageError(str(error)) from None


def without_short_forms(words: list[str], config_class) -> list[str]:
    """The words of a command line, with --sample written as --eval-policy sample.

    Raises:
      UsageError: the script has no policy that draws its actions.
    """
    if "--sample" not in words:
        return words
    if not any(field.name == "eval_policy" for field in dataclasses.fields(config_class)):
        script = script_of(config_class).name
        reason = "its policy takes the action of the highest value"
        raise UsageError(f"{script} has no stochastic policy to sample from: {reason}")
    i = words.index("--sample")
    return [*words[:i], "--eval-policy", "sample", *words[i + 1 :]]


def check_memory_options(words: list[str], config_class) -> None:
    """Name the script with memory to those who ask for one where there is none.

    Raises:
      UsageError: --cell is among the words and not among the options.
    """
    names = {field.name for field in dataclasses.fields(config_class)}
    if "cell" not in names and any(word.partition("=")[0] == "--cell" for word in words):
        script = script_of(config_class).name
        sibling = "drqn.py" if script == "dqn.py" else f"r{script}"
        raise UsageError(f"{script} has no memory, so no --cell: {sibling} has")


def read_words(words: list[str], config_class, defaults: dict) -> dict:
    """The values of all fields of a config: those that the words give, or their defaults.

    tyro shows an option in the group of the dataclass that has it. So it is given one dataclass for
    each heading of the config, with the fields under it, and one for the options needed most often.
    """
    hints = typing.get_type_hints(config_class, include_extras=True)
    explanations = explain_fields(config_class)
    groups = {"Common": {}}
    by_name = {field.name: field for field in dataclasses.fields(config_class)}
    own = [name for name in explanations if name in by_name]
    for name in [*(name for name in COMMON if name in by_name), *own, *by_name]:
        heading, comment = explanations.get(name, ("Other", None))
        heading = "Common" if name in COMMON else heading
        default = by_name[name].default
        if default is dataclasses.MISSING:
            default = by_name[name].default_factory()
        field = dataclasses.field(
            default_factory=partial(defaults.get, name, default),
            metadata={"help": comment},
        )
        groups.setdefault(heading, {})[name] = (name, hints[name], field)
    members = []
    for i, (heading, fields) in enumerate(groups.items()):
        group = dataclasses.make_dataclass(f"Group{i}", fields.values())
        hint = Annotated[group, tyro.conf.arg(name=heading, help="")]
        members.append((f"group{i}", hint, dataclasses.field(default_factory=group)))
    parsed = tyro.cli(
        dataclasses.make_dataclass("Options", members),
        args=words,
        description=config_class.__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}


def explain_fields(config_class) -> dict[str, tuple[str, str]]:
    """Field -> the heading above it and the comment beside it, as they stand in the source.

    The fields of the class come before those that it inherits. One that it has anew, above its own
    headings, stays under the heading that it was inherited from.
    """
    comments = {}
    explanations = {}
    for owner in config_class.__mro__[:-1]:
        heading = ""
        for line in inspect.getsource(owner).splitlines():
            if match := re.fullmatch(r"    # (.+)", line):
                heading = match[1]
            elif match := re.fullmatch(r"    (\w+): .*  # (.+)", line):
                name, comment = match.groups()
                comments.setdefault(name, comment)
                if heading:
                    explanations.setdefault(name, (heading, comments[name]))
    return explanations | {
        name: ("Other", comment) for name, comment in comments.items() if name not in explanations
    }


def whole_number(text: str) -> int:
    """What a word of the command line says, such as 1e5 or 1_000_000.

    Raises:
      ValueError: it is not a whole number, or has too many digits.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    # Not by way of float, which has too few digits: 1e23 would be another number.
    with contextlib.suppress(decimal.InvalidOperation):
        number = decimal.Decimal(text)
        has_exponent = "e" in text.lower()  # 5.0 is meant to be a number, 1.5e6 a whole one
        if has_exponent and number.is_finite() and number.adjusted() > MAX_DIGITS:
            raise ValueError(f"{text!r} is too large")
        if has_exponent and number.is_finite() and number == number.to_integral_value():
            return int(number)
    raise ValueError(f"{text!r} is not a whole number")


registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def read_whole_numbers(info):
    """Let tyro accept 1e5 and 1_000_000 as whole numbers."""
    if info.type is not int:
        return None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    )


@registry.primitive_rule
def leave_choices_to_check_types(info):
    """Let tyro accept any word as a choice: `check_types` names the closest valid one."""
    if info.type_origin is not Literal:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(typing.get_args(info.type)) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def prepare_devices(given) -> None:
    """Make the devices that the run asks for, and find its other processes, before jax is used.

    Raises:
      UsageError: the other processes cannot be reached.
    """
    from harness.processes import DEVICES_PER_CORE, join, make_cpu_devices, num_cores

    def number(text):
        with contextlib.suppress(ValueError):  # `read_words` says what is wrong with it
            value = whole_number(text or "")
            return value if 0 <= value < 2**31 else None

    devices, seeds = given.num_devices, given.num_seeds
    if given.resume:
        saved = read_about(given.resume)["config"]
        most = DEVICES_PER_CORE * num_cores()  # the file may be a stranger's
        devices = devices or str(min(number(str(saved.get("num_devices"))) or 0, most))
        seeds = str(saved.get("num_seeds"))
    processes = number(given.num_processes) or 1
    make_cpu_devices((number(devices) or 0) // processes, number(seeds) or 1)
    coordinator = given.coordinator
    if coordinator and given.evaluate:
        raise UsageError("coordinator is for training: --evaluate runs in one process")
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not given.evaluate:
        coordinator = coordinator or "auto"
    if not coordinator and (given.num_processes or given.process_id):
        raise UsageError("num_processes and process_id need --coordinator")
    if coordinator:
        join(coordinator, number(given.num_processes), number(given.process_id))


def check_device() -> None:
    """Refuse to go on without the device that JAX_PLATFORMS asks for.

    Raises:
      UsageError: jax cannot use it.
    """
    import jax

    try:
        jax.devices()
    except Exception as error:  # of many kinds, by what is missing
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason, *_ = str(error).strip().splitlines() or ["jax finds no such device here"]
        raise UsageError(f"JAX_PLATFORMS={wanted} cannot be used: {reason}") from None


# -------------------------------------------------------------------------------------------------
# The process


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
        try:
            path = Path(folder).expanduser()
        except RuntimeError as error:  # there is no such user, or none at all
            if folder != Experiment.compilation_cache:
                raise UsageError(f"compilation_cache {folder!r}: {error}") from None
            return
        jax.config.update("jax_compilation_cache_dir", str(path))
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
    if hasattr(config, "buffer_size") and config.batch_size > config.buffer_size:
        size = f"the {config.buffer_size} of buffer_size"
        raise ValueError(f"batch_size ({config.batch_size}) must be at most {size}")
    if hasattr(config, "sequence_length"):
        length = config.burn_in + config.sequence_length
        if getattr(config, "n_step", 1) > length:
            limit = f"must be at most burn_in + sequence_length ({length})"
            raise ValueError(f"n_step ({config.n_step}) {limit}")
        # A sequence consists of whole chunks, the steps of one update each.
        chunks = -(-length // config.num_steps)
        for name, needed in (("learning_starts", chunks - 1), ("buffer_size", chunks)):
            steps = needed * steps_per_update
            if getattr(config, name) < steps:
                reason = f"for sequences of burn_in + sequence_length = {length} steps"
                raise ValueError(
                    f"{name} ({getattr(config, name)}) must be at least {steps}, {reason}"
                )
    elif hasattr(config, "n_step"):
        # The first minibatch is drawn after `learning_starts` and one update more.
        first = (config.learning_starts // steps_per_update + 1) * config.num_steps
        kept = config.buffer_size // config.num_envs
        if config.n_step > min(first, kept):
            name = "learning_starts" if first < kept else "buffer_size"
            there = f"the buffer then holds {min(first, kept)} steps of each environment"
            raise ValueError(f"n_step ({config.n_step}) is too long: {there}; raise {name}")
    if config.seed + config.num_seeds > 2**31:
        raise ValueError(f"seed must be less than 2**31 - num_seeds, got {config.seed}")
    if config.total_steps < steps_per_update:
        update = f"one update ({steps_per_update} steps)"
        raise ValueError(f"total_steps ({config.total_steps}) is less than {update}")
    check_counters(config)
    if config.video:
        check_gif("video", config.video)
    for path in config.export:
        check_file("export", path, EXPORTED)
    trained = "needs a trained agent: give the run's directory with evaluate"
    if config.video and not config.evaluate:
        raise ValueError(f"video {trained}")
    if config.export and not config.evaluate:
        raise ValueError(f"export {trained}")
    if config.best and not (config.evaluate or config.init_from):
        raise ValueError(f"best {trained} or init_from")


def check_counters(config) -> None:
    """The part of `check_sizes` about numbers that a run counts in int32."""
    per_update = getattr(config, "gradient_steps", 0)
    per_update = per_update or config.update_epochs * config.num_minibatches
    for counted, number in (
        ("updates", config.num_updates),
        ("gradient steps", config.num_updates * per_update),
    ):
        if number >= 2**31:
            limit = f"{number:,} {counted}, a run can count to {2**31 - 1:,}"
            raise ValueError(f"total_steps ({config.total_steps}) makes {limit}")
    if getattr(config, "num_layers", 1) > MAX_LAYERS:
        raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {config.num_layers}")


def check_ranges(config) -> None:
    """The part of `check_sizes` that looks at one field at a time."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{field.name} must be finite, got {value}")
        if type(value) is int and value >= 2**31 and field.name not in MAY_BE_LARGE:
            raise ValueError(f"{field.name} must be less than 2**31, got {value}")
        if field.name in AT_LEAST_0:
            if value < 0:
                raise ValueError(f"{field.name} must be 0 or more, got {value}")
        elif field.name in BETWEEN_0_AND_1:
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be between 0 and 1, got {value}")
        elif field.name not in ANY_SIGN and type(value) in (int, float) and value <= 0:
            raise ValueError(f"{field.name} must be greater than 0, got {value}")


def check_gif(name: str, path: str) -> None:
    """`check_file` for a .gif."""
    check_file(name, path, (".gif",))


def check_file(name: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Refuse a path, a value of option `name`, to which no file of this kind can be written.

    Raises:
      ValueError: names the option, the path and what is valid.
    """
    if Path(path).suffix not in suffixes:
        kinds = " or ".join(suffixes)
        raise ValueError(f"{name} must be a file name that ends in {kinds}, got {path!r}")
    if not is_folder(Path(path).parent):
        raise ValueError(f"{name} must be in a folder that exists, got {path!r}")
    if is_folder(path):
        raise ValueError(f"{name} must be a file, and {path!r} is a folder")


def is_folder(path) -> bool:
    """Whether this is a folder; no path that the file system refuses is one."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False
