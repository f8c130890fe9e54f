"""Decode back ends of this machine, each to be compared with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import StoredTensor, scales_for_tile
from codecllm.formats.tiling import Tile
from codecllm.loader.host.decode import Workspace, read_tiles, write_tile
from codecllm.loader.resident.int8_matmul import dequantize_rows
from codecllm.loader.torch_tensors import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class BackEnd:
    """One way to decode a tile.

    Attributes:
        name: for people.
        version: of the library behind it.
        takes: whether it decodes tensors of this kind.
        decode: decodes the `tiles_together` tiles from a tile (by its number) on to unsigned words
            of the source's element size, row-major, flat.
    """

    name: str
    version: str
    takes: Callable[[StoredTensor], bool]
    decode: Callable[[StoredTensor, int], NDArray[Any]]


def present_back_ends() -> list[BackEnd]:
    """Returns the back ends of this machine.

    These are the loader's CPU decoder, and the arithmetic of resident modules on the CPU and on a
    GPU.
    """
    import zstandard

    zstd = ".".join(map(str, zstandard.ZSTD_VERSION))
    back_ends = [
        BackEnd("cpu", f"libzstd {zstd}", lambda tensor: True, _decode_cpu),
        BackEnd(
            "int8 modules",
            f"torch {torch.__version__}",
            _by_rows,
            lambda tensor, index: _decode_torch(tensor, index, "cpu"),
        ),
    ]
    if torch.cuda.is_available():
        name = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
        back_ends.append(
            BackEnd(
                "int8 modules on cuda",
                name,
                _by_rows,
                lambda tensor, index: _decode_torch(tensor, index, "cuda"),
            )
        )
    return back_ends


def _decode_cpu(tensor: StoredTensor, index: int) -> NDArray[Any]:
    # The loader's own functions are called, so that its bits are tested and not a copy's.
    workspace = Workspace()
    (tile, planes) = next(
        iter(read_tiles(tensor, range(index, index + tensor.tiles_together), workspace))
    )
    out = np.empty((tile.rows, tile.cols), word_dtype(DTYPES[tensor.record.dtype]))
    write_tile(tensor, tile, planes, out, tensor.record.dtype, workspace)
    return out.reshape(-1)


def _by_rows(tensor: StoredTensor) -> bool:
    return (
        isinstance(tensor.record, Int8Tensor)
        and tensor.record.channel_kind == "row"
        and not tensor.wide
    )


def _decode_torch(tensor: StoredTensor, index: int, device: str) -> NDArray[Any]:
    assert tensor.scales is not None
    tile, planes = next(
        iter(read_tiles(tensor, range(index, index + tensor.tiles_together), Workspace()))
    )
    # A copy, since the workspace is used again.
    codes = torch.from_numpy(planes[0].view(np.int8).copy()).to(device)
    scales = torch.from_numpy(scales_of_rows(tensor, tile)).to(device)
    factors = None
    if tensor.columns is not None:
        factors = torch.from_numpy(
            tensor.columns.scales[tile.col : tile.col + tile.cols].copy()
        ).to(device)
    weights = dequantize_rows(codes, scales, TORCH_DTYPES[tensor.record.dtype], factors).cpu()
    words: NDArray[Any] = (
        weights.view(-1).view(torch.uint8).numpy().view(word_dtype(DTYPES[tensor.record.dtype]))
    )
    return words


def scales_of_rows(tensor: StoredTensor, tile: Tile) -> NDArray[np.float32]:
    """Returns float32 [tile.rows] scales of a tensor with one scale per row."""
    assert tensor.scales is not None
    return scales_for_tile(tensor.record, tensor.scales, tile).reshape(-1).copy()
