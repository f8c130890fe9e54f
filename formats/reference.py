"""Whole tensors out of a container, slowly and obviously. Every fast path must give these bits."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.container import Container, PlainTensor, StoredTensor, scales_for_tile
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import DecodeError
from codecllm.formats.float_bits import bits_from_float32
from codecllm.formats.manifest import Int8Tensor
from codecllm.formats.schemes.int8 import dequantize
from codecllm.formats.schemes.lossless import join_planes


def read_symbols(tensor: StoredTensor) -> list[NDArray[np.uint8]]:
    """Decodes all chunks of a tensor; returns one uint8 [rows, cols] matrix of symbols per plane."""
    grid, planes = tensor.table.grid, tensor.table.planes
    matrices = [np.empty((grid.rows, grid.cols), np.uint8) for _ in range(planes)]
    for index, tile in enumerate(grid):
        for plane in range(planes):
            chunk = index * planes + plane
            slots = tensor.read_slots(chunk, chunk + 1, bytearray(tensor.slots_bytes(chunk, chunk + 1)))
            symbols = tensor.decode_chunk(chunk, slots, chunk).reshape(tile.rows, tile.cols)
            matrices[plane][tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] = symbols
    return matrices


def read_codes(tensor: StoredTensor) -> NDArray[np.int8]:
    """Returns the int8 [rows, cols] codes of an `int8` tensor."""
    return read_symbols(tensor)[0].view(np.int8)


def read_tile_codes(tensor: StoredTensor, index: int) -> NDArray[np.int8]:
    """Returns the int8 [tile rows, tile cols] codes of one tile of an `int8` tensor."""
    tile = tensor.table.grid.tile(index)
    return _read_tile(tensor, index)[0].view(np.int8).reshape(tile.rows, tile.cols)


def read_tile_bytes(tensor: StoredTensor, index: int) -> bytes:
    """Returns the elements of one tile, row-major, as `read_tensor_bytes` would give them for the whole tensor."""
    if isinstance(tensor.record, Int8Tensor):
        assert tensor.scales is not None
        scales = scales_for_tile(tensor.record, tensor.scales, tensor.table.grid.tile(index))
        return bits_from_float32(dequantize(read_tile_codes(tensor, index), scales), tensor.record.dtype).tobytes()
    return _joined(tensor, _read_tile(tensor, index))


def _read_tile(tensor: StoredTensor, index: int) -> list[NDArray[np.uint8]]:
    """Decodes one tile; returns its symbols, row-major, one array per plane."""
    first, last = index * tensor.table.planes, (index + 1) * tensor.table.planes
    slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
    return [tensor.decode_chunk(chunk, slots, first) for chunk in range(first, last)]


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
