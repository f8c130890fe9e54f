"""The first half of the way onto a device: from orders to batches in pinned memory.

Threads read the pieces of a batch into one pinned buffer of a ring and check them. Chunks that the
device cannot decode are decoded there by the CPU.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch

from codecllm.formats.container import Container
from codecllm.loader.device.buffers import PinnedBuffer
from codecllm.loader.device.codecs import DeviceCodecs
from codecllm.loader.device.plan import SLOT_BYTES, Batch, Order, Piece, aligned, cut
from codecllm.loader.device.read_piece import decodes_on_host, read_piece
from codecllm.loader.device.streams import Streams
from codecllm.loader.host.workers import WorkerThreads
from codecllm.loader.promise import Promise

RING = 4
"""Pinned buffers: one that is copied, three that are filled."""

READERS = 3
"""Threads that read and check stored chunks, on any number of cores.

Reading and hashing run outside the interpreter's lock, at several GB/s a thread; but each chunk
takes the lock once, as does every call that queues work for the device, and with more threads the
engine waits longer for the lock than it gains.
"""


@dataclass(slots=True, eq=False)
class ReadingBatch:
    """A batch whose pieces are being read.

    Attributes:
        batch: the batch.
        slot: the pinned buffer.
        memory: uint8 [batch.slot_bytes], the part of the buffer that the batch takes.
        jobs: one for each piece.
    """

    batch: Batch
    slot: PinnedBuffer
    memory: torch.Tensor
    jobs: list[Promise[None]]

    def wait(self) -> None:
        """Waits until all pieces are read and checked.

        Raises:
            FormatError: one is damaged.
        """
        for job in self.jobs:
            job.get()


class BatchReader:
    """Cuts orders into pieces, gathers pieces into batches, and reads these; for one thread."""

    def __init__(
        self, container: Container, threads: int, streams: Streams, codecs: DeviceCodecs
    ) -> None:
        """Allocates nothing yet.

        Args:
            container: where the tensors are stored.
            threads: threads that decode on the CPU chunks that the device cannot decode.
            streams: the device's.
            codecs: which chunks are decoded on the device.
        """
        self._container = container
        self._streams = streams
        self._codecs = codecs
        self._readers = WorkerThreads(min(READERS, threads), "codecllm-read")
        self._decoders = WorkerThreads(threads)
        self._orders: deque[Order] = deque()
        self._upcoming: deque[Piece] = deque()
        self._slots = [PinnedBuffer() for _ in range(RING)]
        self._batches = 0
        self._least_bytes = min(SLOT_BYTES, aligned(container.manifest.decoded_bytes))

    @property
    def pending(self) -> bool:
        """Whether there are orders or pieces that no batch holds yet."""
        return bool(self._orders or self._upcoming)

    def add(self, order: Order) -> None:
        """Queues an order."""
        self._orders.append(order)

    def pin(self) -> None:
        """Allocates all pinned buffers: a tenth of a second that building the model may hide."""
        for slot in self._slots:
            slot.claim(self._least_bytes, self._least_bytes, self._streams)

    def plan_order(self) -> bool:
        """Cuts the first queued order into pieces; returns whether there was one.

        Raises:
            FormatError: its side data are damaged.
        """
        if not self._orders:
            return False
        self._upcoming.extend(cut(self._orders.popleft(), self._container, self._codecs))
        return True

    def next_batch(self) -> Batch | None:
        """Returns as many of the next pieces as fit into a batch; None where there are none.

        Raises:
            FormatError: the side data of a tensor are damaged.
        """
        batch = Batch()
        while (piece := self._next_piece()) is not None:
            # It keeps its place: tensors are finished in the order of their pieces.
            if not batch.takes(piece):
                self._upcoming.appendleft(piece)
                break
            batch.add(piece)
        return batch if batch.pieces else None

    def start(self, batch: Batch) -> ReadingBatch:
        """Starts to read a batch, once the copy from its pinned buffer is done."""
        slot = self._slots[self._batches % RING]
        self._batches += 1
        memory = slot.claim(batch.slot_bytes, self._least_bytes, self._streams)
        jobs = []
        for piece, place, _ in batch.pieces:
            buffer = memory[place : place + piece.host_bytes]
            # Decoding takes the cores, reading the disk: neither queue waits for the other.
            threads = self._decoders if decodes_on_host(piece) else self._readers
            jobs.append(threads.submit(partial(read_piece, piece, buffer)))
        return ReadingBatch(batch, slot, memory, jobs)

    def end_threads(self) -> None:
        """Drops queued jobs and waits for running ones: they write to pinned memory."""
        self._readers.close()
        self._decoders.close()

    def free(self) -> None:
        """Lets go of the pinned memory."""
        self._slots.clear()
        self._upcoming.clear()

    def _next_piece(self) -> Piece | None:
        while not self._upcoming and self.plan_order():
            pass
        return self._upcoming.popleft() if self._upcoming else None
