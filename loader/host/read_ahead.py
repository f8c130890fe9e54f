"""Tensors made before they are asked for: reading, checking, decoding and casting overlap, memory is bounded.

    expect     what will be asked for, in the order of the files; what the budget holds is planned at once
    threads    each plans a tensor, or takes the next run of one: reads it into its own buffer, checks, decodes and casts it
    take       hands a tensor out, in any order; what is asked for too early goes to the front

A run stays in the cache of the core that read it, and nothing is handed from thread to thread: under the interpreter's lock
each handing over costs as much as decoding some kilobytes. For the same reason the threads stay out of their taker's way:

    before the first tensor is taken    the taker is busy: it builds the model. Whoever decodes meanwhile waits for the
                                        interpreter behind each call, up to 5 ms: one thread works, and supplies memory first,
                                        by few and long calls
    whoever waits for a tensor          waits until the budget is made, and then takes many at once; better, it works until
                                        then in the place of a thread: a sleeper's core often stays idle for some time

The kernel reads ahead from the disk meanwhile (`Announcer`). Nothing is begun while tensors that nobody has taken hold more
than a budget of bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import torch

from codecllm.loader.host.decode import Workspace
from codecllm.loader.host.pool import DecodePool
from codecllm.loader.torch_tensors import Filling, Run

BUDGET_BYTES = 256 << 20
"""Most bytes of tensors that are made or under way and that nobody has taken; one tensor may be larger than that."""


@dataclass(slots=True, eq=False)
class Request:
    """A tensor that is wanted, or will be.

    Attributes:
        key: what it is asked for by.
        size: about its bytes.
        start: plans it; called at most once, by a thread of the pool, by whoever expects it or by a taker that helps.
        tensor: the tensor, once it is complete and checked.
        error: the first error that prevented it.
    """

    key: Hashable
    size: int
    start: Callable[[], Filling]
    tensor: torch.Tensor | None = None
    error: BaseException | None = None

    @property
    def made(self) -> bool:
        """Whether there is the tensor or the error."""
        return self.tensor is not None or self.error is not None


class _Making:
    """A tensor under way: counts the runs that are left."""

    def __init__(self, request: Request, filling: Filling) -> None:
        self.request = request
        self.tensor = filling.tensor
        self.left = len(filling.runs)


class ReadAhead:
    """Makes tensors in the order of the files, ahead of whoever takes them. Safe to share between threads."""

    def __init__(
        self, pool: DecodePool, budget: int = BUDGET_BYTES, *, takers_help: bool = False
    ) -> None:
        """Prepares reading; nothing runs before something is expected or taken.

        Args:
            pool: its threads read and decode; others may use it too, and wait while there is something to read.
            budget: see BUDGET_BYTES.
            takers_help: who waits for a tensor waits until the budget is made, and where the pool has two threads or more one
                of those who wait works in the place of one of them. Best for takers that have much to do before they take and
                little between two tensors; others wait for their own tensor alone.
        """
        self._pool = pool
        self._budget = budget
        self._untaken = 0
        self._order: list[Request | None] = []
        self._cursor = 0
        self._place: dict[Hashable, int] = {}
        self._urgent: deque[Request] = deque()
        self._runs: deque[tuple[_Making, Run]] = deque()
        self._started: dict[Hashable, Request] = {}
        self._unmade: set[Request] = set()
        self._busy = 0
        self._taken = False
        self._prepared = False
        self._preparing = False
        self._takers_help = takers_help
        self._helper = Workspace(pool.workers) if takers_help and pool.workers > 1 else None
        self._helping = False
        self._closed = False
        self._lock = threading.RLock()
        self._bells: list[SimpleQueue[None]] = []

    def expect(
        self, requests: Iterable[Request], prepare: Callable[[], Iterator[None]] | None = None
    ) -> None:
        """Appends tensors, of keys that were not used before, to what is made ahead; plans as many as the budget holds.

        Args:
            requests: the tensors.
            prepare: called once they are planned; gives steps that a thread takes, one after another, until the first tensor is
                taken. They may write to memory of planned tensors: nothing is decoded before the last one, or the one under
                way then, ends. They are not taken where a tensor was taken, or others were expected, before.
        """
        with self._lock:
            for request in requests:
                self._place[request.key] = len(self._order)
                self._order.append(request)
                self._unmade.add(request)
            prepares, self._prepared = not self._taken and not self._prepared, True
            if prepares:
                self._preparing = True
        try:
            with torch.inference_mode(
                False
            ):  # what other threads write to has to be a plain tensor
                while (due := self._begin()) is not None:
                    self._plan(due)
            steps = prepare() if prepare is not None else iter(())
            if prepares:
                self._pool.put(lambda workspace: self._prepare(steps, workspace), self.close)
        except BaseException:
            if prepares:
                with self._lock:
                    self._preparing = False
                    self._ring()
            raise
        with self._lock:
            self._employ()

    def take(self, request: Request) -> Request:
        """Returns what receives the tensor: the expected request of the same key, or else `request` itself, which goes first.

        Where the tensor was not begun yet, reading goes on behind it: whoever takes tensors in another order is followed.
        """
        with self._lock:
            if not self._taken:
                self._taken = True
                self._employ()
            started = self._started.pop(request.key, None)
            if started is not None:
                self._untaken -= started.size
                self._employ()
                return started
            place = self._place.pop(request.key, None)
            if place is not None:
                expected, self._order[place] = self._order[place], None
                assert expected is not None
                request, self._cursor = expected, place + 1
            if self._closed:
                if not request.made:
                    request.error = _closed_error()
                return request
            self._unmade.add(request)
            self._urgent.append(request)
            self._employ()
            return request

    def result(self, taken: Request) -> torch.Tensor:
        """Returns a tensor that was taken, or raises its error.

        Where it is not made yet and takers help, the caller waits, or helps, until nothing is left to do for lack of budget
        or of tensors: woken for each tensor, it would take the interpreter's lock from those that make the next one, and sleep
        again.
        """
        if not taken.made and self._takers_help:
            self._help(taken)
            self._wait_until(
                lambda: taken.made and (self._closed or not self._busy or taken.error is not None)
            )
        elif not taken.made:
            self._wait_until(lambda: taken.made)
        if taken.error is not None:
            raise taken.error
        assert taken.tensor is not None
        return taken.tensor

    def drop(self, key: Hashable) -> None:
        """Gives up an expected tensor that nobody will take; nothing where there is none of that key."""
        with self._lock:
            place, started = self._place.pop(key, None), self._started.pop(key, None)
            if place is not None:
                request, self._order[place] = self._order[place], None
                assert request is not None
                self._unmade.discard(request)
            if started is not None:
                self._untaken -= started.size
                self._employ()

    def close(self) -> None:
        """Begins nothing more; the pool's end waits for runs under way. Tensors not yet made fail; others may be taken."""
        with self._lock:
            self._closed = True
            for request in list(self._unmade):
                self._settle(request, error=_closed_error())
            self._ring()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _employ(self) -> None:
        """Puts idle threads of the pool to work where there is some; hold the lock."""
        if self._closed or self._preparing:
            return
        place = self._helper is not None and not self._helping  # of a taker
        threads = self._pool.workers - place if self._taken else 1
        work = len(self._runs) + len(self._urgent)
        if not work and self._may_begin():
            work = threads  # how many runs the next tensors have is not known yet
        for _ in range(min(work, threads - self._busy)):
            self._busy += 1
            try:
                self._pool.put(self._work, self._gone)
            except RuntimeError:  # the pool was closed: threads that are left go on
                self._busy -= 1
                if not self._busy:
                    raise
                return

    def _prepare(self, steps: Iterator[None], workspace: Workspace) -> None:
        """Takes the steps of `expect` in a thread of the pool, which then goes on with what they held up."""
        with contextlib.suppress(
            Exception
        ):  # memory that cannot be supplied fails whoever decodes into it
            while not (self._taken or self._closed) and next(steps, steps) is not steps:
                pass
        with self._lock:
            self._preparing = False
            self._busy += 1
            self._ring()
            self._employ()
        self._work(workspace)

    def _gone(self) -> None:
        """Ends the reading where the pool was closed before a thread began to work."""
        self._rest_one(None)
        self.close()

    def _help(self, awaited: Request) -> None:
        """Works in the calling thread, one at a time, once nothing is being prepared; `awaited` is what it waits for."""
        self._wait_until(lambda: not self._preparing or awaited.made)
        with self._lock:
            if self._preparing or self._helper is None or self._helping:
                return
            self._helping = True
            self._busy += 1
        with torch.inference_mode(False):
            self._work(self._helper, awaited)

    def _work(self, workspace: Workspace, awaited: Request | None = None) -> None:
        """Plans tensors and makes runs until there are none, or until what a taker that helps waits for has failed.

        Such a taker plans nothing while others do, for it employs nobody: Ctrl-C inside the pool's locks would leave them held.
        """
        try:
            while (job := self._next(awaited)) is not None:
                if isinstance(job, Request):
                    self._plan(job, first=True)
                    if awaited is None:
                        with self._lock:
                            self._employ()
                else:
                    self._make(*job, workspace)
                del job  # or it would keep its tensor while the next one is waited for
        except BaseException:  # Ctrl-C, where a taker helps
            self._rest_one(awaited)
            if awaited is None:  # what no tensor is to blame for
                self.close()
            raise

    def _next(self, awaited: Request | None) -> Request | tuple[_Making, Run] | None:
        """Returns a tensor to be planned or a run to be made, whichever is due; None sends the calling thread to rest."""
        while True:
            with self._lock:
                plans = awaited is None or self._busy == 1
                if plans or self._runs or self._over(awaited):
                    job = None if self._over(awaited) else self._due(plans)
                    if job is None:  # under the same lock: what comes next employs another thread
                        self._rest_one(awaited)
                    return job
                bell = self._new_bell()
            bell.get()

    def _over(self, awaited: Request | None) -> bool:
        return self._closed or (awaited is not None and awaited.error is not None)

    def _due(self, plans: bool) -> Request | tuple[_Making, Run] | None:
        """Returns the next job; whoever does not plan calls where there is a run. Hold the lock."""
        if plans and self._urgent:
            return self._urgent.popleft()
        return self._runs.popleft() if self._runs else self._begin()

    def _rest_one(self, awaited: Request | None) -> None:
        """Counts the calling thread as one that rests."""
        with self._lock:
            self._busy -= 1
            if awaited is not None:
                self._helping = False
            self._ring()

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Returns once `ready`, which is asked with the lock held; do not hold it.

        A condition variable would do it but for Ctrl-C, which may leave one locked.
        """
        while True:
            with self._lock:
                if ready():
                    return
                bell = self._new_bell()
            bell.get()

    def _new_bell(self) -> SimpleQueue[None]:
        """Returns what is rung once, when something has changed; hold the lock."""
        bell: SimpleQueue[None] = SimpleQueue()
        self._bells.append(bell)
        return bell

    def _ring(self) -> None:
        """Wakes all who wait; hold the lock."""
        for bell in self._bells:
            bell.put(None)
        self._bells.clear()

    def _begin(self) -> Request | None:
        """Returns the next expected tensor, to be planned, or None where there is none or the budget is used up."""
        with self._lock:
            if self._closed or not self._may_begin():
                return None
            request = self._order[self._cursor]
            assert request is not None
            self._order[self._cursor] = None
            self._cursor += 1
            del self._place[request.key]
            self._started[request.key] = request
            self._untaken += request.size
            return request

    def _may_begin(self) -> bool:
        """Moves the cursor to the next expected tensor, from the end back to those that were skipped; whether to begin it."""
        for _ in range(2):
            while self._cursor < len(self._order):
                request = self._order[self._cursor]
                if request is not None:
                    return not self._untaken or self._untaken + request.size <= self._budget
                self._cursor += 1
            self._order = [request for request in self._order if request is not None]
            self._place = {
                request.key: place
                for place, request in enumerate(self._order)
                if request is not None
            }
            self._cursor = 0
        return False

    def _plan(self, request: Request, *, first: bool = False) -> None:
        """Begins a tensor; its runs are the first to be made, or the last."""
        try:
            filling = request.start()
        except BaseException as exc:
            self._settle(request, error=exc)
            if not isinstance(exc, Exception):  # Ctrl-C, of whoever expects or helps
                raise
            return
        making = _Making(request, filling)
        if not filling.runs:
            self._settle(request, filling.tensor)
        with self._lock:
            runs = [(making, run) for run in filling.runs]
            if first:
                self._runs.extendleft(reversed(runs))
            else:
                self._runs.extend(runs)
            if self._helping:
                self._ring()

    def _make(self, making: _Making, run: Run, workspace: Workspace) -> None:
        try:
            if not making.request.made:  # failed, else
                run.decode(
                    run.read(workspace.slots(0 if run.place is not None else run.size)), workspace
                )
        except BaseException as exc:
            self._settle(making.request, error=exc)
            if not isinstance(exc, Exception):  # Ctrl-C, of a taker that helps
                raise
        with self._lock:
            making.left -= 1
            last = not making.left
        if last:
            self._settle(making.request, making.tensor)

    def _settle(
        self,
        request: Request,
        tensor: torch.Tensor | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Sets the tensor or the error of a request; the first one stays."""
        with self._lock:
            if request not in self._unmade:
                return
            self._unmade.discard(request)
            request.tensor, request.error = tensor, error
            if error is not None or not self._takers_help:
                self._ring()


def _closed_error() -> RuntimeError:
    return RuntimeError("the load has ended")
