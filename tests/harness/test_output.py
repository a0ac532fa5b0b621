"""A process outlives the streams it prints to."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT

from harness.options import launch
from harness.output import Lasting

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


def test_launch_outlives_its_output(tmp_path):
    command = f"{sys.executable} {ROOT / 'loggers.py'} --help >/dev/full"
    result = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")


def test_launch_says_when_a_result_is_lost(monkeypatch, tmp_path, capsys):
    @dataclass
    class Command:
        pass

    monkeypatch.setattr(sys, "argv", ["x.py"])
    stdout = io.TextIOWrapper(io.BufferedWriter(Lasting("/dev/full", "w")))
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        launch(lambda command: print("a result"), Command)
    message = "error: the output cannot be written: No space left on device\n"
    assert ended.value.code == 1 and capsys.readouterr().err == message
