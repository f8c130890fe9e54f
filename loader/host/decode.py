"""Decodes coded tensors on the CPU, tile by tile, straight into their final place.

The bits are those of `formats.reference`; here they are made with few passes over data that stays
in the cache. Each pass is one numpy or torch call over a whole tile, which releases the
interpreter's lock, so threads scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.dtypes import DTYPES, DType
from codecllm.formats.errors import DecodeError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.int8 import codes_hold
from codecllm.formats.stored_tensor import StoredTensor, scales_for_tile, sound
from codecllm.formats.tile_run import CODES, WIDE_CODES, decode_natively
from codecllm.formats.tiling import Tile

JOB_SYMBOLS = 1 << 20
"""Elements of one job: its overhead of 20 microseconds is nothing, and threads share a tensor."""

BLOCK_ELEMENTS = 1 << 20
"""Most elements whose intermediate values are held at once, for any tile size."""

Plane = NDArray[Any]
"""Symbols of a plane, uint8, or the codes of a wide tensor, int16."""

_TORCH_ROUNDED = {"BF16": torch.bfloat16, "F16": torch.float16}


class Workspace:
    """Buffers of one thread, grown on demand and used again for every tile."""

    def __init__(self) -> None:
        self._slots = bytearray()
        self._scratch: dict[tuple[np.dtype[Any], int], NDArray[Any]] = {}

    def slots(self, size: int) -> bytearray:
        """Returns a buffer of at least `size` bytes with unspecified content."""
        if len(self._slots) < size:  # runs differ by little: the next one is to fit too
            self._slots = bytearray(size + size // 8)
        return self._slots

    def scratch(self, rows: int, cols: int, dtype: Any, slot: int = 0) -> NDArray[Any]:
        """Returns a C-ordered array [rows, cols] with unspecified content.

        The next call with that dtype and slot reuses its memory.
        """
        key = (np.dtype(dtype), slot)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.size < rows * cols:
            buffer = self._scratch[key] = np.empty(max(rows * cols, 1 << 17), key[0])
        return buffer[: rows * cols].reshape(rows, cols)


def tiles_per_job(tensor: StoredTensor) -> int:
    """Returns the tiles of a job: about `JOB_SYMBOLS` elements, and whole `tiles_together`."""
    grid, together = tensor.table.grid, tensor.tiles_together
    tiles = JOB_SYMBOLS // max(1, min(grid.tile_rows, grid.rows) * min(grid.tile_cols, grid.cols))
    return max(1, tiles // together) * together


def plan_jobs(tensor: StoredTensor) -> list[range]:
    """Cuts a tensor's tiles into runs of `tiles_per_job`; each run is one read and one job."""
    grid, step = tensor.table.grid, tiles_per_job(tensor)
    return [range(first, min(first + step, len(grid))) for first in range(0, len(grid), step)]


def payload_span(tensor: StoredTensor, tiles: range) -> tuple[int, int]:
    """Returns offset and size, in bytes of the shard, of the slots of a run of tiles."""
    planes, offsets = tensor.table.planes, tensor.table.offsets
    begin, end = int(offsets[tiles.start * planes]), int(offsets[tiles.stop * planes])
    return tensor.offset + begin, end - begin


def read_tiles(
    tensor: StoredTensor, tiles: range, workspace: Workspace
) -> Iterator[tuple[Tile, list[Plane]]]:
    """Reads a run of tiles with one read; yields their rectangles, verified and decoded.

    Args:
        tensor: the tensor.
        tiles: numbers of the tiles; where they give the source's rows only together
            (`tiles_together`), all of each row.
        workspace: the calling thread's.

    Yields:
        The rectangle (a tile, or whole rows), and per plane its uint8 [rows, cols] symbols, columns
        in the source's order; of a wide tensor its codes instead, int16 [rows, cols]. Read-only,
        valid until the next step.

    Raises:
        FormatError: a chunk is damaged; it was not given to a decoder.
    """
    return tiles_of(tensor, tiles, read_run(tensor, tiles, workspace), workspace)


def read_run(tensor: StoredTensor, tiles: range, workspace: Workspace) -> memoryview:
    """Reads the slots of a run of tiles with one read, unchecked.

    They are valid until the workspace is used again.
    """
    first, last = tiles.start * tensor.table.planes, tiles.stop * tensor.table.planes
    return tensor.read_slots(first, last, workspace.slots(tensor.slots_bytes(first, last)))


