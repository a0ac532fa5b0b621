"""Signals that are answered at once, whatever the main thread is doing.

Python runs the handlers of signals in the main thread, between two instructions: not during a
compiled program, which may take minutes. But the number of a signal is written into a pipe the
moment it arrives, and a thread can wait at the other end.
"""

import contextlib
import os
import signal
import threading

STOP = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def answered(answer):
    """Inside the block, Ctrl-C and SIGTERM call `answer(number)` at once, in a thread of its own.

    A terminal that is lost (SIGHUP) does nothing. Only the main thread can arrange this: in others
    the block is run as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch():
        while arrived := os.read(reading, 1):
            if arrived[0] in STOP:
                answer(arrived[0])
        os.close(reading)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writing)
    # A handler, even one that does nothing, is what makes Python write into the pipe.
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP}
    handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writing)  # ends the thread


def end_at_once(number: int) -> None:
    """End the process with the exit code of a signal; nothing is cleaned up."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")  # the cursor, which a dashboard hides
    os._exit(128 + number)


def say(text: str) -> None:
    """Write a line to stderr at once, from any thread."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))
