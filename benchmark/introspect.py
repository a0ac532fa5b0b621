"""What a trained agent remembers: which past observations decide its actions, what its carry holds.

    python benchmark/introspect.py runs/RUN
    python benchmark/introspect.py runs/RUN --episodes 64 --steps 500 --seed 7 --out pictures

RUN is a run of a script with memory; the memory can be any. The agent of every seed plays greedily,
and introspect.png and introspect.json are written to the run's directory, or to --out.

The gradient. For each step t and each step t' <= t of an episode: the norm of the derivative of
what decides the action at t with respect to the observation at t', as the network reads it. What
decides is

    rppo, rsacd             log pi(a|s) of the action taken
    drqn, rpqn              Q(s, a) of the action taken
    rppo_continuous, rsac   the mean of the normal distribution, in rsac before it is squashed; the
                            log-density has no derivative where it is greatest, at the greedy action

Previous actions and rewards, which the memory reads as well, stay as they were. A derivative says
what a small change of an observation would do, also where the task never changes it. A row of the
matrix is divided by its sum: its entries are shares of step t. The heat map shows an episode, the
curve the mean share at every distance t - t', its median and the range from the 10th to the 90th
percentile over the episodes of all seeds.

The probe. A ridge regression reads from the carry, right after it has taken in the observation,
what the agent cannot see: the entries that --mask hides, and in MemoryChain the bit that the first
observation showed. Beside it stands the same readout of the observation alone. It is trained on
half of the episodes and its penalty chosen on a quarter; R^2 and accuracies are those of the last
quarter. Steps after the first one of an episode count.
"""

import argparse
import dataclasses
import importlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.task import parts_of
from env_adapters.wrappers import Wrapped
from envs import only_valid, without_mask
from experiment import seed_keys, shapes
from harness.errors import RunError, UsageError, import_optional
from harness.metrics import as_json
from harness.options import keep_32_bits
from harness.run_dir import load_config, read_about, write_json
from harness.text import clean
from harness.trained import restore

DIFFERENTIATED = 8  # episodes of a seed whose gradients are taken
MOST_BYTES = 2**28  # of carries that are kept for the probe
MOST_SAMPLES = 2000  # that a readout is trained on
PENALTIES = 10.0 ** np.arange(-4, 5)
SEED = 2**31 - 3  # the stream of these episodes, which training and --evaluate do not use

# --- What decides an action ----------------------------------------------------------------------


def chosen(values, action):
    """The values (..., num_actions) of the actions (...)."""
    return jnp.take_along_axis(values, action[..., None], axis=-1)[..., 0]


def q_value(network, carry, inputs, starts, action):
    _, q_values = network(carry, inputs, starts)
    return chosen(q_values, action)[..., None]


# Of actors and critics the actor's part alone, as in their `act`, which takes one step.


def ppo_features(network, carry, inputs, starts):
    _, features = network.torsos[0](carry[0], inputs, starts)
    return features


def sac_features(network, carry, inputs, starts):
    torso = network.critic_torso if network.config.shared_torso else network.actor_torso
    _, features = torso(carry[0], inputs, starts, burn_in=0)
    return features


def log_prob(network, logits, action):
    """Of the whole action, which may have several parts."""
    space = network.action_space
    return space.sum_parts(chosen(nn.log_softmax(logits), action))[..., None]


def ppo_log_prob(network, carry, inputs, starts, action):
    outputs = network.actor_head(ppo_features(network, carry, inputs, starts))
    logits = only_valid(network.action_space.logits(outputs), inputs.obs)
    return log_prob(network, logits, action)


def ppo_mean(network, carry, inputs, starts, action):
    return network.actor_head(ppo_features(network, carry, inputs, starts))


def sac_log_prob(network, carry, inputs, starts, action):
    logits = network.policy(sac_features(network, carry, inputs, starts), inputs.obs)
    return log_prob(network, logits, action)


