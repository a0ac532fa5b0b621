"""What a script needs besides its algorithm: options, compiled updates, resuming, evaluating.

    launch(main, Config)                                            # the command line
    with Run(config, init) as run: ...                              # directory, logger, checkpoints
    state, report = run_updates(update, state, env, num_updates)    # train all seeds
    show(config, env, init, evaluate)                               # --evaluate

The parts are in `harness/`: options.py, devices.py, sizes.py, run_dir.py, checkpoints.py,
trained.py, metrics.py and signals.py.
"""

import gc
import os
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.episodes import check_drawable, record, write_gif
from env_adapters.registry import make
from env_adapters.task import Box, Discrete, MultiDiscrete
from env_adapters.wrappers import HIDING
from harness.axes import mean_over_devices
from harness.checkpoints import Checkpoints
from harness.devices import (
    ONE_PART,
    describe_parts,
    divide,
    on_devices,
    place,
    shardings,
    with_own_keys,
)
from harness.errors import Diverged, Options, RunError, UsageError, import_optional
from harness.export import Agent, check_exporters, export
from harness.metrics import (
    METRICS_FILE,
    Report,
    as_json,
    describe,
    evaluated_policies,
    statistics,
    summarize,
    summarize_episodes,
)
from harness.options import Experiment, check_sizes, launch
from harness.output import warn
from harness.processes import are_several, from_first, greatest, is_first, lost_another
from harness.run_dir import (
    CONFIG_FILE,
    MAY_DIFFER_ON_EVALUATE,
    VIDEOS_FOLDER,
    check_same,
    extend,
    forget_after,
    load_config,
    open_run_dir,
    provenance,
    save_evaluation,
    script_of,
    warn_of_changes,
)
from harness.signals import answered, end_at_once, say
from harness.sizes import check_memory, num_bytes
from harness.trained import begin_with, check_not_lost, first_difference, load_trained, restore
from loggers import Logger, check_keys, make_logger

__all__ = [
    "Experiment",
    "Options",
    "Run",
    "RunError",
    "UsageError",
    "check_config",
    "compile_updates",
    "environment_steps",
    "episode_metrics",
    "fill_buffer",
    "launch",
    "mean_over_devices",
    "report_chunks",
    "run_updates",
    "seed_keys",
    "show",
    "vmap_seeds",
]

# -------------------------------------------------------------------------------------------------
# Seeds


def seed_keys(config):
    """Typed keys (num_seeds,): --num-seeds 3 --seed 5 has those of the seeds 5, 6 and 7."""
    return jax.vmap(jax.random.key)(config.seed + jnp.arange(config.num_seeds))


def vmap_seeds(function):
    """`jax.vmap` over the leading seed axis, but a single seed is not batched.

    Unbatched programs compile a fifth faster.
    """

    def mapped(state):
        if jax.tree.leaves(state)[0].shape[0] > 1:
            return jax.vmap(function)(state)
        result = function(jax.tree.map(lambda x: x[0], state))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    return mapped


# -------------------------------------------------------------------------------------------------
# Checks

# script: one like it for the other kind of actions
OTHER_ACTIONS = {
    "ppo": "ppo_continuous",
    "rppo": "rppo_continuous",
    "ppo_continuous": "ppo",
    "rppo_continuous": "rppo",
    "sac": "sacd",
    "rsac": "rsacd",
    "sacd": "sac",
    "rsacd": "rsac",
    "dqn": "sac",
    "drqn": "rsac",
    "pqn": "ppo_continuous",
    "rpqn": "rppo_continuous",
}


