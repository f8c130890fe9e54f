"""Tensors made before they are asked for: reading, checking, decoding and casting overlap, memory is bounded.

    expect     what will be asked for, in the order of the files
    readers    threads that plan a tensor's runs and read them, one after another, into a fixed ring of buffers
    pool       threads that check, decode and cast what lies in a buffer, and give it back to the ring
    take       hands a tensor out, in any order; what is asked for too early goes to the front

Reading stops while the ring is empty, and before tensors that nobody has taken would hold more than a budget of bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import torch

from codecllm.loader.decode import Workspace
from codecllm.loader.pool import DecodePool
from codecllm.loader.torch_tensors import Filling, Run

READERS = 2
"""Threads that read: while one plans a tensor or waits for a disk, the other reads."""

BUFFERS_PER_WORKER = 2
"""Buffers of the ring for each decoding thread, one that it decodes and one that is ready, beside one for each reader."""

BUDGET_BYTES = 256 << 20
"""Most bytes of tensors that are made or under way and that nobody has taken; one tensor may be larger than that."""

_BUFFER_STEP = 1 << 20


@dataclass(slots=True, eq=False)
class Request:
    """A tensor that is wanted, or will be.

    Attributes:
        key: what it is asked for by.
        size: about its bytes.
        start: plans it; called at most once, by a reader.
        made: receives the tensor, or the first error that prevented it.
    """

    key: Hashable
    size: int
    start: Callable[[], Filling]
    made: Future[torch.Tensor] = field(default_factory=Future)


class ReadAhead:
    """Makes tensors in the order of the files, ahead of whoever takes them. Safe to share between threads."""

    def __init__(self, pool: DecodePool, budget: int = BUDGET_BYTES) -> None:
        """Starts the readers.

        Args:
            pool: decodes; others may use it too.
            budget: see BUDGET_BYTES.
        """
        self._pool = pool
        self._budget = budget
        self._untaken = 0
        self._order: list[Request | None] = []
        self._cursor = 0
        self._place: dict[Hashable, int] = {}
        self._urgent: deque[Request] = deque()
        self._started: dict[Hashable, Request] = {}
        self._unmade: set[Request] = set()
        self._ring = [bytearray() for _ in range(BUFFERS_PER_WORKER * pool.workers + READERS)]
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name="codecllm-read", daemon=True) for _ in range(READERS)]
        for thread in self._threads:
            thread.start()

    def expect(self, requests: Iterable[Request]) -> None:
        """Appends tensors, of keys that were not used before, to what is made ahead."""
        with self._changed:
            for request in requests:
                self._place[request.key] = len(self._order)
                self._order.append(request)
                self._unmade.add(request)
            self._changed.notify_all()

    def take(self, request: Request) -> Future[torch.Tensor]:
        """Returns what receives the tensor: the expected one of the same key, or else the request itself, which goes first.

        Where the tensor was not begun yet, reading goes on behind it: whoever takes tensors in another order is followed.
        """
        with self._changed:
            started = self._started.pop(request.key, None)
            if started is not None:
                self._untaken -= started.size
                self._changed.notify_all()
                return started.made
            place = self._place.pop(request.key, None)
            if place is not None:
                expected, self._order[place] = self._order[place], None
                assert expected is not None
                request, self._cursor = expected, place + 1
            self._unmade.add(request)
            if self._closed:
                self._settle(request, error=_closed_error())
            else:
                self._urgent.append(request)
                self._changed.notify_all()
            return request.made

    def drop(self, key: Hashable) -> None:
        """Gives up an expected tensor that nobody will take; nothing where there is none of that key."""
        with self._changed:
            place, started = self._place.pop(key, None), self._started.pop(key, None)
            if place is not None:
                request, self._order[place] = self._order[place], None
                assert request is not None
                self._unmade.discard(request)
            if started is not None:
                self._untaken -= started.size
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the readers. Tensors that were not made fail; those that were can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            for request in list(self._unmade):
                self._settle(request, error=_closed_error())

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            request = self._next()
            if request is None:
                return
            try:
                self._make(request)
            except BaseException as exc:
                self._settle(request, error=exc)
            del request  # or it would keep its tensor while the next one is waited for

    def _next(self) -> Request | None:
        """Waits for the next tensor to be read; None once closed."""
        with self._changed:
            while not self._closed:
                if self._urgent:
                    return self._urgent.popleft()
                request = self._peek()
                if request is not None and (not self._untaken or self._untaken + request.size <= self._budget):
                    self._order[self._cursor] = None
                    self._cursor += 1
                    del self._place[request.key]
                    self._started[request.key] = request
                    self._untaken += request.size
                    return request
                self._changed.wait()
            return None

    def _peek(self) -> Request | None:
        """Moves the cursor to the next expected tensor, from the end back to those that were skipped; returns it, or None."""
        for _ in range(2):
            while self._cursor < len(self._order):
                request = self._order[self._cursor]
                if request is not None:
                    return request
                self._cursor += 1
            self._order = [request for request in self._order if request is not None]
            self._place = {request.key: place for place, request in enumerate(self._order) if request is not None}
            self._cursor = 0
        return None

    def _make(self, request: Request) -> None:
        filling = request.start()
        making = _Making(request, filling.tensor, len(filling.runs))
        if not filling.runs:
            self._settle(request, filling.tensor)
        for run in filling.runs:
            buffer = self._borrow(0 if run.place is not None else run.size)
            if buffer is None:
                return
            try:
                stored = run.read(buffer)
            except BaseException:
                self._give_back(buffer)
                raise
            self._pool.submit(partial(self._decode, making, run, stored, buffer))

    def _decode(self, making: _Making, run: Run, stored: memoryview, buffer: bytearray, workspace: Workspace) -> None:
        try:
            run.decode(stored, workspace)
        except BaseException as exc:
            self._settle(making.request, error=exc)
        self._give_back(buffer)
        if making.ends():
            self._settle(making.request, making.tensor)

    def _settle(self, request: Request, tensor: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """Sets the tensor or the error of a request; the first one stays."""
        with self._changed:
            if request not in self._unmade:
                return
            self._unmade.discard(request)
        if error is not None:
            request.made.set_exception(error)
        else:
            assert tensor is not None
            request.made.set_result(tensor)

    def _borrow(self, size: int) -> bytearray | None:
        """Waits for a buffer of at least `size` bytes; None once closed."""
        with self._changed:
            while not self._ring and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            buffer = self._ring.pop()
        if len(buffer) < size:
            buffer = bytearray(-(-size // _BUFFER_STEP) * _BUFFER_STEP)
        return buffer

    def _give_back(self, buffer: bytearray) -> None:
        with self._changed:
            self._ring.append(buffer)
            self._changed.notify_all()


class _Making:
    """A tensor under way: counts the runs that are left."""

    def __init__(self, request: Request, tensor: torch.Tensor, runs: int) -> None:
        self.request = request
        self.tensor = tensor
        self._left = runs
        self._lock = threading.Lock()

    def ends(self) -> bool:
        """Counts a run as done; whether it was the last."""
        with self._lock:
            self._left -= 1
            return self._left == 0


def _closed_error() -> RuntimeError:
    return RuntimeError("the load has ended")
