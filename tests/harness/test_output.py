"""A process outlives the streams it prints to."""

import os
import subprocess
import sys

import pytest

PRINT = """
import sys
from harness.output import keep_output_open, lost_output
keep_output_open()
for _ in range(20_000):
    print("±" * 10)
print("a warning", file=sys.stderr)
open("file", "w").write("the record")  # its descriptor must not be that of a closed stream
assert open("file").fileno() > 2
error = lost_output()
open("result", "w").write(f"{error and error.strerror}")
sys.exit(3)
"""


def run(tmp_path, redirections, **environment):
    command = f"{sys.executable} -c '{PRINT}' {redirections}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    result = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert (tmp_path / "file").read_text() == "the record"
    return result, (tmp_path / "result").read_text()


@pytest.mark.parametrize(
    ("redirections", "lost"),
    [
        ("", "None"),
        ("| head -1", "None"),
        (">/dev/full", "No space left on device"),
        (">&-", "None"),
        (">&- 2>&- <&-", "None"),
        (">/dev/full 2>/dev/full", "No space left on device"),
    ],
)
def test_a_stream_that_takes_nothing_ends_nothing(redirections, lost, tmp_path):
    result, error = run(tmp_path, redirections)
    assert (result.returncode, error) == (3, lost)
    assert result.stderr in (b"", b"a warning\n")
    assert result.stdout.count(b"\n") == {"": 20_000, "| head -1": 1}.get(redirections, 0)


def test_what_a_stream_cannot_encode_is_escaped(tmp_path):
    result, _ = run(tmp_path, "", PYTHONIOENCODING="ascii")
    assert result.stdout.startswith(rb"\xb1\xb1")
