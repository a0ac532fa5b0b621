"""Imports of libraries that may be missing, that print, or that import more than is used of them."""

import contextlib
import importlib
import io
import os
import sys
import types
import warnings


@contextlib.contextmanager
def imported_when_used(*names):
    """Within, `import name` gives a module that is really imported when something in it is used."""
    stand_ins = [name for name in names if name not in sys.modules]
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda item, name=name: getattr(importlib.import_module(name), item)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


@contextlib.contextmanager
def silence():
    """Nothing is printed, no warning shown."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def import_silently(module: str, owner: str, package: str):
    """The module, without what it prints and warns of; a ValueError that says how to install it if it is missing."""
    try:
        with silence():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{owner} needs {error.name}, which is not installed: pip install {package!r}") from None


def let_pygame_run_anywhere():
    """Let pygame draw on a machine without a screen or a sound card."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
