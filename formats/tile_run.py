"""A run of tiles from its slots to its place: check, decode, join planes or dequantize.

The native core does it by one call without the interpreter's lock. Without the core, numpy does it,
plainly. Both give the bits of `formats.reference`.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import ZSTD, native
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import dequantize, join_codes
from codecllm.formats.schemes.lossless import join_planes
from codecllm.formats.stored_tensor import StoredTensor, sound, tile_steps
from codecllm.formats.tiling import Tile

CODES, WIDE_CODES = "I8", "I16"
"""Targets for the codes of an `int8` tensor instead of its weights: int8, or int16 if wide."""

# The numbers of the native core.
_TARGETS = {"BF16": 0, "F16": 1, "F32": 2, CODES: 3, WIDE_CODES: 4}
_JOIN, _DEQUANTIZE = 0, 1


class _Scratch(threading.local):
    """One thread's memory for the symbols of a tile."""

    def __init__(self) -> None:
        self.data = np.empty(0, np.uint8)

    def reserve(self, size: int) -> NDArray[np.uint8]:
        if self.data.size < size:
            self.data = np.empty(size, np.uint8)
        return self.data


_SCRATCH = _Scratch()


def decode_run(
    tensor: StoredTensor, tiles: range, out: NDArray[Any], target: str, slots: memoryview
) -> None:
    """Decodes a run of tiles into the matrix of a whole tensor.

    Args:
        tensor: the tensor.
        tiles: numbers of the tiles, ascending, without gaps; where columns are permuted, all tiles
            of each row of tiles.
        out: unsigned words [rows, cols] of the grid, of the target's size, C order; the tiles'
            rectangles are written.
        target: for an `int8` tensor `BF16`, `F16`, `F32` (weights, rounded once), `CODES` or, where
            it is wide, `WIDE_CODES`; for `lossless` its own dtype.
        slots: the slots of the tiles' chunks, as `StoredTensor.read_slots` returns them; unchecked.

    Raises:
        ChecksumError, SchemaError, DecodeError: a chunk is damaged; it was not given to a decoder.
            Tiles before it may have been written.
    """
    if not decode_natively(tensor, tiles, out, target, slots):
        decode_plainly(tensor, tiles, out, target, slots)


def decode_natively(
    tensor: StoredTensor, tiles: range, out: NDArray[Any], target: str, slots: memoryview
) -> bool:
    """Decodes as `decode_run`, by the native core; arguments as there.

    Returns:
        False where there is no core, or where it refuses a chunk: then `decode_plainly` finds out
        which, and why.
    """
    core, table = native.core, tensor.table
    if core is None:
        return False
    if not tiles:
        return True
    planes, grid = table.planes, table.grid
    first, last = tiles.start * planes, tiles.stop * planes
    records = table.records[first:last]
    symbols = None
    # The core has no zstd: the library decodes, once the core has checked the slots.
    if (records["codec"] == ZSTD.codec_id).any():
        if core.check_slots(slots, records, table.raw_bytes[first:last]) != -1:
            return False
        symbols = _decompress(tensor, first, last, slots)
        if symbols is None:
            return False
    extent = (grid.rows, grid.cols, grid.tile_rows, grid.tile_cols)
    finish = _finish_of(tensor, target)
    tables: tuple[Any, Any] = (None, None)
    groups = (0, 0)
    if tensor.tables is not None:
        tables = (tensor.tables.data, tensor.tables.offsets)
        groups = (tensor.tables.groups.tile_rows, tensor.tables.groups.tile_cols)
    wrong = core.decode_run(
        slots,
        records,
        symbols,
        symbols is not None,
        extent,
        (tiles.start, tiles.stop),
        planes,
        tables,
        groups,
        *finish,
        out.itemsize,
        _sides_of(tensor),
        out,
        _SCRATCH.reserve(core.scratch_bytes(extent, planes)),
    )
    return bool(wrong == -1)


