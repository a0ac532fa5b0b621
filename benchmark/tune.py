"""Search for good options of a script with Optuna: trials that are trained, compared and pruned.

    python benchmark/tune.py rppo.py --env gymnax::CartPole-v1 --mask velocity \\
        --total-steps 200_000 --trials 40 --parallel 2 --seeds 3 \\
        --search "learning_rate log 1e-4 1e-2" "num_steps choice 32 64 128"

The script is one of algorithms/, or a file of your own with a `Config` such as theirs. Options that
are not tune.py's go to the script. --search takes fields of the script's Config, each in quotes:

    "NAME log LOW HIGH"        a number, every order of magnitude alike
    "NAME uniform LOW HIGH"    a number, every value alike
    "NAME choice A B C"        one of these

The first trial has the script's own values, if the search contains them. Others are proposed by
Optuna (TPE). Numbers of a field that is whole are whole; of others Optuna proposes four digits.

A trial is a process of the script in a directory of its own. Its objective is that of the seeds'
greedy returns in the last evaluation. It is pruned if its evaluations fall behind those of the
other trials. If the script refuses a configuration, the trial counts as pruned; where a loss has
become nan or inf, the seed's return is -inf.

Everything is under runs/tune/NAME, and the same command continues there: after Ctrl-C, after a
crash, or with more --trials. Trials that were running continue from their last checkpoint.
`optuna-dashboard sqlite:///runs/tune/NAME/study.db` shows a study in the browser.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import jax
import numpy as np
import results

from harness.errors import (
    Options,
    RunError,
    UsageError,
    check_types,
    did_you_mean,
    import_optional,
)
from harness.metrics import GREEDY, METRICS_FILE, as_json, read_metrics
from harness.options import (
    Experiment,
    check_memory_options,
    check_ranges,
    read_words,
    whole_number,
)
from harness.output import warn
from harness.run_dir import is_running, numerical_sources
from harness.signals import answered, end_at_once, say
from harness.text import clean

ROOT = Path(__file__).parent.parent
ALGORITHMS = ROOT / "algorithms"
FOLDER = Path("runs") / "tune"
RESERVED = 100  # seeds below it are for reported results, never for a choice: scripts begin at 0
OBJECTIVES = {"mean": np.mean, "median": np.median, "worst": np.min}
EVALUATIONS = 10  # of a trial, unless --eval-every is given
PATIENCE = 60  # seconds that a process may take to end before it is killed
# How a script ends its refusal of a directory that another process has.
TAKEN = ("is in use by another process", "exists; choose another with --run-dir")
SHOWN = 10  # trials of the table at the end

# --- The command ---------------------------------------------------------------------------------

# Options of the script that tune.py sets itself -> what to give instead.
SET_HERE = {
    "num_seeds": "--seeds",
    "run_dir": "--name",
    "resume": "the same command again",
    "evaluate": "the script itself",
}
# What makes returns comparable is the same for all trials.
SAME_FOR_ALL = {"env", "env_kwargs", "mask", "eval_policy"} | {
    field.name for field in dataclasses.fields(Experiment)
}


def read_command(words: list[str]):
    """The options of a command line, and with them `script`, `config_class`, `words` and `spaces`.

    `words` go to the script as they are; `spaces` is {field: its distribution in Optuna}.

    Raises:
      UsageError: names what is wrong, and what is valid.
    """
    parser = argparse.ArgumentParser(
        prog="tune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("script", help="such as rppo.py")
    parser.add_argument("--search", nargs="+", action="extend", required=True, metavar="FIELD")
    parser.add_argument("--trials", type=int, default=40, help="of the whole study (40)")
    parser.add_argument("--parallel", type=int, default=1, help="trials at a time (1)")
    parser.add_argument("--seeds", type=int, default=3, help="of every trial (3)")
    parser.add_argument("--seed", type=int, default=1000, help="the first of them (1000)")
    parser.add_argument("--objective", default="mean", help="mean, median or worst of the seeds")
    parser.add_argument("--pruner", default="median", help="median, hyperband or none")
    parser.add_argument("--name", default="", help="of the study; by default made of the command")
    command, command.words = parser.parse_known_args(words)
    for name, least in (("trials", 0), ("parallel", 1), ("seeds", 1)):
        if getattr(command, name) < least:
            raise UsageError(f"--{name} must be {least} or more, got {getattr(command, name)}")
    check_choice("--objective", command.objective, OBJECTIVES)
    check_choice("--pruner", command.pruner, ("median", "hyperband", "none"))
    if command.seed < RESERVED:
        last = command.seed + command.seeds - 1
        chosen = f"--seed {command.seed} --seeds {command.seeds} would choose by seeds up to {last}"
        reserved = f"those below {RESERVED} are for results"
        raise UsageError(f"{chosen}, and {reserved}: begin at {RESERVED} or later")
    command.script, command.config_class = find_script(command.script)
    command.spaces = {}
    for text in command.search:
        name, space = read_space(text, command)
        if name in command.spaces:
            raise UsageError(f"{name} is searched twice")
        command.spaces[name] = space
    return check_words(command)


def import_optuna():
    """Optuna, which is not among the requirements; it only speaks if something is wrong."""
    optuna = import_optional("optuna", "tune.py")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def check_choice(option: str, value: str, valid) -> None:
    if value not in valid:
        hint = did_you_mean(value, list(valid))
        raise UsageError(f"{option} must be one of {', '.join(valid)}, got {value!r}{hint}")


def find_script(name: str):
    """The file of a script, and its Config."""
    path = Path(name)
    own = ALGORITHMS / f"{path.stem}.py"
    if path.parent == Path() and not path.exists() and own.exists():
        return own, importlib.import_module(f"algorithms.{path.stem}").Config
    if path.suffix != ".py" or not path.is_file():
        known = [file.name for file in ALGORITHMS.glob("[a-z]*.py")]
        raise UsageError(f"no script {name!r}{did_you_mean(name, known)}")
    spec = importlib.util.spec_from_file_location(f"tuned_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its source is looked for
    spec.loader.exec_module(module)
    if not hasattr(module, "Config"):
        raise UsageError(f"{name} has no Config, as the scripts in algorithms/ have")
    return path, module.Config


def read_space(text: str, command):
    """A field of the script's Config and the distribution of its values, from "NAME KIND ...".

    Raises:
      UsageError: the script has no such field, or the values are not valid for it.
    """
    optuna = import_optuna()
    name, *rest = text.replace(",", " ").split() or [""]
    name = name.replace("-", "_")
    config_class = command.config_class
    hints = typing.get_type_hints(config_class)
    if name not in hints:
        check_memory_options([f"--{name}"], config_class)
        hint = did_you_mean(name, sorted(hints.keys() - SAME_FOR_ALL))
        raise UsageError(f"{command.script.name} has no option {name!r} to search{hint}")
    if name in SAME_FOR_ALL or hints[name] == Options:
        raise UsageError(f"{name} is not to be searched: give all trials the same")
    example = f'"{name} log LOW HIGH", "{name} uniform LOW HIGH" or "{name} choice A B C"'
    if len(rest) < 2:
        raise UsageError(f"--search {text!r} is not complete: write {example}")
    kind, *values = rest
    check_choice(f"the kind of search for {name}", kind, ("log", "uniform", "choice"))
    values = [read_value(name, word, hints[name]) for word in values]
    for value in values:
        check_value(config_class, name, value)
    if kind == "choice":
        return name, optuna.distributions.CategoricalDistribution(values)
    if hints[name] not in (int, float):
        raise UsageError(f'{name} is no number: write "{name} choice A B C"')
    if len(values) != 2 or not values[0] < values[1] or (kind == "log" and values[0] <= 0):
        lowest = " greater than 0" if kind == "log" else ""
        raise UsageError(f'--search "{name} {kind}" takes LOW{lowest} and HIGH, got {text!r}')
    whole = hints[name] is int
    distribution = "IntDistribution" if whole else "FloatDistribution"
    return name, getattr(optuna.distributions, distribution)(*values, log=kind == "log")


def read_value(name: str, word: str, kind):
    """A word of the command line as a value of a field of this type.

    Raises:
      UsageError: it is none.
    """
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise UsageError(f"{name} must be true or false, got {word!r}")
        return word.lower() == "true"
    try:
        return {int: whole_number, float: float}.get(kind, str)(word)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} must be {wanted}, got {word!r}") from None


def check_value(config_class, name: str, value) -> None:
    """Refuse a value that the field has in no configuration.

    Raises:
      UsageError: names the field, its value and what is valid.
    """
    try:
        check_types(config_class, {name: value})
        check_ranges(dataclasses.make_dataclass("Single", [name])(value))
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_words(command):
    """The command, with the `config` that its words give, once it is sure that trials can run.

    Raises:
      UsageError: a word sets what tune.py sets or searches, or no trial would be accepted.
    """
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in command.words]
    for flag, word in zip(flags, command.words, strict=True):
        positive = flag.removeprefix("no_")
        if word.startswith("--") and flag in SET_HERE:
            raise UsageError(f"tune.py has no {word}: use {SET_HERE[flag]}")
        if word.startswith("--") and (flag in command.spaces or positive in command.spaces):
            raise UsageError(f"{word} is given and searched: leave one of them out")
    check_memory_options(command.words, command.config_class)
    values = read_words(command.words, command.config_class, {})
    values |= {"seed": command.seed, "num_seeds": command.seeds}
    if "eval_every" not in flags:
        values["eval_every"] = max(1, values["total_steps"] // EVALUATIONS)
    if values.get("eval_policy") == "sample":
        raise UsageError("tune.py compares greedy returns: leave --eval-policy sample out")
    optuna = import_optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = [study.ask(command.spaces).params for _ in range(20)]
    command.own = {name: values[name] for name in command.spaces}
    refusals = []
    for params in [command.own] * is_searched(command) + draws:
        try:
            check_types(command.config_class, values | params)
            command.config = command.config_class(**values | params)
            return command
        except ValueError as error:
            refusals.append(error)
    raise UsageError(f"{command.script.name} would refuse every trial: {refusals[0]}")


def is_searched(command) -> bool:
    """Whether the search contains the values that the script has without it."""

    def contains(space, value):
        if hasattr(space, "choices"):
            return value in space.choices
        return space.low <= value <= space.high

    return all(contains(space, command.own[name]) for name, space in command.spaces.items())


def definition(command) -> dict:
    """What all commands that continue a study have in common."""
    return {
        "script": shown_path(command.script),
        "options": shlex.join(command.words),
        "search": "; ".join(" ".join(text.split()) for text in sorted(command.search)),
        "seeds": command.seeds,
        "seed": command.seed,
        "objective": command.objective,
        "pruner": command.pruner,
    }


def shown_path(path: Path) -> str:
    """The path of a script as one writes it in the root of this project."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def to_words(params: dict) -> list[str]:
    """The options of a script that give it these values."""
    words = []
    for name, value in params.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


