"""Which environments are code, and what of them is written down."""

import hashlib

import pytest

from harness.own_code import names_code, short_name, sources_of

CODE = (
    "my.py",
    "my.py::f",
    "/a/b/my.py::f",
    "./my::f",
    "a\\my.py::f",
    "package.module::f",
    ".py::",
)
OTHERS = ("gymnax::CartPole-v1", "CartPole-v1", "gxm::Gymnasium/ALE/Pong-v5", "v1.5", "a.::f", "")


@pytest.mark.parametrize(("names", "expected"), [(CODE, True), (OTHERS, False)])
def test_a_file_or_a_module_with_a_dot_is_code(names, expected):
    assert [names_code(name) for name in names] == [expected] * len(names)


def test_names_of_runs_leave_out_folders():
    assert short_name("/home/me/my.py::f") == "my.py::f"
    assert short_name("gxm::Gymnasium/ALE/Pong-v5") == "gxm::Gymnasium/ALE/Pong-v5"


def test_the_hash_of_a_file_is_written_down_under_the_name_of_the_environment(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("x = 1")
    expected = hashlib.sha256(b"x = 1").hexdigest()
    assert sources_of(f"{file}::f") == {f"{file}::f": expected}
    assert sources_of("gymnax::CartPole-v1") == sources_of("gone.py::f") == {}
    assert len(sources_of("harness.own_code::names_code")) == 1  # imported above
    assert sources_of("never.imported::f") == {}