def check_config(config, *actions, bounded: bool = False) -> None:
    """Refuse a config with impossible sizes, or with an environment that the script cannot act in.

    Args:
      *actions: the kinds of actions that the script has, as `Discrete` or `Box`.
      bounded: whether they need finite bounds.

    Raises:
      ValueError: names the field or environment, its value and what is valid.
    """
    check_sizes(config)
    if jax.config.jax_enable_x64:
        advice = 'call jax.config.update("jax_enable_x64", False) first'
        raise ValueError(f"training is in 32 bits, and jax_enable_x64 is set: {advice}")
    try:
        env = config.make_env()
    except ValueError:
        # Some scripts have actions rescaled, which discrete ones are not: ask without that.
        env = make(config.env, **config.env_kwargs)
        if isinstance(env.action_space, Box) == (Box in actions):
            raise
    space = env.action_space
    other = OTHER_ACTIONS.get(script_of(config).stem)
    advice = f"; {other}.py has them" if other else ""
    if isinstance(space, MultiDiscrete) and Discrete in actions and MultiDiscrete not in actions:
        advice = "leave joint_actions True, or use ppo.py, rppo.py, sacd.py or rsacd.py"
        raise ValueError(f"the actions of {env.id} have several parts: {advice}")
    if not isinstance(space, actions):
        kinds = ("continuous", "discrete") if Box in actions else ("discrete", "continuous")
        needed = f"this script needs {kinds[0]} actions{' with bounds' if bounded else ''}"
        raise ValueError(f"{needed}, those of {env.id} are {kinds[1]}{advice}")
    if Box in actions and len(space.shape) != 1:
        needed = "this script needs actions that are vectors"
        raise ValueError(f"{needed}, those of {env.id} have the shape {space.shape}")
    if bounded and not np.isfinite([space.low, space.high]).all():
        advice = "; ppo_continuous.py needs none"
        needed = "this script needs continuous actions with bounds"
        raise ValueError(f"{needed}, those of {env.id} have none{advice}")
    if getattr(config, "critic_obs", "same") == "full":
        check_critic_obs(config, env)


def check_critic_obs(config, env) -> None:
    """Refuse a critic that is to see more, where it cannot or where there is nothing more to see.

    Raises:
      ValueError: says why.
    """
    if config.shared_torso:
        reason = "a shared one would show the actor what only the critic may see"
        raise ValueError(f"critic_obs full needs two torsos, leave out shared_torso: {reason}")
    if not (env.hides or config.evaluate):  # acting does not need it
        nothing = f"nothing of {env.id} is hidden from the actor"
        ways = f"a mask, {', '.join(HIDING[:-1])} or {HIDING[-1]}"
        raise ValueError(f"critic_obs full does nothing: {nothing}; hide something with {ways}")


# -------------------------------------------------------------------------------------------------
# Updates


@partial(jax.jit, static_argnames=("update", "env"), donate_argnames="state")
def compiled_updates(update, state, env, num_updates):
    """Several updates of every seed, as one program.

    Args:
      update: (state, env) -> (state, metrics), of one seed.
      state: the states of all seeds; it is used up (donated).

    Returns:
      The state, the sums of the metrics (S,), and for how many updates each sum stayed finite (S,).
    """
    parts = divide(state.config)
    update = with_own_keys(update, parts)

    def run(state, num_updates):
        # A single seed with a memory or a replay buffer trains faster as a batch of one: XLA then
        # updates the buffer in place. Without them it trains and compiles faster unbatched.
        is_batch = hasattr(state, "carry") or hasattr(state, "buffer")
        batch = jax.vmap if is_batch else vmap_seeds
        # jit lets eval_shape and the loop share one tracing.
        update_seeds = jax.jit(batch(partial(update, env=env)))

        def body(_, loop):
            state, sums, finite = loop
            state, metrics = update_seeds(state)
            sums = jax.tree.map(jnp.add, sums, metrics)
            finite = jax.tree.map(lambda count, total: count + jnp.isfinite(total), finite, sums)
            return state, sums, finite

        metrics = jax.eval_shape(update_seeds, state)[1]
        # Sums of whole numbers, too, are floats: the steps of many episodes do not fit into int32.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), metrics)
        counts = jax.tree.map(lambda x: jnp.zeros(x.shape, int), metrics)
        # The number of updates is not known when this compiles: a last, shorter chunk does not
        # compile again.
        loop = jax.lax.fori_loop(0, num_updates, body, (state, zeros, counts))
        return loop[0], loop[1:]

    state, (sums, finite) = on_devices(run, parts)(state, num_updates)
    return state, sums, finite


