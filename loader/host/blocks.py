"""Small tensors that lie together in a shard, for which one read and one job are enough.

A read, a job, and the hand-over between two threads each cost as much as decoding some kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from codecllm.formats.container import Container
from codecllm.formats.errors import FormatError
from codecllm.formats.files import Excerpt
from codecllm.loader.engine import Request

SMALL_BYTES = 64 << 10
"""A tensor of fewer bytes in memory is small."""

BLOCK_BYTES = 256 << 10
"""Most bytes of a shard that are read together."""

_TENSORS_BYTES = 1 << 20
"""Most bytes in memory of the tensors of a block."""

_GAP_BYTES = 16 << 10
"""Most bytes between two tensors of a block; they are read for nothing."""


@dataclass(slots=True)
class Block:
    """Small tensors whose bytes, with their side tensors, are [begin, end) of a shard.

    Attributes:
        shard: number of the shard.
        begin: where the first byte lies.
        end: the offset behind the last byte.
        size: bytes of the tensors in memory.
        requests: the tensors, in the order of the file.
    """

    shard: int
    begin: int
    end: int
    size: int = 0
    requests: list[Request] = field(default_factory=list)

    def read(self, container: Container) -> Excerpt | None:
        """Reads the block, unchecked; None where each tensor has to be read by itself."""
        # A tensor may lie far from its side tensors: no bytes of others are read with it.
        if self.end - self.begin > BLOCK_BYTES:
            return None
        try:
            return container.excerpt(self.shard, self.begin, self.end)
        except (FormatError, OSError):
            return None  # the error of the tensor that is to blame names it


class SmallTensors:
    """The small tensors of a prefetch, in blocks. For one thread."""

    def __init__(self, container: Container) -> None:
        """Starts without tensors."""
        self._container = container
        self._unsorted: dict[int, list[tuple[Request, int]]] = {}
        self._blocks: dict[Request, Block] = {}

    def add(self, request: Request, size: int) -> None:
        """Adds a tensor that takes `size` bytes in memory; nothing is read."""
        shard = self._container.stored_record(request.name).shard
        self._unsorted.setdefault(shard, []).append((request, size))

    def block(self, request: Request) -> Block:
        """Returns the block of a tensor that was added.

        Raises:
            FormatError: the header of its shard is damaged.
        """
        # Not before a tensor of the shard is needed: reading a header takes time.
        if request not in self._blocks:
            self._cut(self._container.stored_record(request.name).shard)
        return self._blocks[request]

    def _cut(self, shard: int) -> None:
        """Cuts the tensors of a shard into blocks."""
        spans = [
            (*self._container.span(request.name), size, request)
            for request, size in self._unsorted[shard]
        ]
        spans.sort(key=lambda span: span[:2])
        block = Block(shard, 0, 0)
        for begin, end, size, request in spans:
            if not (
                block.requests
                and begin - block.end <= _GAP_BYTES
                and end - block.begin <= BLOCK_BYTES
                and block.size + size <= _TENSORS_BYTES
            ):
                block = Block(shard, begin, end)
            block.end = max(block.end, end)
            block.size += size
            block.requests.append(request)
            self._blocks[request] = block
        del self._unsorted[shard]
