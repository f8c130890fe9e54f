"""The reference model: the class that the config names, with weights from the slow reference.

No code of the loader decodes them. There are two sets of weights: those that the container decodes
to, and those of the source, quantized again. They are the same where stage 1 found no fault.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.converter.source.source import SourceModel
from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import dequantize
from codecllm.formats.schemes.lossless import join_planes, word_dtype
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor, tile_steps
from codecllm.formats.tiling import Tile, default_grid
from codecllm.loader.hf.folder import read_config
from codecllm.loader.hf.model_class import described_tensors, model_class, strip_quantization
from codecllm.loader.hf.quiet import silenced, without_progress_bars
from codecllm.loader.hf.remote_code import building
from codecllm.loader.torch_tensors import DTYPE_NAMES, torch_dtype
from codecllm.verifier.checks.rounding import is_repeatable, repeated
from codecllm.verifier.diagnosis.examination import Examination
from codecllm.verifier.diagnosis.parts import (
    asked_steps,
    decoded_parts,
    read_weights,
)

_FLOATS = ("BF16", "F16", "F32")


def reference_tensors(container: Container, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns every tensor of a container as the reference decodes it.

    Each has memory of its own: the model class ties them.

    Args:
        container: the container, undamaged.
        dtype: dtype to which int8 tensors are rounded, once; others keep their own.

    Raises:
        FormatError: a tensor is damaged.
    """
    return {
        name: reference_tensor(container, container.stored_record(name).name, dtype)
        for name in container.records
    }


def requantized_tensors(
    container: Container, source: SourceModel, examined: dict[str, Examination], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the source's tensors, quantized again where the container's are.

    A right container decodes to these.

    A tensor whose codes do not follow from its steps is the container's own: its rounding cannot be
    repeated.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in container.records:
        record = container.stored_record(name)
        one = examined[name]
        tensor = source.tensors[name]
        if isinstance(record, Int8Tensor) and one.scales is not None and not one.not_finite:
            stored_tensor = container.tensor(name)
            assert isinstance(stored_tensor, StoredTensor)
            if is_repeatable(record):
                tensors[name] = _requantized(stored_tensor, tensor, one.scales, dtype)
            else:  # other roundings cannot be repeated without the data that chose them
                tensors[name] = reference_tensor(container, record.name, dtype)
        else:
            tensors[name] = source_tensor(tensor)
    return tensors


def source_tensor(tensor: SourceTensor) -> torch.Tensor:
    """Returns a tensor of the source, bit for bit."""
    data = bytearray(tensor.read_bytes(0, tensor.entry.bytes))
    dtype = torch_dtype(tensor.dtype.name, tensor.name)
    return (
        torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)
        if data
        else torch.empty(tensor.shape, dtype=dtype)
    )


def build_model(container: Container, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Returns the container's model class with the given weights, in evaluation mode."""
    # Without our block transformers takes no quantizer, and so no code of the loader.
    config = read_config(container)
    strip_quantization(config)
    with silenced(), without_progress_bars(), building():
        model = model_class(config, partial(described_tensors, container)).from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype
        )
    return model.eval()


def parameters_of_config(container: Container) -> int:
    """Returns how many parameters the config's model has.

    It is built without data, so a wrong config costs no memory.
    """
    config = read_config(container)
    strip_quantization(config)
    # The meta device builds modules without data.
    with building(), torch.device("meta"):
        model = model_class(config, partial(described_tensors, container))(config)
    return sum(value.numel() for value in model.parameters())


def reference_tensor(container: Container, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of a container as the reference decodes it.

    Args:
        container: the container, undamaged.
        name: the tensor's name; no alias.
        dtype: dtype to which an int8 tensor is rounded, once; another keeps its own.

    Raises:
        FormatError: the tensor is damaged.
    """
    tensor = container.tensor(name)
    if isinstance(tensor, PlainTensor):
        own_dtype = torch_dtype(tensor.record.dtype, name)
        data = tensor.read()
        return (
            torch.frombuffer(data, dtype=own_dtype).reshape(tensor.record.shape)
            if data
            else torch.empty(tensor.record.shape, dtype=own_dtype)
        )
    record = tensor.record
    grid = tensor.table.grid
    int8 = isinstance(record, Int8Tensor)
    target = _target(dtype) if int8 else record.dtype
    words = np.empty((grid.rows, grid.cols), word_dtype(DTYPES[target]))
    faults: list[Any] = []
    for part in decoded_parts(tensor, faults):
        tile = part.place
        if int8:
            _put(
                words,
                tile,
                bits_from_float32(dequantize(part.codes, tile_steps(tensor, tile)), target),
            )
        else:
            elements = join_planes(
                [plane.reshape(-1) for plane in part.planes], DTYPES[record.dtype]
            )
            _put(words, tile, elements.reshape(tile.rows, tile.cols))
    if faults:
        raise faults[0]
    return _as_torch(words, target, record.shape, dtype if int8 else None)


def _requantized(
    stored: StoredTensor, tensor: SourceTensor, scales: NDArray[np.float32], dtype: torch.dtype
) -> torch.Tensor:
    # Any grid does: codes do not depend on it, only chunks do.
    grid = default_grid(stored.table.grid.rows, stored.table.grid.cols)
    target = _target(dtype)
    words = np.empty((grid.rows, grid.cols), word_dtype(DTYPES[target]))
    for tile in grid:
        steps = asked_steps(stored, scales, tile)
        codes = repeated(read_weights(tensor, grid, tile), steps, stored)
        _put(words, tile, bits_from_float32(dequantize(codes, steps), target))
    return _as_torch(words, target, stored.record.shape, dtype)


def codes_and_scales(tensor: StoredTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the codes of an int8 tensor [rows, cols], int8 or (wide) int16, and its steps.

    Steps are float32 [rows, 1] or [1, cols], or [rows, cols] where columns have scales.
    """
    grid = tensor.table.grid
    codes = np.empty((grid.rows, grid.cols), np.int16 if tensor.wide else np.int8)
    faults: list[Any] = []
    for part in decoded_parts(tensor, faults):
        _put(codes, part.place, part.codes)
    if faults:
        raise faults[0]
    return torch.from_numpy(codes), torch.from_numpy(
        tile_steps(tensor, Tile(0, 0, grid.rows, grid.cols)).copy()
    )


def _put(words: NDArray[Any], tile: Tile, values: NDArray[Any]) -> None:
    words[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] = values


def _target(dtype: torch.dtype) -> str:
    name = DTYPE_NAMES.get(dtype, "F32")
    return name if name in _FLOATS else "F32"


def _as_torch(
    words: NDArray[Any], dtype: str, shape: list[int], cast: torch.dtype | None
) -> torch.Tensor:
    # As bytes: torch has few operations for unsigned words, and numpy no bfloat16.
    signed = torch.from_numpy(words.reshape(-1).view(np.uint8))
    tensor = signed.view(torch_dtype(dtype)).reshape(shape)
    return tensor if cast is None else tensor.to(cast)
