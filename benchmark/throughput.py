"""Training speed beside other JAX libraries, in environment steps per second.

    python benchmark/throughput.py                             # ours and all peers
    python benchmark/throughput.py --peers memorax rejax       # ours and these
    python benchmark/throughput.py --peers --only "rppo"       # ours alone, some of them
    python benchmark/throughput.py --grid

The task is CartPole, for SAC Pendulum. --grid measures SAC instead, by parallel environments and
gradient steps per update.

Every system is a process of its own, a peer's in a virtual environment with the JAX that ours has
(see peers.py). A process compiles, then waits. The driver lets the processes train in turn, one at
a time, for several rounds, so that a busy moment slows all of them. First updates are not timed.
Of every system the median, lowest and highest speed, the time to compile and the peak memory of its
process are written to benchmark/results, of ours also the floor (see floor.py), of peers also the
ratio of ours to theirs, round by round.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import results
from peers import PEERS, interpreter_of

SHAPES = {"small": (16, 128), "large": (64, 128)}  # environments, steps


def ours(script, **fields):
    import importlib

    import jax

    from experiment import compiled_updates, fill_buffer, seed_keys
    from fast import use_fast_random
    from harness.devices import divide, place
    from harness.processes import make_cpu_devices

    # As `launch` does for users.
    make_cpu_devices(fields.get("num_devices", 0), fields.get("num_seeds", 1))
    use_fast_random()
    script = importlib.import_module(f"algorithms.{script}")
    config = script.Config(**{"total_steps": 10**8} | fields)
    env = config.make_env()
    state = place(script.init(config, seed_keys(config)), divide(config))
    if hasattr(state, "buffer"):
        state = fill_buffer(script.rollout, state, env)

    def run(updates):
        nonlocal state
        state, *_ = jax.block_until_ready(compiled_updates(script.update, state, env, updates))
        return updates * config.steps_per_update * config.num_seeds

    def floor():
        from floor import floor_of

        found = floor_of(script.update, state, env)
        steps = config.steps_per_update * config.num_seeds
        return found | {"steps_per_second": steps / found["seconds"]}

    run.floor = floor
    return run


def ours_recurrent(shape, shared_torso, cell="gru"):
    num_envs, num_steps = SHAPES[shape]
    return ours(
        "rppo", cell=cell, num_envs=num_envs, num_steps=num_steps, shared_torso=shared_torso
    )


def ours_feedforward(script):
    return ours(script, num_envs=32, num_steps=64, num_minibatches=16, hidden_size=64)


def memorax_ppo(shape, cell="gru"):
    import flax.linen as nn
    import jax
    import optax
    from memorax.algorithms import PPO, PPOConfig
    from memorax.environments import environment
    from memorax.networks import MLP, FeatureExtractor, Network, heads
    from memorax.networks.sequence_models import rnn, slstm

    num_envs, num_steps = SHAPES[shape]
    env, env_params = environment.make("gymnax::CartPole-v1")
    config = PPOConfig(
        name="ppo",
        num_envs=num_envs,
        num_eval_envs=1,
        num_steps=num_steps,
        gamma=0.99,
        gae_lambda=0.95,
        num_minibatches=4,
        update_epochs=4,
        normalize_advantage=True,
        clip_coef=0.2,
        clip_vloss=False,
        ent_coef=0.01,
        vf_coef=0.5,
    )

    def torso():
        memory = nn.GRUCell(features=128) if cell == "gru" else slstm.sLSTMCell(features=128)
        return rnn.RNN(memory) if cell == "gru" else memory

    extractor = FeatureExtractor(observation_extractor=MLP(features=(128,)))
    actor = Network(extractor, torso(), heads.Categorical(env.action_space(env_params).n))
    critic = Network(extractor, torso(), heads.VNetwork())
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3, eps=1e-5))
    agent = PPO(config, env, env_params, actor, critic, optimizer, optimizer)
    key, state = agent.init(jax.random.key(0))
    steps = num_envs * num_steps

    def run(updates):
        nonlocal key, state
        for _ in range(
            max(updates, 1)
        ):  # one compiled update: its train compiles anew for every number of steps
            key, state, _ = jax.block_until_ready(agent.train(key, state, steps))
        return updates * steps

    return run


def ours_off_policy(script, num_envs, batch_size, hidden_size, **fields):
    sizes = {"num_envs": num_envs, "batch_size": batch_size, "hidden_size": hidden_size}
    return ours(script, **sizes, learning_starts=256, **fields)


def rejax(algorithm, steps, **options):
    import jax
    from rejax import get_algo

    agent = get_algo(algorithm).create(**options)
    state = agent.init_state(jax.random.key(0))

    @jax.jit
    def chunk(state, updates):
        return jax.lax.fori_loop(0, updates, lambda _, state: agent.train_iteration(state), state)

    def run(updates):
        nonlocal state
        state = jax.block_until_ready(chunk(state, updates))
        return updates * steps

    return run


def rejax_on_policy(algorithm):
    shape = {
        "env": "CartPole-v1",
        "num_envs": 32,
        "num_steps": 64,
        "num_epochs": 4,
        "num_minibatches": 16,
    }
    # its PQN always has two layers of 64 with LayerNorm
    network = {"activation": "tanh", "hidden_layer_sizes": (64, 64)} if algorithm == "ppo" else {}
    return rejax(
        algorithm, 32 * 64, **shape, learning_rate=1e-3, max_grad_norm=0.5, agent_kwargs=network
    )


def rejax_dqn():
    sizes = {
        "num_envs": 10,
        "batch_size": 128,
        "fill_buffer": 256,
        "buffer_size": 50_000,
        "total_timesteps": 10**9,
    }
    return rejax("dqn", 10, env="CartPole-v1", **sizes)


def rejax_sac(width):
    sizes = {
        "num_envs": 1,
        "batch_size": 256,
        "fill_buffer": 256,
        "buffer_size": 50_000,
        "total_timesteps": 10**9,
    }
    return rejax("sac", 1, env="Pendulum-v1", **sizes, hidden_layer_sizes=(width, width))


def sbx_sac(width):
    from sbx import SAC

    sizes = {
        "learning_starts": 256,
        "buffer_size": 50_000,
        "policy_kwargs": {"net_arch": [width, width]},
    }
    agent = SAC("MlpPolicy", "Pendulum-v1", batch_size=256, **sizes)

    def run(updates):
        agent.learn(max(updates, 1), reset_num_timesteps=False)
        return updates

    run(512)
    return run


def sb3_recurrent_ppo(shape):
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    num_envs, num_steps = SHAPES[shape]
    network = {"lstm_hidden_size": 128, "net_arch": [], "enable_critic_lstm": True}
    agent = RecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env("CartPole-v1", num_envs),
        n_steps=num_steps,
        batch_size=num_envs * num_steps // 4,
        n_epochs=4,
        learning_rate=1e-3,
        policy_kwargs=network,
    )

    def run(updates):
        steps = max(updates, 1) * num_envs * num_steps
        agent.learn(steps, reset_num_timesteps=False)
        return updates * num_envs * num_steps

    return run


class System(NamedTuple):
    """What takes part.

    Attributes:
      library: "ours", or one of `PEERS`.
      make_run: () -> a function that trains for so many updates and returns the number of steps.
      updates: of a round.
      against: of a peer, the system of ours that does the same.
    """

    library: str
    make_run: Any
    updates: int
    against: str = ""


SYSTEMS = {
    "rppo gru shared torso, 16 x 128": System("ours", lambda: ours_recurrent("small", True), 10),
    "rppo gru two torsos, 16 x 128": System("ours", lambda: ours_recurrent("small", False), 10),
    "memorax PPO gru (two torsos), 16 x 128": System(
        "memorax",
        lambda: memorax_ppo("small"),
        10,
        "rppo gru two torsos, 16 x 128",
    ),
    "rppo lstm two torsos, 16 x 128": System(
        "ours",
        lambda: ours_recurrent("small", False, "lstm"),
        10,
    ),
    "sb3 RecurrentPPO lstm (two), 16 x 128": System(
        "sb3",
        lambda: sb3_recurrent_ppo("small"),
        1,
        "rppo lstm two torsos, 16 x 128",
    ),
    "rppo gru shared torso, 64 x 128": System("ours", lambda: ours_recurrent("large", True), 5),
    "rppo gru two torsos, 64 x 128": System("ours", lambda: ours_recurrent("large", False), 5),
    "memorax PPO gru (two torsos), 64 x 128": System(
        "memorax",
        lambda: memorax_ppo("large"),
        5,
        "rppo gru two torsos, 64 x 128",
    ),
    "rppo slstm shared torso, 64 x 128": System(
        "ours",
        lambda: ours_recurrent("large", True, "slstm"),
        3,
    ),
    "ppo, 32 x 64, 16 minibatches": System("ours", lambda: ours_feedforward("ppo"), 100),
    "rejax PPO, 32 x 64, 16 minibatches": System(
        "rejax",
        lambda: rejax_on_policy("ppo"),
        100,
        "ppo, 32 x 64, 16 minibatches",
    ),
    "pqn, 32 x 64, 16 minibatches": System("ours", lambda: ours_feedforward("pqn"), 100),
    "rejax PQN, 32 x 64, 16 minibatches": System(
        "rejax",
        lambda: rejax_on_policy("pqn"),
        100,
        "pqn, 32 x 64, 16 minibatches",
    ),
    "dqn, 10 environments, batch 128": System(
        "ours",
        lambda: ours_off_policy("dqn", 10, 128, 64),
        10_000,
    ),
    "rejax DQN, 10 environments, batch 128": System(
        "rejax",
        rejax_dqn,
        10_000,
        "dqn, 10 environments, batch 128",
    ),
    "sac, batch 256, two layers of 64": System(
        "ours",
        lambda: ours_off_policy("sac", 1, 256, 64),
        2_000,
    ),
    "rejax SAC, batch 256, two layers of 64": System(
        "rejax",
        lambda: rejax_sac(64),
        2_000,
        "sac, batch 256, two layers of 64",
    ),
    "sbx SAC, batch 256, two layers of 64": System(
        "sbx",
        lambda: sbx_sac(64),
        500,
        "sac, batch 256, two layers of 64",
    ),
    "sac, batch 256, two layers of 256": System(
        "ours",
        lambda: ours_off_policy("sac", 1, 256, 256),
        500,
    ),
    "rejax SAC, batch 256, two layers of 256": System(
        "rejax",
        lambda: rejax_sac(256),
        500,
        "sac, batch 256, two layers of 256",
    ),
    "sbx SAC, batch 256, two layers of 256": System(
        "sbx",
        lambda: sbx_sac(256),
        500,
        "sac, batch 256, two layers of 256",
    ),
}


def worker(name):
    """Compile, then run one round per line of standard input."""
    system = SYSTEMS[name]
    run = timed_rounds(system.make_run, system.updates)
    if system.library == "ours":
        print(json.dumps({"floor": run.floor()}), flush=True)


def timed_rounds(make_run, updates):
    """What a worker does: `make_run()` returns the function that trains for so many updates."""
    run = make_run()
    about = {"compile": compile_seconds(run)} | results.environment()
    print(json.dumps(about), flush=True)
    run(updates)
    while sys.stdin.readline().strip() == "go":
        start = time.perf_counter()
        steps = run(updates)
        speed = steps / (time.perf_counter() - start)
        print(json.dumps({"sps": speed, "peak_mib": peak_mib()}), flush=True)
    return run


def compile_seconds(run):
    """The time that the first call of `run` takes longer than the third, which compiles nothing."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(0)
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[2]