def _decompress(
    tensor: StoredTensor, first: int, last: int, slots: memoryview
) -> list[memoryview | None] | None:
    """Returns the symbols of `zstd` chunks, None for others; None in all if one is refused."""
    chunks = tensor.table.chunks[first:last]
    base = chunks[0].begin
    zstd_chunks = [number for number, chunk in enumerate(chunks) if chunk.codec == ZSTD.codec_id]
    frames = ZSTD.decompress_together(
        slots,
        [(chunks[number].begin - base, chunks[number].stored_bytes) for number in zstd_chunks],
        [chunks[number].raw_bytes for number in zstd_chunks],
    )
    if frames is None:
        return None
    symbols: list[memoryview | None] = [None] * len(chunks)
    for number, frame in zip(zstd_chunks, frames, strict=True):
        symbols[number] = frame
    return symbols


def _finish_of(tensor: StoredTensor, target: str) -> tuple[int, int, bool, bool]:
    """Returns how the core turns symbols into elements: finish, target, rotate, boolean."""
    if isinstance(tensor.record, Int8Tensor):
        return _DEQUANTIZE, _TARGETS[target], False, False
    dtype = DTYPES[tensor.record.dtype]
    return _JOIN, 0, dtype.rotates, dtype.name == "BOOL"


def _sides_of(tensor: StoredTensor) -> tuple[Any, bool, Any, Any]:
    """Returns scales, whether they belong to columns, scales of columns, order of columns."""
    if not isinstance(tensor.record, Int8Tensor):
        return None, False, None, None
    assert tensor.scales is not None
    scales = np.ascontiguousarray(tensor.scales)
    by_column = tensor.record.channel_kind == "column"
    if tensor.columns is None:
        return scales, by_column, None, None
    return scales, by_column, np.ascontiguousarray(tensor.columns.scales), tensor.columns.order


def decode_plainly(
    tensor: StoredTensor, tiles: range, out: NDArray[Any], target: str, slots: memoryview
) -> None:
    """Decodes as `decode_run`, with numpy; arguments and errors as there."""
    planes = tensor.table.planes
    first, last = tiles.start * planes, tiles.stop * planes
    chunk_symbols = (sound(symbols) for symbols in tensor.decode_run(first, last, slots, first))
    for start in range(tiles.start, tiles.stop, tensor.tiles_together):
        part = tensor.part(start)
        stored_planes = [
            np.empty((part.rows, part.cols), np.int16 if tensor.wide else np.uint8)
            for _ in range(1 if tensor.wide else planes)
        ]
        for index in range(start, start + tensor.tiles_together):
            tile = tensor.table.grid.tile(index)
            symbols: list[NDArray[Any]] = [
                next(chunk_symbols).reshape(tile.rows, tile.cols) for _ in range(planes)
            ]
            if tensor.wide:
                low, high = (plane.view(np.int8) for plane in symbols)
                symbols = [join_codes(low, high, tensor.table.low_bits[index])]
            begin = tile.col - part.col
            for whole, piece in zip(stored_planes, symbols, strict=True):
                whole[:, begin : begin + tile.cols] = piece
        place = out[part.row : part.row + part.rows, part.col : part.col + part.cols]
        _write_part(
            tensor, part, [tensor.in_order(plane) for plane in stored_planes], place, target
        )


def _write_part(
    tensor: StoredTensor, part: Tile, planes: list[NDArray[Any]], place: NDArray[Any], target: str
) -> None:
    if not isinstance(tensor.record, Int8Tensor):
        flat = [plane.reshape(-1) for plane in planes]
        place[...] = join_planes(flat, DTYPES[tensor.record.dtype]).reshape(place.shape)
        return
    codes = planes[0] if tensor.wide else planes[0].view(np.int8)
    if target in (CODES, WIDE_CODES):
        place.view(f"i{place.itemsize}")[...] = codes
        return
    place[...] = bits_from_float32(dequantize(codes, tile_steps(tensor, part)), target)
