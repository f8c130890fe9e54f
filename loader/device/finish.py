"""From a piece's symbols in the arena to elements of the final tensor: one kernel a piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import CodedTensor, Int8Tensor
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tiling import Grid
from codecllm.loader.torch_tensors import TORCH_DTYPES

_Side = TypeVar("_Side", NDArray[Any], torch.Tensor)
_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})


def finishes_on_device(record: CodedTensor) -> bool:
    """Whether kernels make a tensor's elements; otherwise the CPU does. Needs Triton."""
    from codecllm.loader.kernels.assemble import can_assemble

    return isinstance(record, Int8Tensor) or can_assemble(DTYPES[record.dtype])


def side_arrays(source: StoredTensor, rows: tuple[int, int]) -> list[NDArray[Any]]:
    """Returns the side arrays of an `int8` tensor's rows, of four-byte items; none for others.

    Float32 scales, one per row of these or one per column; where columns have them, float32 and
    int32 [columns]: their scales and, if it is not the source's, their order; of wide codes int32
    [tiles], how many of their bits the low plane holds.

    Args:
        source: the tensor.
        rows: first row and number of rows: whole bands of tiles.
    """
    record = source.record
    if not isinstance(record, Int8Tensor):
        return []
    assert source.scales is not None
    sides: list[NDArray[Any]] = [source.scales]
    if source.columns is not None:
        sides.append(source.columns.scales)
        if source.columns.order is not None:
            sides.append(source.columns.order)
    if source.wide:
        sides.append(np.array(source.table.low_bits, np.int32))
    return sides_of_rows(source, sides, rows)


def sides_of_rows(source: StoredTensor, sides: list[_Side], rows: tuple[int, int]) -> list[_Side]:
    """Returns `side_arrays` of some rows from those of all rows, on the host or on a device."""
    record, parts = source.record, list(sides)
    if isinstance(record, Int8Tensor) and record.channel_kind == "row":
        parts[0] = parts[0][rows[0] : sum(rows)]
    if source.wide:
        grid = source.table.grid
        first, last = rows[0] // grid.tile_rows, -(-sum(rows) // grid.tile_rows)
        parts[-1] = parts[-1][first * grid.across : last * grid.across]
    return parts


def finish_bands(
    source: StoredTensor,
    rows: tuple[int, int],
    planes: list[torch.Tensor],
    sides: list[torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Queues the kernel that writes the elements of whole bands of tiles, on the current stream.

    Args:
        source: the tensor.
        rows: first row and number of rows.
        planes: uint8 [rows * columns] per plane on the device, in the order of the tiles.
        sides: `side_arrays`, on the device.
        out: [rows, columns], contiguous; int8 receives codes.
    """
    from codecllm.loader.kernels.assemble import assemble_lossless
    from codecllm.loader.kernels.dequantize import dequantize_int8, untile_codes

    whole = source.table.grid
    # Bands begin at a tile's first row, so they are a grid of their own.
    grid = Grid(rows[1], whole.cols, whole.tile_rows, whole.tile_cols)
    if isinstance(source.record, Int8Tensor):
        sides, low_bits = (sides[:-1], sides[-1]) if source.wide else (sides, None)
        scale, col_scale, order = [*sides, None, None][:3]
        assert scale is not None
        if out.dtype == torch.int8:
            untile_codes(planes[0], grid, out, order)
            return
        high = planes[1] if source.wide else None
        # Kernels round to three dtypes; torch casts float32 to any other one.
        with _as_dtype(out, out.dtype if out.dtype in _FLOATS else torch.float32) as target:
            dequantize_int8(
                planes[0],
                high,
                low_bits,
                grid,
                scale,
                col_scale,
                order,
                source.record.channel_kind,
                target,
            )
    else:
        with _as_dtype(out, TORCH_DTYPES[source.record.dtype]) as target:
            assemble_lossless(planes, grid, DTYPES[source.record.dtype], target)


def to_device(arrays: list[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Copies arrays to a device, each into memory of its own."""
    # `np.array` copies: arrays over the file's bytes are read-only, which torch does not take.
    return [torch.from_numpy(np.array(array)).to(device) for array in arrays]


@contextmanager
def _as_dtype(out: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yields `out`, or memory of another dtype that is cast into it at the end."""
    target = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=out.device)
    yield target
    if target is not out:
        out.copy_(target)
