"""Why a loaded weight is not the container's: explanations that fit are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.codes.code_autopsy import Explanation
from codecllm.verifier.diagnosis.codes.round_trip import shift_of
from codecllm.verifier.diagnosis.codes.rows import (
    describe_order,
    is_attention,
    permutation,
    row_digests,
)

UNRELATED = 0.2
"""Correlation below which a weight has nothing to do with the right one."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A loaded weight that is not the right one, and facts about the right one.

    Attributes:
        name: of the parameter.
        found: the loaded weight, on the CPU.
        right: the container's weight, of the same dtype.
        codes: int8 codes in the weight's shape as a matrix, where it is an int8 tensor of that very
            shape.
        scales: float32 steps that broadcast against `codes`.
        source: the source's own weight, where there is one of that name.
        head: rows of an attention head, or None.
        others: gives the name of another parameter that holds exactly this weight, or None.
    """

    name: str
    found: torch.Tensor
    right: torch.Tensor
    codes: torch.Tensor | None
    scales: torch.Tensor | None
    source: torch.Tensor | None
    head: int | None
    others: Callable[[torch.Tensor], str | None]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _words(tensor: torch.Tensor) -> Any:
    return _bits(tensor).numpy().view(f"<u{tensor.dtype.itemsize}")


def explain_weight(suspect: Suspect) -> Explanation:
    """Returns why a loaded weight differs from the container's."""
    weight = suspect.found
    right = suspect.right
    if weight.shape != right.shape:
        if (
            weight.ndim == 2
            and tuple(weight.shape) == tuple(right.shape)[::-1]
            and same_bits(weight.T, right)
        ):
            return Explanation(
                Cause.TRANSPOSED,
                f"shape is {list(weight.shape)} for {list(right.shape)}, the transposed one",
            )
        return Explanation(
            Cause.WRONG_WEIGHT, f"shape is {list(weight.shape)} for {list(right.shape)}"
        )
    # From the most specific to the most general: the first that fits is named.
    tests = (_from_scales, _copied, _moved, _rescaled)
    explanation = next((result for test in tests if (result := test(suspect)) is not None), None)
    return explanation or _any_difference(suspect)


def _from_scales(suspect: Suspect) -> Explanation | None:
    """Tries faults between codes and scales, where these are known."""
    if suspect.codes is None or suspect.scales is None:
        return None
    codes = suspect.codes.float()
    scales = suspect.scales
    shape = suspect.found.shape
    dtype = suspect.found.dtype
    by_row = scales.shape[1] == 1
    flat = scales.reshape(-1)
    crosswise = flat[None, :] if by_row else flat[:, None]
    first = _first_channel(suspect)
    # Rounded scales first: a weight through float16 scales also fits looser explanations.
    for narrow in (torch.float16, torch.bfloat16):
        through = scales.to(narrow).float()
        if _is(suspect, codes * through):
            overflows = ~torch.isfinite(through.reshape(-1))
            if overflows.any():
                channel = int(overflows.nonzero()[0])
                value = float(flat[channel])
                count = int(overflows.sum())
                text = (
                    f"{count} scales overflow {narrow}: that of channel {channel}, {value:.6g}, "
                    f"becomes infinite"
                )
                return Explanation(Cause.SCALE_OVERFLOW, text, channel)
            return Explanation(Cause.ROUNDED_SCALES, f"scales went through {narrow}", first)
    if crosswise.shape[int(by_row)] == codes.shape[int(by_row)] and _is(suspect, codes * crosswise):
        axis, right = (1, 0) if by_row else (0, 1)
        shape_text = f"[{codes.shape[0]}, {codes.shape[1]}]"
        text = f"scales broadcast along axis {axis} instead of {right} of the codes {shape_text}"
        return Explanation(Cause.SCALE_AXIS, text, first)
    if _is(suspect, codes):
        return Explanation(Cause.SCALE_NOT_APPLIED, "the weight is the bare codes", first)
    once = (codes * scales).to(dtype).reshape(shape)
    for twice in (codes * scales * scales, once.reshape(codes.shape).float() * scales):
        if _is(suspect, twice):
            return Explanation(
                Cause.REPLACED_TWICE, "each channel's scale was applied twice", first
            )
    return None


def _is(suspect: Suspect, values: torch.Tensor) -> bool:
    """Whether a candidate [rows, cols] is the weight that was found, NaN equal to NaN."""
    candidate = values.to(suspect.found.dtype).reshape(suspect.found.shape)
    return torch.equal(candidate, suspect.found) or bool(
        torch.isclose(candidate, suspect.found, rtol=0, atol=0, equal_nan=True).all()
    )