def peak_mib():
    """The greatest memory that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of Linux' KiB


def take_turns(commands: dict, rounds: int):
    """Start workers, and let them train one at a time, a round each.

    Args:
      commands: name -> the command of a process that calls `timed_rounds`.

    Returns:
      What each process says of itself, when it has compiled and at the end, and its speed in every
      round, by name.

    Raises:
      SystemExit: a process has failed; names it, with the last line that it has printed.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        about = {}
        for name, command in commands.items():
            errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            workers[name] = Worker(name, command, errors)
            stack.callback(workers[name].close)
            about[name] = workers[name].answer()
        speeds = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                told = worker.train()
                speeds[name].append(told.pop("sps"))
                about[name] |= told
        for name, worker in workers.items():  # one after the other: what they do now is measured
            about[name] |= worker.end()
    return about, speeds


class Worker:
    """A system in a process of its own."""

    def __init__(self, name, command, errors):
        self.name = name
        self.errors = errors  # a file
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def train(self) -> dict:
        """A round, and what it says of it."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says so
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.answer()

    def end(self) -> dict:
        """Let it end, and what it says at last."""
        rest, _ = self.process.communicate()
        return json.loads(rest or "{}") if self.process.returncode == 0 else self._fail()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _fail(self):
        code = self.process.wait()
        self.errors.seek(0)
        reason = results.last_line(self.errors.read())
        sys.exit(f"error: {self.name} ended with exit code {code}: {reason}")


def report_grid(rounds):
    """SAC on Pendulum with batches of 256 and two layers of 256: all combinations take turns."""
    all_envs = (1, 4, 16, 64)
    all_gradient_steps = (1, 4, 16)
    runs = {}
    for num_envs in all_envs:
        for gradient_steps in all_gradient_steps:
            run = ours_off_policy("sac", num_envs, 256, 256, gradient_steps=gradient_steps)
            runs[num_envs, gradient_steps] = run
    speeds = {sizes: [] for sizes in runs}
    for turn in range(rounds + 1):
        for sizes, run in runs.items():
            _, gradient_steps = sizes
            start = time.perf_counter()
            steps = run(400 // gradient_steps)
            if turn:  # the first run compiles
                speeds[sizes].append(steps / (time.perf_counter() - start))
    medians = {sizes: statistics.median(values) for sizes, values in speeds.items()}
    print("| environments \\ gradient steps | " + " | ".join(map(str, all_gradient_steps)) + " |")
    print("|---" * (1 + len(all_gradient_steps)) + "|")
    for n in all_envs:
        print(f"| {n} | " + " | ".join(f"{medians[n, g]:,.0f}" for g in all_gradient_steps) + " |")
    values = {
        "num_envs": all_envs,
        "gradient_steps": all_gradient_steps,
        "steps_per_second": [[round(medians[n, g]) for g in all_gradient_steps] for n in all_envs],
        "batch_size": 256,
        "hidden_size": 256,
        "rounds": rounds,
    }
    device = results.folder(results.environment()["machine"])
    results.record(f"sac-grid/{device}", values, results.this_command())


def paired(own, others):
    """The ratio of two systems' speeds, round by round: its median, least and greatest."""
    ratios = [a / b for a, b in zip(own, others, strict=True)]
    return [round(f(ratios), 3) for f in (statistics.median, min, max)]


