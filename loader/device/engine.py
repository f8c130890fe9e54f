"""The engine that loads tensors onto a device, and its thread.

While one batch is decoded on the device, the next is copied there, and threads read and check the
ones behind it. The host waits for the device in two places, both by events: before it overwrites a
pinned buffer whose copy may still run, and before it hands a tensor out, when the fault words of
its last batch have come back. The host holds RING pinned buffers: 256 MiB.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import weakref
from collections import deque
from collections.abc import Iterable
from queue import Empty, SimpleQueue

import torch

from codecllm.formats.container import Container
from codecllm.loader.device.codecs import DeviceCodecs
from codecllm.loader.device.issuing import BatchIssuer, IssuedBatch
from codecllm.loader.device.plan import Order
from codecllm.loader.device.reading import RING, BatchReader, ReadingBatch
from codecllm.loader.device.streams import Streams
from codecllm.loader.engine import Request
from codecllm.loader.host.workers import snapshot
from codecllm.loader.promise import Promise

_LOG = logging.getLogger(__name__)


class DeviceEngine:
    """Loads tensors of a container onto one device; see `engine.Engine`.

    Attributes:
        streams: the device's streams.
        codecs: which chunks are decoded on the device.
    """

    def __init__(
        self, container: Container, threads: int, streams: Streams, codecs: DeviceCodecs
    ) -> None:
        """Starts the engine's thread, which allocates pinned memory.

        Args:
            container: where the tensors are stored.
            threads: threads that decode on the CPU chunks that the device cannot decode.
            streams: the device's streams.
            codecs: which chunks are decoded on the device.
        """
        self.streams = streams
        self.codecs = codecs
        self._reader = BatchReader(container, threads, streams, codecs)
        self._issuer = BatchIssuer(container, streams, codecs)
        self._inbox: SimpleQueue[Order | None] = SimpleQueue()
        self._promises: dict[Request, Promise[torch.Tensor]] = {}
        self._may_decode = False
        self._error: BaseException | None = None
        self._ended = Promise[None]()
        self._process = os.getpid()
        # Only the engine's thread uses these.
        self._open: set[Order] = set()
        self._reading: deque[ReadingBatch] = deque()
        self._issued: deque[IssuedBatch] = deque()
        _engines.add(self)
        try:
            # One call of C without a lock; `Thread.start` waits for an event instead.
            _thread.start_new_thread(self._run, ())
        except BaseException:  # Ctrl-C, when the thread may run: no caller will end it
            self._end_soon()
            raise

    def prefetch(self, requests: Iterable[Request]) -> None:
        """See `engine.Engine`; tensors are read in this order (the files' order is quickest).

        No memory of the device is used for them before the first `take`: a model that is being
        built may be measuring the memory that is free.
        """
        for request in requests:
            if request not in self._promises:
                self._promises[request] = self._order(request)

    def take(self, request: Request) -> Promise[torch.Tensor]:
        """See `engine.Engine`; from the first call on all prefetched tensors are decoded.

        After the first error, of any tensor, all promises fail with it.
        """
        promise = self._promises.pop(request, None) or self._order(request)
        self._may_decode = True
        self._inbox.put(None)
        return promise

    def close(self) -> None:
        """See `engine.Engine`."""
        self._end_soon()
        if self._process == os.getpid():  # a forked process has no thread to wait for
            self._ended.get()
        self._promises.clear()

    def _order(self, request: Request) -> Promise[torch.Tensor]:
        order = Order(request)
        self._inbox.put(order)
        if self._error is not None:  # the thread may have ended
            order.promise.fail(self._error)
        return order.promise

    def _end_soon(self) -> None:
        self._error = self._error or RuntimeError("the load was closed")
        self._inbox.put(None)

    @torch.no_grad()
    def _run(self) -> None:
        try:
            with self.streams.here():
                self._reader.pin()
                while self._error is None:
                    self._step()
        except BaseException as exc:
            self._error = self._error or exc
        finally:
            self._end()

    def _step(self) -> None:
        """Does the most urgent work that is possible; waits only where nothing else is left."""
        while self._issued and self._issued[0].done.query():
            self._settle()
        self._receive(wait=not (self._reading or self._issued or self._reader.pending))
        while len(self._reading) < RING - 1 and (batch := self._reader.next_batch()) is not None:
            self._reading.append(self._reader.start(batch))
        if self._reading:
            self._issue(self._reading.popleft())
        elif self._issued:
            self._settle()

    def _receive(self, *, wait: bool) -> None:
        """Takes orders from the inbox; where it is empty, waits for a message or returns."""
        try:
            order = self._inbox.get(block=wait)
            while True:
                if order is not None:
                    self._open.add(order)
                    self._reader.add(order)
                order = self._inbox.get_nowait()
        except Empty:
            return

    def _issue(self, reading: ReadingBatch) -> None:
        reading.wait()
        while not self._may_decode and self._error is None:
            if not self._reader.plan_order():
                self._receive(wait=True)
        if self._error is None:
            self._issued.append(self._issuer.issue(reading))

    def _settle(self) -> None:
        """Waits for the oldest batch on the device and hands its tensors out."""
        batch = self._issued.popleft()
        self._issuer.settle(batch)
        for order in batch.finished:
            tensor, order.out = order.out, None
            assert tensor is not None
            self._open.discard(order)
            order.promise.give(tensor)

    def _end(self) -> None:
        """Lets go of all memory once no work uses it, and fails the promises that are left."""
        assert self._error is not None
        try:
            self._reader.end_threads()
            self.streams.synchronize()
        except Exception:  # a broken device: the promises fail with the first error
            _LOG.debug("%s: could not wait for queued work", self.streams.device, exc_info=True)
        self._receive(wait=False)
        for order in self._open:
            order.out = None
            order.promise.fail(self._error)
        self._open.clear()
        self._reading.clear()
        self._issued.clear()
        self._reader.free()
        self._issuer.free()
        self._ended.give(None)


_EXIT_SECONDS = 10.0
"""How long an interpreter that ends waits for an engine: longer, and the device is broken."""

_engines: weakref.WeakSet[DeviceEngine] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Ends the engines that Ctrl-C left open, while the interpreter is whole."""
    engines = snapshot(_engines)
    for engine in engines:
        engine._end_soon()
    for engine in engines:
        if engine._process == os.getpid():
            engine._ended.wait(_EXIT_SECONDS)
