"""The threads that read and decode."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
    """A fixed number of threads, each with buffers of its own that live as long as the pool."""

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
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(self.workers, "codecllm-decode")
        self._start_all()

    def submit(self, job: Job) -> Future[None]:
        """Queues a job; jobs start in the order in which they were queued."""
        return self._executor.submit(self._run, job)

    def run_all(self, jobs: list[Job]) -> None:
        """Queues jobs and waits for all of them; raises the first job's error once none runs any more."""
        futures = [self.submit(job) for job in jobs]
        errors = [future.exception() for future in futures]
        first = next((error for error in errors if error is not None), None)
        if first is not None:
            raise first

    def close(self) -> None:
        """Drops queued jobs, waits for running ones and frees the buffers."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job) -> None:
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace(self.workers)
        job(self._local.workspace)

    def _start_all(self) -> None:
        """Starts every thread now, and asks torch for a single thread in each.

        torch reads the number again when a thread first needs it, and that is the caller's by then: large operations of `int8`
        decoding may still use more.

        torch keeps the number per thread, and a default for threads that have not asked yet, which the threads' own setting
        changes. The caller's number is asked for before, and set again behind.
        """
        threads = torch.get_num_threads()
        barrier = threading.Barrier(self.workers + 1)
        for _ in range(self.workers):
            self._executor.submit(_wait_single_threaded, barrier)
        barrier.wait()
        torch.set_num_threads(threads)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _wait_single_threaded(barrier: threading.Barrier) -> None:
    torch.set_num_threads(1)
    barrier.wait()
