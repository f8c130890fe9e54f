"""Whole tensors out of a container, slowly and obviously. Every fast path must give these bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import DecodeError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import dequantize, join_codes, split_codes
from codecllm.formats.schemes.lossless import join_planes
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor, sound, tile_steps
from codecllm.formats.tiling import Tile

# Chunks side by side share the cost of numpy's calls.
_RANS_SYMBOLS = 1 << 20


def read_symbols(tensor: StoredTensor) -> list[NDArray[np.uint8]]:
    """Decodes all chunks of a tensor.

    Of a wide tensor the planes are the low and the high byte of its codes, for any `low_bits` of
    its chunks.

    Returns:
        One uint8 [rows, cols] matrix of symbols per plane, columns as in the source.
    """
    grid = tensor.table.grid
    planes = tensor.table.planes
    matrices = [np.empty((grid.rows, grid.cols), np.uint8) for _ in range(planes)]
    for tiles in runs(tensor):
        for part, part_planes in _decoded_parts(tensor, tiles):
            for matrix, symbols in zip(matrices, part_planes, strict=True):
                matrix[part.row : part.row + part.rows, part.col : part.col + part.cols] = symbols
    return matrices


def runs(tensor: StoredTensor) -> list[range]:
    """Cuts a tensor's tiles into runs that are read and decoded together.

    Each run has whole rows in the source's order. It is one tile or row of tiles; with codec
    `rans`, whose chunks are decoded side by side, about a million elements.
    """
    grid = tensor.table.grid
    together = tensor.tiles_together
    step = together
    if tensor.tables is not None:
        tiles = _RANS_SYMBOLS // (min(grid.tile_rows, grid.rows) * min(grid.tile_cols, grid.cols))
        # A run ends where rows end, so that its elements are contiguous in the source.
        step = max(1, tiles // together) * together
    return [range(first, min(first + step, len(grid))) for first in range(0, len(grid), step)]


def _decoded_parts(
    tensor: StoredTensor, tiles: range
) -> Iterator[tuple[Tile, list[NDArray[np.uint8]]]]:
    """Reads a run of tiles with one read.

    Yields:
        Each rectangle of the source and its planes, uint8 [rows, cols].
    """
    planes = tensor.table.planes
    together = tensor.tiles_together
    first = tiles.start * planes
    last = tiles.stop * planes
    slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
    run = tensor.decode_run(first, last, slots, first)
    for start in range(tiles.start, tiles.stop, together):
        chunks = [sound(symbols) for symbols in islice(run, planes * together)]
        yield tensor.part(start), join_chunks(tensor, start, chunks)


def join_chunks(
    tensor: StoredTensor, start: int, chunks: list[NDArray[np.uint8]]
) -> list[NDArray[np.uint8]]:
    """Returns the planes of the `tiles_together` tiles from `start` on.

    They are uint8 [rows, cols] as in `read_symbols`.

    Args:
        tensor: the tensor.
        start: number of the first tile.
        chunks: the symbols of these tiles' chunks in order, flat.
    """
    part = tensor.part(start)
    planes = tensor.table.planes
    matrices = [np.empty((part.rows, part.cols), np.uint8) for _ in range(planes)]
    for number in range(tensor.tiles_together):
        tile = tensor.table.grid.tile(start + number)
        first_col = tile.col - part.col
        symbols_of_planes = chunks[number * planes : (number + 1) * planes]
        if tensor.wide:
            # Tiles may differ in low_bits: bytes of codes are the same planes for all of them.
            low, high = (half.view(np.int8) for half in symbols_of_planes)
            codes = join_codes(low, high, tensor.table.low_bits[start + number])
            symbols_of_planes = [half.view(np.uint8) for half in split_codes(codes, 8)]
        for plane, symbols in zip(matrices, symbols_of_planes, strict=True):
            plane[:, first_col : first_col + tile.cols] = symbols.reshape(tile.rows, tile.cols)
    return [_in_order(tensor, plane) for plane in matrices]


def _in_order(tensor: StoredTensor, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Puts the columns back where the source has them."""
    if tensor.columns is None or tensor.columns.order is None:
        return stored
    source = np.empty_like(stored)
    # Assignment by index undoes the permutation; reading by it would apply it twice.
    source[:, tensor.columns.order] = stored
    return source


def _codes(planes: list[NDArray[np.uint8]]) -> NDArray[np.signedinteger]:
    low = planes[0].view(np.int8)
    return low if len(planes) == 1 else join_codes(low, planes[1].view(np.int8), 8)


