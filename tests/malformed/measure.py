"""Time and memory of a bad input: CPU seconds, and MiB above those used before."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_SECONDS = 1.0
MAX_MIB = 64.0
SECONDS_PER_MIB = 0.25
MIB_PER_MIB = 20.0
"""Limit for each further MiB of a manifest or header: a valid record takes time and memory."""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """The cost of a stretch of code."""

    seconds: float = 0.0
    mib: float = 0.0

    def check(self, input_mib: float = 0.0) -> None:
        """Fails where the cost is above the limit of an input of that size."""
        seconds = MAX_SECONDS + SECONDS_PER_MIB * input_mib
        mib = MAX_MIB + MIB_PER_MIB * input_mib
        assert self.seconds <= seconds, f"took {self.seconds:.2f} s of CPU time, at most {seconds}"
        assert self.mib <= mib, f"took {self.mib:.0f} MiB, at most {mib}"


@contextmanager
def measured() -> Iterator[Cost]:
    """Yields a cost, filled in at the end. Linux lets us set back the peak of resident memory."""
    gc.collect()
    cost = Cost()
    _CLEAR.write_text("5")
    before, start = _status("VmRSS"), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - start
        cost.mib = (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
