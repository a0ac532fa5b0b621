"""A missing library is one sentence that says what to install."""

import sys

import pytest

from harness.errors import UsageError, import_optional


@pytest.mark.parametrize(
    ("module", "package", "sentence"),
    [
        ("nothing_such", None, "logger x needs nothing_such, which is not installed: pip install"),
        ("nothing_such.part", "name", "nothing_such, which is not installed: pip install name"),
    ],
)
def test_a_missing_library_is_named_with_its_package(module, package, sentence):
    with pytest.raises(UsageError) as refused:
        import_optional(module, "logger x", package)
    assert sentence in str(refused.value)


def test_what_a_library_lacks_is_named_too(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import nothing_such.part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"x needs nothing_such, .*: pip install nothing_such$"):
        import_optional("half_there", "x", "half-there")


def test_a_library_that_is_there_is_returned():
    assert import_optional("sys", "x") is sys
