"""Errors that users see, and the checks of options and libraries that raise them."""

import difflib
import importlib
import math
import shlex
import types
import typing

Options = dict[str, int | float | bool | str]  # on the command line: name value name value ...


class UsageError(ValueError):
    """The user asked for something that cannot be done.

    Its message is shown to the user as it is, without a traceback; the process exits with code 2.
    """


class RunError(RuntimeError):
    """Training cannot continue.

    Its message is shown to the user as it is, without a traceback; the process exits with code 1.
    """


class Diverged(RunError):
    """Every seed has met a loss that is nan or inf."""


def did_you_mean(name: str, valid) -> str:
    """The hint " (did you mean 'this'?)" with the closest valid name, or "" if none is close.

    Args:
      valid: the valid names, or a dict from valid names to the names to show for them.
    """
    matches = difflib.get_close_matches(name, list(valid), n=1)
    if not matches:
        return ""
    shown = valid[matches[0]] if isinstance(valid, dict) else matches[0]
    return f" (did you mean {shown!r}?)"


def import_optional(module: str, owner: str, package: str | None = None):
    """Import a module of a library that may be missing.

    Args:
      owner: what needs it, for the error.
      package: what to pass to `pip install`, if it is not the name of the library.

    Raises:
      UsageError: the library, or another one that it needs, is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        missing = (error.name or library).partition(".")[0]
        # A library that is here may lack another one.
        wanted = (package or library) if missing == library else missing
        reason = f"{owner} needs {missing}, which is not installed"
        raise UsageError(f"{reason}: pip install {shlex.quote(wanted)}") from None


def check_options(owner: str, options: Options, defaults: dict) -> None:
    """Refuse options that `owner` does not have, and values of another type than their default.

    Raises:
      ValueError: names the option, its value and what is valid.
    """
    for name, value in options.items():
        if name not in defaults:
            hint = did_you_mean(name, defaults.keys())
            listing = f"valid options: {', '.join(defaults)}" if defaults else "it has none"
            raise ValueError(f"{owner} has no option {name!r}{hint}; {listing}")
        wanted = type(defaults[name])
        is_whole = wanted is float and type(value) is int
        if wanted in (bool, int, float, str) and type(value) is not wanted and not is_whole:
            raise ValueError(f"option {name} of {owner} must be {wanted.__name__}, got {value!r}")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"option {name} of {owner} must be finite, got {value!r}")


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Options: "names with a number, true, false or text each",
}


def check_types(config_class, values: dict) -> None:
    """Refuse values that the fields of a config cannot have.

    Raises:
      ValueError: names the field, its value and what is valid.
    """
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        hint = hints[name]
        if fits(value, hint):
            continue
        several = "" if typing.get_origin(hint) is not tuple else "each of "
        single = typing.get_args(hint)[0] if several else hint
        if typing.get_origin(single) is not typing.Literal:
            valid = f"a list, {several}them {NAMES[single]}" if several else NAMES[single]
            raise ValueError(f"{name} must be {valid}, got {value!r}")
        choices = typing.get_args(single)
        wrong = next((v for v in value if v not in choices), value) if several else value
        hint = did_you_mean(wrong, choices) if isinstance(wrong, str) else ""
        listing = ", ".join(map(str, choices))
        raise ValueError(f"{several}{name} must be one of {listing}, got {wrong!r}{hint}")


def fits(value, hint) -> bool:
    """Whether a value is of the type that a field of a config is annotated with."""
    origin = typing.get_origin(hint)
    parts = typing.get_args(hint)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(name, parts[0]) and fits(item, parts[1]) for name, item in items)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)