def episode_metrics(done, episode_return, episode_length) -> dict:
    """What the episodes that end in a rollout add to an update's metrics.

    They are sums: a report divides them by `charts/episodes`.

    Args:
      done: (T, N) bool, whether an episode ends with the step.
      episode_return: (T, N) float32, of the episode up to this step.
      episode_length: (T, N) int32, likewise.
    """
    return {
        "charts/episodic_return": episode_return.sum(where=done),
        "charts/episodic_length": episode_length.sum(where=done, dtype=jnp.float32),
        "charts/episodes": done.sum(),
    }


def run_updates(update, state, env, num_updates: int):
    """Run several updates of every seed: the new state, and the `Report` of their means.

    The first call compiles `update`, and so does every call with another shape of state. The state
    passed in is used up (donated).

    Raises:
      UsageError: the state has a replay buffer that `warmup` has not filled.
    """
    config = state.config
    first = updates_done(state)
    learning_starts = getattr(config, "learning_starts", 0)
    if first < learning_starts // config.steps_per_update:
        reason = f"its replay buffer is to hold learning_starts ({learning_starts}) steps first"
        raise UsageError(f"call warmup before train: {reason}")
    state = place(state, divide(config))
    began = time.perf_counter()
    sums, finite, done = 0.0, 0, 0
    while done < num_updates:
        # Sums of more updates would lose digits in float32.
        count = min(1000, num_updates - done)
        state, *part = jax.block_until_ready(compiled_updates(update, state, env, count))
        sums, finite = add_part(sums, finite, done, *part)
        done += count
    check_not_stuck(state, env)
    seconds = time.perf_counter() - began
    report = summarize(sums, finite, first, num_updates, config.steps_per_update)
    report["charts/SPS"] = num_updates * config.steps_per_update * config.num_seeds / seconds
    return state, report


def check_not_stuck(state, env) -> None:
    """Refuse to go on where an action mask allowed nothing.

    Raises:
      RunError: names the environment and the step of the episode.
    """
    stuck = getattr(state.env_state, "stuck", ())
    if isinstance(stuck, jax.Array):
        steps = np.concatenate([np.ravel(shard.data) for shard in stuck.addressable_shards])
        step = greatest(int(steps.max()))  # in all processes, or one would wait for another
        if step >= 0:
            raise RunError(
                f"the action mask of {env.id} allows nothing at step {step} of an episode"
            )


def add_part(sums, finite, done: int, more_sums, more_finite):
    """Add what `compiled_updates` returns to the sums of `done` updates, in float64."""
    if not done:
        return jax.tree.map(lambda x: np.asarray(x, float), more_sums), more_finite

    def add_finite(count, more):
        return np.where(np.asarray(count) == done, count + more, count)

    return jax.tree.map(np.add, sums, more_sums), jax.tree.map(add_finite, finite, more_finite)


def compile_updates(update, state, env):
    """Compile `run_updates` for this state and run no update: the same state, and a `Report`."""
    state = place(state, divide(state.config))
    began = time.perf_counter()
    state, *_ = jax.block_until_ready(compiled_updates(update, state, env, 0))
    seconds = time.perf_counter() - began
    return state, Report({"charts/compile_seconds": seconds}, environment_steps(state))


def tell(config, text: str) -> None:
    """Print what a run is doing, if it is shown on a terminal."""
    if {"console", "dashboard"} & set(config.log) and is_first():
        print(text, flush=True)


@partial(jax.jit, static_argnames=("rollout", "env"), donate_argnames="state")
def compiled_rollouts(rollout, state, env):
    """`learning_starts` steps of every seed: the state, which is used up (donated)."""
    num_rollouts = state.config.learning_starts // state.config.steps_per_update
    parts = divide(state.config)
    rollout = with_own_keys(rollout, parts)

    def fill(state):
        return jax.lax.fori_loop(0, num_rollouts, lambda _, state: rollout(state, env)[0], state)

    return on_devices(lambda state: (jax.vmap(fill)(state), ()), parts)(state)[0]


