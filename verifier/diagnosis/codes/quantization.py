"""Stage 2: errors and sizes of quantization, tensor by tensor.

One scale per channel is compared with one per tensor, and every stored bit has its place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from codecllm.formats.container import Container
from codecllm.formats.errors import NonFiniteWeightError
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, RawTensor
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.examination import FP16_LARGEST, FP16_SMALLEST, Choice, Examination
from codecllm.verifier.report import Stage

LISTED_CHANNELS = 16
"""Channels named per tensor and kind; the report says how many there are."""

OUTLIER = 16.0
"""A scale this many times the tensor's median one is called extreme."""


def check_quantization(
    container: Container, examined: dict[str, Examination], stage: Stage
) -> None:
    """States errors and sizes of every tensor and fails for weights that are no numbers.

    Args:
        container: the container.
        examined: by tensor, see `round_trip.examine_all`.
        stage: receives findings and figures; `facts` are those of `ratio_account`, `tensors` and
            `channels`.
    """
    for one in examined.values():
        if one.not_finite:
            channel, count = next(iter(sorted(one.not_finite.items())))
            unit = "channel" if isinstance(one.record, Int8Tensor) else "row"
            places = f"{sum(one.not_finite.values())} in {len(one.not_finite)} {unit}s"
            text = (
                f"the source's weights are NaN or infinite: {places}, "
                f"first in {unit} {channel} ({count})"
            )
            stage.fail(
                NonFiniteWeightError(text, tensor=one.name), cause=Cause.NON_FINITE, channel=channel
            )
    with_bytes = {
        name: one
        for name, one in examined.items()
        if not isinstance(container.records[name], AliasTensor)
    }
    whole = all(not one.faults for one in with_bytes.values()) and len(with_bytes) == sum(
        not isinstance(record, AliasTensor) for record in container.manifest.tensors
    )
    tensors = [row for row in map(tensor_figures, with_bytes.values()) if row is not None]
    # The parts of the account must add up to the file; without one tensor they would not.
    account = ratio_account(container, with_bytes) if whole else {}
    stage.facts = {
        **account,
        "tensors": tensors,
        "channels": [row for row in map(channel_notes, with_bytes.values()) if row],
    }
    stage.facts["histograms"] = histograms(with_bytes)
    stage.summary = (
        _summary(account, tensors)
        if whole
        else "sizes are not accounted for in a damaged container"
    )


def tensor_figures(one: Examination) -> dict[str, Any] | None:
    """Returns the figures of a coded tensor as JSON values; None for a plain or damaged one.

    `per_channel` is the stored tensor, `per_tensor` the same with a single scale. Errors are
    relative to the root mean square weight; bits are per weight and count payload and scales;
    ratios are to the source's bits.
    """
    if isinstance(one.record, RawTensor) or one.faults:
        return None
    row: dict[str, Any] = {
        "name": one.name,
        "scheme": one.record.scheme,
        "elements": one.elements,
        "channels": len(one.scales) if one.scales is not None else None,
        "per_channel": _choice(
            one, one.per_channel, len(one.scales) if one.scales is not None else 0
        ),
    }
    if one.per_tensor is not None:
        row["per_tensor"] = _choice(one, one.per_tensor, 1)
    return row


def _choice(one: Examination, choice: Choice, scales: int) -> dict[str, Any]:
    source_bits = 8 * one.record.source_bytes
    # Scales count: many channels of few weights can cost more than their codes save.
    bits = 8 * choice.stored_bytes + 32 * scales
    return {
        "relative_error": math.sqrt(choice.squared_error / one.energy) if one.energy else 0.0,
        "worst_error": choice.worst_error,
        "codes_in_use": choice.codes_in_use,
        "entropy_bits_per_weight": choice.entropy_bits / one.elements,
        "bits_per_weight": bits / one.elements,
        "ratio": source_bits / max(1, bits),
    }


