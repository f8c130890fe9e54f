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
from concurrent.futures import CancelledError

import pytest
import torch

from codecllm.formats.errors import UsageError
from codecllm.loader.host import pool as pool_module
from codecllm.loader.host.pool import DecodePool

_others: set[threading.Thread] = set()


def _threads():
    """Threads of the pools of a test."""
    return [
        each
        for each in threading.enumerate()
        if each.name.startswith("codecllm-decode") and each not in _others
    ]


@pytest.fixture
def ctrl_c():
    """Lets SIGINT raise KeyboardInterrupt: what a shell starts in the background ignores it."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


def _until(ready):
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def others():
    """Leaves out threads of models that earlier tests of this process hold."""
    _others.clear()
    _others.update(_threads())


@pytest.mark.parametrize("workers", [1, 3])
def test_each_job_runs_once_in_order_and_each_thread_has_one_workspace(workers):
    begun, spaces = [], {}
    with DecodePool(workers) as pool:
        ended = [
            pool.submit(
                lambda space, n=n: (
                    begun.append(n),
                    spaces.setdefault(id(space), set()).add(threading.get_ident()),
                )
            )
            for n in range(200)
        ]
        assert [future.result(20) for future in ended] == [None] * 200
        assert len(_threads()) == workers
    assert sorted(begun) == list(range(200))
    assert workers > 1 or begun == list(range(200))
    assert all(len(threads) == 1 for threads in spaces.values())
    assert not _threads()


def test_a_job_that_fails_harms_no_other():
    with DecodePool(1) as pool:
        failed, done = pool.submit(lambda _: 1 / 0), pool.submit(lambda _: None)
        with pytest.raises(ZeroDivisionError):
            failed.result(20)
        assert done.result(20) is None


def test_run_all_raises_the_first_jobs_error_once_none_runs_any_more():
    ran = []

    def job(number):
        time.sleep(0.05 if number == 1 else 0)
        ran.append(number)
        if number in (1, 2):
            raise ValueError(number)

    with DecodePool(3) as pool:
        with pytest.raises(ValueError, match="1"):
            pool.run_all([lambda _, n=n: job(n) for n in range(9)])
        assert sorted(ran) == list(range(9))
        pool.run_all([])


def test_ctrl_c_leaves_run_all_once_none_runs_any_more(ctrl_c):
    """Whoever catches the interrupt may use the memory again that these jobs write to."""
    begun, ended = [], []

    def job(number):
        begun.append(number)
        if number == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        ended.append(number)

    with DecodePool(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.run_all([lambda _, n=n: job(n) for n in range(50)])
        assert sorted(begun) == sorted(ended)
        assert len(ended) < 50
        pool.run_all([lambda _: ended.append("again")])
        assert ended[-1] == "again"


def test_a_job_that_runs_cannot_be_cancelled_and_one_that_waits_never_runs():
    gate, begun, ran = threading.Event(), threading.Event(), []
    with DecodePool(1) as pool:
        running = pool.submit(lambda _: (begun.set(), gate.wait(20), ran.append(1)))
        waiting = pool.submit(lambda _: ran.append(2))
        assert begun.wait(20)
        assert (running.cancel(), waiting.cancel()) == (False, True)
        gate.set()
        assert pool.submit(lambda _: ran.append(3)).result(20) is None
    assert ran == [1, 3]


def test_closing_a_pool_ends_those_who_wait_for_what_it_drops():
    gate, begun, errors = threading.Event(), threading.Event(), []
    pool = DecodePool(1)
    pool.submit(lambda _: (begun.set(), gate.wait(20)))
    assert begun.wait(20)

    def run():
        try:
            pool.run_all([lambda _: None] * 5)
        except RuntimeError as exc:
            errors.append(str(exc))

    waiting = threading.Thread(target=run)
    waiting.start()
    time.sleep(0.1)
    threading.Timer(0.1, gate.set).start()
    pool.close()
    waiting.join(20)
    assert errors == ["the pool of decoding threads was closed"]


def test_closing_may_be_interrupted_and_done_again(ctrl_c, monkeypatch):
    for where in ("_drop_queued", "_dismiss"):
        pool = DecodePool(2)
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, where, lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                pool.close()
        pool.close()
        assert not _threads()


def test_a_forked_process_has_threads_of_its_own():
    with DecodePool(2) as pool:
        pool.run_all([lambda _: None] * 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
            child = os.fork()
        if not child:
            ran = []
            faulthandler.dump_traceback_later(20, exit=True)
            pool.run_all([lambda _, n=n: ran.append(n) for n in range(4)])
            pool.close()
            os._exit(0 if sorted(ran) == [0, 1, 2, 3] else 3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        pool.run_all([lambda _: None] * 4)


def test_an_error_in_a_queued_job_costs_no_thread(caplog):
    ran = []
    with DecodePool(1) as pool:
        pool.put(lambda _: 1 / 0, ran.clear)
        pool.run_all([lambda _: ran.append(1)])
    assert ran == [1]
    assert "ZeroDivisionError" in caplog.text


def test_closing_drops_what_is_queued_and_waits_for_what_runs():
    gate, begun = threading.Event(), threading.Event()
    pool = DecodePool(1)
    running = pool.submit(lambda _: (begun.set(), gate.wait(20)))
    queued = pool.submit(lambda _: pytest.fail("it was dropped"))
    assert begun.wait(20)
    closing = threading.Thread(target=pool.close)
    closing.start()
    with pytest.raises(CancelledError):
        queued.result(20)
    assert closing.is_alive()
    gate.set()
    closing.join(20)
    assert running.result(20) is None
    assert not _threads()
    pool.close()
    with pytest.raises(RuntimeError, match="is closed"):
        pool.submit(lambda _: None)
    with pytest.raises(RuntimeError, match="is closed"):
        pool.run_all([lambda _: None])


def test_threads_end_with_the_last_reference_to_their_pool():
    pool, ran = DecodePool(2), []
    pool.submit(lambda _: ran.append(1))
    del pool
    gc.collect()
    _until(lambda: not _threads())
    assert ran == [1]


def test_a_pool_may_be_closed_by_one_of_its_threads():
    pool = DecodePool(2)
    pool.submit(lambda _: pool.close()).result(20)
    _until(lambda: not _threads())


def test_nothing_of_a_job_is_kept():
    class Big:
        pass

    with DecodePool(1) as pool:
        big = Big()
        gone = weakref.ref(big)
        pool.submit(lambda _, big=big: None).result(20)
        pool.submit(lambda _, big=big: 1 / 0).exception(20)
        del big
        _until(lambda: gone() is None)


def test_torchs_threads_stay_as_they_are():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with DecodePool(2) as pool:
                found = [torch.get_num_threads()]
                pool.run_all([lambda _, found=found: found.append(torch.get_num_threads())] * 4)
            fresh = threading.Thread(
                target=lambda found=found: found.append(torch.get_num_threads())
            )
            fresh.start()
            fresh.join(20)
            assert found == [threads] * 6
    finally:
        torch.set_num_threads(before)


def test_workers_have_to_be_some():
    with pytest.raises(UsageError, match="workers"):
        DecodePool(0)


_EXITS = """
import atexit, threading, time
from codecllm.loader.host.pool import DecodePool
pool = DecodePool(2)
begun, ending = threading.Barrier(3), threading.Event()
atexit.register(ending.set)
def job(_):
    begun.wait(20)
    ending.wait(20)
    time.sleep(0.5)
    print("ended\\n", end="", flush=True)