def record(name, speeds, about):
    """Write the result file of a system; machine and versions are those of its own process."""
    own = SYSTEMS[name]
    values = {
        "system": name,
        "steps_per_second": round(statistics.median(speeds[name])),
        "lowest": round(min(speeds[name])),
        "highest": round(max(speeds[name])),
        "rounds": len(speeds[name]),
        "compile_seconds": round(about["compile"], 2),
        "peak_mib": round(about["peak_mib"]),
        "floor": about.get("floor"),
        "ours_over_this": paired(speeds[own.against], speeds[name]) if own.against else None,
    }
    path = f"throughput/{results.folder(about['machine'])}/{results.slug(name)}"
    provenance = {key: about[key] for key in ("machine", "versions")}
    results.record(path, values, results.this_command(), **provenance)
    return values


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="only systems whose name contains this")
    parser.add_argument(
        "--grid", action="store_true", help="SAC by num_envs and gradient_steps instead"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grid:
        return report_grid(args.rounds)
    if args.worker:
        return worker(args.worker)

    chosen = [name for name, own in SYSTEMS.items() if own.library in ("ours", *args.peers)]
    chosen = [name for name in chosen if args.only in name]
    # A peer is measured against a system of ours, which then takes part as well.
    needed = {SYSTEMS[name].against for name in chosen}
    chosen = [name for name in SYSTEMS if name in chosen or name in needed]
    interpreters = {"ours": sys.executable}
    for name in chosen:
        library = SYSTEMS[name].library
        if library not in interpreters:
            interpreters[library] = str(interpreter_of(library))
    commands = {
        name: [interpreters[SYSTEMS[name].library], __file__, "--worker", name] for name in chosen
    }
    about, speeds = take_turns(commands, args.rounds)
    head = ("system", "steps/s", "min", "max", "ours/this", "of floor", "compile s", "MiB")
    print(f"{head[0]:<42}" + "".join(f"{word:>11}" for word in head[1:]))
    for name in chosen:
        values = record(name, speeds, about[name])
        ratio = values["ours_over_this"]
        floor = values["floor"]
        speed = values["steps_per_second"]
        cells = [
            f"{speed:,}",
            f"{values['lowest']:,}",
            f"{values['highest']:,}",
            f"{ratio[0]:.2f}" if ratio else "",
            f"{speed / floor['steps_per_second']:.0%}" if floor else "",
            f"{values['compile_seconds']:.1f}",
            f"{values['peak_mib']:,}",
        ]
        print(f"{name:<42}" + "".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    main()