# --- The study -----------------------------------------------------------------------------------


def make_sampler(seed: int):
    """Optuna's TPE with numbers of four digits: what it knows of a trial is what was trained."""
    optuna = import_optuna()

    class FewDigits(optuna.samplers.TPESampler):
        def sample_independent(self, study, trial, name, space):
            value = super().sample_independent(study, trial, name, space)
            if not isinstance(space, optuna.distributions.FloatDistribution):
                return value
            return min(max(float(f"{value:.4g}"), space.low), space.high)

    return FewDigits(constant_liar=True, seed=seed)


def open_study(command, folder: Path):
    """The study in a folder, new or to be continued; what was interrupted waits to be run again.

    Raises:
      UsageError: the folder is of another command.
    """
    optuna = import_optuna()
    pruners = optuna.pruners
    num_evaluations = command.config.total_steps // command.config.eval_every
    pruner = {
        "median": pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=num_evaluations // 5),
        "hyperband": pruners.HyperbandPruner(max_resource=max(1, num_evaluations)),
        "none": pruners.NopPruner(),
    }[command.pruner]
    study = optuna.create_study(
        study_name="tune",
        storage=f"sqlite:///{folder / 'study.db'}",
        direction="maximize",
        pruner=pruner,
        load_if_exists=True,
    )
    # A sampler with a fixed seed would propose the same trials again when a study is continued.
    study.sampler = make_sampler(len(study.trials))
    now = definition(command)
    was = study.user_attrs.get("definition", now)
    for name in now:
        if was[name] != now[name]:
            fact = f"{folder} was begun with {name} {was[name]!r}, not {now[name]!r}"
            raise UsageError(f"{fact}: give another --name")
    sources = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in numerical_sources(command.script).items()
    }
    if sources != study.user_attrs.get("sources", sources):
        warn(f"the code has changed since {folder} was begun: its trials are not comparable")
    if "definition" not in study.user_attrs:
        study.set_user_attr("sources", sources)
        study.set_user_attr("definition", now)
        if is_searched(command):
            study.enqueue_trial(command.own)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        run = trial.user_attrs.get("run", name_of(trial.number))
        study.enqueue_trial(trial.params, user_attrs={"run": run})
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def name_of(number: int) -> str:
    """The directory of the trial of this number."""
    return f"trial-{number:04}"


