"""Peak memory of a piece of work: RssAnon, sampled, above its value before."""

from __future__ import annotations

import threading
from types import TracebackType

_INTERVAL_S = 0.01


def anonymous_mib() -> float:
    """Returns the anonymous memory of this process in MiB, without pages of mapped files."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    raise OSError("this kernel does not report RssAnon")


class PeakMemory:
    """Context manager; afterwards `mib` is the highest sample minus the one at the beginning."""

    def __enter__(self) -> PeakMemory:
        self._before = anonymous_mib()
        self._highest = self._before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.mib = max(self._highest, anonymous_mib()) - self._before

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._highest = max(self._highest, anonymous_mib())
