"""Promises: the first outcome stays, threads may wait, an interrupt ends the wait."""

from __future__ import annotations

import signal
import threading
import time
from queue import SimpleQueue

import pytest

from codecllm.loader.promise import Promise


def test_the_first_outcome_stays():
    promise = Promise()
    assert not promise.done
    promise.give(None)
    promise.fail(ValueError("too late"))
    promise.give(5)
    assert promise.done
    assert promise.get() is None
    assert promise.error() is None


def test_an_error_is_raised_each_time():
    promise = Promise()
    promise.fail(KeyError("x"))
    for _ in range(2):
        with pytest.raises(KeyError, match="x"):
            promise.get()


def test_all_threads_that_wait_get_the_value():
    promise, values = Promise(), []
    threads = [threading.Thread(target=lambda: values.append(promise.get())) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    promise.give(3)
    for thread in threads:
        thread.join(20)
    assert values == [3] * 5


def test_a_signal_that_does_not_end_the_wait_in_c_is_seen_soon(monkeypatch):
    """As where it comes between Python's look for signals and the wait."""
    waits = []

    class Deaf(SimpleQueue):
        def get(self, timeout):
            waits.append(timeout)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            try:
                return super().get(timeout=timeout)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    monkeypatch.setattr("codecllm.loader.promise.SimpleQueue", Deaf)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Promise().wait(1000)
    finally:
        signal.signal(signal.SIGINT, former)
    assert waits == [0.1]


def test_a_wait_may_have_a_limit():
    promise = Promise()
    assert not promise.wait(0.01)
    promise.give(1)
    assert promise.wait(0.01)


def test_ctrl_c_ends_a_wait_and_another_one_gets_the_value(ctrl_c):
    promise = Promise()
    threading.Timer(
        0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        promise.get()
    promise.give(2)
    assert promise.get() == 2
