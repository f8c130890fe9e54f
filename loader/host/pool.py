"""The threads that read and decode.

They are ours and not `concurrent.futures`' because whoever queues jobs may be interrupted by Ctrl-C at any moment: what the
main thread touches here are queues and locks that are one step for the interpreter. Inside `ThreadPoolExecutor.submit`, or
inside `Future.result`, an interrupt may leave a lock held that a worker then waits for, for ever.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeVar

from codecllm.formats.errors import UsageError
from codecllm.formats.machine import cores
from codecllm.loader.host.decode import Workspace

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[[Workspace], None]


class DecodePool:
    """A fixed number of threads, each with buffers of its own that live as long as the pool.

    They end when the pool is closed, when nothing refers to it any more, and with the interpreter. A process that was forked
    starts its own when it first needs them.
    """

    def __init__(self, workers: int | None = None) -> None:
        """Starts the threads.

        Args:
            workers: how many, 1 or more; None takes one per core that the process may use.

        Raises:
            UsageError: `workers` is not positive.
        """
        self.workers = workers if workers is not None else cores()
        if self.workers < 1:
            raise UsageError("workers must be 1 or more", got=workers)
        self._closed = False
        self._begin()
        _open_pools.add(self)
        self._start_all()

    def put(self, job: Job, dropped: Callable[[], object]) -> None:
        """Queues a job; jobs start in the order in which they were queued.

        Args:
            job: does what it does without raising an error.
            dropped: called instead of it where the pool is closed before it starts.

        Raises:
            RuntimeError: the pool was closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of decoding threads is closed")
            if not self._threads:
                self._start_all()
            self._jobs.put((job, dropped))

    def submit(self, job: Job) -> Future[None]:
        """Queues a job; the future gets its end or its error. Ctrl-C in a thread that uses the future may leave it locked.

        Raises:
            RuntimeError: the pool was closed.
        """
        ended: Future[None] = Future()
        self.put(partial(_run, job, ended), ended.cancel)
        return ended

    def run_all(self, jobs: list[Job]) -> None:
        """Runs jobs in all threads; returns, or raises the first job's error, once none runs any more.

        Where Ctrl-C ends the wait, jobs that have not begun are dropped and the others waited for; a second one ends that too.

        Raises:
            RuntimeError: the pool was closed before all had begun.
        """
        batch = _Batch(jobs)
        try:
            for _ in range(min(self.workers, len(jobs))):
                self.put(batch.work, batch.drop)
            batch.wait()
        except BaseException:
            batch.drop()
            batch.wait()
            raise
        batch.check()

    def close(self) -> None:
        """Drops queued jobs, waits for running ones and frees the buffers. May be called again, after Ctrl-C for one."""
        with self._lock:
            self._closed = True
        _drop_queued(self._jobs)
        _dismiss(self._jobs, self.workers)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _begin(self) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        weakref.finalize(
            self, _dismiss, self._jobs, self.workers
        ).atexit = False  # `_close_all` does more

    def _start_all(self) -> None:
        """Starts every thread now.

        torch's number of threads is left as it is. With one for each of ours `int8` loads took a quarter less time where other
        work had a core, and a quarter more where none had: a taker that helps cannot be kept to one too, because torch's number
        is also the default of threads that others start meanwhile.
        """
        serve = partial(_serve, self._jobs, self.workers)
        names = [f"codecllm-decode_{number}" for number in range(self.workers)]
        self._threads = _started_all(serve, names, partial(_dismiss, self._jobs))

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Batch:
    """Jobs that are waited for together."""

    def __init__(self, jobs: list[Job]) -> None:
        self._queued = deque(enumerate(jobs))
        self._running = 0
        self._dropped = False
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
                if not (self._queued or self._running):
                    self._ended.put(None)

    def drop(self) -> None:
        """Drops what is queued."""
        with self._lock:
            if self._queued:
                self._dropped = True
                self._queued.clear()
            self._ended.put(None)

    def wait(self) -> None:
        """Returns once nothing is queued or runs."""
        while True:
            with self._lock:
                if not (self._queued or self._running):
                    return
            self._ended.get()

    def check(self) -> None:
        """Raises the error of the first job that failed, or RuntimeError where some were dropped."""
        if self._errors:
            errors, self._errors = self._errors, {}
            try:
                raise errors[min(errors)]
            finally:
                del (
                    errors
                )  # which the error's traceback would keep, and with it all that the job held
        if self._dropped:
            raise RuntimeError("the pool of decoding threads was closed")


_Jobs = SimpleQueue[tuple[Job, Callable[[], object]] | None]
_open_pools: weakref.WeakSet[DecodePool] = weakref.WeakSet()


def known(open_ones: weakref.WeakSet[T]) -> list[T]:
    """Returns what is in a set to which other threads may add."""
    while True:
        try:
            return list(open_ones)
        except RuntimeError:  # one does
            continue


@atexit.register
def _close_all() -> None:
    """Ends the threads of pools that nobody closed, while the interpreter is still whole."""
    for pool in known(_open_pools):
        pool.close()


def _begin_again() -> None:
    """Forgets, in a process that was forked, the threads and the jobs that it does not have."""
    for pool in known(_open_pools):
        pool._begin()


os.register_at_fork(after_in_child=_begin_again)


def started(target: Callable[[], object], name: str) -> threading.Thread:
    """Starts a daemon thread. Ctrl-C meanwhile leaves it running or not, and nothing locked."""
    (thread,) = _started_all(target, [name], lambda count: None)
    return thread


def _started_all(
    target: Callable[[], object], names: list[str], dismiss: Callable[[int], object]
) -> list[threading.Thread]:
    """Starts daemon threads that run `target`; where one cannot be started, `dismiss` gets the number of those that were.

    A thread of its own starts them, which no Ctrl-C reaches, and that is begun without `threading`: inside `Thread.start` an
    interrupt may leave a lock held for which the new thread then waits.
    """
    begun: SimpleQueue[list[threading.Thread] | Exception] = SimpleQueue()
    _thread.start_new_thread(_start_threads, (target, names, dismiss, begun))
    found = begun.get()
    if isinstance(found, Exception):
        raise found
    return found


def _start_threads(
    target: Callable[[], object],
    names: list[str],
    dismiss: Callable[[int], object],
    begun: SimpleQueue[list[threading.Thread] | Exception],
) -> None:
    threads: list[threading.Thread] = []
    try:
        for name in names:
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            threads.append(thread)
    except Exception as exc:
        dismiss(len(threads))
        begun.put(exc)
    else:
        begun.put(threads)


def _run(job: Job, ended: Future[None], workspace: Workspace) -> None:
    try:
        if ended.set_running_or_notify_cancel():
            job(workspace)
            ended.set_result(None)
    except BaseException as exc:
        ended.set_exception(exc)
    finally:
        del job, ended  # an error's traceback would keep them


def _serve(jobs: _Jobs, workers: int) -> None:
    """Runs queued jobs in the calling thread until it is dismissed; it keeps nothing of a job that has ended."""
    workspace = Workspace(workers)
    while (queued := jobs.get()) is not None:
        try:
            queued[0](workspace)
        except BaseException:  # the thread has to live on
            _LOG.exception("a job of a decoding thread failed")
        del queued


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
        if queued is None:  # threads were dismissed before: behind it there is no job
            jobs.put(None)
            return
        queued[1]()
