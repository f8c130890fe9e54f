"""How far the codes of an int8 tensor may lie from its source: half a step, or as recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.manifest.records import DEADZONE, NEAREST, Int8Tensor, TensorRecord
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.schemes.int8 import quantize
from codecllm.formats.stored_tensor import StoredTensor, tile_steps
from codecllm.formats.tiling import Tile

ERROR_SLACK = 2.0**-15
"""Error that the float32 roundings of scale and quotient may add to 8-bit codes, in half steps."""

WIDE_SLACK = 2.0**-22
"""The same for each unit of a code beyond 8 bits."""


def is_nearest(record: TensorRecord) -> bool:
    """Whether a tensor's codes, if it has any, are the nearest ones."""
    return not isinstance(record, Int8Tensor) or record.rounding in (None, NEAREST)


def is_repeatable(record: TensorRecord) -> bool:
    """Whether a tensor's codes, if it has any, follow from its steps."""
    return is_nearest(record) or (isinstance(record, Int8Tensor) and record.rounding == DEADZONE)


def repeated(
    weights: NDArray[np.float32], steps: NDArray[np.float32], tensor: StoredTensor
) -> NDArray[np.signedinteger[Any]]:
    """Returns the codes that the reference gives float32 weights; the steps broadcast to them."""
    assert isinstance(tensor.record, Int8Tensor)
    return quantize(weights, steps, tensor.wide, float(np.float32(tensor.record.deadzone or 0.0)))


def code_errors(
    tensor: StoredTensor,
    tile: Tile,
    elements: NDArray[np.generic],
    words: NDArray[np.unsignedinteger],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns |w - code * step| in units of step / 2, and the most that it may be.

    A code times a float32 is exact in float64.
    """
    assert isinstance(tensor.record, Int8Tensor)
    record = tensor.record
    # float64, so that the check itself adds no rounding to the slack.
    steps = tile_steps(tensor, tile).astype(np.float64)
    codes = elements.astype(np.float64)
    weights = float32_from_bits(words, record.dtype).astype(np.float64)
    errors = np.abs(weights - codes * steps) / (steps / 2)
    half_steps = 2 * (record.worst_steps or 0.0) if not is_nearest(record) else 1.0
    return errors, half_steps + np.maximum(ERROR_SLACK, (np.abs(codes) + half_steps) * WIDE_SLACK)
