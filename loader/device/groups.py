"""Blocks of matrices that are decoded together, and the buffers that receive them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device.chunks import ChunkWork
from codecllm.loader.device.plan import aligned, band_rows
from codecllm.loader.device.streams import Event

GROUP_ELEMENTS = 1 << 27
"""Most elements decoded together: a thousand chunks. Two buffers of bfloat16 then take 512 MiB."""


class HeldMatrix(Protocol):
    """A matrix whose payload lies in device memory.

    Attributes:
        stored: the tensor.
        slot: where its payload begins.
        sides: side arrays of the whole matrix, on the device.
    """

    stored: StoredTensor
    slot: int
    sides: list[torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Bands of tiles of a matrix that are decoded, and used, together."""

    tensor: HeldMatrix
    bands: range

    @property
    def rows(self) -> int:
        """Rows of the block."""
        return band_rows(self.tensor.stored, self.bands)[1]

    @property
    def cols(self) -> int:
        """Columns of the block."""
        return self.tensor.stored.table.grid.cols

    @property
    def elements(self) -> int:
        """Elements of the block."""
        return self.rows * self.cols


Place = tuple[int, int, torch.dtype]
"""Addresses of the arena and of a buffer, and the dtype of the weights that are decoded there."""


@dataclass(slots=True, eq=False)
class Recording:
    """The decoding of a group into one place.

    Attributes:
        weights: the decoded blocks, [rows, columns] each, in that place.
        replay: queues it; None as long as it was queued only once, which compiles its kernels.
        refused: there is no recording of it.
    """

    weights: dict[Block, torch.Tensor]
    replay: Callable[[], None] | None = None
    refused: bool = False


@dataclass(slots=True, eq=False)
class Group:
    """Blocks that are decoded as one batch, described for an arena at a certain address.

    Attributes:
        blocks: the blocks.
        one_by_one: whether each is a batch of its own instead, from the start of the arena.
        arena: its address.
        work: the description, None until there is one.
        words: it, on the device.
        tables: of `rans`, on the device, with an event behind their copy; None without any.
        planes: where the planes of each block lie in the arena.
        chunks: numbers of the chunks of each block in the description.
        recordings: of the decoding, by place.
    """

    blocks: list[Block]
    one_by_one: bool = False
    arena: int = 0
    work: ChunkWork | None = None
    words: torch.Tensor | None = None
    tables: Any = None
    planes: list[list[int]] = field(default_factory=list)
    chunks: list[range] = field(default_factory=list)
    recordings: dict[Place, Recording] = field(default_factory=dict)

    def size(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the decoded blocks."""
        return sum(aligned(block.elements * dtype.itemsize) for block in self.blocks)

    def places(self, memory: torch.Tensor, dtype: torch.dtype) -> dict[Block, torch.Tensor]:
        """Returns where the blocks go, [rows, columns] each, in memory of `size` bytes or more."""
        places, start = {}, 0
        for block in self.blocks:
            size = block.elements * dtype.itemsize
            places[block] = memory[start : start + size].view(dtype).view(block.rows, block.cols)
            start += aligned(size)
        return places


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory for decoded weights, and a note of its contents.

    Attributes:
        memory: the memory.
        weights: the blocks that were decoded into it, [rows, columns] each.
        dtype: their dtype.
        ready: behind the decoding.
        users: streams by number: their later work waits for `ready`, and reads the weights.
    """

    memory: torch.Tensor | None = None
    weights: dict[Block, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    ready: Event | None = None
    users: dict[int, Any] = field(default_factory=dict)

    def holds(self, block: Block, dtype: torch.dtype) -> bool:
        """Whether it has the weights of a block in a dtype."""
        return block in self.weights and self.dtype == dtype


def grouped(blocks: list[Block]) -> list[Group]:
    """Gathers consecutive blocks into groups of at most GROUP_ELEMENTS, one block at least."""
    groups: list[Group] = []
    size = 0
    for block in blocks:
        if not groups or size + block.elements > GROUP_ELEMENTS:
            groups.append(Group([]))
            size = 0
        groups[-1].blocks.append(block)
        size += block.elements
    return groups
