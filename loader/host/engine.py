"""Tensors decoded on the CPU before they are taken; reading, checking and decoding overlap.

    caller         puts messages into the coordinator's queue and waits for promises
    coordinator    one thread: plans tensors in the order of the prefetch, while the budget lasts
    workers        each takes the next run of tiles: reads, checks, decodes and casts it

Only the coordinator's thread touches the order and the budget, so they need no lock. No tensor is
handed from worker to worker: under the interpreter's lock each hand-over costs as much as decoding
some kilobytes. For the same reason small tensors go from thread to thread in blocks: a caller finds
the block of a tensor in a table, and sends one message when the last tensor of it is taken.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import FormatError
from codecllm.formats.machine import cores, without_garbage_collection
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.loader.engine import Part, Request
from codecllm.loader.host.alike import decode_alike
from codecllm.loader.host.announce import Announcer
from codecllm.loader.host.blocks import SMALL_BYTES, Block, SmallTensors
from codecllm.loader.host.decode import Workspace
from codecllm.loader.host.filling import PendingTensor, plan_tensor
from codecllm.loader.host.memory import Allocate, SlabMemory
from codecllm.loader.host.together import Together
from codecllm.loader.host.workers import Job, WorkerThreads
from codecllm.loader.promise import Awaited, Promise

BUDGET_BYTES = 256 << 20
"""Upper bound on bytes decoded or in flight but not yet taken; one larger tensor is allowed."""


class HostEngine:
    """Decodes tensors of a container into the memory of the CPU; see `engine.Engine`."""

    def __init__(
        self,
        container: Container,
        threads: int,
        *,
        allocate: Allocate | None = None,
        budget: int = BUDGET_BYTES,
    ) -> None:
        """Starts nothing yet.

        Args:
            container: where the tensors are stored.
            threads: number of workers.
            allocate: returns memory for tensors, called by one thread; None takes new memory.
            budget: see `BUDGET_BYTES`.

        Raises:
            UsageError: `threads` is not positive.
        """
        self._container = container
        self._allocate = allocate if allocate is not None else SlabMemory().empty_bytes
        self._budget = budget
        self._workers = WorkerThreads(threads)
        # Until the caller takes its first tensor it builds the model, and needs a core of its own.
        self._holds_one = 1 < threads >= cores()
        self._coordinator = WorkerThreads(1, "codecllm-coordinator")
        self._process = os.getpid()
        self._announcer = Announcer()
        self._error: BaseException | None = None
        self._promises: dict[Request, Promise[torch.Tensor]] = {}
        # Small tensors that were begun, until the last of their block is taken. Callers only look.
        self._blocks: dict[Request, Together] = {}
        self._in_flight: set[Promise[Any] | Together] = set()
        self._jobs: deque[Job] = deque()
        # Only the coordinator uses these.
        self._waiting: OrderedDict[Request, int] = OrderedDict()
        self._small = SmallTensors(container)
        self._untaken: dict[Request, int] = {}
        self._untaken_bytes = 0
        self._prefetched: dict[tuple[str, Part], Request] = {}

    def prefetch(self, requests: Iterable[Request]) -> None:
        """See `engine.Engine`; as many tensors are decoded ahead as the budget allows."""
        if self._holds_one:
            self._holds_one = False
            self._workers.hold_one()
        self._post(self._on_prefetch, list(requests))

    def take(self, request: Request) -> Awaited[torch.Tensor]:
        """See `engine.Engine`; a tensor that was not begun goes first.

        Raises:
            RuntimeError: in a process that was forked from the one that made the engine.
        """
        if self._process != os.getpid():
            raise RuntimeError("a load cannot go on in a forked process")
        self._workers.release()
        block = self._blocks.get(request)
        if block is not None:
            taken = block.take(request)
            if block.is_taken:
                self._post(self._on_block_taken, block)
            if self._error is not None:
                block.fail(self._error)
            return taken
        # The coordinator removes the promise: a caller that Ctrl-C interrupts here and that asks
        # again gets the same one.
        promise = self._promises.setdefault(request, Promise())
        self._post(self._on_take, request)
        if self._error is not None:  # the coordinator may have ended
            promise.fail(self._error)
        return promise

    def close(self) -> None:
        """See `engine.Engine`."""
        self._break(RuntimeError("the load has ended"))
        self._coordinator.close()
        self._workers.close()
        self._break(RuntimeError("the load has ended"))  # for promises of the last message

    def _post(self, handler: Callable[..., None], *arguments: object) -> None:
        self._coordinator.submit(partial(self._handle, handler, arguments))

    def _handle(
        self, handler: Callable[..., None], arguments: tuple[object, ...], workspace: Workspace
    ) -> None:
        try:
            if self._error is None:
                handler(*arguments)
        except BaseException as exc:  # no tensor is to blame: nothing can go on
            self._break(exc)

    def _break(self, error: BaseException) -> None:
        """Fails all promises that are not kept; the first error stays for later ones."""
        self._error = self._error or error
        for promise in list(self._promises.copy().values()):
            promise.fail(self._error)
        for begun in list(self._in_flight.copy()):
            begun.fail(self._error)

    def _on_prefetch(self, requests: list[Request]) -> None:
        with without_garbage_collection():  # reading the headers of shards makes many objects
            self._add(requests)
            self._start_waiting()

    def _add(self, requests: list[Request]) -> None:
        for request in requests:
            if request in self._waiting or request in self._untaken or request in self._blocks:
                continue
            size = self._waiting[request] = self._size(request)
            self._prefetched[request.name, request.part] = request
            if size < SMALL_BYTES and request.out is None:
                self._small.add(request, size)

    def _on_take(self, request: Request) -> None:
        promise = self._promises.pop(request, None)
        if promise is None:  # another thread took it at the same moment: both have its promise
            return
        block = self._blocks.get(request)
        if block is not None:  # it was begun after the caller had looked for it
            block.take_as(request, promise)
            self._release(block)
            return
        expected = self._prefetched.pop((request.name, request.part), None)
        is_started = expected is not None and self._forget(expected)
        if expected is not None and expected != request:
            # Taken with another dtype: the prefetched tensor will never be taken.
            self._promises.pop(expected, None)
            is_started = False
        if not is_started:
            self._start(request, promise, first=True)
        self._start_waiting()

    def _forget(self, request: Request) -> bool:
        """Takes a prefetched tensor out of the order and the budget; whether it was started."""
        block = self._blocks.get(request)
        if block is not None:
            block.drop(request)
            self._release(block)
            return True
        self._waiting.pop(request, None)
        size = self._untaken.pop(request, None)
        self._untaken_bytes -= size or 0
        return size is not None

    def _on_block_taken(self, block: Together) -> None:
        self._release(block)
        self._start_waiting()

    def _release(self, block: Together) -> None:
        """Lets go of a block whose last tensor was taken; once more changes nothing."""
        if not block.is_taken or self._blocks.get(block.requests[0]) is not block:
            return
        for request in block.requests:
            del self._blocks[request]
        self._untaken_bytes -= block.size

    def _start_waiting(self) -> None:
        """Starts prefetched tensors in their order while the budget lasts."""
        while self._waiting:
            request, size = next(iter(self._waiting.items()))
            has_untaken = self._untaken or self._blocks
            if has_untaken and self._untaken_bytes + size > self._budget:
                return
            if size < SMALL_BYTES and request.out is None:
                self._start_block(request)
            else:
                self._start(request, self._count(request), first=False)

    def _count(self, request: Request) -> Promise[torch.Tensor]:
        """Moves a tensor that waits into the budget; returns its promise."""
        size = self._waiting.pop(request)
        self._untaken[request] = size
        self._untaken_bytes += size
        return self._promises.setdefault(request, Promise())

    def _start_block(self, request: Request) -> None:
        """Queues the job of a small tensor and of those beside it that wait too."""
        try:
            block = self._small.block(request)
            file, _ = self._container.shard(block.shard)
            self._announcer.announce_bytes(file, block.begin, block.end)
        except FormatError as exc:
            self._count(request).fail(exc)
            return
        requests = [one for one in block.requests if one in self._waiting]
        begun = Together(requests, sum(self._waiting.pop(one) for one in requests))
        self._in_flight.add(begun)
        self._blocks.update(dict.fromkeys(requests, begun))
        self._untaken_bytes += begun.size
        self._jobs.append(partial(self._run_block, block, begun))
        self._workers.submit(self._run_next)

    def _size(self, request: Request) -> int:
        """Returns about how many bytes a tensor takes."""
        record = self._container.records[request.name]
        if request.part != "weight":
            is_wide = isinstance(record, Int8Tensor) and record.wide
            return record.elements * (2 if is_wide else 1)
        if request.dtype is not None:
            return record.elements * request.dtype.itemsize
        return record.elements * DTYPES[record.dtype].itemsize

    def _start(self, request: Request, promise: Promise[torch.Tensor], *, first: bool) -> None:
        """Plans a tensor and queues its jobs, before all others or behind them."""
        try:
            source = self._container.tensor(request.name)
            self._announcer.announce(source)
            plan = plan_tensor(source, request, self._allocate)
        except Exception as exc:
            promise.fail(exc)
            return
        if not plan.jobs:
            promise.give(plan.tensor)
            return
        pending = _InFlight(plan, promise)
        self._in_flight.add(promise)
        jobs = [partial(self._run_part, pending, job) for job in plan.jobs]
        if first:
            self._jobs.extendleft(reversed(jobs))
        else:
            self._jobs.extend(jobs)
        for _ in jobs:
            self._workers.submit(self._run_next)

    def _run_next(self, workspace: Workspace) -> None:
        """Runs the first job of the queue, in a worker."""
        self._jobs.popleft()(workspace)

    def _run_block(self, block: Block, begun: Together, workspace: Workspace) -> None:
        """Reads and decodes small tensors that lie together."""
        if not begun.done:
            try:
                begun.give(self._decoded(block, begun.requests, workspace))
            except BaseException as exc:  # no tensor is to blame
                begun.fail(exc)
        self._in_flight.discard(begun)

    def _decoded(
        self, block: Block, requests: list[Request], workspace: Workspace
    ) -> dict[Request, torch.Tensor | BaseException]:
        """Returns tensors of a block, or the error of each."""
        outcomes: dict[Request, torch.Tensor | BaseException] = {}
        excerpt = block.read(self._container)
        if excerpt is not None:
            outcomes.update(decode_alike(self._container, block.shard, excerpt, requests))
        for request in requests:
            if request not in outcomes:
                try:
                    plan = plan_tensor(self._container.tensor(request.name, excerpt), request)
                    for job in plan.jobs:
                        job(workspace)
                    outcomes[request] = plan.tensor
                except Exception as exc:
                    outcomes[request] = exc
        return outcomes

    def _run_part(self, pending: _InFlight, job: Job, workspace: Workspace) -> None:
        """Runs one job of a tensor."""
        if not pending.promise.done:
            try:
                job(workspace)
            except BaseException as exc:
                pending.promise.fail(exc)
        if pending.job_ended():
            pending.promise.give(pending.tensor)
            self._in_flight.discard(pending.promise)


class _InFlight:
    """A tensor whose jobs are queued or run."""

    def __init__(self, planned: PendingTensor, promise: Promise[torch.Tensor]) -> None:
        self.tensor = planned.tensor
        self.promise = promise
        self._jobs_left = len(planned.jobs)
        self._lock = threading.Lock()  # of workers, which Ctrl-C does not interrupt

    def job_ended(self) -> bool:
        """Counts a job that has ended; returns whether it was the last."""
        with self._lock:
            self._jobs_left -= 1
            return not self._jobs_left
