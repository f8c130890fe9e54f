"""The floor of a baseline: what is too far from the source to be the loss of the quantization."""

from __future__ import annotations

import math

from codecllm.verifier.baseline.record import Agreement, Baseline

HIGH_RATE, LOW_RATE = 6.0, 4.0
"""Bits per weight from which the floor is that of 8 bits, and below which there is none."""

FLOOR = (0.1, 0.9, 0.9)
FLOOR_OF_LOW_RATES = (0.5, 0.75, 0.75)
"""Mean KL in nats, top-1 agreement and cosine; see `below_floor`."""

MIN_TOP1_OF_ALL, SMALL_KL = 0.5, 1e-3

FLAT = 0.05
"""Mean probability of the likeliest token below which a model prefers none, as random weights."""


def floor_of(bits: float | None) -> tuple[float, float, float] | None:
    """Returns mean KL, top-1 agreement and cosine for bits per weight, or None; see below."""
    if bits is not None and bits < LOW_RATE:
        return None
    return FLOOR if bits is None or bits >= HIGH_RATE else FLOOR_OF_LOW_RATES


def below_floor(
    agreement: Agreement, bits: float | None, certainty: float | None = None
) -> str | None:
    """Returns the figures of an agreement that is too low for a sound conversion, or None.

    Converted without a rate, or at 6 bits a weight and more: a mean divergence above 0.1 nats with
    a top-1 agreement below 90 %, a top-1 agreement below 50 % with a divergence above 1e-3 nats, or
    a cosine below 0.9. From 4 to 6 bits: 0.5 nats with 75 %, and 0.75. Fewer bits have no floor:
    the caller accepted their loss. The 50 % do not count where the converted model prefers no
    token, as random weights do not: had the source preferred one, the divergence would be larger.

    Args:
        agreement: converted model against source.
        bits: bits per weight that were asked for; None: 8, by the largest weight of each channel.
        certainty: of the converted model, see `certainty_of`; None where it is unknown.
    """
    floor = floor_of(bits)
    if floor is None:
        return None
    far_kl, low_top1, low_cosine = floor
    # `not x >= y` and `not x <= y`: a NaN of a broken model must fail, and all its comparisons are
    # false.
    if agreement.cosine is not None and not agreement.cosine >= low_cosine:
        return f"smallest cosine {agreement.cosine:.4f}, expected at least {low_cosine}"
    if agreement.top1 is None or agreement.mean_kl is None:
        return None
    far = not agreement.mean_kl <= far_kl and agreement.top1 < low_top1
    flat = certainty is not None and certainty < FLAT
    other = agreement.top1 < MIN_TOP1_OF_ALL and not agreement.mean_kl <= SMALL_KL and not flat
    if far or other:
        return (
            f"top-1 {agreement.top1:.1%} and mean KL {agreement.mean_kl:.3f} nats, "
            f"expected at least {low_top1:.0%} or at most {far_kl} nats"
        )
    return None


def certainty_of(baseline: Baseline) -> float | None:
    """Returns the mean probability of the converted model's likeliest token, or None.

    It is taken along the model's own continuations.
    """
    best = [
        math.exp(min(0.0, tokens.logprobs[0]))
        for prompt in baseline.greedy
        for tokens in prompt.top
        if tokens.logprobs
    ]
    return sum(best) / len(best) if best else None
