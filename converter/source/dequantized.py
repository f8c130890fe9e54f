"""Weights of a quantized source as bfloat16, computed piece by piece where they are read.

No tensor is ever whole in memory.

A weight of 8 bits times its scale, or a code of MXFP4 times its power of two, is computed in
float32 and rounded once, to nearest even: the values that transformers gives when it dequantizes
such a checkpoint.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.dtypes import DTYPES, DType
from codecllm.formats.errors import SourceError
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.shards.safetensors_header import TensorEntry

TARGET = DTYPES["BF16"]
# E2M1 by code: 1 bit of sign, 2 of exponent, 1 of mantissa (OCP Microscaling Formats).
_FP4_VALUES = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    np.float32,
)
_EXPONENT_BIAS = 127
_MXFP4_GROUP = 32
_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class ScaledTensor(SourceTensor):
    """A weight of 8 bits that is seen as its product with its scales.

    Attributes:
        weight: the stored weight, F8_E4M3, F8_E5M2 or I8, of the same shape.
        scales: float32 [leading dimensions, rows, columns] of the grid of scales.
        block: rows and columns that one scale is for.
    """

    weight: SourceTensor
    scales: NDArray[np.float32]
    block: tuple[int, int]

    @property
    def is_stored(self) -> bool:
        """See `SourceTensor.is_stored`: elements are computed."""
        return False

    def read_elements(
        self, first: int, last: int, buffer: NDArray[np.uint8] | None = None
    ) -> NDArray[np.unsignedinteger]:
        """As `SourceTensor.read_elements`: computes the elements, as bits of bfloat16."""
        target = _target(last - first, buffer)
        for begin in range(first, last, _PIECE_ELEMENTS):
            end = min(begin + _PIECE_ELEMENTS, last)
            values = _VALUES_OF[self.weight.dtype.name][self.weight.read_elements(begin, end)]
            # As transformers does: the product in float32, then one rounding.
            values *= self._scales_of(begin, end)
            target[begin - first : end - first] = bits_from_float32(values, TARGET.name)
        return target

    def read_bytes(self, first: int, last: int) -> bytes:
        """Computes bytes [first, last) of the data."""
        return _bytes_of(self, first, last)

    def _scales_of(self, first: int, last: int) -> NDArray[np.float32]:
        height, cols = self.shape[-2], self.shape[-1]
        first_row, last_row = first // cols, -(-last // cols)
        row = np.arange(first_row, last_row)
        of_rows = self.scales[row // height, row % height // self.block[0]]
        spread = np.repeat(of_rows, self.block[1], axis=1)[:, :cols]
        start = first - first_row * cols
        return spread.reshape(-1)[start : start + last - first]


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor(SourceTensor):
    """Experts of MXFP4: [experts, outputs, groups, 16], two codes a byte.

    They are seen as [experts, inputs, outputs].

    Attributes:
        blocks: U8, as stored.
        exponents: U8 [experts, outputs, groups]: a group's scale is 2 ** (exponent - 127).
    """

    blocks: SourceTensor
    exponents: SourceTensor

    @property
    def is_stored(self) -> bool:
        """See `SourceTensor.is_stored`: elements are computed."""
        return False

    def read_elements(
        self, first: int, last: int, buffer: NDArray[np.uint8] | None = None
    ) -> NDArray[np.unsignedinteger]:
        """As `SourceTensor.read_elements`: computes the elements, as bits of bfloat16."""
        target = _target(last - first, buffer)
        size = self.shape[1] * self.shape[2]
        for expert in range(first // size, -(-last // size)):
            values = _EXPERTS.read(self, expert)
            begin, end = max(first, expert * size), min(last, (expert + 1) * size)
            target[begin - first : end - first] = values[
                begin - expert * size : end - expert * size
            ]
        return target

    def read_bytes(self, first: int, last: int) -> bytes:
        """Computes bytes [first, last) of the data."""
        return _bytes_of(self, first, last)

    def read_expert(self, expert: int) -> NDArray[np.unsignedinteger]:
        """Computes one expert as bits of bfloat16 [inputs * outputs]."""
        inputs, outputs = self.shape[1:]
        size = outputs * inputs // 2
        code_pairs = self.blocks.read_elements(expert * size, (expert + 1) * size)
        groups = outputs * inputs // _MXFP4_GROUP
        exponents = self.exponents.read_elements(expert * groups, (expert + 1) * groups)
        values = np.empty((size, 2), np.float32)
        # The low half of a byte is the first code.
        values[:, 0] = _FP4_VALUES[code_pairs & 15]
        values[:, 1] = _FP4_VALUES[code_pairs >> 4]
        scaled_values = np.ldexp(
            values.reshape(groups, _MXFP4_GROUP),
            exponents.astype(np.int32)[:, None] - _EXPONENT_BIAS,
        )
        values_by_input = np.ascontiguousarray(scaled_values.reshape(outputs, inputs).T).reshape(-1)
        return bits_from_float32(values_by_input, TARGET.name)


class _LastExpert(threading.local):
    """One thread's last expert.

    Blocks of a tensor are read in order, and each expert is cut into several.
    """

    def __init__(self) -> None:
        self.tensor: Mxfp4Tensor | None = None
        self.expert = -1
        self.values = np.empty(0, np.uint16)

    def read(self, tensor: Mxfp4Tensor, expert: int) -> NDArray[np.unsignedinteger]:
        if self.tensor is not tensor or self.expert != expert:
            self.values = tensor.read_expert(expert)
            self.tensor, self.expert = tensor, expert
        return self.values


_EXPERTS = _LastExpert()


def scaled_tensor(
    weight: SourceTensor, scale: SourceTensor, block_sizes: Collection[tuple[int, int]]
) -> ScaledTensor:
    """Returns a weight seen as its product with its scales.

    Args:
        weight: F8_E4M3, F8_E5M2 or I8, of rank 2 or more.
        scale: one number, one for each row, or a grid of them.
        block_sizes: sizes of blocks that the config states, rows and columns; without any, sizes of
            blocks are powers of two.

    Raises:
        SourceError: the shape of the scales does not fit the weight, or fits several sizes of
            blocks.
    """
    *leading, rows, cols = weight.shape
    count = math.prod(leading)
    values = _scale_values(scale)
    grid = _grid(weight, scale, values.size)
    block = _block(rows, cols, grid, block_sizes)
    if block is None or values.size != count * grid[0] * grid[1]:
        raise SourceError(
            "scales do not fit the weight",
            file=scale.file.name,
            tensor=scale.name,
            got=list(scale.shape),
            expected=f"for {list(weight.shape)}, in blocks that {_wanted(block_sizes)}",
        )
    scales = values.reshape(count, *grid)
    return ScaledTensor(_entry(weight.name, weight.shape), weight.file, weight, scales, block)


def mxfp4_tensor(name: str, blocks: SourceTensor, exponents: SourceTensor) -> Mxfp4Tensor:
    """Returns the experts `name` seen as floats; `blocks` is U8 [experts, outputs, groups, 16].

    Raises:
        SourceError: the blocks have another rank.
    """
    if len(blocks.shape) != 4:
        raise SourceError(
            "MXFP4 blocks of another layout than that of experts; use --scheme lossless",
            file=blocks.file.name,
            tensor=blocks.name,
            got=list(blocks.shape),
        )
    experts, outputs, groups, _ = blocks.shape
    shape = (experts, groups * _MXFP4_GROUP, outputs)
    return Mxfp4Tensor(_entry(name, shape), blocks.file, blocks, exponents)


def _grid(weight: SourceTensor, scale: SourceTensor, size: int) -> tuple[int, int]:
    """Returns rows and columns of the grid of scales of a matrix."""
    *leading, rows, _ = weight.shape
    if len(scale.shape) == len(weight.shape):
        return scale.shape[-2], scale.shape[-1]
    count = math.prod(leading)
    if size == count * rows and rows > 1:
        return rows, 1
    return 1, 1


def _block(
    rows: int, cols: int, grid: tuple[int, int], block_sizes: Collection[tuple[int, int]]
) -> tuple[int, int] | None:
    """Returns the size of blocks that gives a grid; None: none does, or several do."""
    if 0 in grid:
        return None
    if grid in ((1, 1), (rows, 1)):
        return rows // grid[0], cols
    if not block_sizes:
        sides = _power_of_two(rows, grid[0]), _power_of_two(cols, grid[1])
        return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])
    fitting = {
        # One block along a side holds all of it, whatever its size.
        (height if grid[0] > 1 else rows, width if grid[1] > 1 else cols)
        for height, width in block_sizes
        if grid == (-(-rows // height), -(-cols // width))
    }
    return fitting.pop() if len(fitting) == 1 else None


def _wanted(block_sizes: Collection[tuple[int, int]]) -> str:
    if not block_sizes:
        return "are powers of two, for config.json states no size of them"
    return f"config.json states: {' or '.join(f'{a} x {b}' for a, b in sorted(block_sizes)[:4])}"


def _power_of_two(length: int, count: int) -> int | None:
    """Returns the power of two that cuts a length into so many blocks, or the whole length for one.

    There is at most one, and other sizes would give as many blocks: 192 in two are blocks of 128.
    """
    if count == 1:
        return length
    size = 1
    while size < length and -(-length // size) > count:
        size *= 2
    return size if -(-length // size) == count else None


def _scale_values(scale: SourceTensor) -> NDArray[np.float32]:
    words = scale.read_elements(0, scale.entry.elements)
    if scale.dtype.name in ("F8_E8M0", "U8"):
        return np.ldexp(np.float32(1), words.astype(np.int32) - _EXPONENT_BIAS)
    return float32_from_bits(words, scale.dtype.name)


def _entry(name: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, TARGET, shape, 0, math.prod(shape) * TARGET.itemsize)


def _target(elements: int, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint16]:
    if buffer is None:
        return np.empty(elements, np.uint16)
    return buffer[: elements * TARGET.itemsize].view(np.uint16)


def _bytes_of(tensor: SourceTensor, first: int, last: int) -> bytes:
    start = first // TARGET.itemsize
    words = tensor.read_elements(start, -(-last // TARGET.itemsize))
    begin = first - start * TARGET.itemsize
    return words.tobytes()[begin : begin + last - first]


def _float8_values(dtype: DType) -> NDArray[np.float32]:
    """Returns float32 [256]: the value of each bit pattern of an 8-bit float or integer."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype.name == "I8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    if dtype.name == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)
    # E4M3 has no infinities: only the pattern of all ones is NaN. Exponent 0 is subnormal.
    exponent = (codes >> 3 & 15).astype(np.int32)
    mantissa = (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -values, values).astype(np.float32)


_VALUES_OF = {name: _float8_values(DTYPES[name]) for name in ("F8_E4M3", "F8_E5M2", "I8")}
