"""Standard output and error of a process, which a pipe, a disk or a terminal may stop taking."""

import contextlib
import errno
import io
import os
import sys

from harness.text import clean


def warn(text: str) -> None:
    """Print a warning; nothing happens if stderr cannot take it."""
    with contextlib.suppress(OSError):
        print(f"warning: {clean(text)}", file=sys.stderr, flush=True)


class Lasting(io.FileIO):
    """A file descriptor that never fails: what it cannot take any more is dropped.

    Attributes:
      error: why it takes nothing, if so and if it is not that the reader of a pipe has gone.
    """

    error = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.error = error
            # Libraries that write to the descriptor itself are let off as well.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def keep_output_open() -> None:
    """Let nothing that is printed end this process, whatever happens to stdout and stderr.

    Characters that they cannot encode are escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, as by `>&-`: the next file opened would take this number
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open until the end
        elif old is getattr(sys, f"__{name}__") and not isinstance(raw(old), Lasting):
            with contextlib.suppress(OSError):
                old.flush()
            lasting = io.TextIOWrapper(
                io.BufferedWriter(Lasting(number, "w", closefd=False)),
                encoding=old.encoding,
                errors="backslashreplace",
                line_buffering=old.line_buffering,
            )
            setattr(sys, name, lasting)


def raw(stream):
    """The file under a text stream, or None."""
    return getattr(getattr(stream, "buffer", None), "raw", None)


def lost_output():
    """The error for which something printed to stdout is lost, or None."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return getattr(raw(sys.stdout), "error", None)
