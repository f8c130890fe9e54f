"""Signals wait while an output folder is put in order.

A second Ctrl-C must not end the cleaning after the first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Holds SIGINT, SIGTERM and SIGHUP back until the end of the block.

    Then the first one that came is raised.

    Signals that the process ignores stay ignored. Outside the main thread nothing is to be done:
    Python runs handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    former_handlers = {
        number: handler
        for number, handler in handlers.items()
        # None: a handler that was set outside Python and cannot be set again.
        if handler is not None and handler is not signal.SIG_IGN
    }
    for number in former_handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