def score(returns, objective: str) -> float:
    """The objective of the returns (S,); nan is that of a seed that has diverged."""
    returns = np.nan_to_num(np.asarray(returns, float), nan=-np.inf)
    return float(OBJECTIVES[objective](returns))


class Training:
    """A trial of Optuna in training: a process of the script, and what it has reported.

    Attributes:
      process: None before it has been started, and where the process of another tune.py, which was
        killed, still trains this trial.
      state: "running", "pruned", or "diverged" and waiting for its end.
    """

    def __init__(self, command, study, trial, folder: Path):
        self.command = command
        self.study = study
        self.trial = trial
        name = trial.user_attrs.get("run", name_of(trial.number))
        trial.set_user_attr("run", name)
        self.run_dir = folder / name
        self.process = None
        self.is_resumed = False
        self.state = "running"
        self.asked = 0.0  # when the process was told to end
        self.step = 0  # of the last evaluation
        self.value = None
        self.reported = set()

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.run_dir.with_suffix(".log")

    def start(self) -> None:
        command = self.command
        words = [*command.words, *to_words(self.trial.params)]
        words += ["--seed", str(command.seed), "--num-seeds", str(command.seeds)]
        words += ["--eval-every", str(command.config.eval_every), "--log", "file"]
        if hasattr(command.config, "eval_policy"):
            words += ["--eval-policy", "greedy"]
        words += ["--resume" if self.run_dir.exists() else "--run-dir", str(self.run_dir)]
        environment = os.environ.copy()
        if command.parallel > 1:  # of a GPU that they share
            share = f"{0.75 / command.parallel:.2f}"
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(command.script), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is answered here
            )
        self.is_resumed = "--resume" in words

    def end(self, state: str) -> None:
        """Tell the process to stop, which it does at its next report."""
        self.state = state
        self.asked = time.monotonic()
        if self.process:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        if self.process:
            self.process.kill()

    def poll(self) -> bool:
        """Look what has happened: True if the trial is over, and Optuna knows how."""
        if self.process is None:
            if self.run_dir.exists() and is_running(self.run_dir):
                return False
            self.start()
        code = self.process.poll()
        self._read()
        if code is None:
            if self.asked and time.monotonic() > self.asked + PATIENCE:
                self.process.kill()
            return False
        return self._finish(code)

    def _read(self):
        """Report new evaluations to Optuna, and end the process if they are bad enough."""
        config = self.command.config
        for record in read_metrics(self.run_dir / METRICS_FILE):
            if GREEDY not in record or record["step"] <= self.step:
                continue
            self.step = record["step"]
            returns = np.atleast_1d(np.asarray(record[GREEDY], float))
            self.value = score(returns, self.command.objective)
            self.trial.set_user_attr("step", self.step)
            self.trial.set_user_attr("returns", as_json(returns))
            # Evaluations follow whole updates: those of two trials are at nearly the same steps.
            index = round(self.step / config.eval_every)
            if index in self.reported:
                continue
            self.reported.add(index)
            self.trial.report(self.value, index)
            if self.state != "running":
                continue
            if self.value == -np.inf:
                self.end("diverged")
            elif self.step < 0.95 * config.total_steps and self.trial.should_prune():
                self.end("pruned")

    def _finish(self, code: int) -> bool:
        from optuna.trial import TrialState

        sentence = last_line(self.log)
        is_refused = code == 2 and "cannot be written" not in sentence
        if is_refused and sentence.endswith(TAKEN) and self.run_dir.exists():
            self.process = None  # that of a tune.py which was killed has come first: wait for it
            return False
        if is_refused and self.is_resumed:  # of other code, or killed before there was anything
            self._begin_again(sentence)
            return False
        if self.state == "pruned":
            return self._tell(TrialState.PRUNED, f"pruned at step {self.step:,}")
        if self.state == "diverged" or (code == 1 and "training diverged" in sentence):
            self.value = -np.inf
            self._tell(TrialState.COMPLETE, "diverged")
        elif is_refused:
            self.trial.set_user_attr("refused", sentence)
            self._tell(TrialState.PRUNED, f"refused: {sentence}")
        elif code or self.value is None:
            what = f"failed with exit code {code}, see {self.log}: {sentence}"
            self._tell(TrialState.FAIL, what)
        else:
            self._tell(TrialState.COMPLETE, f"{self.command.objective} {self.value:.2f}")
        return True

    def _begin_again(self, reason: str):
        """Start anew, and keep what cannot be continued."""
        name = self.run_dir.name
        old = results.set_aside(self.run_dir)
        print(f"{name} begins again, and what it was is {old}: {clean(reason)}", flush=True)
        self.start()

    def _tell(self, state, what):
        from optuna.trial import TrialState

        value = self.value if state == TrialState.COMPLETE else None
        self.study.tell(self.trial, value, state)
        params = " ".join(f"{name}={x}" for name, x in self.trial.params.items())
        print(f"{self.run_dir.name}: {clean(what)}  ({params})", flush=True)
        return True