def _copied(suspect: Suspect) -> Explanation | None:
    if suspect.source is not None and same_bits(suspect.found, suspect.source):
        return Explanation(
            Cause.NOT_REPLACED, "the layer still holds the source's own weight, not the container's"
        )
    other = suspect.others(suspect.found)
    if other is not None:
        return Explanation(Cause.WRONG_TENSOR, f"the weight is that of {other!r}")
    if (
        suspect.found.ndim == 2
        and suspect.found.shape[0] == suspect.found.shape[1]
        and same_bits(suspect.found.T, suspect.right)
    ):
        return Explanation(Cause.TRANSPOSED, "the weight is the transposed one")
    return None


def _moved(suspect: Suspect) -> Explanation | None:
    words = _words(suspect.found)
    right_words = _words(suspect.right)
    shift = shift_of(words, right_words)
    if shift is not None:
        return Explanation(
            Cause.SHIFTED,
            f"the weight is a shifted buffer: each element is the one {shift:+d} elements away",
            0,
        )
    if suspect.found.ndim < 2:
        return None
    cols = suspect.found.shape[-1]
    # Digests find the partner of each row without comparing all pairs.
    order = permutation(
        row_digests(words.reshape(-1, cols)), row_digests(right_words.reshape(-1, cols))
    )
    if order is None:
        return None
    cause = Cause.HEAD_ORDER if is_attention(suspect.name) else Cause.ROW_ORDER
    return Explanation(
        cause, describe_order(order, suspect.head), int((order != np.arange(len(order))).argmax())
    )


def _rescaled(suspect: Suspect) -> Explanation | None:
    """Rows that are the right ones times a factor: wrong or exchanged scales."""
    # A row has one factor only where it has one scale.
    if suspect.codes is None or suspect.scales is None or suspect.scales.shape[1] != 1:
        return None
    weight, right = (
        value.reshape(suspect.codes.shape).float() for value in (suspect.found, suspect.right)
    )
    # The least squares factor of each row; rows of zeros have none.
    power = right.square().sum(1)
    factors = torch.where(power > 0, (weight * right).sum(1) / power, torch.ones_like(power))
    remainder = (weight - factors[:, None] * right).abs().amax(1)
    if not bool(torch.isfinite(factors).all()) or bool(
        (remainder > 0.01 * weight.abs().amax(1)).any()
    ):
        return None
    off = ((factors - 1).abs() > 0.01).nonzero().flatten()
    if not len(off):
        return None
    channel = int(off[0])
    scales = suspect.scales.reshape(-1)
    applied_scales = (factors * scales)[off]
    if torch.allclose(applied_scales.sort().values, scales[off].sort().values, rtol=0.01):
        names = ", ".join(map(str, off[:6].tolist()))
        return Explanation(
            Cause.SWAPPED_SCALES,
            f"channels {names} were multiplied by each other's scales",
            channel,
        )
    factor = float(factors[off].median())
    text = f"{len(off)} channels are {factor:.4g} times the right value, first channel {channel}"
    return Explanation(Cause.WRONG_SCALE, text, channel)


def _any_difference(suspect: Suspect) -> Explanation:
    weight = suspect.found.double().reshape(-1)
    right = suspect.right.double().reshape(-1)
    bad = _words(suspect.found) != _words(suspect.right)
    channel = _first_channel(suspect)
    not_finite = int((~torch.isfinite(weight)).sum()) - int((~torch.isfinite(right)).sum())
    if not_finite > 0:
        text = (
            f"{not_finite} weights are NaN or infinite that must not be, first in channel {channel}"
        )
        return Explanation(Cause.WRONG_WEIGHT, text, channel)
    norms = float(weight.norm() * right.norm())
    correlation = float(weight @ right) / norms if norms else 0.0
    share = int(bad.sum()) / max(1, bad.size)
    # Most elements differ and nothing is alike: another initialization.
    if share > 0.5 and abs(correlation) < UNRELATED:
        text = (
            f"the weight has nothing to do with the container's (correlation {correlation:+.3f}): "
            f"it was never loaded"
        )
        return Explanation(Cause.NOT_REPLACED, text)
    relative = float((weight - right).norm() / right.norm().clamp_min(1e-300))
    figures = f"relative error {relative:.3e}, correlation {correlation:.4f}"
    text = f"{share:.2%} of the elements differ, first in channel {channel}; {figures}"
    return Explanation(Cause.WRONG_WEIGHT, text, channel)


def _first_channel(suspect: Suspect) -> int | None:
    """Returns the first channel (row, or column where scales go by column) with a wrong element."""
    words = _words(suspect.found)
    right = _words(suspect.right)
    bad = words != right
    if not bad.any():
        return None
    cols = suspect.found.shape[-1] if suspect.found.ndim > 1 else 1
    by_column = (
        suspect.scales is not None and suspect.scales.shape[0] == 1 != suspect.scales.shape[1]
    )
    first = int(bad.argmax())
    return first % cols if by_column else first // cols
