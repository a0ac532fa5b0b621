"""Studies: scripts x memories x tasks x seeds, as independent runs of the scripts on Ray.

    python benchmark/study.py --list                      # every study, and what of it is done
    python benchmark/study.py small                       # train what is missing of a study
    python benchmark/study.py memories popgym-repeat gru  # only what has one of these names
    python benchmark/study.py memories --address auto     # on a cluster instead of this machine

study.toml describes the studies; its tasks are those of tasks.toml. A setting is one script with
one memory on one task. All its seeds train side by side in one run, under runs/study. When the run
is complete, two result files are written: benchmark/results/study has what was learned, and
study-cost has time and memory. A setting is done if its result file is of its command. To measure
it again, for instance after a change of its script, delete the file.

The same command continues a study: after Ctrl-C, after a crash, with more nodes or fewer. Runs
continue from their last checkpoint. If a node dies, Ray starts its runs on another one, where they
continue as well. What was learned is then the same to the bit as without the interruption, if the
nodes are of one kind. All nodes must see this directory, and --runs if given, at the same path.

Ray is not among the requirements: pip install ray
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import learning
import numpy as np
import results
from learning import ROOT, TASKS, Agent
from tune import PATIENCE, RESERVED, check_choice, last_line, score

from harness.checkpoints import Checkpoints
from harness.errors import RunError, UsageError, did_you_mean, import_optional
from harness.history import load
from harness.run_dir import is_running
from harness.signals import answered, end_at_once, say
from harness.text import clean, duration
from memory_cells import CELLS

FILE = Path(__file__).with_suffix(".toml")
CHOOSING_SEEDS = 3
POLL = 0.5  # seconds between two looks at the runs

# --- The file ------------------------------------------------------------------------------------

# Key of a study -> its type; those without a default must be given.
KEYS = {
    "title": str,
    "scripts": list,
    "memories": list,
    "tasks": list,
    "options": str,
    "control": str,
    "steps": int,
    "seeds": int,
    "eval_every": int,
    "choose": list,
    "like": str,
    "except": dict,
}
DEFAULTS = {"options": "", "control": "", "eval_every": 50_000, "choose": [], "except": {}}
EXCEPT_KEYS = ("scripts", "options", "steps", "seeds", "eval_every")


@dataclass(frozen=True)
class Setting:
    """One script with one memory on one task of a study.

    Attributes:
      options: of the agent, without --cell and the learning rate.
      choose: learning rates, of which the best is to be reported; empty: the script's own.
      runs: the folder of its runs; `learning.RUNS` if empty.
    """

    study: str
    task: str
    script: str
    memory: str
    options: str
    steps: int
    seeds: int
    eval_every: int
    choose: tuple[float, ...] = ()
    runs: str = ""

    @property
    def id(self) -> str:
        return f"{self.study}/{self.task}/{self.script}-{self.memory}"

    def agent(self, rate: float | None = None) -> Agent:
        """The agent that is reported, with this learning rate, or with the script's own."""
        return self._agent("", rate, self.seeds, "")

    def candidate(self, rate: float) -> Agent:
        """An agent that helps to choose the learning rate, on seeds of its own."""
        return self._agent(f"-lr-{rate:g}", rate, CHOOSING_SEEDS, f"--seed {RESERVED}")

    def _agent(self, ending, rate, seeds, more):
        # Automatic choice would take another number of devices, and round differently, on a node
        # with other cores.
        words = [f"--cell {self.memory}", self.options, more, "--num-devices 1"]
        words += [] if rate is None else [f"--learning-rate {rate:g}"]
        return Agent(
            self.task,
            f"{self.script}-{self.memory}{ending}",
            f"study/{self.id}{ending}",
            self.steps,
            seeds,
            " ".join(filter(None, words)),
            self.eval_every,
            runs=self.runs,
        )

    def reported(self) -> Agent:
        """The agent of the result file, as far as its learning rate has been chosen."""
        agent = self.agent()
        if not self.choose or not results.exists(agent.result):
            return agent
        values = results.load(agent.result)["values"]
        choice = values["choice"]
        is_same = choice and tuple(choice["learning_rates"]) == self.choose
        return self.agent(values["learning_rate"]) if is_same else agent

    def is_done(self) -> bool:
        """Whether there are the result files of this very setting."""
        agent = self.reported()
        cost = results.exists(cost_of(agent.result))
        return cost and learning.is_done(agent)