def last_line(log: Path) -> str:
    """The last sentence that a process has printed, without "error: "."""
    return results.last_line(log.read_text(errors="replace")).removeprefix("error: ")


class Tuning:
    """The trials of a study that are in training, and how they end."""

    def __init__(self, command, study, folder: Path):
        self.command = command
        self.study = study
        self.folder = folder
        self.trainings = []
        self.is_stopping = False

    def is_due(self) -> bool:
        """Whether another trial is to be started."""
        from optuna.trial import TrialState

        if self.is_stopping or len(self.trainings) >= self.command.parallel:
            return False
        trials = self.study.get_trials(deepcopy=False)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        if any("run" in trial.user_attrs for trial in waiting):  # it was interrupted
            return True
        # An interrupted trial and its repetition share a directory.
        begun = {trial.user_attrs["run"] for trial in trials if "run" in trial.user_attrs}
        return len(begun) < self.command.trials

    def run(self) -> None:
        """Train until the study has its trials, or until it is told to stop."""
        with answered(self._answer):
            try:
                while True:
                    while self.is_due():
                        trial = self.study.ask(self.command.spaces)
                        training = Training(self.command, self.study, trial, self.folder)
                        self.trainings.append(training)
                    if self.is_stopping or not self.trainings:
                        return
                    self.trainings = [each for each in self.trainings if not each.poll()]
                    time.sleep(0.2)
            finally:
                self._stop()

    def _stop(self):
        """End all processes; their trials can be continued."""
        started = [each for each in self.trainings if each.process]
        for each in started:
            each.end("stopped")
        for each in started:
            try:
                each.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                each.kill()

    def _answer(self, number):
        """What happens when Ctrl-C or SIGTERM arrives; in a thread of its own."""
        if self.is_stopping:
            for each in self.trainings:
                each.kill()
            end_at_once(number)
        self.is_stopping = True
        say("stopping the trials at their next report; press Ctrl-C again to stop at once")


