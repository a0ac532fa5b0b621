"""Errors that users see, and the checks of options and libraries that raise them."""

import difflib
import importlib
import shlex

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
