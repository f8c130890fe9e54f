"""Whole tensors out of a container, slowly and obviously. Every fast path must give these bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.container import Container, PlainTensor, StoredTensor, scales_for_tile, sound
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import DecodeError
from codecllm.formats.float_bits import bits_from_float32
from codecllm.formats.manifest import Int8Tensor
from codecllm.formats.schemes.int8 import dequantize
from codecllm.formats.schemes.lossless import join_planes

_RANS_SYMBOLS = 1 << 20


def read_symbols(tensor: StoredTensor) -> list[NDArray[np.uint8]]:
    """Decodes all chunks of a tensor; returns one uint8 [rows, cols] matrix of symbols per plane."""
    grid, planes = tensor.table.grid, tensor.table.planes
    matrices = [np.empty((grid.rows, grid.cols), np.uint8) for _ in range(planes)]
    step = tiles_at_once(tensor)
    for start in range(0, len(grid), step):
        for index, decoded in _decoded_tiles(tensor, range(start, min(start + step, len(grid)))):
            tile = grid.tile(index)
            for matrix, symbols in zip(matrices, decoded, strict=True):
                place = matrix[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
                place[...] = symbols.reshape(tile.rows, tile.cols)
    return matrices


def tiles_at_once(tensor: StoredTensor) -> int:
    """Returns how many tiles to read and decode together: one, or with codec `rans`, which needs company, a million."""
    if tensor.tables is None:
        return 1
    grid = tensor.table.grid
    return max(1, _RANS_SYMBOLS // (min(grid.tile_rows, grid.rows) * min(grid.tile_cols, grid.cols)))


def _decoded_tiles(tensor: StoredTensor, tiles: range) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Reads a run of tiles with one read; yields the number of each and its planes, uint8 [tile rows * tile columns]."""
    planes = tensor.table.planes
    first, last = tiles.start * planes, tiles.stop * planes
    slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
    decoded = tensor.decode_run(first, last, slots, first)
    for index in tiles:
        yield index, [sound(symbols) for symbols in islice(decoded, planes)]


def read_codes(tensor: StoredTensor) -> NDArray[np.int8]:
    """Returns the int8 [rows, cols] codes of an `int8` tensor."""
    return read_symbols(tensor)[0].view(np.int8)


def read_tiles_codes(tensor: StoredTensor, tiles: range) -> list[NDArray[np.int8]]:
    """Returns the int8 [tile rows, tile cols] codes of a run of tiles of an `int8` tensor."""
    grid = tensor.table.grid
    return [
        planes[0].view(np.int8).reshape(grid.tile(index).rows, grid.tile(index).cols)
        for index, planes in _decoded_tiles(tensor, tiles)
    ]


def read_tiles_bytes(tensor: StoredTensor, tiles: range) -> bytes:
    """Returns the elements of a run of tiles, tile by tile, each row-major."""
    return b"".join(_tile_bytes(tensor, index, planes) for index, planes in _decoded_tiles(tensor, tiles))


def _tile_bytes(tensor: StoredTensor, index: int, planes: list[NDArray[np.uint8]]) -> bytes:
    tile = tensor.table.grid.tile(index)
    if isinstance(tensor.record, Int8Tensor):
        assert tensor.scales is not None
        codes = planes[0].view(np.int8).reshape(tile.rows, tile.cols)
        values = dequantize(codes, scales_for_tile(tensor.record, tensor.scales, tile))
        return bits_from_float32(values, tensor.record.dtype).tobytes()
    return _joined(tensor, planes)


def read_tensor_bytes(container: Container, name: str) -> bytes:
    """Returns a tensor's elements in its source dtype, row-major, little-endian.

    A `lossless` or plain tensor comes back bit for bit. An `int8` tensor is dequantized: fl32(code * scale), rounded once.

    Raises:
        FormatError: something is damaged; nothing is returned.
    """
    tensor = container.tensor(name)
    if isinstance(tensor, PlainTensor):
        return bytes(tensor.read())
    if isinstance(tensor.record, Int8Tensor):
        assert tensor.scales is not None
        scales = tensor.scales[None, :] if tensor.record.channel_kind == "column" else tensor.scales[:, None]
        return bits_from_float32(dequantize(read_codes(tensor), scales), tensor.record.dtype).tobytes()
    return _joined(tensor, [matrix.reshape(-1) for matrix in read_symbols(tensor)])


def _joined(tensor: StoredTensor, planes: list[NDArray[np.uint8]]) -> bytes:
    try:
        return join_planes(planes, DTYPES[tensor.record.dtype]).tobytes()
    except DecodeError as exc:
        raise exc.located(file=tensor.file.name, tensor=tensor.record.name) from exc


def tensor_digest(container: Container, name: str) -> str:
    """Recomputes the digest that the manifest records: what was decoded, not what is stored.

    `int8`: sha256 of the codes in source order, then the float32 scales, little-endian. Others: sha256 of the source's bytes.
    """
    tensor = container.tensor(name)
    if isinstance(tensor, StoredTensor) and isinstance(tensor.record, Int8Tensor):
        assert tensor.scales is not None
        digest = hashlib.sha256(read_codes(tensor).tobytes())
        digest.update(tensor.scales.astype("<f4").tobytes())
        return digest.hexdigest()
    return hashlib.sha256(read_tensor_bytes(container, name)).hexdigest()