def fill_buffer(rollout, state, env):
    """Take `learning_starts` steps of every seed into the replay buffers, before the first update.

    Nothing happens if updates have been done: the buffers are full.

    Args:
      rollout: (state, env) -> (state, metrics), of one seed.
      state: the states of all seeds; it is used up (donated).
    """
    if updates_done(state):
        return state
    return compiled_rollouts(rollout, place(state, divide(state.config)), env)


def report_chunks(config, num_steps: int):
    """Divide `num_steps` steps per seed into reports: the number of updates of each.

    It is `log_every`, and for the last report what is left. There is at least one update.
    """
    remaining = max(1, num_steps // config.steps_per_update)
    while remaining:
        num_updates = min(config.log_every, remaining)
        yield num_updates
        remaining -= num_updates


def updates_done(state) -> int:
    """The updates that each seed has done, on whatever devices the seeds are."""
    return int(state.updates.addressable_shards[0].data[0])


def environment_steps(state) -> int:
    """The environment steps that each seed has trained for."""
    return updates_done(state) * state.config.steps_per_update


# -------------------------------------------------------------------------------------------------
# Runs


FRESH = 2**31 - 2  # the stream of --evaluate, which training and its evaluations do not use


def shapes(config, init):
    """The shapes and dtypes of the state of a run, as a pytree like it."""
    return jax.eval_shape(lambda: init(config, seed_keys(config)))


class Run:
    """A training run, new or resumed: its directory, logger and checkpoints.

        with Run(config, init) as run:
            state = warmup(run.state, env, run.logger)
            while num_steps := run.next_chunk(state):
                state, _ = train(state, env, run.logger, num_steps)
                if run.evaluation_is_due(state):
                    run.evaluate(evaluate, state, env)

    Reports and evaluations happen after the same updates whether or not the run was interrupted.
    SIGTERM and Ctrl-C end the loop at the next report, after a checkpoint; a second one ends the
    process at once. Before the first update the first one does: there is nothing to save.

    Raises:
      UsageError: the directory or a logger cannot be used.
    """

    def __init__(self, config, init):
        check_keys(config)
        if config.eval_video:
            check_eval_video(config)
        self.parts = divide(config)
        like = check_memory(config, partial(shapes, config, init), self.parts.count)
        trained = None
        if config.init_from and not (config.resume and Checkpoints(config.resume).steps()):
            trained = load_trained(config, partial(shapes, init=init), like)
        self.config = config
        self.signal = None  # the first signal that asked the run to stop
        self.signal_time = 0.0  # when it arrived
        self.phase = "starting"  # then "training", then "closing"
        self.evaluation = {}  # policy -> episodes of the last evaluation
        self.films = config.eval_video  # until that fails
        self.saved_step = None  # step of the last checkpoint
        self.lock = None
        self.dir = Path(from_first(self._open))
        try:
            self.identity = os.stat(self.dir)
        except OSError as error:
            raise UsageError(f"{str(self.dir)!r} is not seen here: {error.strerror}") from None
        self.checkpoints = Checkpoints(self.dir, config.keep_checkpoints)
        notes = {"metrics_bytes": 0, "diverged": ()}
        where = shardings(like, self.parts) if self.parts.count > 1 else None
        if config.resume and self.checkpoints.steps():
            self.state, self.saved_step, notes = self.checkpoints.restore(like, where=where)
            self._compare(notes.get("parts", ONE_PART))
        else:
            check_not_lost(self.dir, "continue from")
            make = partial(init, config)
            if where:  # no device ever holds all of it
                make = jax.jit(make, out_shardings=where)
            self.state = make(seed_keys(config))
            if trained:
                self.state = place(begin_with(trained, self.state), self.parts)
        if is_first():
            if config.resume:
                extend(self.dir, config, self.saved_step or 0)
            self._announce(like)
            forget_after(self.dir / METRICS_FILE, notes["metrics_bytes"])
            self.logger = make_logger(config, self.dir, notes["diverged"], self.saved_step)
        else:
            self.logger = Logger(diverged=notes["diverged"])

    def _open(self):
        path, self.lock = open_run_dir(self.config)
        return str(path.absolute() if are_several() else path)

    def _announce(self, like):
        """What a user might not expect of this run."""
        config = self.config
        if "console" not in config.log:
            return
        if hasattr(like, "buffer"):
            print(f"replay buffer: {num_bytes(like.buffer) / 2**20:,.1f} MiB", flush=True)
        trained = config.num_updates * config.steps_per_update
        if trained != config.total_steps:
            updates = f"whole updates of {config.steps_per_update:,}"
            print(f"--total-steps {config.total_steps:,} trains {trained:,}: {updates}", flush=True)
        if self.parts.count > 1:
            print(f"{self.parts.count} devices, {describe_parts(self.parts)}", flush=True)

    def _compare(self, parts):
        """Say so if the run is continued in other parts than those of its last checkpoint."""
        if tuple(parts) != self.parts and is_first():
            before = int(np.prod(parts))
            change = f"trained on {before} devices so far, now on {self.parts.count}"
            exactly = f"--num-devices {before} would continue exactly"
            warn(f"{change}: numbers will differ from those of an uninterrupted run; {exactly}")

    def __enter__(self):
        self.signals = answered(self._answer)
        self.signals.__enter__()
        tell(self.config, "compiling, usually 10 to 50 s; cached for later runs of this kind")
        return self

    @property
    def updates_per_evaluation(self) -> int:
        return max(1, self.config.eval_every // self.config.steps_per_update)

    def next_chunk(self, state) -> int:
        """Steps to train until the next report; 0 if the run is complete or has been stopped."""
        gc.enable()
        self.phase = "training"
        self._check_dir()
        config = self.config
        signal = greatest(self.signal or 0)  # processes stop together
        self.signal = self.signal or signal or None
        if signal and self.saved_step != environment_steps(state):
            self._checkpoint(state)
        if signal:
            return 0
        done = updates_done(state)
        period = self.updates_per_evaluation
        end = min(config.num_updates, (done // period + 1) * period)
        return min(config.log_every, end - done) * config.steps_per_update

    def evaluation_is_due(self, state) -> bool:
        """True after every `eval_every` steps, rounded down to whole updates, and at the end."""
        done = updates_done(state)
        return done % self.updates_per_evaluation == 0 or done == self.config.num_updates

    def evaluate(self, evaluate, state, env) -> None:
        """Evaluate the policies that `eval_policy` names, report that, and write a checkpoint.

        The checkpoint's score is the mean return of the last of them: if both are evaluated, that
        of the policy as it was trained, which draws its actions.
        """
        if not self.evaluation:
            tell(self.config, "compiling the first evaluation")
        self.evaluation = evaluate_policies(evaluate, state, env, self.parts)
        report = {}
        for policy, episodes in self.evaluation.items():
            report |= summarize_episodes(episodes, policy)
        self.logger.log(report, environment_steps(state))
        if self.films:
            self._film(evaluate, state, env)
        diverged = list(self.logger.diverged)
        returns = {
            policy: float(np.mean(np.delete(report[f"eval/{policy}_return"], diverged)))
            for policy in self.evaluation
        }
        self._checkpoint(state, returns[policy], returns)

    def _film(self, evaluate, state, env):
        """Write an episode of the first seed that has not diverged, and hand it to the loggers."""
        step = environment_steps(state)
        path = self.dir / VIDEOS_FOLDER / f"{step}.gif"
        seed = first_healthy(self.config, self.logger.diverged)
        try:
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part.gif")
            part.unlink(missing_ok=True)  # of a run that was killed
            write_gif(str(part), env, play_recorded(evaluate, state, env, seed))
            part.replace(path)
        except Exception as error:  # as for loggers: training is worth more
            self.films = False
            warn(f"no more videos: {error}; training continues without them")
        else:
            self.logger.video(path, step)

    def _checkpoint(self, state, score=float("nan"), returns=None):
        metrics = self.dir / METRICS_FILE
        step = environment_steps(state)
        notes = {
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "diverged": list(self.logger.diverged.items()),
            "returns": returns or {},  # policy -> mean return, if it was just evaluated
            "parts": self.parts,
        }
        try:
            self.checkpoints.save(state, step, score, **notes)
        except OSError as error:
            self._check_dir()
            free = shutil.disk_usage(self.dir).free / 2**20
            where = f"{self.checkpoints.folder} ({free:,.0f} MiB free)"
            reason = error.strerror or str(error).splitlines()[0]
            advice = self._how_to_continue("make room and continue from there with --resume")
            failure = f"the checkpoint of step {step:,} cannot be written to {where}: {reason}"
            raise RunError(f"{failure}; {advice}") from None
        self.saved_step = step

    def _how_to_continue(self, advice="continue from there with --resume"):
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is of step {self.saved_step:,}, {advice} {self.dir}"

    def _check_dir(self):
        """Notice that the directory was deleted, or that another one has its name."""
        try:
            same = os.path.samestat(os.stat(self.dir), self.identity)
            same = same and (self.dir / CONFIG_FILE).exists()
        except (FileNotFoundError, NotADirectoryError):
            same = False
        except OSError:  # a network that is down, for example
            return
        if not same:
            gone = f"the run directory {str(self.dir)!r} was deleted or moved"
            raise RunError(f"{gone}, the run cannot continue")

    def _answer(self, number):
        """What happens when a signal arrives; in a thread of its own, the main one may be busy."""
        now = time.monotonic()
        if self.signal is None and self.phase != "starting":
            self.signal, self.signal_time = number, now
            what = "stopping at the next report" if self.phase == "training" else "closing the logs"
            say(f"{what}; press Ctrl-C again to stop at once")
        elif now > self.signal_time + 0.1:  # `timeout`, for one, sends each signal twice
            say(f"interrupted; {self._how_to_continue()}")
            # What they hold is lost to a process that ends; they have a second to write it.
            closing = threading.Thread(target=self.logger.close, daemon=True)
            closing.start()
            closing.join(1.0)
            end_at_once(number)

    def __exit__(self, kind, error, _):
        self.phase = "closing"
        complete = self.saved_step == self.config.num_updates * self.config.steps_per_update
        if kind is None and not complete and is_first():
            print(f"stopped; {self._how_to_continue()}", file=sys.stderr)
        try:
            self.logger.close()
            self.checkpoints.close()
        finally:
            if self.lock:
                self.lock.release()
            self.signals.__exit__(None, None, None)
        if lost_another(error):
            raise RunError(f"another process of this run is gone; {self._how_to_continue()}")
        if kind is Diverged:
            advice = self._how_to_continue("the last good one: look at it with --evaluate")
            raise RunError(f"{error}; {advice}") from None
        if kind is None and not complete:
            sys.exit(128 + self.signal)
        if kind is None and is_first():
            for policy, episodes in self.evaluation.items():
                print(describe(episodes, self.logger.diverged, policy))
            if not self.evaluation:
                print("the run was complete")
            print(f"saved to {self.dir}")


def evaluate_as(policy: str, evaluate, state, env, episodes: int, parts=ONE_PART, **options):
    """What a script's `evaluate` returns for one of the policies, "greedy" or "sampled"."""
    if hasattr(state.config, "eval_policy"):  # the others have the greedy policy only
        options["greedy"] = policy == "greedy"
    if parts == ONE_PART:
        return evaluate(state, env, episodes, **options)
    return evaluate_parts(evaluate, state, env, episodes, parts, tuple(options.items()))


@partial(jax.jit, static_argnames=("evaluate", "env", "episodes", "parts", "options"))
def evaluate_parts(evaluate, state, env, episodes, parts, options):
    """What `evaluate` returns, each device playing for its seeds."""
    function = partial(evaluate, env=env, episodes=episodes, **dict(options))
    return on_devices(function, parts, returns_state=False)(state)


def evaluate_policies(evaluate, state, env, parts=ONE_PART) -> dict:
    """Policy -> its episodes (S, eval_episodes), for the policies that the config names."""
    episodes = state.config.eval_episodes
    policies = evaluated_policies(state.config)
    return {
        policy: evaluate_as(policy, evaluate, state, env, episodes, parts) for policy in policies
    }


@partial(jax.jit, static_argnames=("evaluate", "env", "seed"))
def play_recorded(evaluate, state, env, seed: int):
    """The recording of a greedy episode of one seed."""
    single = jax.tree.map(lambda x: x[seed : seed + 1], state)
    recordings = evaluate_as("greedy", evaluate, single, env, 1, play=record)
    return jax.tree.map(lambda x: x[0], recordings)


def first_healthy(config, diverged) -> int:
    """The first seed of a run that has not diverged, counted from 0."""
    return min(set(range(config.num_seeds)) - set(diverged))


def check_eval_video(config) -> None:
    """Refuse --eval-video where no video could be written.

    Raises:
      UsageError: names the reason.
    """
    import_optional("PIL", "eval_video", "pillow")
    check_drawable(config.make_env())
    if are_several():
        raise UsageError("eval_video is for runs of one process; film with --evaluate and --video")


def show(config, env, init, evaluate) -> None:
    """What --evaluate does: play fresh episodes with a trained agent, film and export it.

    The episodes are others than those that chose the best checkpoint: their keys are made from
    --seed. The result is printed, and written to evaluations/ in the run's directory.

    Raises:
      UsageError: there is no such run or checkpoint, the environment cannot be drawn, or what
        --export needs is not installed.
    """
    check_exporters(config.export)
    saved = load_config(config.evaluate, type(config), config.env)
    check_same(config, saved, MAY_DIFFER_ON_EVALUATE)
    warn_of_changes(config.evaluate, config.env)
    if config.video:
        check_drawable(env)
    like = check_memory(config, partial(shapes, config, init))
    difference = ""
    if config.env_kwargs != saved.env_kwargs:
        difference = first_difference(like, shapes(saved, init))
    if difference:
        other = f"with env_kwargs {config.env_kwargs}, trained with {saved.env_kwargs}"
        raise UsageError(f"{config.evaluate!r} cannot be evaluated {other}: {difference}")
    state, step, notes = restore(config.evaluate, like, config.best, "evaluate")
    diverged = dict(notes["diverged"])
    fresh = jax.vmap(partial(jax.random.fold_in, data=FRESH))(seed_keys(config))
    state = state.replace(key=fresh)
    results = evaluate_policies(evaluate, state, env)

    chooser = evaluated_policies(saved)[-1]
    which = f" (the best {chooser} return)" if config.best else ""
    for policy, episodes in results.items():
        print(f"checkpoint of step {step:,}{which}: {describe(episodes, diverged, policy)}")
    contents = {
        "checkpoint": {
            "step": step,
            "chosen_by": f"best {chooser} return" if config.best else "last",
            "returns_in_training": notes.get("returns", {}),
        },
        "seed": config.seed,
        "env": config.env,
        "env_kwargs": config.env_kwargs,
        "mask": config.mask,
        "diverged_seeds": list(diverged),
        "policies": {
            policy: as_json(statistics(episodes, diverged) | episodes._asdict())
            for policy, episodes in results.items()
        },
    }
    about = provenance(script_of(config))
    contents |= {name: about[name] for name in ("started", "command", "git", "python", "machine")}
    try:
        path = save_evaluation(Path(config.evaluate), contents)
        print(f"saved to {path}")
    except OSError as error:
        warn(f"the evaluation was not saved: {error.strerror}")

    seed = first_healthy(config, diverged)
    for path in config.export:
        agent = Agent(evaluate, state, env, seed)
        export(path, agent, {"step": step, "seed": saved.seed + seed})
        print(f"greedy agent of seed {saved.seed + seed}: {path}")
    if config.video:
        policy = list(results)[-1]
        recordings = evaluate_as(policy, evaluate, state, env, 1, play=record)
        episode = jax.tree.map(lambda x: x[seed], recordings)
        try:
            write_gif(config.video, env, episode)
        except OSError as error:
            raise UsageError(f"{config.video!r} cannot be written: {error.strerror}") from None
        print(f"video of {int(episode.length)} steps, {policy} actions: {config.video}")