def sac_mean(network, carry, inputs, starts, action):
    mean, _ = network.policy(sac_features(network, carry, inputs, starts))
    return mean


# script -> what is differentiated, in words and as a function of whole sequences: (network,
# carry, Inputs (T, N, ...), starts (T, N), action (T, N, ...)) -> (T, N, K)
DECIDES = {
    "rppo": ("log pi(a|s)", ppo_log_prob),
    "rppo_continuous": ("mean action", ppo_mean),
    "drqn": ("Q(s, a)", q_value),
    "rpqn": ("Q(s, a)", q_value),
    "rsac": ("mean action before squashing", sac_mean),
    "rsacd": ("log pi(a|s)", sac_log_prob),
}


# --- Episodes ------------------------------------------------------------------------------------


class Record(NamedTuple):
    """Steps of an agent, (T, N, ...); with a leading axis of seeds where several are recorded."""

    obs: Any  # as the network reads it
    start: jax.Array
    previous: jax.Array  # the action before
    reward: jax.Array  # the reward before
    action: jax.Array
    done: jax.Array
    hidden: dict[str, jax.Array]  # what the agent cannot see: (T, N)
    carry: Any  # after obs[t], at every stride-th step, the last one of a stride


def record(env, policy, initialize, key, num_envs, episodes, *, steps, stride, full_env, entries):
    """Play `steps` steps in `episodes` environments; takes the place of `envs.play`.

    Args:
      steps: a multiple of `stride`.
      full_env: the environment without its mask, or None. It makes the same steps.
      entries: {name: (part, index)} of the observation of `full_env` that are hidden.
    """
    key, reset_key = jax.random.split(key)
    reset_keys = jax.random.split(reset_key, episodes)
    space = env.action_space

    def step(loop, _):
        key, memory, obs, start, previous, reward, env_state, full = loop
        key, policy_key, step_key = jax.random.split(key, 3)
        memory, action = policy(memory, obs, start, previous, reward, policy_key)
        action = action.astype(space.dtype)
        hidden = {}
        if full_env:
            parts = parts_of(without_mask(full[0]))
            hidden = {name: parts[part][:, index] for name, (part, index) in entries.items()}
        hidden |= context_of(env_state.task)
        keys = jax.random.split(step_key, episodes)
        next_obs, env_state, next_reward, *_, info = jax.vmap(env.step)(keys, env_state, action)
        if full_env:
            full = jax.vmap(full_env.step)(keys, full[1], action)[:2]
        done = info["episode_done"]
        row = Record(obs, start, previous, reward, action, done, hidden, ())
        return (key, memory, next_obs, done, action, next_reward, env_state, full), row

    def several_steps(loop, _):
        loop, rows = jax.lax.scan(step, loop, length=stride)
        return loop, (rows, loop[1])

    obs, env_state = jax.vmap(env.reset)(reset_keys)
    full = jax.vmap(full_env.reset)(reset_keys) if full_env else ()
    first = (
        key,
        initialize(episodes),
        obs,
        jnp.ones(episodes, bool),
        jnp.zeros((episodes, *space.shape), space.dtype),
        jnp.zeros(episodes, jnp.float32),
        env_state,
        full,
    )
    _, (rows, carry) = jax.lax.scan(several_steps, first, length=steps // stride)
    rows = jax.tree.map(lambda x: x.reshape(steps, *x.shape[2:]), rows)
    return rows._replace(carry=carry)


def context_of(task_state) -> dict:
    """The bit that MemoryChain asks for, as -1 and 1; {} in other tasks."""
    while isinstance(task_state, Wrapped):
        task_state = task_state.inner
    if not (hasattr(task_state, "context") and hasattr(task_state, "query")):
        return {}
    bit = jnp.take_along_axis(task_state.context, task_state.query[:, None], axis=1)[:, 0]
    return {"first bit": 2.0 * bit - 1.0}


def hidden_entries(config):
    """The environment without the mask of a config, and what the mask hides.

    Returns:
      The environment, or None if nothing is to be compared with it; and {name: (part, index)} of
      its observations' vectors, see `parts_of`. Images that are hidden are left out.
    """
    stacked = config.env_kwargs.get("frame_stack", 1) != 1
    if not config.mask or stacked:  # a stacked observation has no one place for an entry
        return None, {}
    seen = {"critic_obs": "same"} if hasattr(config, "critic_obs") else {}  # full needs a mask
    full_env = dataclasses.replace(config, mask=(), **seen).make_env().raw
    parts = parts_of(full_env.observation_space)
    entries = {}
    for name in map(str, config.mask):
        owner, _, index = name.rpartition(".")
        if "" in parts:  # one vector
            places = [("", i) for i in full_env._task.masks.get(name) or (int(name),)]
        elif inside := [part for part in parts if f"{part}.".startswith(f"{name}.")]:
            vectors = [part for part in inside if len(parts[part].shape) == 1]
            places = [(part, i) for part in vectors for i in range(*parts[part].shape)]
        else:
            places = [(owner, int(index))]
        for part, i in places:
            place = f"{part[len(name) :]} {i}"  # what the name does not say
            entries[name if len(places) == 1 else name + place] = (part, i)
    return full_env, entries


class Agent(NamedTuple):
    """What a run has learned, loaded to be looked at."""

    module: Any  # of the script
    config: Any
    env: Any
    state: Any  # of the seeds that have not diverged
    seeds: list[int]
    step: int


def load(run: str, given_env: str | None = None, best: bool = False) -> Agent:
    """The agent of a run.

    Raises:
      UsageError: there is no such run or checkpoint, or its script has no memory.
    """
    script = read_about(run)["script"]
    if script not in DECIDES:
        twin = {"dqn": "drqn"}.get(script, f"r{script}")
        if twin in DECIDES:
            advice = f"look into a run of {twin}.py"
            raise UsageError(f"{run!r} is a run of {script}.py, which has no memory: {advice}")
        known = ", ".join(DECIDES)
        raise UsageError(f"{run!r} is a run of {script}.py, and introspect.py knows {known}")
    module = importlib.import_module(f"algorithms.{script}")
    config = load_config(run, module.Config, given_env)
    state, step, notes = restore(run, shapes(config, module.init), best, "look into")
    diverged = dict(notes["diverged"])
    kept = [seed for seed in range(config.num_seeds) if seed not in diverged]
    state = jax.tree.map(lambda x: x[np.array(kept)], state)
    return Agent(module, config, config.make_env(), state, [config.seed + i for i in kept], step)


def play(agent: Agent, episodes: int, steps: int, seed: int = 0) -> Record:
    """Greedy episodes of every seed, (S, T, N, ...); T is a multiple of the carry's stride."""
    config = agent.config
    network = agent.module.make_network(config, agent.env)
    carry = jax.eval_shape(lambda: network.initialize_carry(episodes))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
    stride = min(steps, -(-size * steps * len(agent.seeds) // MOST_BYTES) or 1)
    full_env, entries = hidden_entries(config)
    recorder = partial(
        record,
        steps=steps // stride * stride,
        stride=stride,
        full_env=full_env,
        entries=entries,
    )
    keys = seed_keys(dataclasses.replace(config, seed=seed, num_seeds=len(agent.seeds)))
    fresh = jax.vmap(partial(jax.random.fold_in, data=SEED))(keys)
    state = agent.state.replace(key=fresh)
    return jax.device_get(agent.module.evaluate(state, agent.env, episodes, play=recorder))


def lengths_of(done) -> np.ndarray:
    """How many of the steps (..., T, N) belong to the first episode: (..., N)."""
    ends = done.argmax(axis=-2) + 1
    return np.where(done.any(axis=-2), ends, done.shape[-2])


# --- The gradient --------------------------------------------------------------------------------


def is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def readable(obs):
    """Observations as numbers that can be differentiated: images as the networks scale them."""
    return jax.tree.map(lambda x: x / np.float32(255) if x.dtype == np.uint8 else x, obs)


@partial(jax.jit, static_argnames=("function", "apply"))
def gradient_norms(function, apply, params, carry, inputs, starts, action):
    """Norms of the derivatives of what decides the actions with respect to the observations.

    Args:
      function: of `DECIDES`.
      apply: of the network.
      inputs: (T, N, ...); the observations are `readable`.

    Returns:
      (T, N, T): of the action at the first axis, the observation at the last.
    """
    leaves, structure = jax.tree.flatten(inputs.obs)
    floats = [leaf for leaf in leaves if is_float(leaf)]

    def outputs(floats):
        rest = iter(floats)
        obs = structure.unflatten([next(rest) if is_float(x) else x for x in leaves])
        return apply(params, carry, inputs._replace(obs=obs), starts, action, method=function)

    values, pull = jax.vjp(outputs, floats)
    num_steps, num_envs, num_outputs = values.shape

    def row(index):
        """Norms (N, T) of the derivative of one output of one step."""
        step, output = index // num_outputs, index % num_outputs
        # The environments do not touch each other: one backward pass serves them all.
        (gradients,) = pull(jnp.zeros_like(values).at[step, :, output].set(1.0))
        flat = [leaf.reshape(num_steps, num_envs, -1) for leaf in gradients]
        flat = jnp.concatenate(flat, axis=-1)
        # A policy that is sure of itself has derivatives whose squares float32 cannot hold.
        largest = jnp.abs(flat).max(axis=(0, 2), keepdims=True)
        scale = jnp.where(largest > 0, largest, 1.0)
        return (scale * jnp.sqrt(((flat / scale) ** 2).sum(axis=-1, keepdims=True)))[..., 0].T

    norms = jax.lax.map(row, jnp.arange(num_steps * num_outputs), batch_size=8)
    norms = norms.reshape(num_steps, num_outputs, num_envs, num_steps)
    largest = norms.max(axis=(1, 3), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale[:, 0] * jnp.sqrt(((norms / scale) ** 2).sum(axis=1))


def sensitivities(agent: Agent, records: Record, episodes: int = DIFFERENTIATED):
    """`gradient_norms` of the first episodes of every seed: (S, episodes, T, T), as numpy."""
    config = agent.config
    if getattr(config, "bptt", 0):  # what training cuts is looked at all the same
        config = dataclasses.replace(config, bptt=0)
    network = agent.module.make_network(config, agent.env)
    _, decides = DECIDES[read_script(agent)]
    result = []
    for seed in range(len(agent.seeds)):
        part = jax.tree.map(lambda x, seed=seed: x[seed][:, :episodes], records._replace(carry=()))
        inputs = agent.module.Inputs(readable(part.obs), part.previous, part.reward)
        params = jax.tree.map(lambda x, seed=seed: x[seed], agent.state.params)
        carry = network.initialize_carry(part.start.shape[1])
        sequence = (carry, inputs, part.start, part.action)
        norms = gradient_norms(decides, network.apply, params, *sequence)
        result.append(np.asarray(norms, float).transpose(1, 0, 2))
    return np.stack(result)


def read_script(agent: Agent) -> str:
    return agent.module.__name__.rpartition(".")[2]


def shares(norms, length: int):
    """Rows (length, length) that sum to 1, of one episode's norms (T, T); nan after the diagonal.

    A row without any gradient is nan.
    """
    past = np.tril(norms[:length, :length])
    total = past.sum(axis=1, keepdims=True)
    rows = np.divide(past, total, out=np.full_like(past, np.nan), where=total > 0)
    return np.where(np.tri(length, dtype=bool), rows, np.nan)


def recall_curve(rows, num_distances: int):
    """The mean share at each distance t - t', (num_distances,); nan beyond the episode."""
    curve = np.full(num_distances, np.nan)
    for distance in range(len(rows)):
        diagonal = np.diagonal(rows, -distance)
        known = diagonal[~np.isnan(diagonal)]
        if known.size:
            curve[distance] = known.mean()
    return curve


def summary(curves) -> dict:
    """Of curves (episodes, D): their median, 10th and 90th percentile, where any has a value."""
    known = ~np.isnan(curves)
    curves = curves[:, known.any(axis=0)]
    low, median, high = np.nanpercentile(curves, [10, 50, 90], axis=0)
    count = (~np.isnan(curves)).sum(axis=0)
    return {"median": median, "low": low, "high": high, "episodes": count}


# --- The probe -----------------------------------------------------------------------------------


def as_features(tree, num_axes: int):
    """The numbers of a pytree as vectors (..., D) in float64; whole numbers in it are left out."""
    parts = []
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        if np.iscomplexobj(leaf):
            leaf = np.stack([leaf.real, leaf.imag], axis=-1)
        if np.issubdtype(leaf.dtype, np.floating):
            parts.append(leaf.reshape(*leaf.shape[:num_axes], -1))
    shape = np.shape(jax.tree.leaves(tree)[0])[:num_axes] if jax.tree.leaves(tree) else ()
    return np.concatenate(parts, axis=-1).astype(float) if parts else np.zeros((*shape, 0))


def readout(train, validation, test):
    """A linear prediction of targets from features, with the ridge penalty that validates best.

    Args:
      train, validation, test: pairs of features (n, D) and targets (n, K).

    Returns:
      Predictions of the targets of `test`, (n, K).
    """
    centre, spread = train[0].mean(axis=0), train[0].std(axis=0)
    varies = spread > 1e-8 * (1.0 + np.abs(centre))
    target_mean = train[1].mean(axis=0)
    if not varies.any():
        return np.broadcast_to(target_mean, test[1].shape)

    def standardized(features):
        return ((features - centre)[:, varies]) / spread[varies]

    u, s, v = np.linalg.svd(standardized(train[0]), full_matrices=False)
    projected = u.T @ (train[1] - target_mean)

    def predict(features, penalty):
        weights = (s / (s**2 + penalty * len(u)))[:, None] * projected
        return standardized(features) @ v.T @ weights + target_mean

    def error(penalty):
        return ((predict(validation[0], penalty) - validation[1]) ** 2).mean()

    return predict(test[0], min(PENALTIES, key=error))


def probe(features, targets, lengths, steps) -> np.ndarray:
    """How well a readout predicts the targets of episodes that it was not trained on.

    Args:
      features: (T, N, D); T steps of N episodes.
      targets: (T, N, K).
      lengths: (N,), of the episodes.
      steps: (T,), the times of the T rows in their episodes; the first one does not count.

    Returns:
      R^2 of each target (K,), or its accuracy if all its values are -1 and 1.
    """
    counts = (steps[:, None] > 0) & (steps[:, None] < lengths)
    episodes = np.arange(counts.shape[1])
    half, rest = len(episodes) // 2, len(episodes) // 4
    groups = (
        episodes < half,
        (episodes >= half) & (episodes < half + rest),
        episodes >= half + rest,
    )
    rng = np.random.default_rng(0)
    parts = []
    for group in groups:
        rows, columns = np.nonzero(counts & group)
        order = rng.permutation(len(rows))[:MOST_SAMPLES]
        parts.append([x[rows[order], columns[order]] for x in (features, targets)])
    predicted, actual = readout(*parts), parts[2][1]
    wrong = ((predicted - actual) ** 2).sum(axis=0)
    total = ((actual - actual.mean(axis=0)) ** 2).sum(axis=0)
    fit = 1.0 - np.divide(wrong, total, out=np.full_like(wrong, np.nan), where=total > 0)
    accuracy = (np.where(predicted < 0, -1, 1) == actual).mean(axis=0)
    return np.where(is_bit(targets), accuracy, fit)


def is_bit(targets):
    """Which of the targets (T, N, K) have the values -1 and 1 only."""
    return (np.abs(targets) == 1).all(axis=(0, 1))


def probes(records: Record) -> dict:
    """What can be read from the carry and from the observation alone.

    Returns:
      {hidden variable: {"measure": "R^2" or "accuracy", "carry": values (S,), "observation": ...}}
    """
    names = list(records.hidden)
    if not names:
        return {}
    num_seeds, num_steps = records.start.shape[:2]
    lengths = lengths_of(records.done)
    carries = as_features(records.carry, num_axes=3)
    stride = num_steps // carries.shape[1] if carries.ndim == 4 and carries.shape[1] else 1
    steps = np.arange(stride - 1, num_steps, stride)
    obs = as_features(readable(without_mask(records.obs)), num_axes=3)[:, steps]
    if carries.shape[:1] != obs.shape[:1]:  # a memory without a carry
        carries = np.zeros((*obs.shape[:3], 0))
    targets = np.stack([records.hidden[name] for name in names], axis=-1)[:, steps].astype(float)
    found = {}
    for source, features in (("carry", carries), ("observation", obs)):
        found[source] = np.stack(
            [probe(features[i], targets[i], lengths[i], steps) for i in range(num_seeds)]
        )
    bits = is_bit(targets.reshape(-1, *targets.shape[2:]))
    return {
        name: {"measure": "accuracy" if bits[k] else "R^2"}
        | {source: values[:, k] for source, values in found.items()}
        for k, name in enumerate(names)
    }


# --- Output --------------------------------------------------------------------------------------


def look(agent: Agent, episodes: int, steps: int, seed: int) -> dict:
    """Everything that introspect.json says, but for the names of run and command."""
    records = play(agent, episodes, min(steps, agent.env.max_steps), seed)
    lengths = lengths_of(records.done)
    norms = sensitivities(agent, records)
    num_steps = norms.shape[-1]
    matrices = [
        [shares(rows, length) for rows, length in zip(*pair, strict=False)]
        for pair in zip(norms, lengths, strict=True)
    ]
    curves = [[recall_curve(rows, num_steps) for rows in of_seed] for of_seed in matrices]
    what, _ = DECIDES[read_script(agent)]
    return {
        "script": read_script(agent),
        "cell": agent.config.cell,
        "env": agent.config.env,
        "mask": agent.config.mask,
        "step": agent.step,
        "seeds": agent.seeds,
        "derivative_of": what,
        "lengths": lengths,
        "recall": summary(np.concatenate(curves)),
        "recall_of_seeds": [summary(np.stack(of_seed))["median"] for of_seed in curves],
        "probe": probes(records) if episodes >= 8 else {},
        "heat_map": matrices[0][0],
    }


def draw(found: dict, path: Path) -> None:
    """The heat map, the curve, and the probe if there is one."""
    matplotlib = import_optional("matplotlib.figure", "introspect.py", "matplotlib")
    from matplotlib.colors import LogNorm

    width = 13 if found["probe"] else 9.5
    figure = matplotlib.Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots(1, 3 if found["probe"] else 2)
    mask = f" --mask {' '.join(map(str, found['mask']))}" if found["mask"] else ""
    figure.suptitle(f"{found['script']}.py --env {found['env']}{mask} --cell {found['cell']}")

    # Dark is much: a map whose lightness falls steadily reads the same in black and white.
    image = axes[0].imshow(
        np.where(found["heat_map"] == 0, 1e-9, found["heat_map"]),
        norm=LogNorm(1e-3, 1.0, clip=True),
        cmap="viridis_r",
        interpolation="nearest",
    )
    axes[0].set(
        title="one episode",
        xlabel="step t' of the observation",
        ylabel=f"step t of the {'action' if 'action' in found['derivative_of'] else 'decision'}",
    )
    figure.colorbar(image, ax=axes[0], label=f"share of the gradient of\n{found['derivative_of']}")

    recall = found["recall"]
    distance = np.arange(len(recall["median"]))
    axes[1].fill_between(distance, recall["low"], recall["high"], color="0.8", lw=0)
    is_short = len(distance) <= 30
    axes[1].plot(distance, recall["median"], color="k", marker="o" if is_short else "", ms=3)
    count, seeds = int(recall["episodes"].max()), len(found["seeds"])
    axes[1].set(
        title=f"{count} episodes of {seeds} seed{'s' * (seeds > 1)}",
        xlabel="distance t - t'",
        ylabel="mean share: median, and\n10th to 90th percentile of episodes",
        ylim=(0, None),
    )
    if not is_short:
        axes[1].set_xscale("symlog", linthresh=1)
        axes[1].set_xlim(0, len(distance))
    if found["probe"]:
        draw_probe(axes[2], found["probe"])
    for axis in axes[1:]:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_probe(axis, found: dict) -> None:
    """Bars of the median seed, and a point for every seed."""
    looks = {"carry": {"color": "0.35"}, "observation": {"color": "white", "hatch": "//"}}
    for i, (source, look_of) in enumerate(looks.items()):
        values = np.array([of_name[source] for of_name in found.values()])
        places = np.arange(len(found)) + 0.4 * i - 0.2
        label = source if source == "carry" else "observation alone"
        axis.bar(places, np.median(values, axis=1), 0.36, edgecolor="k", label=label, **look_of)
        for place, of_name in zip(places, values, strict=True):
            axis.plot([place] * len(of_name), of_name, "D", color="k", mfc="white", ms=4)
    labels = [
        f"{name}\n({of_name['measure'].replace('^2', '²')})" for name, of_name in found.items()
    ]
    axis.set_xticks(range(len(found)), labels)
    axis.axhline(0, color="k", lw=0.8)
    axis.set(title="linear readout of what is hidden", ylim=(None, 1.25))
    axis.legend(loc="upper right", ncols=2, fontsize=9, frameon=False)


def rounded(value):
    """Numbers with four digits, in lists as JSON has them."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--episodes", type=int, default=32, help="of every seed (32)")
    parser.add_argument("--steps", type=int, default=200, help="at most, of an episode (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes (0)")
    parser.add_argument("--best", action="store_true", help="the checkpoint of the best evaluation")
    parser.add_argument("--env", help="the run's environment, if it is code of your own")
    parser.add_argument("--out", type=Path, help="a folder; by default the run's directory")
    args = parser.parse_args()
    keep_32_bits()
    try:
        for name in ("episodes", "steps"):
            if getattr(args, name) < 1:
                raise UsageError(f"--{name} must be 1 or more, got {getattr(args, name)}")
        agent = load(args.run, args.env, args.best)
        folder = args.out or Path(args.run)
        folder.mkdir(parents=True, exist_ok=True)
        found = look(agent, args.episodes, args.steps, args.seed)
        draw(found, folder / "introspect.png")
        about = {"run": Path(args.run).name, "episodes": args.episodes, "episode_seed": args.seed}
        write_json(folder / "introspect.json", about | rounded(as_json(found)))
    except (UsageError, RunError) as error:
        print(f"error: {clean(error)}", file=sys.stderr)
        sys.exit(2)
    for name, values in found["probe"].items():
        carry, obs = (np.median(values[source]) for source in ("carry", "observation"))
        print(f"{name}: {values['measure']} {carry:.2f} from the carry, {obs:.2f} without it")
    if not found["probe"]:
        reason = "at least 8 episodes" if args.episodes < 8 else "--mask, or MemoryChain"
        print(f"no probe: it needs {reason}")
    print(f"saved to {folder / 'introspect.png'} and introspect.json")


if __name__ == "__main__":
    main()
