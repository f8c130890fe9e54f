"""Element types of the container as torch's, and the order of a container's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.arguments.check import refusal
from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Element types of the container that torch has; F8_E8M0 is added where this torch knows it."""
if hasattr(torch, "float8_e8m0fnu"):
    TORCH_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: str, tensor: str | None = None) -> torch.dtype:
    """Returns torch's dtype for an element type of the container.

    Raises:
        UnsupportedEnvironmentError: this torch has none.
    """
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise UnsupportedEnvironmentError(
            f"torch {torch.__version__} has no dtype for {name}", tensor=tensor
        )
    return dtype


def check_dtype(dtype: object) -> None:
    """Checks the argument `dtype`: a float dtype of torch.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise refusal(dtype, "dtype", "a float dtype such as torch.bfloat16")


def is_model_float(name: str) -> bool:
    """Whether an element type is a float that models compute with: more than 8 bits."""
    return name in ("BF16", "F16", "F32", "F64")


def words_of(tensor: torch.Tensor, rows: int, cols: int) -> NDArray[Any]:
    """Returns the memory of a contiguous tensor as unsigned words [rows, cols] of its item size."""
    # By way of bytes: numpy has no bfloat16 and no float8.
    flat = tensor.view(-1)
    numpy_bytes: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return numpy_bytes.view(f"<u{tensor.dtype.itemsize}").reshape(rows, cols)


def file_order(container: Container) -> Iterator[str]:
    """Yields the names of all stored tensors in the order of the shards' bytes; no aliases."""
    for number in range(len(container.manifest.shards)):
        _, header = container.shard(number)
        for name in header.tensors:
            if name in container.records:
                yield name