pool.submit(job)
pool.submit(job)
pool.submit(lambda _: print("never"))
begun.wait(20)
"""


def test_an_interpreter_ends_with_a_pool_that_nobody_closed():
    done = subprocess.run(
        [sys.executable, "-c", _EXITS], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\nended\n", "")


_INTERRUPTED = """
import faulthandler, random, signal, torch
from codecllm.loader.host.pool import DecodePool
from codecllm.loader.host.read_ahead import ReadAhead, Request
from codecllm.loader.torch_tensors import Filling

faulthandler.dump_traceback_later(100, exit=True)
rng, interrupted, armed = random.Random(5), 0, False

class Run:
    place, size = None, 64
    def __init__(self, tensor, part): self.tensor, self.part = tensor, part
    def read(self, buffer): return memoryview(buffer)[:64]
    def decode(self, stored, workspace): self.tensor[self.part] = self.part

def request(key):
    def start():
        tensor = torch.full((4,), -1)
        return Filling(tensor, [Run(tensor, part) for part in range(4)])
    return Request(key, 100, start)

def interrupt(*_):
    if armed: raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for turn in range(1200):
    pool, ahead = DecodePool(rng.choice([1, 2, 4])), None
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.004 + 1e-5)
            ahead = ReadAhead(pool, rng.choice([1, 500, 1 << 30]), takers_help=rng.random() < 0.5)
            ahead.expect([request(key) for key in range(20)], lambda: iter(range(3)))
            for key in range(20):
                assert ahead.result(ahead.take(request(key))).tolist() == [0, 1, 2, 3]
            ahead.close()
            pool.close()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if ahead is not None: ahead.close()
            pool.close()
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted)
"""


def test_ctrl_c_at_any_moment_of_a_load_lets_nobody_wait():
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100