def cost_of(result: str) -> str:
    """The name of the file with the cost, from that of the result."""
    return result.replace("study/", "study-cost/", 1)


def read_studies(path: Path, runs: str = "") -> dict[str, list[Setting]]:
    """The settings of every study of a file, in the order in which they are to be trained.

    Raises:
      UsageError: names what is wrong, and what is valid.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"no study file {str(path)!r}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path} has {name!r} outside of a study: write it under its [name]")
        other = table.get("like", name)
        check_choice(f"study {name}: like", other, tables)
        tables[name] = DEFAULTS | tables[other] | table
    return {name: settings_of(name, table, runs) for name, table in tables.items()}


def settings_of(study: str, table: dict, runs: str) -> list[Setting]:
    """The settings of a study, from its table in the file.

    Raises:
      UsageError: names what is wrong, and what is valid.
    """
    if table.get("memories") == "all":
        table["memories"] = list(CELLS)
    check_table(study, table)
    settings = []
    for task in table["tasks"]:
        of_task = table | table["except"].get(task, {})
        for script in of_task["scripts"]:
            values = of_task | table["except"].get(script, {})
            for memory in values["memories"]:
                own = (values["options"], values["control"] if memory == "none" else "")
                settings.append(
                    Setting(
                        study,
                        task,
                        script,
                        memory,
                        " ".join(filter(None, own)),
                        values["steps"],
                        values["seeds"],
                        values["eval_every"],
                        tuple(values["choose"]),
                        runs,
                    )
                )
    return settings


def check_table(study: str, table: dict) -> None:
    """Refuse a study with a key, name or value that is not valid.

    Raises:
      UsageError: names it, and what is valid.
    """
    for key, value in table.items():
        check_key(study, key, value, KEYS)
    if missing := [key for key in KEYS if key not in table and key != "like"]:
        raise UsageError(f"study {study} has no {missing[0]}")
    exceptions = table["except"]
    scripts = list(table["scripts"])
    for name, values in exceptions.items():
        check_choice(f"study {study}: except", name, [*table["tasks"], *table["scripts"]])
        if not isinstance(values, dict):
            raise UsageError(f"study {study}: write [{study}.except.{name}] with keys under it")
        for key, value in values.items():
            check_key(f"{study}, except {name}", key, value, EXCEPT_KEYS)
        scripts += values.get("scripts", [])
    for task in table["tasks"]:
        check_choice(f"study {study}: a task", task, TASKS)
    for memory in table["memories"]:
        check_choice(f"study {study}: a memory", memory, CELLS)
    for script in scripts:
        check_choice(f"study {study}: a script", script, scripts_with_memory())
    for rate in table["choose"]:
        if type(rate) is not float or not rate > 0:
            raise UsageError(f"study {study}: choose takes learning rates, got {rate!r}")
    for values in (table, *exceptions.values()):
        if values.get("seeds", 1) > RESERVED:
            reason = f"those from {RESERVED} on are for choices"
            raise UsageError(f"study {study}: seeds must be at most {RESERVED}, {reason}")


def check_key(where: str, key: str, value, valid) -> None:
    """Refuse a key that a table cannot have, or a value of another type.

    Raises:
      UsageError: names both, and what is valid.
    """
    if key not in valid:
        raise UsageError(f"study {where} has no key {key!r}{did_you_mean(key, list(valid))}")
    kind = KEYS[key]
    if type(value) is not kind or (kind is int and value <= 0):
        wanted = {int: "a whole number above 0", str: "text", list: "a list", dict: "a table"}[kind]
        raise UsageError(f"study {where}: {key} must be {wanted}, got {value!r}")


def scripts_with_memory() -> list[str]:
    """Those whose Config has --cell."""
    scripts = (ROOT / "algorithms").glob("*.py")
    return sorted(path.stem for path in scripts if "\n    cell: " in path.read_text())


def select(settings: list[Setting], names: list[str]) -> list[Setting]:
    """The settings that have one of these names: a task, script or memory, or a part of the id.

    Raises:
      UsageError: no setting has one of the names; names the nearest.
    """
    chosen = set()
    known = {word for x in settings for word in (x.task, x.script, x.memory)}
    for name in names:
        if name in known:
            found = {x for x in settings if name in (x.task, x.script, x.memory)}
        else:
            found = {x for x in settings if name in x.id}
        if not found:
            hint = did_you_mean(name, sorted(known))
            raise UsageError(f"study {settings[0].study} has no {name!r}{hint}; --list shows all")
        chosen |= found
    return [x for x in settings if x in chosen or not names]


def check_options(settings: list[Setting]) -> None:
    """Refuse options that a script would refuse; every script is asked once for every task.

    Raises:
      UsageError: names the first setting that is refused, and the reason.
    """
    checked = {(x.task, x.script, x.options): x for x in reversed(settings)}
    for setting in reversed(checked.values()):
        agent = setting.candidate(setting.choose[0]) if setting.choose else setting.agent()
        try:
            learning.config_class_of(agent)(**learning.config_of(agent))
        except ValueError as error:
            raise UsageError(f"{setting.id} would be refused: {error}") from None


# --- A run, in a worker of Ray -------------------------------------------------------------------

# A process that ends with the one that started it, even if that is killed (Linux).
ENDS_WITH_PARENT = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(command: list[str], log: Path, environment: dict) -> int:
    """Run a command to its end, and return its exit code; what it prints is appended to `log`.

    If this is interrupted, the command is told to stop, which scripts do after a checkpoint.
    """
    command = [*command, "--log", "file"]
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", ENDS_WITH_PARENT, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is answered by the study
        )
    try:
        while process.poll() is None:
            time.sleep(POLL)
        return process.returncode
    finally:
        process.terminate()  # nothing, if it has ended; Ray has its workers ignore SIGINT
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def run_agent(agent: Agent, gpus: float) -> dict:
    """Train an agent to its end, from wherever its run has come to; what was learned, and its cost.

    Returns:
      "values", "cost" and "about", the keys that `results.record` takes from a run. Or "failed",
      the sentence with which the script has ended.

    Raises:
      ChildProcessError: the script was killed, or its run is in use: to be tried again.
    """
    jax.config.update("jax_platforms", "cpu")  # of this process: GPUs are for the script
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # As where a shell started the node in the background: ray.cancel would have no effect.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ.copy()
    if not gpus:
        environment.setdefault("JAX_PLATFORMS", "cpu")
    elif gpus < 1:  # several runs share it
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.75 * gpus:.2f}")
    log = log_of(agent)
    log.parent.mkdir(parents=True, exist_ok=True)
    while is_running(agent.run_dir):  # by a worker that is on its way out
        time.sleep(POLL)
    if not learning.is_complete(agent):
        try:
            code = learning.train(agent, partial(start, log=log, environment=environment))
        except SystemExit as error:
            raise ChildProcessError(str(error)) from None
        sentence = last_line(log)
        if code < 0 or code > 128:
            raise ChildProcessError(f"exit code {code}, see {log}: {sentence}")
        if code:
            return {"failed": f"exit code {code}, see {log}: {sentence}"}
    history = load(agent.run_dir)
    about = json.loads((agent.run_dir / "config.json").read_text())
    values = learning.outcome(history) | {
        "learning_rate": about["config"]["learning_rate"],
        "num_params": num_params(agent),
    }
    cost = learning.cost(history) | {
        "compile_seconds": history.last("charts/compile_seconds"),
        "memory_mb": history.values("system/memory_mb").max().round(1),
    }
    return {"values": values, "cost": cost, "about": results.of_run(about)}


def log_of(agent: Agent) -> Path:
    """What the script has printed, beside the directory of the run."""
    return agent.run_dir.with_name(f"{agent.run_dir.name}.log")


def num_params(agent: Agent) -> int:
    """The parameters of one seed; those of target networks are not counted."""
    with contextlib.closing(Checkpoints(agent.run_dir)) as checkpoints:
        shapes = checkpoints.shapes()
    return sum(math.prod(shape[1:]) for name, shape in shapes.items() if name.startswith("params/"))


# --- A study -------------------------------------------------------------------------------------


@dataclass
class Job:
    """A run that is to be trained.

    Attributes:
      rate: its learning rate, if that is to be chosen or has been.
      is_candidate: whether it helps to choose the rate.
      began: when Ray was asked to train it.
      history: what it has reported, once there is something.
    """

    setting: Setting
    agent: Agent
    rate: float | None = None
    is_candidate: bool = False
    began: float = 0.0
    history: object = None

    @property
    def name(self) -> str:
        return self.agent.id

    def look(self) -> None:
        """Read what is new in the files of the run."""
        if self.history is None:
            with contextlib.suppress(UsageError):  # it has no file yet
                self.history = load(self.agent.run_dir)
        else:
            self.history.poll()

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.history.progress if self.history else 0.0

    @property
    def seconds_left(self) -> float:
        """nan if unknown."""
        return self.history.seconds_left() if self.history else math.nan


@dataclass
class Studying:
    """The settings of a study in training on Ray.

    Attributes:
      waiting: jobs that Ray has not been given yet.
      running: reference of Ray -> job.
      found: setting -> learning rate -> returns of its candidate; none if it has failed.
      failed: names of jobs that ended with an error.
    """

    ray: object
    options: object
    settings: list[Setting]
    waiting: deque = field(default_factory=deque)
    running: dict = field(default_factory=dict)
    found: dict = field(default_factory=dict)
    finished: int = 0
    failed: list = field(default_factory=list)
    durations: list = field(default_factory=list)
    is_stopping: bool = False

    def __post_init__(self):
        for setting in self.settings:
            if setting.is_done():
                self.finished += 1
            elif setting.choose:
                jobs = [Job(setting, setting.candidate(x), x, True) for x in setting.choose]
                self.waiting.extend(jobs)
            else:
                self.waiting.append(Job(setting, setting.agent()))

    def run(self) -> None:
        """Train until everything is done, or until it is told to stop."""
        task = self._task()
        with answered(self._answer), View(self) as view:
            try:
                while (self.waiting or self.running) and not self.is_stopping:
                    while self.waiting and len(self.running) < self._room():
                        self._submit(task, view)
                    ready, _ = self.ray.wait(list(self.running), timeout=POLL)
                    for reference in ready:
                        self._finish(reference, view)
                    view.show()
            finally:
                self._stop()

    def _task(self):
        """The function that Ray runs in its workers."""
        root = str(ROOT)

        def train(agent, gpus):  # a plain dict: the worker does not know our modules yet
            import sys

            sys.path[:0] = [root, f"{root}/benchmark"]
            import study

            return study.run_agent(study.Agent(**agent), gpus)

        return self.ray.remote(
            num_cpus=self.options.cpus_per_run,
            num_gpus=self.options.gpus_per_run,
            max_retries=self.options.retries,
            retry_exceptions=[ChildProcessError],
        )(train)

    def _room(self) -> int:
        """How many runs fit into the cluster as it is now."""
        has = self.ray.cluster_resources()
        fits = has.get("CPU", 0) / self.options.cpus_per_run
        if self.options.gpus_per_run:
            fits = min(fits, has.get("GPU", 0) / self.options.gpus_per_run)
        return min(int(fits), self.options.jobs or math.inf)

    def _submit(self, task, view):
        job = self.waiting.popleft()
        job.began = time.monotonic()
        job.look()
        where = f"continues at step {job.history.step:,}" if job.history else "starts"
        agent = dataclasses.asdict(job.agent)
        reference = task.options(name=job.name).remote(agent, self.options.gpus_per_run)
        self.running[reference] = job
        view.say(f"{job.name} {where}")

    def _finish(self, reference, view):
        job = self.running.pop(reference)
        self.durations.append(time.monotonic() - job.began)
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            result = {"failed": str(error).strip().splitlines()[-1]}
        if "failed" in result:
            view.say(f"{job.name} failed: {result['failed']}")
        if job.is_candidate:
            self._choose(job, result)
        elif "failed" in result:
            self.failed.append(job.name)
        else:
            self._record(job, result)
            self.finished += 1
            view.say(f"{learning.describe(job.agent)} ({self})")

    def _choose(self, job, result):
        """Once all candidates of a setting are there, train that of the best learning rate."""
        setting = job.setting
        found = self.found.setdefault(setting, {})
        found[job.rate] = result["values"]["returns"] if "values" in result else None
        if len(found) < len(setting.choose):
            return
        # Of equals the first: `max` takes it.
        best = max(setting.choose, key=lambda rate: score_of(found[rate]))
        if found[best] is None:
            self.failed.append(setting.agent().id)
        else:
            self.waiting.appendleft(Job(setting, setting.agent(best), best))

    def _record(self, job, result):
        setting = job.setting
        agent = job.agent
        own = {name: getattr(setting, name) for name in ("study", "task", "script", "memory")}
        choice = None
        if setting.choose:
            choice = {
                "learning_rates": list(setting.choose),
                "returns": [self.found[setting][rate] for rate in setting.choose],
                "seeds": [RESERVED + i for i in range(CHOOSING_SEEDS)],
            }
        values = own | result["values"] | {"choice": choice}
        costs = own | result["cost"]
        results.record(cost_of(agent.result), costs, agent.command, **result["about"])
        results.record(agent.result, values, agent.command, **result["about"])

    def seconds_left(self) -> float:
        """An estimate from the runs in training and those that were finished; nan if unknown."""
        now = time.monotonic()
        known = [job for job in self.running.values() if math.isfinite(job.seconds_left)]
        lefts = [job.seconds_left for job in known]
        totals = self.durations or [now - job.began + job.seconds_left for job in known]
        if not totals:
            return math.nan
        # A setting whose rate is still to be chosen has a run to come that is in no list.
        to_choose = {job.setting for job in [*self.waiting, *self.running.values()]}
        to_come = len(self.waiting) + sum(bool(x.choose) for x in to_choose)
        unknown = len(self.running) - len(known)
        work = sum(lefts) + (to_come + unknown) * float(np.mean(totals))
        return work / max(1, len(self.running))

    def __str__(self):
        words = [f"{self.finished} of {len(self.settings)} done", f"{len(self.running)} running"]
        words += [f"{len(self.failed)} failed"] if self.failed else []
        left = self.seconds_left()
        words += [f"{duration(left)} left"] if left > 0 else []
        return ", ".join(words)

    def _stop(self):
        """Stop all runs after a checkpoint, and wait for them."""
        references = list(self.running)
        for reference in references:
            self.ray.cancel(reference)
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        for job in self.running.values():
            while is_running(job.agent.run_dir) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _answer(self, number):
        """What happens when Ctrl-C or SIGTERM arrives; in a thread of its own."""
        if self.is_stopping:
            end_at_once(number)
        self.is_stopping = True
        say("stopping the runs at their next report; press Ctrl-C again to stop at once")


def score_of(returns) -> float:
    """The mean of a candidate's returns; -inf if a seed has diverged, or all have."""
    return -math.inf if returns is None else score(returns, "mean")