# --- The report ----------------------------------------------------------------------------------


def report(command, study, folder: Path) -> None:
    """Print the best trials, what was important, and how to run the best one."""
    from optuna.trial import TrialState

    print()
    finished = study.get_trials(states=[TrialState.COMPLETE])
    pruned = study.get_trials(states=[TrialState.PRUNED])
    refused = sum("refused" in trial.user_attrs for trial in pruned)
    best = sorted(finished, key=lambda trial: trial.value, reverse=True)
    counts = f"{len(finished)} complete, {len(pruned) - refused} pruned, {refused} refused"
    others = {
        trial.user_attrs.get("run") for trial in study.trials if trial.state != TrialState.FAIL
    }
    failed = [trial.user_attrs.get("run") for trial in study.get_trials(states=[TrialState.FAIL])]
    if lost := {run for run in failed if run} - others:  # the rest was interrupted and repeated
        counts += f", {len(lost)} failed"
    print(f"{folder}: {counts}")
    if not best:
        return
    names = list(command.spaces)
    print(f"\n| | {command.objective} | the seeds | {' | '.join(names)} |")
    print(f"|{'---|' * (len(names) + 3)}")
    for trial in best[:SHOWN]:
        returns = trial.user_attrs.get("returns", [])
        seeds = ", ".join("diverged" if x is None else f"{x:.2f}" for x in returns)
        values = [str(trial.params[name]) for name in names]
        cells = (trial.user_attrs["run"], f"{trial.value:.2f}", seeds, *values)
        print(f"| {' | '.join(cells)} |")
    importances = importances_of(study)
    if importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in importances.items())
        print(f"\nimportance (PED-ANOVA): {shares}")
    words = [shown_path(command.script), *command.words, *to_words(best[0].params)]
    print("\nThe best trial. Its return is flattered, as its seeds chose it; others measure it:")
    print(f"\n    python {shlex.join(words)} --num-seeds 5")


def importances_of(study) -> dict:
    """The share of each field in the differences between trials, {} if there are too few."""
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with contextlib.suppress(ValueError, RuntimeError):
        if len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) >= 10:
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {}


def name_of_study(command) -> str:
    """The name that --name gives, or one that says what the study is."""
    if command.name:
        if not re.fullmatch(r"\w[\w.-]*", command.name):
            raise UsageError(f"--name takes letters, digits, -, _ and ., got {command.name!r}")
        return command.name
    hashed = hashlib.sha256(json.dumps(definition(command)).encode()).hexdigest()[:8]
    return f"{command.script.stem}-{results.slug(command.config.env)}-{hashed}"


def main():
    from filelock import FileLock, Timeout

    jax.config.update("jax_platforms", "cpu")  # of this process: GPUs are for the trials
    try:
        command = read_command(sys.argv[1:])
        folder = FOLDER / name_of_study(command)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=1):
                study = open_study(command, folder)
                tuning = Tuning(command, study, folder)
                tuning.run()
                report(command, study, folder)
        except Timeout:
            raise UsageError(f"{folder} is in use by another process") from None
    except (UsageError, RunError) as error:
        print(f"error: {clean(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    if tuning.is_stopping:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
