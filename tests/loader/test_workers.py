"""The threads under every load: order, errors, Ctrl-C, and every way in which they end."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest

from codecllm.formats.errors import UsageError
from codecllm.loader.host import workers as workers_module
from codecllm.loader.host.workers import JobDroppedError, WorkerThreads


@pytest.fixture
def workers():
    threads = WorkerThreads(2)
    yield threads
    threads.close()


def _until(ready):
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 3])
def test_each_job_runs_once_in_order_and_each_thread_has_one_workspace(count):
    begun, spaces = [], {}

    def job(number, workspace):
        begun.append(number)
        spaces.setdefault(id(workspace), set()).add(threading.get_ident())
        time.sleep(0.001)

    workers = WorkerThreads(count)
    workers.run_all([lambda space, n=n: job(n, space) for n in range(100)])
    workers.close()
    assert sorted(begun) == list(range(100))
    assert count > 1 or begun == list(range(100))
    assert len(spaces) <= count
    assert all(len(threads) == 1 for threads in spaces.values())


def _threads_that_work(workers):
    """Returns how many threads take jobs that each wait until as many as possible are there."""
    here, gate = set(), threading.Event()

    def job(_):
        here.add(threading.get_ident())
        gate.wait(20)

    promises = [workers.submit(job) for _ in range(2)]
    _until(lambda: here)
    time.sleep(0.2)
    count = len(here)
    gate.set()
    for promise in promises:
        promise.get()
    return count


def test_one_thread_is_held_until_it_is_released(workers):
    workers.hold_one()
    assert _threads_that_work(workers) == 1
    workers.release()
    assert _threads_that_work(workers) == 2


@pytest.mark.parametrize("ends", ["close", "the last reference"])
def test_a_held_thread_ends_with_the_others(ends):
    threads = WorkerThreads(2)
    threads.hold_one()
    ended = threads._queue.ended
    if ends == "close":
        threads.close()
    del threads
    gc.collect()
    assert ended.wait(20)


def test_a_job_that_fails_harms_no_other(workers):
    failed, done = workers.submit(lambda _: 1 / 0), workers.submit(lambda _: None)
    with pytest.raises(ZeroDivisionError):
        failed.get()
    assert done.get() is None


def test_run_all_raises_the_first_jobs_error_once_all_have_ended(workers):
    ran = []

    def job(number):
        time.sleep(0.05 if number == 1 else 0)
        ran.append(number)
        if number in (1, 2):
            raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        workers.run_all([lambda _, n=n: job(n) for n in range(9)])
    assert sorted(ran) == list(range(9))
    workers.run_all([])


def test_ctrl_c_leaves_run_all_at_once_and_drops_the_jobs_that_have_not_begun(workers, ctrl_c):
    begun, gate = [], threading.Event()

    def job(number):
        begun.append(number)
        if number == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        gate.wait(20)

    with pytest.raises(KeyboardInterrupt):
        workers.run_all([lambda _, n=n: job(n) for n in range(50)])
    gate.set()
    workers.run_all([lambda _: begun.append("again")])
    assert begun[-1] == "again"
    assert len(begun) <= 3


def test_closing_drops_queued_jobs_and_waits_for_running_ones():
    gate, begun = threading.Event(), threading.Event()
    workers = WorkerThreads(1)
    running = workers.submit(lambda _: (begun.set(), gate.wait(20)))
    queued = workers.submit(lambda _: pytest.fail("it was dropped"))
    assert begun.wait(20)
    closing = threading.Thread(target=workers.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()
    gate.set()
    closing.join(20)
    assert running.get() is None
    with pytest.raises(JobDroppedError):
        queued.get()
    workers.close()
    with pytest.raises(JobDroppedError):
        workers.submit(lambda _: None).get()


def test_closing_may_be_interrupted_and_done_again(workers, ctrl_c):
    gate, begun = threading.Event(), threading.Event()
    workers.submit(lambda _: (begun.set(), gate.wait(20)))
    assert begun.wait(20)  # a job that has not begun is dropped, and closing would not wait
    threading.Timer(
        0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        workers.close()
    gate.set()
    workers.close()


def test_a_forked_process_has_threads_of_its_own(workers):
    workers.run_all([lambda _: None] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        child = os.fork()
    if not child:
        ran = []
        faulthandler.dump_traceback_later(20, exit=True)
        WorkerThreads(1).close()
        workers.run_all([lambda _, n=n: ran.append(n) for n in range(4)])
        workers.close()
        os._exit(0 if sorted(ran) == [0, 1, 2, 3] else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    workers.run_all([lambda _: None] * 4)


def test_a_forked_process_that_submits_nothing_closes_at_once(workers):
    workers.run_all([lambda _: None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(20, exit=True)
        workers.close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_threads_end_with_the_last_reference():
    before = threading.active_count()
    workers, ended = WorkerThreads(3), []
    workers.run_all([lambda _: None])
    ended = workers._queue.ended
    del workers
    gc.collect()
    assert ended.wait(20)
    _until(lambda: threading.active_count() <= before)


def test_nothing_of_a_job_is_kept(workers):
    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    workers.submit(lambda _, big=big: None).get()
    workers.submit(lambda _, big=big: 1 / 0).error()
    del big
    _until(lambda: gone() is None)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_fewer_threads_than_asked_for_do_the_work(monkeypatch, caplog, error):
    def start(thread):
        raise error

    monkeypatch.setattr(workers_module.Thread, "start", start)
    workers, ran = WorkerThreads(4), []
    workers.run_all([lambda _, n=n: ran.append(n) for n in range(9)])
    workers.close()
    assert ran == list(range(9))
    assert "1 of 4 worker threads" in caplog.text


def test_the_number_of_threads_is_positive():
    with pytest.raises(UsageError, match="workers"):
        WorkerThreads(0)


_EXITS = """
import atexit, threading, time
from codecllm.loader.host.workers import WorkerThreads
workers = WorkerThreads(2)
begun, ending = threading.Barrier(3), threading.Event()
atexit.register(ending.set)
def job(_):
    begun.wait(20)
    ending.wait(20)
    time.sleep(0.5)
    print("ended\\n", end="", flush=True)
workers.submit(job)
workers.submit(job)
workers.submit(lambda _: print("never"))
begun.wait(20)
"""


def test_an_interpreter_waits_for_running_jobs_of_threads_that_were_not_closed():
    done = subprocess.run(
        [sys.executable, "-c", _EXITS], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\nended\n", "")


def test_a_set_that_changes_while_it_is_read_is_read_again():
    class Changing(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            if self.reads < 3:
                raise RuntimeError("Set changed size during iteration")
            return super().__iter__()

    members = Changing([1, 2])
    assert workers_module.snapshot(members) == [1, 2]
    assert members.reads == 3