class View:
    """The state of a study on a terminal, redrawn in place; elsewhere lines of what happens."""

    def __init__(self, studying):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self.studying = studying
        self.console = Console(soft_wrap=True, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.all = self.bars.add_task("", total=1, left="")
        self.by_job = {}

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def say(self, line: str) -> None:
        self.console.print(clean(line), markup=False)
        self.console.file.flush()

    def show(self) -> None:
        """Draw how far everything is."""
        studying = self.studying
        if self.bars.disable:
            return
        running = {job.name: job for job in studying.running.values()}
        for name in [name for name in self.by_job if name not in running]:
            self.bars.remove_task(self.by_job.pop(name))
        for name, job in running.items():
            job.look()
            left = f"{duration(job.seconds_left)} left" if job.seconds_left > 0 else ""
            if name not in self.by_job:
                self.by_job[name] = self.bars.add_task(name, total=1, left="")
            self.bars.update(self.by_job[name], completed=job.progress, left=left)
        done = studying.finished / max(1, len(studying.settings))
        self.bars.update(self.all, description=str(studying), completed=done)
        self.bars.refresh()


# --- The command ---------------------------------------------------------------------------------


def read_command(words: list[str]):
    parser = argparse.ArgumentParser(
        prog="study.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = "a study of the file, then names of tasks, scripts and memories; by default all"
    parser.add_argument("names", nargs="*", metavar="name", help=names)
    parser.add_argument("--list", action="store_true", help="train nothing, print the commands")
    parser.add_argument("--address", help="of a Ray cluster, such as auto; without it, a local one")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (as many as fit)")
    parser.add_argument("--cpus-per-run", type=float, default=1, help="cores of a run (1)")
    parser.add_argument("--gpus-per-run", type=float, default=0, help="GPUs of a run (0), also 0.5")
    parser.add_argument("--retries", type=int, default=3, help="after a node or process died (3)")
    parser.add_argument("--file", type=Path, default=FILE, help="the study file (study.toml)")
    parser.add_argument("--runs", default="", help="folder of the runs, seen by all nodes (runs)")
    options = parser.parse_args(words)
    options.study, *options.names = options.names or [None]
    for name, is_valid in (
        ("jobs", options.jobs >= 0),
        ("cpus-per-run", options.cpus_per_run > 0),
        ("gpus-per-run", options.gpus_per_run >= 0),
        ("retries", options.retries >= 0),
    ):
        if not is_valid:
            raise UsageError(f"--{name} must not be so small")
    if options.runs:
        options.runs = str(Path(options.runs).absolute())
    return options


def connect(ray, options) -> None:
    """Connect to the cluster, or start one on this machine.

    Raises:
      UsageError: there is none, or none of its nodes has what a run needs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    local = {} if options.address else {"include_dashboard": False}
    try:
        ray.init(address=options.address or "local", **quiet, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"no Ray cluster at {options.address!r}: {reason}") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": options.cpus_per_run, "GPU": options.gpus_per_run}
    if not any(all(has.get(kind, 0) >= wanted[kind] for kind in wanted) for has in nodes):
        most = ", ".join(f"{max(has.get(kind, 0) for has in nodes):g} {kind}s" for kind in wanted)
        asked = ", ".join(f"{number:g} {kind}s" for kind, number in wanted.items())
        raise UsageError(f"a run takes {asked}, and no node has that: at most {most}")


def list_settings(settings: list[Setting]) -> None:
    for setting in settings:
        agent = setting.reported()
        print(f"{setting.study}/{learning.describe(agent)}\n    {agent.command}")
        if setting.choose and not setting.is_done():
            rates = ", ".join(f"{rate:g}" for rate in setting.choose)
            print(f"    with the best of the learning rates {rates}")


def carry_out(options) -> Studying | None:
    """What the command asks for; the study that was trained, if any."""
    studies = read_studies(options.file, options.runs)
    if options.study is None and not options.list:
        raise UsageError(f"which study? {options.file.name} has {', '.join(studies)}")
    if options.study is None:
        list_settings([setting for settings in studies.values() for setting in settings])
        return None
    check_choice("the study", options.study, studies)
    settings = select(studies[options.study], options.names)
    if options.list:
        list_settings(settings)
        return None
    ray = import_optional("ray", "study.py")
    studying = Studying(ray, options, settings)
    if studying.waiting:
        from filelock import FileLock, Timeout

        folder = Path(options.runs or learning.RUNS) / "study" / options.study
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=1):
                connect(ray, options)  # first, as it forks: after that jax may have threads
                check_options([setting for setting in settings if not setting.is_done()])
                studying.run()
        except Timeout:
            raise UsageError(f"{folder} is in use by another process") from None
        finally:
            ray.shutdown()
    print(f"{options.study}: {studying}", flush=True)
    return studying


def main():
    jax.config.update("jax_platforms", "cpu")  # of this process: GPUs are for the runs
    try:
        studying = carry_out(read_command(sys.argv[1:]))
    except (UsageError, RunError) as error:
        print(f"error: {clean(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    if studying and studying.is_stopping:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    if studying and studying.failed:
        names = ", ".join(studying.failed)
        print(f"error: these ended with an error, see above: {names}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
