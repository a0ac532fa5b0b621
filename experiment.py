"""What a run is besides its algorithm: command line, checks, seeds, run directory, saved model.

A run directory holds
  config.json    the script's name and every field of its config
  metrics.jsonl  one JSON object per report (loggers.py)
  events.*       the same for TensorBoard
  model/         the final training state (orbax)
"""

import dataclasses
import difflib
import itertools
import json
import re
import sys
import time
from pathlib import Path

Options = dict[str, int | float | bool | str]  # on the command line: name value name value ...

CONFIG_FILE = "config.json"
MODEL_DIR = "model"

# config fields with other bounds than "greater than 0"
AT_LEAST_0 = ("seed", "ent_coef", "vf_coef", "bptt")
UP_TO_1 = ("gamma", "gae_lambda")


class UsageError(ValueError):
    """Something the user asked for cannot be done; its message is the whole story."""


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

    Errors of the user's end the process with exit code 2 and one sentence; Ctrl-C with 130 and no traceback.
    """
    import tyro

    try:
        main(tyro.cli(config_class))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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
        elif type(value) in (int, float) and value <= 0:
            raise ValueError(f"{field.name} must be greater than 0, got {value}")
    if getattr(config, "bptt", 0) and config.num_steps % config.bptt:
        raise ValueError(f"bptt ({config.bptt}) must divide num_steps ({config.num_steps})")
    if config.seed + config.num_seeds > 2**31:
        raise ValueError(f"seed must be less than 2**31 - num_seeds, got {config.seed}")
    if config.total_steps < config.batch_size:
        raise ValueError(f"total_steps ({config.total_steps}) is less than one update ({config.batch_size} steps)")


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


def create_run_dir(config, script: str) -> Path:
    """Make the directory of a new run and write its config there.

    Args:
      config: the script's config; `config.run_dir` names the directory, "" makes a name under runs/.
      script: the script's `__file__`.

    Raises:
      UsageError: the directory exists or cannot be written.
    """
    script = Path(script).stem
    parts = [config.env, script, getattr(config, "cell", ""), f"seed{config.seed}", time.strftime("%Y%m%d-%H%M%S")]
    name = "__".join(re.sub(r"[^\w.-]+", "-", part) for part in parts if part)
    path = Path(config.run_dir or Path("runs") / name)
    twins = itertools.count(2)  # runs started within the same second
    while not config.run_dir and path.exists():
        path = path.with_name(f"{name}-{next(twins)}")
    try:
        path.mkdir(parents=True)
        text = json.dumps({"script": script, "config": dataclasses.asdict(config)}, indent=2)
        (path / CONFIG_FILE).write_text(text + "\n")
    except FileExistsError:
        raise UsageError(f"run directory {str(path)!r} exists; choose another with --run-dir") from None
    except OSError as error:
        raise UsageError(f"run directory {str(path)!r} cannot be written: {error.strerror}") from None
    return path


def load_config(run_dir: str, config_class, script: str):
    """The config of a finished run of `script`.

    Raises:
      UsageError: no such run, of another script, or with fields this version does not have.
    """
    path, script = Path(run_dir) / CONFIG_FILE, Path(script).stem
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


def load_run(run_dir: str, config_class, init, script: str):
    """The config and the final state of a finished run of `script`; `init` is the script's, (config, keys) -> state.

    Raises:
      UsageError: as `load_config` and `load_model`.
    """
    import jax

    config = load_config(run_dir, config_class, script)
    return config, load_model(run_dir, jax.eval_shape(lambda: init(config, seed_keys(config))))


def save_model(run_dir, state):
    """Write a pytree of arrays (typed keys included) to `run_dir`."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(run_dir).absolute() / MODEL_DIR, jax.tree.leaves(state))


def load_model(run_dir, state):
    """What `save_model` wrote to `run_dir`; `state` gives the structure, shapes and dtypes (`jax.eval_shape` will do).

    Raises:
      UsageError: there is no model, or it does not fit the structure.
    """
    import jax
    import orbax.checkpoint as ocp

    path = Path(run_dir).absolute() / MODEL_DIR
    if not path.is_dir():
        raise UsageError(f"no model in {str(run_dir)!r}: the run has not finished")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was saved
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for leaf in jax.tree.leaves(state)]
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            leaves = checkpointer.restore(path, shapes)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"the model in {str(run_dir)!r} is damaged or of another version: {reason}") from None
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