def ratio_account(container: Container, examined: dict[str, Examination]) -> dict[str, Any]:
    """Returns the place of every stored bit, and the ratio without some of them.

    The parts add up to the stored bytes: entropy of the symbols, the cost of whole-bit code lengths
    above it, the rest of the coder, scales, plainly stored tensors, and headers (tables, shapes,
    padding, safetensors headers, manifest).
    """
    coded_tensors = [one for one in examined.values() if not isinstance(one.record, RawTensor)]
    plain = sum(
        8 * one.record.source_bytes
        for one in examined.values()
        if isinstance(one.record, RawTensor)
    )
    payload = sum(8 * one.per_channel.stored_bytes for one in coded_tensors)
    entropy = sum(one.per_channel.entropy_bits for one in coded_tensors)
    prefix = sum(one.per_channel.prefix_bits for one in coded_tensors)
    scales = sum(32 * len(one.scales) for one in coded_tensors if one.scales is not None)
    container_bits = 8 * container.stored_bytes
    source = 8 * container.manifest.source.tensor_bytes
    # The remainder, and not a sum of its own: so the parts add up by construction.
    headers = container_bits - payload - scales - plain
    weights = max(1, sum(one.elements for one in examined.values()))
    # A coder with fewer bits than any code of whole bits has no such loss.
    whole_bits = min(max(0.0, prefix - entropy), max(0.0, payload - entropy))
    single = sum(
        8 * one.per_tensor.stored_bytes + 32
        if one.per_tensor is not None
        else 8 * one.per_channel.stored_bytes
        for one in coded_tensors
    )
    energy = sum(one.energy for one in coded_tensors)
    error, together = (
        math.sqrt(sum(choice.squared_error for choice in choices) / energy) if energy else 0.0
        for choices in (
            [one.per_channel for one in coded_tensors],
            [one.per_tensor or one.per_channel for one in coded_tensors],
        )
    )
    bits = {
        "entropy": entropy / weights,
        "whole_bit_code_lengths": whole_bits / weights,
        "rest_of_the_coder": (payload - entropy - whole_bits) / weights,
        "scales": scales / weights,
        "plain_tensors": plain / weights,
        "headers": headers / weights,
    }
    return {
        "weights": weights,
        "source_bytes": source // 8,
        "stored_bytes": container_bits // 8,
        "ratio": source / container_bits,
        "bits_per_weight": container_bits / weights,
        "bits": bits,
        "ratio_at_entropy": source / max(1.0, container_bits - payload + entropy),
        "ratio_with_whole_bits": source / max(1.0, container_bits - payload + entropy + whole_bits),
        "explained_by_entropy": (container_bits - payload + entropy) / container_bits,
        "explained": (container_bits - payload + entropy + whole_bits) / container_bits,
        "ratio_per_tensor_scale": source / max(1, single + plain + headers),
        "relative_error": error,
        "relative_error_per_tensor_scale": together,
    }


def channel_notes(one: Examination) -> dict[str, Any]:
    """Returns remarkable channels of a tensor; an empty object without any.

    `zero`: channels of zeros. `beyond_fp16`: scales that float16 cannot hold. `extreme`: scales far
    above the tensor's median. `not_finite`: channels (rows) with NaN or infinite weights, and how
    many.
    """
    notes: dict[str, Any] = {}
    if one.not_finite:
        notes["not_finite"] = {
            str(channel): count
            for channel, count in sorted(one.not_finite.items())[:LISTED_CHANNELS]
        }
    if one.scales is not None and one.absmax is not None:
        is_used = one.absmax > 0
        # Channels of zeros say nothing about the usual scale.
        median = float(np.median(one.scales[is_used])) if is_used.any() else 1.0
        kinds = {
            "zero": ~is_used,
            "beyond_fp16": is_used & ((one.scales > FP16_LARGEST) | (one.scales < FP16_SMALLEST)),
            "extreme": is_used & (one.scales > OUTLIER * median),
        }
        for kind, mask in kinds.items():
            channels = np.flatnonzero(mask)
            if len(channels):
                first_channels = channels[:LISTED_CHANNELS].tolist()
                notes[kind] = {
                    "count": len(channels),
                    "channels": first_channels,
                    "scales": one.scales[first_channels].tolist(),
                }
    return {"name": one.name, **notes} if notes else {}


def histograms(examined: dict[str, Examination]) -> dict[str, list[int]]:
    """Returns how often each code from -127 to 127 occurs in all int8 tensors.

    The counts are those of the stored codes, and of codes under one scale per tensor.
    """
    int8_tensors = [
        one for one in examined.values() if one.per_tensor is not None and not one.faults
    ]
    if not int8_tensors:
        return {}
    per_channel = np.sum([one.per_channel.histogram for one in int8_tensors], axis=0)
    together = np.sum(
        [one.per_tensor.histogram for one in int8_tensors if one.per_tensor is not None], axis=0
    )
    # Entry 0 counts -128, which is no code.
    return {"per_channel": per_channel[1:].tolist(), "per_tensor": together[1:].tolist()}


def _summary(account: dict[str, Any], tensors: list[dict[str, Any]]) -> str:
    bits = account["bits"]
    coder = bits["whole_bit_code_lengths"] + bits["rest_of_the_coder"]
    text = (
        f"{account['ratio']:.4f}x, {account['bits_per_weight']:.3f} bits per weight: "
        f"{bits['entropy']:.3f} entropy, {coder:.3f} coder "
        f"({bits['whole_bit_code_lengths']:.3f} of it whole-bit code lengths), "
        f"{bits['scales']:.3f} scales, "
        f"{bits['plain_tensors'] + bits['headers']:.3f} plain tensors and headers"
    )
    if any("per_tensor" in row for row in tensors):
        times = account["relative_error_per_tensor_scale"] / max(account["relative_error"], 1e-30)
        text += (
            f"; relative error {account['relative_error']:.2e}. One scale per tensor: "
            f"{account['ratio_per_tensor_scale']:.4f}x at {times:.2f} times the error"
        )
    return text