def tiles_of(
    tensor: StoredTensor, tiles: range, slots: memoryview, workspace: Workspace
) -> Iterator[tuple[Tile, list[Plane]]]:
    """Verifies and decodes a run of tiles from their slots; yields and raises as `read_tiles`."""
    planes = tensor.table.planes
    first, last = tiles.start * planes, tiles.stop * planes
    # Many chunks by one call: each call takes the interpreter's lock once.
    together = tensor.decode_together(first, last, slots)
    if (
        together is not None
        and tensor.table.grid.across == 1
        and not tensor.permuted
        and not tensor.wide
    ):
        whole = _rows_of(tensor, tiles)
        whole_planes: list[Plane] = [
            _gather(together[plane::planes], whole, workspace, plane) for plane in range(planes)
        ]
        if tensor.scales is None or codes_hold(whole_planes[-1].view(np.int8)):
            yield whole, whole_planes
            return
    elif together is not None and (
        tensor.scales is None or all(map(codes_hold, _codes(together[planes - 1 :: planes])))
    ):
        symbols = (np.frombuffer(chunk, np.uint8) for chunk in together)
        for start in range(tiles.start, tiles.stop, tensor.tiles_together):
            yield tensor.part(start), join_tiles(tensor, start, symbols, workspace)
        return
    # Chunk by chunk: this names the chunk that is damaged, or holds a code of -128.
    decoded_chunks = (sound(symbols) for symbols in tensor.decode_run(first, last, slots, first))
    for start in range(tiles.start, tiles.stop, tensor.tiles_together):
        yield tensor.part(start), join_tiles(tensor, start, decoded_chunks, workspace)


def _rows_of(tensor: StoredTensor, tiles: range) -> Tile:
    """Returns the rectangle of a run of tiles, each of which is whole rows."""
    head, foot = tensor.table.grid.tile(tiles[0]), tensor.table.grid.tile(tiles[-1])
    return Tile(head.row, 0, foot.row + foot.rows - head.row, head.cols)


def _codes(planes: list[memoryview]) -> Iterator[NDArray[np.int8]]:
    return (np.frombuffer(plane, np.int8) for plane in planes)


def _gather(
    parts: list[memoryview], whole: Tile, workspace: Workspace, plane: int
) -> NDArray[np.uint8]:
    """Returns one plane of tiles that follow each other as one array [whole.rows, whole.cols]."""
    if len(parts) == 1:
        return np.frombuffer(parts[0], np.uint8).reshape(whole.rows, whole.cols)
    joined_plane = workspace.scratch(whole.rows, whole.cols, np.uint8, plane)
    place, at = memoryview(joined_plane.reshape(-1)), 0
    for part in parts:
        place[at : at + part.nbytes] = part
        at += part.nbytes
    return joined_plane


def join_tiles(
    tensor: StoredTensor, start: int, decoded: Iterator[NDArray[np.uint8]], workspace: Workspace
) -> list[Plane]:
    """Takes the symbols of `tiles_together` tiles from `start` on; returns their planes."""
    planes, part = tensor.table.planes, tensor.part(start)
    if tensor.wide:
        return [_join_wide(tensor, start, decoded, workspace)]
    if tensor.tiles_together == 1 and not tensor.permuted:
        return [symbols.reshape(part.rows, part.cols) for symbols in islice(decoded, planes)]
    stored_planes = [
        workspace.scratch(part.rows, part.cols, np.uint8, plane) for plane in range(planes)
    ]
    for index in range(start, start + tensor.tiles_together):
        tile = tensor.table.grid.tile(index)
        for plane, symbols in zip(stored_planes, islice(decoded, planes), strict=True):
            plane[:, tile.col : tile.col + tile.cols] = symbols.reshape(tile.rows, tile.cols)
    if not tensor.permuted:
        return stored_planes
    ordered_planes = [
        workspace.scratch(part.rows, part.cols, np.uint8, planes + plane) for plane in range(planes)
    ]
    return [
        tensor.in_order(plane, out)
        for plane, out in zip(stored_planes, ordered_planes, strict=True)
    ]


def _join_wide(
    tensor: StoredTensor, start: int, decoded: Iterator[NDArray[np.uint8]], workspace: Workspace
) -> NDArray[np.int16]:
    """Returns codes [rows, cols] of `tiles_together` tiles of a wide tensor, in source order."""
    part = tensor.part(start)
    stored_codes: NDArray[np.int16] = workspace.scratch(part.rows, part.cols, np.int16)
    for index in range(start, start + tensor.tiles_together):
        tile = tensor.table.grid.tile(index)
        low, high = (
            symbols.view(np.int8).reshape(tile.rows, tile.cols) for symbols in islice(decoded, 2)
        )
        # The low plane is signed, so a sum and no bitwise or joins the two.
        codes = stored_codes[:, tile.col - part.col : tile.col - part.col + tile.cols]
        np.copyto(codes, high)
        np.multiply(
            codes, np.int16(1 << tensor.table.low_bits[index]), out=codes
        )  # a shift has half the speed
        np.add(codes, low, out=codes)
    if not tensor.permuted:
        return stored_codes
    return tensor.in_order(stored_codes, workspace.scratch(part.rows, part.cols, np.int16, 1))


