"""The threads that read and decode.

They are ours and not `concurrent.futures`' because whoever queues jobs may be interrupted by Ctrl-C at any moment: what the
main thread touches here are queues and locks that are one step for the interpreter. Inside `ThreadPoolExecutor.submit`, or
inside `Future.result`, an interrupt may leave a lock held that a worker then waits for, for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import TracebackType

import torch

from codecllm.formats.codecs import rans
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.loader.decode import Workspace

Job = Callable[[Workspace], None]

USEFUL_THREADS = 6
"""Most threads that decode zstd by default: they share the interpreter's lock between two runs. On 16 cores 6 of them decoded
1.1 billion weights a second, 8 of them 1.0 and 16 of them 0.8."""


def loading_threads(container: Container, workers: int | None) -> int:
    """Returns how many threads should read and decode for a load: `workers`, or what is fastest where that is None."""
    threads = container.decoding_threads(workers)
    return threads if workers is not None or rans.NAME in container.manifest.required_features else min(threads, USEFUL_THREADS)


class DecodePool:
    """A fixed number of threads, each with buffers of its own that live as long as the pool.

    They end when the pool is closed, when nothing refers to it any more, and with the interpreter.
    """

    def __init__(self, workers: int | None = None) -> None:
        """Starts the threads.

        Args:
            workers: how many, 1 or more; None takes one per core that the process may use.

        Raises:
            UsageError: `workers` is not positive.
        """
        self.workers = workers if workers is not None else max(1, len(os.sched_getaffinity(0)))
        if self.workers < 1:
            raise UsageError("workers must be 1 or more", got=workers)
        self._jobs: _Jobs = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._lock = threading.Lock()
        self._abandoned = weakref.finalize(self, _dismiss, self._jobs, self.workers)
        self._abandoned.atexit = False  # `_close_all` does more
        _open_pools.add(self)
        self._start_all()

    def submit(self, job: Job) -> Future[None]:
        """Queues a job; jobs start in the order in which they were queued.

        Raises:
            RuntimeError: the pool was closed.
        """
        ended: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of decoding threads is closed")
            self._jobs.put((job, ended))
        return ended

    def run_all(self, jobs: list[Job]) -> None:
        """Runs jobs in all threads; returns, or raises the first job's error, once none runs any more.

        That holds for Ctrl-C in the calling thread too: jobs that have not begun are dropped then.
        """
        batch = _Batch(jobs)
        try:
            for _ in range(min(self.workers, len(jobs))):
                self.submit(batch.work)
            batch.wait()
        except BaseException:
            batch.end()
            raise
        batch.raise_first()

    def close(self) -> None:
        """Drops queued jobs, waits for running ones and frees the buffers."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            _drop_queued(self._jobs)
            self._abandoned()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _start_all(self) -> None:
        """Starts every thread now, each with one thread of torch's; the caller's number of them stays, and the default."""
        threads = torch.get_num_threads()
        ready: SimpleQueue[threading.Thread] = SimpleQueue()
        try:
            for number in range(self.workers):
                name = f"codecllm-decode_{number}"
                threading.Thread(target=_serve, args=(self._jobs, self.workers, ready), name=name, daemon=True).start()
            for _ in range(self.workers):
                self._threads.append(ready.get())
        except BaseException:  # Ctrl-C, or no thread can be started
            self._abandoned()
            raise
        finally:
            torch.set_num_threads(threads)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keeps torch's operations of the calling thread in that thread: others decode beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Batch:
    """Jobs that are waited for together."""

    def __init__(self, jobs: list[Job]) -> None:
        self._queued = deque(enumerate(jobs))
        self._running = 0
        self._errors: dict[int, BaseException] = {}
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._lock = threading.Lock()

    def work(self, workspace: Workspace) -> None:
        """Runs jobs, in their order, until none is queued."""
        while True:
            with self._lock:
                if not self._queued:
                    return
                number, job = self._queued.popleft()
                self._running += 1
            try:
                job(workspace)
            except BaseException as exc:
                self._errors[number] = exc
            with self._lock:
                self._running -= 1
            self._ended.put(None)

    def wait(self) -> None:
        """Returns once nothing is queued or runs."""
        while True:
            with self._lock:
                if not (self._queued or self._running):
                    return
            self._ended.get()

    def end(self) -> None:
        """Drops what is queued and waits for what runs, however often that is interrupted."""
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                with self._lock:
                    self._queued.clear()
                return self.wait()

    def raise_first(self) -> None:
        """Raises the error of the first job that failed."""
        if self._errors:
            raise self._errors[min(self._errors)]


_Jobs = SimpleQueue[tuple[Job, Future[None]] | None]
_open_pools: weakref.WeakSet[DecodePool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the threads of pools that nobody closed, while the interpreter is still whole."""
    for pool in list(_open_pools):
        pool.close()


def _serve(jobs: _Jobs, workers: int, ready: SimpleQueue[threading.Thread]) -> None:
    """Runs queued jobs in the calling thread until it is dismissed; it keeps nothing of a job that has ended."""
    torch.get_num_threads()  # a thread that has not asked yet is given the default at its first operation, whatever it has set
    torch.set_num_threads(1)
    ready.put(threading.current_thread())
    workspace = Workspace(workers)
    while (queued := jobs.get()) is not None:
        job, ended = queued
        try:
            job(workspace)
        except BaseException as exc:
            ended.set_exception(exc)
        else:
            ended.set_result(None)
        del queued, job, ended


def _dismiss(jobs: _Jobs, workers: int) -> None:
    """Lets the threads end behind what is queued."""
    for _ in range(workers):
        jobs.put(None)


def _drop_queued(jobs: _Jobs) -> None:
    while True:
        try:
            queued = jobs.get_nowait()
        except Empty:
            return
        if queued is not None:
            queued[1].cancel()
