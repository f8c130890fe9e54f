"""Progress of a long stage: a sentence now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 20.0
"""Seconds between two sentences."""


def now_and_then(tell: Callable[[str], None], sentence: str) -> Callable[[int, int], None]:
    """Returns a callback for steps done and all steps, which tells of some.

    Args:
        tell: called with a sentence.
        sentence: it, with two pairs of braces for the two numbers.
    """
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= PATIENCE:
            last = time.monotonic()
            tell(sentence.format(done, total))

    return advance