def decode_tiles(
    tensor: StoredTensor,
    tiles: range,
    out: NDArray[Any],
    target: str,
    slots: memoryview,
    workspace: Workspace,
) -> None:
    """Decodes a run of tiles into the matrix of a whole tensor.

    Args:
        tensor: the tensor.
        tiles: numbers of the tiles.
        out: unsigned words [rows, cols] of the grid, of the target's size, C order; the tiles'
            rectangles are written.
        target: for an `int8` tensor `BF16`, `F16`, `F32` (weights, rounded once), `CODES` or, where
            it is wide, `WIDE_CODES`; for `lossless` its own dtype.
        slots: the tiles' slots, as they were read.
        workspace: the calling thread's.

    Raises:
        FormatError: a chunk is damaged. Tiles before it were written.
    """
    if decode_natively(tensor, tiles, out, target, slots):
        return
    for tile, planes in tiles_of(tensor, tiles, slots, workspace):
        place = out[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
        write_tile(tensor, tile, planes, place, target, workspace)


def write_tile(
    tensor: StoredTensor,
    tile: Tile,
    planes: list[Plane],
    out: NDArray[Any],
    target: str,
    workspace: Workspace,
) -> None:
    """Turns planes, as `read_tiles` yields them, into elements.

    `out` is unsigned words [tile.rows, tile.cols], of any strides.

    Raises:
        DecodeError: a boolean is neither 0 nor 1.
    """
    for rows, cols in _blocks(tile.rows, tile.cols):
        parts = [plane[rows, cols] for plane in planes]
        if not isinstance(tensor.record, Int8Tensor):
            join_planes(parts, DTYPES[tensor.record.dtype], out[rows, cols], workspace)
            continue
        codes = parts[0] if tensor.wide else parts[0].view(np.int8)
        if target in (CODES, WIDE_CODES):
            np.copyto(out[rows, cols].view(f"i{out.itemsize}"), codes)
            continue
        dequantize(
            codes, _steps(tensor, tile, rows, cols, workspace), out[rows, cols], target, workspace
        )


def _steps(
    tensor: StoredTensor, tile: Tile, rows: slice, cols: slice, workspace: Workspace
) -> NDArray[np.float32]:
    """Returns the steps of a block of a tile, to broadcast against its codes."""
    assert tensor.scales is not None
    scales = scales_for_tile(tensor.record, tensor.scales, tile)
    by_column = scales.shape[0] == 1 and tile.cols == scales.shape[1]
    block_scales = scales[:, cols] if by_column else scales[rows]
    if tensor.columns is None:
        return block_scales
    factors = tensor.columns.scales[tile.col + cols.start : tile.col + cols.stop]
    steps: NDArray[np.float32] = workspace.scratch(len(block_scales), len(factors), np.float32, 1)
    np.multiply(block_scales, factors[None, :], out=steps)
    return steps


def dequantize(
    codes: NDArray[Any],
    steps: NDArray[np.float32],
    out: NDArray[Any],
    target: str,
    workspace: Workspace,
) -> None:
    """Writes fl32(code * step), rounded once (ties to even) to `target`.

    Args:
        codes: int8 or int16 [rows, cols].
        steps: float32, broadcasts against `codes`.
        out: unsigned words [rows, cols] of the target's size; receives bit patterns.
        target: `BF16`, `F16` or `F32`.
        workspace: the calling thread's.
    """
    values = (
        out.view(np.float32)
        if target == "F32"
        else workspace.scratch(codes.shape[0], codes.shape[1], np.float32)
    )
    np.copyto(values, codes)  # exact: sixteen bits fit a float32
    # torch multiplies rows by their steps twice as fast as numpy and rounds float32 four to twenty
    # times as fast; tests compare all ties with the reference.
    products = torch.from_numpy(values).mul_(
        torch.from_numpy(steps if steps.flags.writeable else steps.copy())
    )
    if target != "F32":
        torch.from_numpy(out).view(_TORCH_ROUNDED[target]).copy_(products)


def join_planes(
    planes: list[NDArray[np.uint8]], dtype: DType, out: NDArray[Any], workspace: Workspace
) -> None:
    """Inverse of `formats.schemes.lossless.split_planes`, into place; moves bits as integers only.

    Args:
        planes: uint8 [rows, cols] per plane, the most significant first.
        dtype: element type.
        out: unsigned words [rows, cols] of the element's size.
        workspace: the calling thread's.

    Raises:
        DecodeError: a boolean is neither 0 nor 1.
    """
    np.copyto(out, planes[0])
    for plane in planes[1:]:
        np.multiply(
            out, out.dtype.type(1 << 8), out=out
        )  # as a shift by 8, which numpy does at half the speed
        np.bitwise_or(out, plane, out=out)
    # The sign was moved to the lowest bit, so that the exponent fills a plane of its own.
    if dtype.rotates:
        sign = workspace.scratch(out.shape[0], out.shape[1], out.dtype)
        np.multiply(out, out.dtype.type(1 << (dtype.bits - 1)), out=sign)
        np.right_shift(out, 1, out=out)
        np.bitwise_or(out, sign, out=out)
    if dtype.name == "BOOL" and (out > 1).any():
        raise DecodeError("a boolean is neither 0 nor 1", got=int(out.max()))


def _blocks(rows: int, cols: int) -> Iterator[tuple[slice, slice]]:
    """Cuts a tile into rectangles of at most BLOCK_ELEMENTS; the usual tile is one rectangle."""
    width = min(cols, BLOCK_ELEMENTS)
    height = max(1, BLOCK_ELEMENTS // width)
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield slice(row, min(row + height, rows)), slice(col, min(col + width, cols))
