"""The kernels of the packed layout, compiled at run time: `linear.cu` and `pack.cu`."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader.kernels.nvrtc import Kernel
from codecllm.loader.packed.layout import TILE_ROWS, tile_words

LEAST_SHARED = 96 << 10
"""Bytes of shared memory that a block may have on every device with the kernels, and more."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Shape:
    """Setting of `packed_linear`.

    Attributes:
        row_tiles: tiles of 16 rows that a warp multiplies.
        token_tiles: tiles of 8 inputs.
        row_warps: warps of a block with different rows.
        col_warps: warps of a block that share the columns of the same rows.
        splits: blocks that share the columns of the same rows; another kernel adds their sums.
        stages: buffers of a ring in shared memory; all but one are filled while one is read.
    """

    row_tiles: int
    token_tiles: int
    row_warps: int
    col_warps: int
    splits: int = 1
    stages: int = 4

    @property
    def rows(self) -> int:
        """Returns the rows of a block."""
        return TILE_ROWS * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Returns the threads of a block."""
        return 32 * self.row_warps * self.col_warps

    def shared(self, bits: int) -> int:
        """Returns the bytes of dynamic shared memory of a block, for `bits` a weight."""
        weights = self.row_warps * self.col_warps * self.row_tiles * 4 * tile_words(bits)
        inputs = 1024 * self.col_warps * self.token_tiles if self.token_tiles > 1 else 0
        return self.stages * (weights + inputs)

    def within(self, bits: int, shared: int) -> Shape:
        """Returns the shape with as many of its stages as fit.

        Two have to; where they do not, fewer warps share the columns.

        Args:
            bits: bits of a weight.
            shared: bytes of shared memory that a block may have.
        """
        static = 4 * 8 * self.rows * (self.col_warps + 1)
        stages = (shared - static) // (self.shared(bits) // self.stages)
        if stages < 2 and self.col_warps > 1:
            return replace(self, col_warps=self.col_warps // 2).within(bits, shared)
        return replace(self, stages=max(2, min(self.stages, stages)))


UNPACK_SHAPE = Shape(1, 1, 1, 8)
"""Setting of `packed_unpack`."""


@cache
def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that a block may have on a device."""
    if device.type != "cuda":
        return LEAST_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels compile for a device: they need NVRTC and matrix units for bfloat16."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        kernel_of("packed_unpack", 8, False, UNPACK_SHAPE, device)
    except UnsupportedEnvironmentError:
        return False
    return True


_compiling: dict[tuple[str, str, torch.device], threading.Lock] = {}


def kernel_of(name: str, bits: int, is_half: bool, shape: Shape, device: torch.device) -> Kernel:
    """Returns a compiled kernel of `linear.cu`; a process compiles each setting once (0.3 s).

    Raises:
        UnsupportedEnvironmentError: it cannot be compiled here.
    """
    return _kernel_of(name, source_of(bits, is_half, shape), device)


def packing_kernel_of(name: str, bits: int, source_bytes: int, device: torch.device) -> Kernel:
    """Returns a compiled kernel of `pack.cu`, as `kernel_of` does.

    Args:
        name: name of the kernel.
        bits: of the layout.
        source_bytes: bytes of an element of the matrix that is packed: 1 or 2.
        device: where it runs.
    """
    return _kernel_of(name, packing_source_of(bits, source_bytes), device)


def _kernel_of(name: str, source: str, device: torch.device) -> Kernel:
    with _compiling.setdefault((name, source, device), threading.Lock()):
        return _compiled(name, source, device)


@cache
def _compiled(name: str, source: str, device: torch.device) -> Kernel:
    return Kernel(source, name, device)


@cache
def source_of(bits: int, is_half: bool, shape: Shape) -> str:
    """Returns the source of `linear.cu` for a setting."""
    macros = {
        "BITS": bits,
        "IS_HALF": int(is_half),
        "ROW_TILES": shape.row_tiles,
        "TOKEN_TILES": shape.token_tiles,
        "ROW_WARPS": shape.row_warps,
        "COL_WARPS": shape.col_warps,
        "STAGES": shape.stages,
    }
    return _with_macros(macros, "linear.cu")


@cache
def packing_source_of(bits: int, source_bytes: int) -> str:
    """Returns the source of `pack.cu` for a setting."""
    return _with_macros({"BITS": bits, "SOURCE_BYTES": source_bytes}, "pack.cu")


def _with_macros(macros: dict[str, int], file: str) -> str:
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, (_FOLDER / file).read_text(encoding="utf-8")])
