"""Which runs are the same experiment: decided here, for plots, dashboards and reports.

Two runs are the same experiment if one script made them with the same config, apart from the
fields in `PLUMBING`. Their seeds may then be counted together, each seed once. `total_steps` is no
plumbing, since schedules end there; a run that was extended to them is another experiment. The
version of the code is not part of an experiment, but whoever counts runs of several versions
together says so (`versions_differ_in`).
"""

# Fields that do not change what a seed learns. `best` is none of them, as it chooses what
# --init-from takes. A field that is not known here is part of the experiment: runs are rather shown
# apart than mixed.
PLUMBING = frozenset(
    {
        "seed",
        "num_seeds",
        "num_devices",
        "coordinator",
        "num_processes",
        "process_id",
        "log",
        "log_every",
        "wandb_mode",
        "neptune_mode",
        "run_dir",
        "resume",
        "evaluate",
        "video",
        "export",
        "eval_every",
        "eval_episodes",
        "eval_policy",
        "num_eval_envs",
        "eval_video",
        "keep_checkpoints",
        "compilation_cache",
    }
)
MISSING = object()  # the value of a field that a config of another version does not have


def experiment(script: str, config: dict):
    """What is equal for two runs of the same experiment, and can be the key of a dict."""
    return script, frozen({name: value for name, value in config.items() if name not in PLUMBING})


def seeds_of(config: dict) -> range:
    """The seeds of a run."""
    return range(config["seed"], config["seed"] + config["num_seeds"])


def differing_fields(configs: list[dict]) -> list[str]:
    """The fields of the experiment that do not have the same value in all configs."""
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: {frozen(config.get(name, MISSING)) for config in configs} for name in names}
    return [name for name in names if name not in PLUMBING and len(values[name]) > 1]


def versions_differ_in(sources: list[dict]) -> list[str]:
    """The source files that are not the same in all runs, from `sources` of their config.json."""
    names = sorted({name for files in sources for name in files})
    return [name for name in names if len({files.get(name) for files in sources}) > 1]


def frozen(value):
    """The value with dicts and lists made hashable. The order of a dict does not count."""
    if isinstance(value, dict):
        return frozenset((name, frozen(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return tuple(frozen(entry) for entry in value)
    return value
