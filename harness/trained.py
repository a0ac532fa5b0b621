"""What is taken from a run that has been trained: a checkpoint, or the beginning of another run."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from harness.checkpoints import Checkpoints, named_leaves
from harness.errors import UsageError
from harness.metrics import GREEDY, METRICS_FILE, SAMPLED, read_metrics
from harness.run_dir import load_config


def check_not_lost(run_dir, purpose: str) -> None:
    """Refuse a run without checkpoints whose record says that it has written some.

    Raises:
      UsageError: they are gone.
    """
    past = read_metrics(Path(run_dir) / METRICS_FILE)
    evaluations = sum(GREEDY in record or SAMPLED in record for record in past)
    # A process may be killed after its first evaluation and before its first checkpoint.
    if evaluations > 1:
        lost = f"the checkpoints of {str(run_dir)!r} are gone"
        raise UsageError(f"{lost}, there is nothing to {purpose}")


def restore(run_dir: str, like, best: bool, purpose: str):
    """A checkpoint of a run, as `Checkpoints.restore` returns it.

    Raises:
      UsageError: there is none, or it does not fit `like`.
    """
    checkpoints = Checkpoints(run_dir)
    if not checkpoints.steps():
        check_not_lost(run_dir, purpose)
    return checkpoints.restore(like, best)


def first_difference(ours, theirs) -> str:
    """Where two pytrees first differ in names or shapes of their leaves, or ""."""
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            return f"{name} was not there in training"
        if name not in ours:
            return f"{name} was there in training"
        if ours[name].shape != theirs[name].shape:
            return f"{name} has the shape {ours[name].shape}, in training {theirs[name].shape}"
    return ""


def parameters(state) -> dict:
    """What learning has made of a state: its parameters, by the names of their fields."""
    names = ("params", "target_params")
    return {name: getattr(state, name) for name in names if hasattr(state, name)}


def load_trained(config, shapes, like):
    """The state of the run that --init-from names, once it is sure to fit the state `like`.

    Raises:
      UsageError: it does not fit: other shapes, another number of seeds, or no statistics for
        observations that it was trained to read normalised.
    """
    run = config.init_from
    source = load_config(run, type(config), config.env)
    theirs = shapes(source)
    if source.num_seeds not in (1, config.num_seeds):
        seeds = f"has {source.num_seeds} seeds, this run {config.num_seeds}"
        raise UsageError(f"init_from {run!r} does not fit: it {seeds}; give it as many, or one")
    one_seed = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    ours = one_seed(parameters(like))
    if difference := first_difference(ours, one_seed(parameters(theirs))):
        raise UsageError(f"init_from {run!r} does not fit: {difference}")
    if bool(observation_moments(theirs)) != bool(observation_moments(like)):
        had = bool(observation_moments(theirs))
        needed = f"its observations were {'' if had else 'not '}normalised"
        raise UsageError(f"init_from {run!r} does not fit: {needed}; set normalize_obs to {had}")
    # With equal shapes, yet another function.
    for name in ("cell", "cell_kwargs", "rescale", "critic_obs"):
        was, now = getattr(source, name, None), getattr(config, name, None)
        if was != now:
            raise UsageError(f"init_from {run!r} does not fit: {name} was {was!r}, not {now!r}")
    state, _, notes = restore(run, theirs, config.best, "begin with")
    if notes["diverged"]:
        seeds = ", ".join(f"seed_{seed}" for seed, _ in notes["diverged"])
        raise UsageError(f"init_from {run!r} cannot be used: {seeds} diverged")
    return state


def observation_moments(state):
    """The statistics that an environment normalises observations with, or None."""
    return getattr(state.env_state.statistics, "obs", None)


def shapes_of(statistics):
    """The shapes of statistics, without the axes of seeds and environments, and their structure."""
    leaves, structure = jax.tree.flatten(statistics)
    return [leaf.shape[2:] for leaf in leaves], structure


def begin_with(trained, state):
    """A fresh state with the parameters and the normalisation statistics of a trained one.

    Its optimizer, environments, schedules and keys are those of a new run, and so is alpha if it is
    not tuned. In PPO and PQN each environment's first observation was scaled without the trained
    statistics.
    """

    def spread(old, new):
        return jnp.broadcast_to(old, new.shape).astype(new.dtype)

    def spread_moments(old, new):
        return spread(old.mean(axis=1, keepdims=True), new)  # the environments share them

    changes = jax.tree.map(spread, parameters(trained), parameters(state))
    if not getattr(state.config, "autotune", True):  # alpha is an option of the new run
        for name, tree in parameters(state).items():
            changes[name]["params"]["log_alpha"] = tree["params"]["log_alpha"]
    statistics = state.env_state.statistics
    for name in ("obs", "returns", "full"):
        old = getattr(trained.env_state.statistics, name, None)
        new = getattr(statistics, name, None)
        if old is None or new is None:
            continue
        if shapes_of(old) == shapes_of(new):
            statistics = statistics._replace(**{name: jax.tree.map(spread_moments, old, new)})
    env_state = state.env_state._replace(statistics=statistics)
    return state.replace(env_state=env_state, **changes)
