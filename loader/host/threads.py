"""How many threads decode on the CPU: the one place that decides it."""

from __future__ import annotations

from codecllm.formats.codecs import rans
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.machine import cores

USEFUL_THREADS = 6
"""Most threads that decode zstd by default: between two calls they share the interpreter's lock.

On 16 cores 6 of them decoded 1.1 billion weights a second, 8 of them 1.0 and 16 of them 0.8.
"""

RANS_THREADS = 16
"""Fewest threads for codec `rans` by default: its decoder in numpy works on chunks of many threads
together."""


def decoding_threads(container: Container, workers: int | None) -> int:
    """Returns the number of threads that read and decode for a load.

    Args:
        container: the container to load.
        workers: the caller's wish; None takes the fastest number for the container's codecs.

    Raises:
        UsageError: `workers` is not positive.
    """
    if workers is not None:
        if workers < 1:
            raise UsageError("workers must be 1 or more", got=workers)
        return workers
    if rans.NAME in container.manifest.required_features:
        return max(cores(), RANS_THREADS)
    return min(cores(), USEFUL_THREADS)
