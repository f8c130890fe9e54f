"""Distances between two tensors, over all elements and channel by channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def relative_error(right: torch.Tensor, found: torch.Tensor) -> float:
    """Returns |found - right| / |right| (Frobenius norms).

    It is infinite where one has NaN or infinities that the other has not.
    """
    if right.shape != found.shape:
        return float("inf")
    # NaN in the same places is no difference.
    whole = torch.isfinite(right)
    if not torch.equal(whole, torch.isfinite(found)):
        return float("inf")
    a = right[whole].double()
    b = found[whole].double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the cosine between two tensors, 0 where one is not finite."""
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return 0.0
    return float(
        torch.nn.functional.cosine_similarity(a.double().reshape(-1), b.double().reshape(-1), 0)
    )


def worst_channel(right: torch.Tensor, found: torch.Tensor) -> tuple[int, float, float]:
    """Returns the channel with the largest error, the share of channels off by 1 %, that error.

    Channels are places of the last dimension.

    A channel's error is relative to the root mean square channel, so that small channels do not
    stand out by themselves.
    """
    a, b = (value.double().reshape(-1, value.shape[-1]) for value in (right, found))
    if a.shape != b.shape:
        return 0, 1.0, float("inf")
    not_finite = (torch.isfinite(a) != torch.isfinite(b)).any(0)
    if not_finite.any():
        return int(not_finite.nonzero()[0]), float(not_finite.double().mean()), float("inf")
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    errors = (a - b).norm(dim=0) / a.norm(dim=0).square().mean().sqrt().clamp_min(1e-300)
    return int(errors.argmax()), float((errors > 0.01).double().mean()), float(errors.max())


def channel_order(
    right: torch.Tensor, found: torch.Tensor
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Returns which channel of `right` each channel of `found` is, as int64 [channels].

    None means that they are not the same channels, or in the same order.
    """
    a, b = (value.reshape(-1, value.shape[-1]) for value in (right, found))
    if (
        a.shape != b.shape
        or not 1 < a.shape[1] <= 8192
        or not bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    ):
        return None
    # float64: near equal channels the distances of float32 are mostly rounding.
    order = torch.cdist(b.T.double(), a.T.double()).argmin(1)
    # Two channels with one nearest neighbour are no permutation.
    if len(set(order.tolist())) != len(order) or bool((order == torch.arange(len(order))).all()):
        return None
    return (
        order.numpy()
        if torch.allclose(a[:, order], b, rtol=1e-2, atol=1e-3 * float(a.abs().max()))
        else None
    )