def read_codes(tensor: StoredTensor) -> NDArray[np.signedinteger]:
    """Returns the [rows, cols] codes of an `int8` tensor: int8, or int16 where it is wide."""
    return _codes(read_symbols(tensor))


def read_run_codes(tensor: StoredTensor, tiles: range) -> list[NDArray[np.signedinteger]]:
    """Returns the codes [rows, cols] of a run of tiles (see `runs`) of an `int8` tensor."""
    return [_codes(planes) for _, planes in _decoded_parts(tensor, tiles)]


def read_run_bytes(tensor: StoredTensor, tiles: range) -> bytes:
    """Returns the elements of a run of tiles (see `runs`), part by part, each row-major."""
    return b"".join(
        _part_bytes(tensor, part, planes) for part, planes in _decoded_parts(tensor, tiles)
    )


def read_rows(tensor: StoredTensor, first: int, last: int) -> bytes:
    """Returns rows [first, last) of a tensor's matrix, row-major; decodes only their tiles."""
    grid = tensor.table.grid
    begin = first // grid.tile_rows
    end = -(-last // grid.tile_rows)
    row_bytes = grid.cols * DTYPES[tensor.record.dtype].itemsize
    elements = bytearray()
    for band in range(begin, end):
        rows = np.empty((grid.tile(band * grid.across).rows, row_bytes), np.uint8)
        for start in range(band * grid.across, (band + 1) * grid.across, tensor.tiles_together):
            part = tensor.part(start)
            data = read_run_bytes(tensor, range(start, start + tensor.tiles_together))
            width = len(data) // part.rows
            first_byte = part.col * width // part.cols
            rows[:, first_byte : first_byte + width] = np.frombuffer(data, np.uint8).reshape(
                part.rows, width
            )
        elements += rows.tobytes()
    start = (first - begin * grid.tile_rows) * row_bytes
    return bytes(elements[start : start + (last - first) * row_bytes])


def _part_bytes(tensor: StoredTensor, part: Tile, planes: list[NDArray[np.uint8]]) -> bytes:
    if isinstance(tensor.record, Int8Tensor):
        values = dequantize(_codes(planes), tile_steps(tensor, part))
        return bits_from_float32(values, tensor.record.dtype).tobytes()
    return _joined(tensor, [plane.reshape(-1) for plane in planes])


def read_tensor_bytes(container: Container, name: str) -> bytes:
    """Returns a tensor's elements in its source dtype, row-major, little-endian.

    A `lossless` or plain tensor comes back bit for bit. An `int8` tensor is dequantized:
    fl32(code * step), rounded once.

    Raises:
        FormatError: something is damaged; nothing is returned.
    """
    tensor = container.tensor(name)
    if isinstance(tensor, PlainTensor):
        return bytes(tensor.read())
    grid = tensor.table.grid
    return _part_bytes(tensor, Tile(0, 0, grid.rows, grid.cols), read_symbols(tensor))


def _joined(tensor: StoredTensor, planes: list[NDArray[np.uint8]]) -> bytes:
    try:
        return join_planes(planes, DTYPES[tensor.record.dtype]).tobytes()
    except DecodeError as exc:
        raise exc.located(file=tensor.file.name, tensor=tensor.record.name) from exc


def tensor_digest(container: Container, name: str) -> str:
    """Recomputes the digest that the manifest records, from the decoded tensor.

    `int8`: sha256 of the codes in source order, then the scales of the channels and those of the
    columns, if any, all little-endian. Others: sha256 of the source's bytes.
    """
    tensor = container.tensor(name)
    if isinstance(tensor, StoredTensor) and isinstance(tensor.record, Int8Tensor):
        codes = read_codes(tensor)
        digest = hashlib.sha256(codes.astype(f"<i{codes.itemsize}").tobytes())
        digest.update(scales_bytes(tensor))
        return digest.hexdigest()
    return hashlib.sha256(read_tensor_bytes(container, name)).hexdigest()


def scales_bytes(tensor: StoredTensor) -> bytes:
    """Returns the scales of an `int8` tensor as its digest covers them.

    First those of the channels, then those of the columns, float32, little-endian.
    """
    assert tensor.scales is not None
    columns = b"" if tensor.columns is None else tensor.columns.scales.astype("<f4").tobytes()
    return tensor.scales.astype("<f4").tobytes() + columns
