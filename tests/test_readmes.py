"""The documents are true: links lead somewhere, commands parse, every metric is explained."""

import ast
import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import urllib.parse
from argparse import ArgumentParser

import jax
import numpy as np
import pytest
import tyro
from helpers import ALGORITHMS, SCRIPTS, tiny

from experiment import seed_keys
from harness.errors import check_types
from harness.metrics import scalars
from harness.options import read_words, without_short_forms

ROOT = ALGORITHMS.parent
NOT_OURS = ("build", "runs", "shared", "venv", "node_modules")


def find_documents(folder):
    """Every .md file of the repository, without hidden folders and those that are generated."""
    for path in sorted(folder.iterdir()):
        is_hidden = path.name.startswith(".") and path.name != ".github"
        if path.is_dir() and not is_hidden and path.name not in NOT_OURS:
            yield from find_documents(path)
        elif path.suffix == ".md":
            yield path


DOCUMENTS = list(find_documents(ROOT))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)


# --- Markdown ------------------------------------------------------------------------------------

FENCE = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^\1\2 *$", re.M | re.S)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)|^\[[^\]]+\]:\s*(\S+)", re.M)


def blocks(document, *languages):
    """The fenced blocks of these languages."""
    fences = FENCE.findall(document.read_text())
    return [body for _, _, language, body in fences if language in languages]


def prose(document):
    """The text outside of fenced blocks."""
    return FENCE.sub("", document.read_text())


def code_spans(document):
    """What stands between backticks, in the text and in tables, each on one line."""
    paragraphs = re.split(r"\n\s*\n", prose(document).replace("\\|", "|"))
    spans = [span for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", paragraph)]
    return [" ".join(span.split()) for span in spans if span.strip()]


def links(document):
    text = re.sub(r"`[^`]*`", "", prose(document))
    return ["".join(groups) for groups in LINK.findall(text)]


def anchors(document):
    """The names under which GitHub links to the headings."""
    found = set(re.findall(r"(?:id|name)=[\"']([^\"']+)", prose(document)))
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(document), re.M):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link only its text counts
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        twins = (f"{name}-{i}" if i else name for i in range(1000))
        found.add(next(twin for twin in twins if twin not in found))
    return found


def problem_of_link(link, document):
    path, _, anchor = link.partition("#")
    path = urllib.parse.unquote(path)
    target = ROOT / path[1:] if path.startswith("/") else document.parent / path
    target = target.resolve() if path else document
    if not (target.is_relative_to(ROOT) and target.exists()):
        return "there is no such file"
    if anchor and (target.suffix != ".md" or anchor not in anchors(target)):
        return "there is no such heading"
    return ""


def only(problems):
    """Those that are any."""
    return {where: problem for where, problem in problems.items() if problem}


@every_document
def test_links_and_images_lead_somewhere(document):
    local = [link for link in links(document) if not re.match(r"\w+:", link)]
    assert not only({link: problem_of_link(link, document) for link in local})


# --- Commands ------------------------------------------------------------------------------------

PROGRAMS = ("cd", "codespell", "git", "neptune", "ruff", "source", "tensorboard", "uv", "wandb")


class Parsed(BaseException):
    """A script has parsed its command line; nothing that comes after it is to run."""


def stop_after(parse):
    def wrapper(first, *args, **kwargs):
        result = parse(first, *args, **kwargs)
        if isinstance(first, ArgumentParser) and type(first) is not ArgumentParser:
            return result  # a parser within `tyro.cli`
        raise Parsed

    return wrapper


def passes_on(path):
    """Whether a script gives the options that are not its own to another one."""
    return "parse_known_args(" in path.read_text()


def start(path, args):
    """Start a script until it has parsed its command line: whether it could, what it printed."""
    if not re.search(r"parse_args\(|parse_known_args\(|launch\(|tyro\.cli\(", path.read_text()):
        return not args, "it takes no options"
    parse = "parse_known_args" if passes_on(path) else "parse_args"
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [str(path), *args])
        patch.setattr(tyro, "cli", stop_after(tyro.cli))
        patch.setattr(ArgumentParser, parse, stop_after(getattr(ArgumentParser, parse)))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except Parsed:
                return True, output.getvalue()
            except SystemExit as end:
                return not end.code, output.getvalue()
            finally:
                gc.enable()  # `launch` turns it off
    return False, "it never looked at its command line"


