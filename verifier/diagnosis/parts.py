"""Parts of a tensor: rectangles of its matrix, decoded or read from the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.errors import CodecLLMError, FormatError
from codecllm.formats.reference import join_chunks
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.schemes.int8 import join_codes
from codecllm.formats.stored_tensor import StoredTensor, tile_steps
from codecllm.formats.tiling import Grid, Tile


def read_tile(source: SourceTensor, grid: Grid, tile: Tile) -> NDArray[np.unsignedinteger]:
    """Reads a tile of the source's matrix as unsigned words [tile.rows, tile.cols]."""
    start = tile.row * grid.cols + tile.col
    if tile.cols == grid.cols or tile.rows == 1:
        return source.read_elements(start, start + tile.symbols).reshape(tile.rows, tile.cols)
    # A tile that is narrower than the matrix lies in pieces, one for each row.
    rows = [
        source.read_elements(start + row * grid.cols, start + row * grid.cols + tile.cols)
        for row in range(tile.rows)
    ]
    return np.stack(rows)


def read_weights(source: SourceTensor, grid: Grid, tile: Tile) -> NDArray[np.float32]:
    """Reads a tile of an int8 tensor's source as float32 [tile.rows, tile.cols]."""
    return float32_from_bits(read_tile(source, grid, tile), source.dtype.name)


@dataclass(frozen=True, slots=True)
class Part:
    """Some tiles of a tensor that give a rectangle of the source.

    Attributes:
        place: the rectangle: a tile, or whole rows where tiles give the source's order only
            together.
        planes: uint8 [rows, cols] per plane, as in `reference.read_symbols`.
        first: number of the first chunk.
        chunks: symbols of the chunks, in order, as they are stored, flat.
    """

    place: Tile
    planes: list[NDArray[np.uint8]]
    first: int
    chunks: list[NDArray[np.uint8]]

    @property
    def codes(self) -> NDArray[np.signedinteger]:
        """The codes of an int8 tensor, [rows, cols]: int8, or int16 of a wide one."""
        low = self.planes[0].view(np.int8)
        return low if len(self.planes) == 1 else join_codes(low, self.planes[1].view(np.int8), 8)


def decoded_parts(tensor: StoredTensor, faults: list[CodecLLMError]) -> Iterator[Part]:
    """Yields a tensor part by part.

    A part with a damaged chunk is left out.

    Args:
        tensor: the tensor.
        faults: receives the errors of damaged chunks.
    """
    planes = tensor.table.planes
    together = tensor.tiles_together
    for start in range(0, len(tensor.table.grid), together):
        first = start * planes
        last = (start + together) * planes
        slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
        chunks = []
        # Chunk by chunk: a damaged one must not hide the others.
        for chunk in range(first, last):
            try:
                chunks.append(tensor.decode_chunk(chunk, slots, first))
            except FormatError as exc:
                faults.append(exc)
        if len(chunks) == last - first:
            yield Part(tensor.part(start), join_chunks(tensor, start, chunks), first, chunks)


def place_of(tensor: StoredTensor, row: int, col: int) -> tuple[int, int]:
    """Returns the number of the chunk with an element of the matrix, and its byte in the shard."""
    grid = tensor.table.grid
    chunk = (row // grid.tile_rows * grid.across + col // grid.tile_cols) * tensor.table.planes
    return chunk, tensor.offset + int(tensor.table.offsets[chunk])


def asked_steps(
    tensor: StoredTensor, scales: NDArray[np.float32], place: Tile
) -> NDArray[np.float32]:
    """Returns the steps of a part under other scales of its channels.

    They broadcast against the codes of the part.
    """
    return tile_steps(replace(tensor, scales=scales), place)
