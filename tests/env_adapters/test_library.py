"""Libraries are silent when they are imported; one that is missing is named."""

import os
import subprocess
import sys

import pytest

from env_adapters.registry import _make, full_id
from envs import make

IS_MISSING = "which is not installed: pip install"


def test_libraries_are_silent():
    """No warnings at import, nothing from the emulator at its beginning and at Python's end."""
    ids = ["navix::Empty-5x5", "gxm::Gymnasium/ALE/Pong-v5"]
    code = f"from envs import make; [make(id) for id in {ids}]"
    # XLA itself has remarks on what it reads from there.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize(
    ("module", "id", "package"),
    [
        ("gymnax", "gymnax::CartPole-v1", "gymnax"),
        ("ale_py", "gxm::Gymnasium/ALE/Pong-v5", "ale-py"),
        ("craftax", "craftax::Craftax-Symbolic-v1", "craftax"),
        ("navix", "navix::FourRooms", "navix"),
        ("popgym_arcade", "popgym_arcade::BreakoutEasy", "popgym-arcade"),
        ("gymnasium", "gxm::Gymnasium/CartPole-v1", "gymnasium"),
    ],
)
def test_a_missing_library_is_named(module, id, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(module), *sys.meta_path])
    with pytest.raises(ValueError, match=f"needs {module}, {IS_MISSING} {package}"):
        _make.__wrapped__(full_id(id), (), ())


class Missing:
    """An importer for a library that is not there."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.name)


@pytest.mark.parametrize(
    ("id", "module", "install"),
    [
        ("mujoco::CheetahRun", "mujoco_playground", "playground"),
        ("mujoco::Swimmer-v5", "mujoco", r"'gymnasium\[mujoco\]'"),
        ("brax::hopper", "brax.envs", "brax"),
    ],
)
def test_what_is_not_installed_is_named(id, module, install, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    library = module.partition(".")[0]
    with pytest.raises(ValueError, match=f"{id} needs {library}, {IS_MISSING} {install}"):
        make(id, max_steps=7)
