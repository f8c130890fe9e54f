"""Why codes of an int8 tensor are not those of its source: explanations that fit are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.schemes.int8 import MAX_CODE, channel_scales
from codecllm.formats.stored_tensor import StoredTensor, tile_steps
from codecllm.verifier.checks.rounding import repeated
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.codes.rows import (
    describe_order,
    is_attention,
    permutation,
    row_digests,
)
from codecllm.verifier.diagnosis.examination import Examination
from codecllm.verifier.diagnosis.parts import asked_steps, decoded_parts, read_weights

MAX_SHIFT = 64
"""Farthest offset, in elements, at which a shifted buffer is looked for."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause that fits, in words.

    Attributes:
        cause: which.
        text: figures and places.
        channel: the channel concerned, or the first of several.
    """

    cause: Cause
    text: str
    channel: int | None = None


@dataclass(slots=True)
class _Counts:
    """Counts of elements, in all and for each explanation that fits them."""

    elements: int = 0
    fit_expected: int = 0
    fit_stored: int = 0
    found_rows: list[int] = field(default_factory=list)
    expected_rows: list[int] = field(default_factory=list)
    shifts: dict[int, int] = field(default_factory=dict)
    shiftable: int = 0


def explain(
    tensor: StoredTensor, source: SourceTensor, examined: Examination, head: int | None
) -> Explanation:
    """Returns why codes or scales of an int8 tensor differ from those of its source.

    Args:
        tensor: the stored tensor, whose scales the format allows.
        source: the source's tensor.
        examined: the examination of the tensor, which found a difference.
        head: rows of an attention head, or None.
    """
    assert tensor.scales is not None and examined.scales is not None
    counts = _count(tensor, source, examined.scales)
    wrong = examined.wrong_scales
    if not len(wrong):
        return _explain_codes(tensor, examined, counts)
    stored_scales = tensor.scales
    source_scales = examined.scales
    codes_fit = counts.fit_expected == counts.elements
    scales_explain = counts.fit_stored == counts.elements
    first = int(wrong[0])
    if codes_fit and sorted(stored_scales[wrong].tolist()) == sorted(source_scales[wrong].tolist()):
        values = f"channel {first} has {stored_scales[first]:.6g}, not {source_scales[first]:.6g}"
        text = f"channels {_listed(wrong)} have each other's scales: {values}"
        return Explanation(Cause.SWAPPED_SCALES, text, first)
    # Tried before the factor: rounded scales are wrong by a factor too.
    narrow = _narrower(stored_scales, source_scales)
    if narrow is not None:
        values = f"channel {first} has {stored_scales[first]:.9g}, not {source_scales[first]:.9g}"
        text = f"{len(wrong)} scales went through {narrow}: {values}"
        return Explanation(Cause.ROUNDED_SCALES, text, first)
    if scales_explain and _is_per_tensor(stored_scales, examined):
        return _per_tensor(examined)
    if codes_fit or scales_explain:
        return _step(stored_scales, source_scales, wrong, codes_fit)
    # Rows that moved took their scales along.
    order = permutation(counts.found_rows, counts.expected_rows)
    if order is not None and np.array_equal(stored_scales, source_scales[order]):
        cause = Cause.HEAD_ORDER if is_attention(tensor.record.name) else Cause.ROW_ORDER
        return Explanation(
            cause, describe_order(order, head), int((order != np.arange(len(order))).argmax())
        )
    share = examined.differing / max(1, examined.elements)
    scales = f"{len(wrong)} of {len(stored_scales)} scales"
    text = f"{share:.1%} of the codes and {scales} differ, first in channel {first}"
    return Explanation(Cause.OTHER_REVISION, text, first)


def scale_fault(examined: Examination) -> Explanation | None:
    """Explains scales that the format forbids; None without such scales.

    A container with such scales cannot be opened.
    """
    stored_scales = examined.stored_scales
    source_scales = examined.scales
    record = examined.record
    if (
        stored_scales is None
        or source_scales is None
        or (isinstance(record, Int8Tensor) and record.rounding is not None)
    ):
        return None
    bad = np.flatnonzero(~np.isfinite(stored_scales))
    if not len(bad):
        return None
    channel = int(bad[0])
    # The overflow is the point of the test.
    with np.errstate(over="ignore"):
        through = source_scales[channel].astype(np.float16)
    kind = " (float16 ends at 65504)" if np.isinf(through) else ""
    need = f"which needs {source_scales[channel]:.6g}{kind}"
    text = f"{len(bad)} scales are {stored_scales[channel]}, first in channel {channel}, {need}"
    return Explanation(Cause.SCALE_OVERFLOW if kind else Cause.WRONG_SCALE, text, channel)


def _count(tensor: StoredTensor, source: SourceTensor, scales: NDArray[np.float32]) -> _Counts:
    """Reads tensor and source once more and counts the elements that each explanation fits."""
    assert tensor.scales is not None
    counts = _Counts()
    faults = list[CodecLLMError]()
    grid = tensor.table.grid
    by_row = isinstance(tensor.record, Int8Tensor) and tensor.record.channel_kind == "row"
    # Part by part: the codes of a whole tensor, expected ones beside them, might not fit in memory.
    for part in decoded_parts(tensor, faults):
        codes = part.codes
        tile = part.place
        weights = read_weights(source, grid, part.place)
        weights = np.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
        expected = repeated(weights, asked_steps(tensor, scales, tile), tensor)
        with_stored_scales = repeated(weights, tile_steps(tensor, tile), tensor)
        counts.elements += codes.size
        counts.fit_expected += int(np.count_nonzero(codes == expected))
        counts.fit_stored += int(np.count_nonzero(codes == with_stored_scales))
        _count_shifts(counts, codes.reshape(-1), expected.reshape(-1))
        # A row that is cut into tiles has no digest of its own.
        if by_row and tile.cols == grid.cols:
            counts.found_rows += row_digests(codes)
            counts.expected_rows += row_digests(expected)
    return counts


def _count_shifts(
    counts: _Counts, found: NDArray[np.signedinteger], expected: NDArray[np.signedinteger]
) -> None:
    """Counts, for each offset, the elements of a chunk that are that far from their place."""
    # A chunk so short could match by chance.
    if found.size <= 2 * MAX_SHIFT:
        return
    inner = slice(MAX_SHIFT, found.size - MAX_SHIFT)
    wrong = np.flatnonzero(found[inner] != expected[inner]) + MAX_SHIFT
    counts.shiftable += len(wrong)
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        if shift and len(wrong):
            counts.shifts[shift] = counts.shifts.get(shift, 0) + int(
                np.count_nonzero(found[wrong] == expected[wrong - shift])
            )


def _explain_codes(tensor: StoredTensor, examined: Examination, counts: _Counts) -> Explanation:
    assert examined.first is not None
    row, col = examined.first
    channel = (
        row
        if isinstance(tensor.record, Int8Tensor) and tensor.record.channel_kind == "row"
        else col
    )
    shift, fitting = max(counts.shifts.items(), key=lambda item: item[1], default=(0, 0))
    # Each of 128 offsets fits a few elements by chance: all of many must fit.
    if counts.shiftable > 2 * MAX_SHIFT and fitting == counts.shiftable:
        text = (
            f"{examined.differing} codes differ and are those that stand {-shift:+d} elements away"
        )
        return Explanation(Cause.SHIFTED, text, channel)
    place = f"row {row}, column {col}"
    text = f"{examined.differing} of {examined.elements} codes differ, first at {place}"
    return Explanation(Cause.CORRUPTED_PAYLOAD, text, channel)


def _narrower(stored: NDArray[np.float32], expected: NDArray[np.float32]) -> str | None:
    for dtype, words in (("F16", "float16"), ("BF16", "bfloat16")):
        through = float32_from_bits(bits_from_float32(expected, dtype), dtype)
        if np.array_equal(stored, through):
            return words
    return None


def _is_per_tensor(stored: NDArray[np.float32], examined: Examination) -> bool:
    assert examined.absmax is not None
    whole = channel_scales(examined.absmax.max(keepdims=True))
    # With one channel both choices are the same.
    return len(stored) > 1 and bool((stored == whole[0]).all())


def _per_tensor(examined: Examination) -> Explanation:
    assert examined.absmax is not None and examined.scales is not None
    outlier = int(examined.absmax.argmax())
    largest = np.rint(examined.absmax / examined.absmax.max() * MAX_CODE)
    weight = float(examined.absmax[outlier])
    usual = max(float(np.median(examined.absmax)), 1e-38)
    text = (
        f"all {len(examined.absmax)} channels share the scale of channel {outlier}, whose largest "
        f"weight {weight:.6g} is {weight / usual:.1f} times the median channel's: half of the "
        f"channels use codes up to {np.median(largest):.0f} of {MAX_CODE}"
    )
    return Explanation(Cause.PER_TENSOR_SCALE, text, outlier)


def _step(
    stored: NDArray[Any], expected: NDArray[Any], wrong: NDArray[np.int64], codes_fit: bool
) -> Explanation:
    ratios = stored[wrong].astype(np.float64) / expected[wrong]
    first = int(wrong[0])
    typical = float(np.median(ratios))
    spread = (
        ""
        if np.allclose(ratios, typical, rtol=1e-3)
        else f" (from {ratios.min():.3g} to {ratios.max():.3g})"
    )
    where = "all channels" if len(wrong) == len(stored) else f"{len(wrong)} channels"
    text = (
        f"scales of {where} are {typical:.4g} times those of the weights{spread}, "
        f"first in channel {first}"
    )
    if codes_fit:
        return Explanation(Cause.WRONG_SCALE, f"{text}; the codes are right", first)
    return Explanation(
        Cause.COARSE_STEP if typical > 1 else Cause.WRONG_SCALE,
        f"{text}; the codes fit these scales",
        first,
    )


def _listed(channels: NDArray[np.int64]) -> str:
    names = [str(channel) for channel in channels[:6].tolist()]
    return ", ".join(names) + (", ..." if len(channels) > 6 else "")
