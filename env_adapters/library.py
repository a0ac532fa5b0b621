"""Importing libraries that may be missing, that print, or that import more than is used here."""

import contextlib
import importlib
import io
import os
import sys
import types
import warnings

from harness.errors import import_optional


@contextlib.contextmanager
def imported_when_used(*names):
    """Inside the block, importing one of the named modules gives a stand-in.

    The stand-in imports the module when one of its attributes is used for the first time.
    """
    stand_ins = [name for name in names if name not in sys.modules]
    for name in stand_ins:
        stand_in = types.ModuleType(name)
        stand_in.__getattr__ = lambda item, name=name: getattr(importlib.import_module(name), item)
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


@contextlib.contextmanager
def silence():
    """Inside the block, Python prints nothing and shows no warnings."""
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def import_silently(module: str, owner: str, package: str):
    """Import a module and suppress what it prints.

    Args:
      owner: the environment or namespace that needs it, for the error.
      package: what to pass to `pip install`.

    Raises:
      ValueError: it is not installed; says how to install it.
    """
    with silence():
        return import_optional(module, owner, package)


@contextlib.contextmanager
def refusing(owner: str, options: dict):
    """Inside the block, a library makes an environment, and may refuse the user's options.

    Raises:
      ValueError: it does, with an exception of whatever kind; names the options and the reason.
    """
    try:
        yield
    except Exception as error:
        given = " ".join(f"{name} {value}" for name, value in options.items())
        reason = (str(error) or repr(error)).splitlines()[0]
        what = f"with {given}" if given else "on this machine"
        raise ValueError(f"{owner} cannot be made {what}: {reason}") from None


def let_pygame_run_anywhere():
    """Let pygame draw on a machine without a screen or a sound card."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