def parse_config(path, args):
    """Parse the command line of an algorithm: whether it is valid, what was printed."""
    module, output = importlib.import_module(f"algorithms.{path.stem}"), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            words = without_short_forms(list(args), module.Config)
            values = read_words(words, module.Config, {})
            check_types(module.Config, values)
            module.Config(**values)
        except SystemExit as end:
            return not end.code, output.getvalue()
        except ValueError as error:
            return False, str(error)
    return True, ""


@functools.cache
def try_arguments(path, args):
    return parse_config(path, args) if path.parent == ALGORITHMS else start(path, args)


@functools.cache
def options_of(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        _, text = try_arguments(path, ("--help",))
    return set(re.findall(r"--[a-z][\w-]*", text))


@functools.cache
def options_of_any_script():
    scripts = [ALGORITHMS / f"{script}.py" for script in SCRIPTS]
    options = set().union(*map(options_of, [*scripts, ROOT / "envs.py", ROOT / "loggers.py"]))
    for path in (ROOT / "benchmark").glob("*.py"):
        options |= set(re.findall(r"\"(--[a-z][\w-]*)\"", path.read_text()))
    return options


def unknown_options(words, known):
    unknown = {word for word in words if re.match(r"--[a-z]", word)} - known
    return f"unknown options {sorted(unknown)}" if unknown else ""


def simple_commands(line):
    """The commands of a line of shell as words, without redirections and variables before them."""
    line = re.sub(r"<([\w -]+)>", lambda match: re.sub(r"\W", "_", match[1]), line)  # as in <run>
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands, words = [[]], iter(lexer)
    for word in words:
        if word in ("&&", "||", ";", "|", "&"):
            commands.append([])
        elif word in (">", ">>", "<"):
            next(words)
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [command for command in commands if command]


def problem_of_script(path, args):
    """What a script says against its arguments; where ... is among them, only against options."""
    if "..." in args or path.parent != ALGORITHMS:  # argparse would take shortened ones
        others = options_of_any_script() if passes_on(path) else set()
        problem = unknown_options(args, options_of(path) | others)
        if problem or "..." in args:
            return problem
    is_valid, output = try_arguments(path, tuple(args))
    return "" if is_valid else output


def problem_of_python(args, copies):
    script, *rest = args
    if script == "-c":
        return "; ".join(problems_of_code(rest[0]))
    if script == "-m":
        return "" if importlib.util.find_spec(rest[0]) else f"there is no module {rest[0]}"
    path = copies.get(script, ROOT / script)
    return problem_of_script(path, rest) if path.is_file() else f"there is no {script}"


def problem_of_command(words, copies):
    """Why a command would fail; `copies` maps what `cp` made to the files they are copies of."""
    program, *args = words
    files = [arg for arg in args if not arg.startswith("-")]
    if program in ("python", "python3"):
        return problem_of_python(args, copies)
    if program.endswith(".py"):
        return problem_of_python(words, copies)
    if program == "pip":
        pairs = zip(args, args[1:], strict=False)
        needed = [name for flag, name in pairs if flag == "-r"]
    elif program == "cp":
        *needed, copy = files
        copies[copy] = ROOT / files[0]
    elif program == "diff":
        needed = files
    elif program == "pytest":
        needed = [name.partition("::")[0] for name in files if re.search(r"/|\.", name)]
    elif "/" in program:
        needed = [program]
    else:
        return "" if program in PROGRAMS else f"{program} is not known to this test"
    missing = [name for name in needed if not (ROOT / name).exists()]
    return f"there is no {', '.join(missing)}" if missing else ""


def problem_of_span(span, copies):
    """Why a command between backticks would fail; '' also for what is no command."""
    first, *rest = span.split()
    if first.startswith("--"):
        return unknown_options(span.split(), options_of_any_script())
    is_script = first.endswith(".py") and rest and rest[0].startswith("-")
    is_program = first in ("python", "python3", "pip", "pytest", "cp", "diff") and rest
    if not (is_script or is_program) or rest[0].endswith("..."):
        return ""
    for place in (ROOT, ALGORITHMS, ROOT / "benchmark"):  # tables of commands leave out the folder
        if is_script and (place / first).is_file():
            span = f"{(place / first).relative_to(ROOT)} {' '.join(rest)}"
    problems = [problem_of_command(command, copies) for command in simple_commands(span)]
    return " ".join(filter(None, problems))


@every_document
def test_commands_are_understood(document):
    """Each is parsed as its script does it: unknown options, values and environments are errors."""
    shell, copies, problems = blocks(document, "bash", "sh", "shell", "console"), {}, {}
    for line in "".join(shell).replace("\\\n", " ").splitlines():
        for command in simple_commands(line):
            problems[" ".join(command)] = problem_of_command(command, copies)
    for span in code_spans(document):
        problems[span] = problem_of_span(span, copies)
    assert not only(problems)


# --- Python --------------------------------------------------------------------------------------


def problems_of_code(code):
    """Why Python code would not run, as far as syntax and imports tell."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError as error:
        return [f"{error.msg} in line {error.lineno}"]
    wanted = [(a.name, "") for node in nodes if isinstance(node, ast.Import) for a in node.names]
    from_nodes = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    wanted += [(node.module, a.name) for node in from_nodes for a in node.names]
    wanted = [(module, name) for module, name in wanted if module not in OPTIONAL]
    return [f"{module} has no {name}" for module, name in wanted if not exists(module, name)]


OPTIONAL = ("onnxruntime",)  # what a reader may install, and requirements.txt does not


def exists(module, name):
    try:
        found = importlib.import_module(module)
        return not name or hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}")
    except ImportError:
        return False


@every_document
def test_python_compiles_and_its_imports_exist(document):
    assert not only({code: problems_of_code(code) for code in blocks(document, "python")})


@every_document
def test_quoted_lines_are_in_the_scripts(document):
    """A block that begins with a comment of file names quotes lines of these scripts."""

    def squeezed(code):
        return re.sub(r"\s|,(?=\s*[)\]])", "", code)  # however the lines are broken

    for block in blocks(document, "python"):
        first, *lines = block.splitlines()
        if re.fullmatch(r"#( \w+\.py)+", first):
            for name in first.split()[1:]:
                source = squeezed((ALGORITHMS / name).read_text())
                assert not [line for line in lines if squeezed(line) not in source], name


# --- Metrics -------------------------------------------------------------------------------------

ROW = re.compile(r"^\| `([\w*]+/\w+)` \|[^|]*\| ([^|]*?) \|", re.M)  # name, definition, scripts
METRICS = ROW.findall((ALGORITHMS / "README.md").read_text())


def explained(family):
    """The metrics of which algorithms/README.md says that this family of scripts logs them."""
    return {name for name, families in METRICS if family in families.split(", ")}


def family_of(script):
    """The name in that table for a script and its siblings: DQN for dqn and drqn."""
    return script.removesuffix("_continuous").upper().replace("DRQN", "DQN").removeprefix("R")


@functools.cache
def logged_by(script):
    """The metrics that `update` returns."""
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module)
    state = jax.eval_shape(lambda: module.init(config, seed_keys(config)))
    one_seed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
    update = functools.partial(module.update, env=config.make_env())
    return set(jax.eval_shape(update, one_seed)[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_of_a_script_is_explained(script):
    common, logged = explained("all"), logged_by(script)
    own = {name for name in explained(family_of(script)) if not name.startswith("eval/")}
    assert own and logged - own - common == set(), "in algorithms/README.md these are missing"
    assert own - logged == set(), f"{script}.py logs none of these"
    assert common - logged == common - logged_by("ppo"), "not all scripts log these"


def test_every_metric_of_a_run_is_explained(tmp_path):
    """In a run of two seeds, as its record names them and as the other loggers do."""
    ppo = importlib.import_module("algorithms.ppo")
    ppo.main(tiny(ppo, num_seeds=2, log=("file",), run_dir=str(tmp_path / "run")))
    metrics = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        metrics |= {name: np.array(x, float) for name, x in json.loads(line).items() if "/" in name}
    logged = set(metrics)
    for name in set(scalars(metrics)) - logged:
        metric, _, suffix = name.rpartition("/")
        assert metric in metrics
        logged.add("*/" + re.sub(r"\d+", "i", suffix))
    assert logged - explained("all") - explained("PPO") == set(), "these are missing there"
    assert explained("all") - logged == set(), "nobody logs these"


def test_the_table_of_metrics_has_one_row_for_each_and_known_scripts():
    names, families = zip(*METRICS, strict=True)
    assert len(set(names)) == len(names)
    known = {family_of(script) for script in SCRIPTS} | {"all"}
    assert set(", ".join(families).split(", ")) <= known


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
