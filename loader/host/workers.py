"""Threads that run jobs from a queue.

The threads of `concurrent.futures` are no choice here: the main thread may be interrupted by Ctrl-C
inside `Thread.start`, `Executor.submit` or `Future.result`, and a lock that it leaves held there
stops the workers for ever. Here the caller's thread takes no lock.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from codecllm.formats.errors import UsageError
from codecllm.loader.host.decode import Workspace
from codecllm.loader.promise import Promise

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[[Workspace], object]


class JobDroppedError(RuntimeError):
    """The error of a job that was dropped before it began."""


class WorkerThreads:
    """A fixed number of threads that run jobs in the order in which these were submitted.

    Each thread has a workspace of its own that lives as long as the thread. The threads start with
    the first job. They end with `close`, with the last reference, and with the interpreter. A
    process that was forked starts threads of its own when it submits its first job.
    """

    def __init__(self, threads: int, name: str = "codecllm-decode") -> None:
        """Starts nothing yet.

        Args:
            threads: how many threads, 1 or more.
            name: name of the threads, for debuggers.

        Raises:
            UsageError: `threads` is not positive.
        """
        if threads < 1:
            raise UsageError("workers must be 1 or more", got=threads)
        self._threads = threads
        self._name = name
        self._queue = _Queue()
        self._process: int | None = None
        _open_threads.add(self)

    def submit(self, job: Job) -> Promise[None]:
        """Queues a job; the promise is kept at its end, or fails with its error.

        A job whose promise was failed by the caller before it began does not run.
        """
        promise = Promise[None]()
        self._put(job, promise)
        return promise

    def run_all(self, jobs: list[Job]) -> None:
        """Runs jobs; returns, or raises the error of the first job that failed, once all ended.

        Ctrl-C ends the wait at once and drops the jobs that have not begun. Others may still run
        then, and write to their memory.

        Raises:
            RuntimeError: the threads were closed before all jobs had begun.
        """
        # All of them before the first job is queued: Ctrl-C behind `put` finds the job's promise.
        promises = [Promise[None]() for _ in jobs]
        try:
            for job, promise in zip(jobs, promises, strict=True):
                self._put(job, promise)
            errors = [promise.error() for promise in promises]
        except BaseException:
            for promise in promises:
                promise.fail(JobDroppedError("the caller was interrupted"))
            raise
        job_errors = [error for error in errors if error is not None]
        if job_errors:
            raise job_errors[0]

    def hold_one(self) -> None:
        """Lets one of the threads wait until `release`; jobs queued later go to the others."""
        if self._process != os.getpid():
            self._start()
        self._put(partial(_hold, self._queue.released), Promise())

    def release(self) -> None:
        """Ends the wait of `hold_one`; once for all."""
        if not self._queue.released.done:
            self._queue.released.give(None)

    def close(self) -> None:
        """Drops queued jobs and waits for running ones. May be called again, after Ctrl-C too."""
        self._queue.close()
        if self._process == os.getpid():  # a forked process has no threads to wait for
            self._queue.ended.get()

    def _put(self, job: Job, promise: Promise[None]) -> None:
        if self._process != os.getpid():
            self._start()
        self._queue.jobs.put((job, promise))
        if self._queue.closed:  # the threads may have ended without this job
            promise.fail(JobDroppedError("the worker threads were closed"))

    def _start(self) -> None:
        queue = self._queue if self._process is None else _Queue()
        weakref.finalize(self, queue.close).atexit = False  # `_close_all` waits too
        # One call of C without a lock; `Thread.start` waits for an event instead.
        _thread.start_new_thread(_start_and_work, (queue, self._threads, self._name))
        self._queue = queue
        self._process = os.getpid()


class _Queue:
    """The jobs of some threads, and their end.

    Attributes:
        jobs: jobs with their promises; None lets a thread end.
        closed: whether queued jobs are dropped.
        released: kept once no thread is to wait for `WorkerThreads.release`.
        ended: kept once all threads have ended.
    """

    def __init__(self) -> None:
        self.jobs: SimpleQueue[tuple[Job, Promise[None]] | None] = SimpleQueue()
        self.closed = False
        self.released = Promise[None]()
        self.ended = Promise[None]()

    def close(self) -> None:
        """Lets the threads end."""
        self.closed = True
        self.released.give(None)
        self.jobs.put(None)


def _hold(released: Promise[None], _: Workspace) -> None:
    released.wait()


def _start_and_work(queue: _Queue, threads: int, name: str) -> None:
    """Starts the other threads, works as one of them, and waits for their end."""
    others: list[Thread] = []
    try:
        for number in range(1, threads):
            thread = Thread(target=_work, args=(queue,), name=f"{name}_{number}", daemon=True)
            thread.start()
            others.append(thread)
    except Exception:  # the system gives no more threads: those that there are do the work
        _LOG.warning("%d of %d worker threads could be started", len(others) + 1, threads)
    _work(queue)
    for thread in others:
        thread.join()
    queue.ended.give(None)


def _work(queue: _Queue) -> None:
    workspace = Workspace()
    while (entry := queue.jobs.get()) is not None:
        _run(*entry, queue, workspace)
        del entry  # an idle thread keeps no job, and no memory of its tensor
    queue.jobs.put(None)  # for the next thread


def _run(job: Job, promise: Promise[None], queue: _Queue, workspace: Workspace) -> None:
    try:
        if queue.closed:
            promise.fail(JobDroppedError("the worker threads were closed"))
        elif not promise.done:
            job(workspace)
            promise.give(None)
    except BaseException as exc:
        promise.fail(exc)
    finally:
        del job, promise  # the traceback of an error would keep them


_open_threads: weakref.WeakSet[WorkerThreads] = weakref.WeakSet()


def snapshot(objects: weakref.WeakSet[T]) -> list[T]:
    """Returns the members of a set to which other threads may add."""
    while True:
        try:
            return list(objects)
        except RuntimeError:  # one was added meanwhile
            continue


@atexit.register
def _close_all() -> None:
    """Ends the threads that are left: the interpreter must not end around a running decoder."""
    for threads in snapshot(_open_threads):
        threads.close()
