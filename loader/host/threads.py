"""How many threads decode on the CPU: the one place that decides it."""

from __future__ import annotations

from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.codecs import native
from codecllm.formats.machine import cores, threads_of

USEFUL_THREADS = 6
"""Most threads that decode without the native core: between two calls they share the interpreter's
lock. On 16 cores 6 of them decoded 1.1 billion weights a second, 8 of them 1.0 and 16 of them 0.8.
"""


def decoding_threads(workers: int | None) -> int:
    """Returns the number of threads that read and decode for a load.

    Args:
        workers: the caller's wish; None takes one per core, without the native core at most
            `USEFUL_THREADS`.

    Raises:
        UsageError: `workers` is no number from 1 to `machine.MAX_WORKERS`.
    """
    if workers is not None:
        check_arguments(workers=workers)
        return threads_of(workers)
    # The native core works without the interpreter's lock, so all cores are of use.
    return cores() if native.core is not None else min(cores(), USEFUL_THREADS)
