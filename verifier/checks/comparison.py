"""Compares a container with its source model, element by element."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.source import SourceModel
from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError, DecodeError, ModelMismatchError
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, TensorRecord
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.formats.tiling import Tile
from codecllm.verifier.checks.decoding import Scan, blocks_in_source_order
from codecllm.verifier.checks.integrity import Progress, in_order
from codecllm.verifier.checks.rounding import code_errors, is_nearest
from codecllm.verifier.report import Stage

_PLAIN_STEP_BYTES = 4 << 20


def check_source(
    container: Container, source: SourceModel, stage: Stage, workers: int, progress: Progress | None
) -> None:
    """Compares every tensor with the source.

    A lossless tensor must be equal bit for bit. Codes that were rounded to the nearest must lie
    within half a step, codes that were rounded otherwise within the error that the manifest says.
    Names, dtypes and shapes must be the same; an alias is compared with the source's tensor of its
    own name.
    """
    records = container.records
    for name in sorted(source.tensors.keys() ^ records.keys()):
        where = "the source lacks" if name in records else "the container lacks"
        stage.fail(ModelMismatchError(f"{where} this tensor", tensor=name))
    names = [name for name in records if name in source.tensors]
    total, bytes_done = sum(source.tensors[name].entry.bytes for name in names), 0
    worst, refined_worst = 0.0, 0.0
    with ThreadPoolExecutor(workers) as pool:
        for name, (faults, error) in in_order(
            pool, names, lambda name: compare_tensor(container, name, source.tensors[name])
        ):
            bytes_done += source.tensors[name].entry.bytes
            if progress is not None:
                progress(name, bytes_done, total)
            # One figure does not fit both kinds: codes with a dead zone or error feedback may lie
            # further off than half a step.
            if is_nearest(_stored(container, name)):
                worst = max(worst, error)
            else:
                refined_worst = max(refined_worst, error)
            for fault in faults:
                stage.fail(fault)
    int8 = [record for name in names if isinstance(record := _stored(container, name), Int8Tensor)]
    int8_count = len(int8)
    rounding_names = [record.rounding or "" for record in int8 if not is_nearest(record)]
    refined_count = len(rounding_names)
    kinds = ", ".join(sorted(set(rounding_names)))
    stage.summary = (
        f"{len(names) - int8_count} tensors bit for bit, "
        f"{int8_count - refined_count} int8 within half a step"
    )
    stage.summary += f" (worst {worst:.6f} of scale / 2)" if int8_count > refined_count else ""
    if refined_count:
        stage.summary += (
            f", {refined_count} rounded otherwise, as recorded "
            f"({kinds}; worst {refined_worst / 2:.3f} steps)"
        )
    stage.facts = {
        "tensors": len(names),
        "quantized": int8_count,
        "worst_error_in_half_steps": worst,
    }
    if refined_count:
        stage.facts |= {
            "rounded_otherwise": refined_count,
            "their_worst_error_in_steps": refined_worst / 2,
        }


def compare_tensor(
    container: Container, name: str, source: SourceTensor
) -> tuple[list[CodecLLMError], float]:
    """Compares one tensor.

    Returns:
        One error per damaged chunk and one for the first element that differs; the worst error of
        an int8 tensor in units of scale / 2.
    """
    record = _stored(container, name)
    if (record.dtype, tuple(record.shape)) != (source.dtype.name, source.shape):
        got, expected = (
            f"{record.dtype} {record.shape}",
            f"{source.dtype.name} {list(source.shape)}",
        )
        return [
            ModelMismatchError(
                "type differs from the source", tensor=name, got=got, expected=expected
            )
        ], 0.0
    try:
        tensor = container.tensor(name)
        if isinstance(tensor, PlainTensor):
            return _compare_plain(tensor, name, source), 0.0
        return _compare_coded(tensor, name, source)
    except CodecLLMError as exc:
        return [exc], 0.0


def _stored(container: Container, name: str) -> TensorRecord:
    record = container.records[name]
    return container.records[record.alias_of] if isinstance(record, AliasTensor) else record


def _compare_plain(tensor: PlainTensor, name: str, source: SourceTensor) -> list[CodecLLMError]:
    stored_bytes = memoryview(tensor.read())
    for first in range(0, len(stored_bytes), _PLAIN_STEP_BYTES):
        part = stored_bytes[first : first + _PLAIN_STEP_BYTES]
        if source.read_bytes(first, first + len(part)) != part:
            return [
                DecodeError(
                    "differs from the source",
                    tensor=name,
                    file=tensor.file.name,
                    byte=tensor.offset + first,
                )
            ]
    return []


def _compare_coded(
    tensor: StoredTensor, name: str, source: SourceTensor
) -> tuple[list[CodecLLMError], float]:
    scan = Scan(entropy_bits=[0.0] * tensor.table.planes)
    compare = (
        partial(code_errors, tensor) if isinstance(tensor.record, Int8Tensor) else _word_errors
    )
    worst, differing, first_bad = 0.0, 0, None
    for tile, elements in blocks_in_source_order(tensor, scan):
        start = tile.row * tensor.table.grid.cols + tile.col
        words = source.read_elements(start, start + tile.symbols).reshape(tile.rows, tile.cols)
        errors, bounds = compare(tile, elements, words)
        worst = max(worst, float(errors.max()))
        # Negated, so that a NaN counts as a difference: no comparison with NaN is true.
        bad = ~(errors <= bounds)
        if bad.any():
            differing += int(bad.sum())
            if first_bad is None:
                row, col = np.unravel_index(int(bad.argmax()), bad.shape)
                first_bad = (tile.row + int(row), tile.col + int(col))
    faults = list(scan.faults)
    if first_bad is not None:
        place = f"row {first_bad[0]}, column {first_bad[1]}"
        text = f"{differing} elements differ from the source, first at {place}"
        faults.append(DecodeError(text, tensor=name, file=tensor.file.name))
    # Errors of lossless tensors are 0 or infinity, which is no figure for a report.
    return faults, worst if isinstance(tensor.record, Int8Tensor) else 0.0


def _word_errors(
    tile: Tile, elements: NDArray[np.generic], words: NDArray[np.unsignedinteger]
) -> tuple[NDArray[np.float64], float]:
    """Returns 0 where the bits are equal and infinity elsewhere, and the error allowed: 0."""
    return np.where(elements == words, 0.0, np.inf), 0.0
