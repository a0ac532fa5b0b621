"""Files of environments, as a user has them."""

import sys

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file of environments, outside of the repository, into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="my_env.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield write
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]
