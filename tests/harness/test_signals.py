"""Signals are answered while the main thread is in a call that Python cannot interrupt."""

import os
import signal
import threading
import time
import zlib

from helpers import as_command, tiny

from algorithms import ppo
from harness import options
from harness.signals import STOP, answered


def test_a_signal_is_answered_while_the_main_thread_is_busy():
    before = [signal.getsignal(number) for number in (*STOP, signal.SIGHUP)]
    answers = []

    def send():
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    with answered(lambda number: answers.append((number, time.perf_counter()))):
        threading.Timer(0.1, send).start()
        zlib.compress(os.urandom(2**24))  # a compiled program is such a call, too
        end = time.perf_counter()
        time.sleep(0.3)
    assert [number for number, _ in answers] == [signal.SIGTERM, signal.SIGINT]
    assert all(when < end for _, when in answers)
    assert [signal.getsignal(number) for number in (*STOP, signal.SIGHUP)] == before


def test_blocks_in_blocks_and_in_other_threads():
    outer, inner, other = [], [], []
    with answered(outer.append):
        with answered(inner.append):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

        def run():
            with answered(other.append):
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        time.sleep(0.1)
    assert (outer, inner, other) == ([signal.SIGINT], [signal.SIGTERM], [])


def test_what_is_not_training_ends_at_the_first_signal(monkeypatch):
    ended = []

    def main(config):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

    monkeypatch.setattr(options, "end_at_once", ended.append)
    monkeypatch.setattr(options, "parse", lambda config_class: tiny(ppo))
    with as_command("ppo"):  # without it this process would be started again on JAX 0.9
        options.launch(main, ppo.Config)
    assert ended == [signal.SIGINT]
