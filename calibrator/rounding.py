"""Rounding with error feedback on a device: the columns of `converter.rate.feedback`, in torch.

A panel of 64 columns is rounded column by column; its errors enter all later panels by one matrix
product. On a GPU one kernel rounds a panel: a thread for each row, whose columns wait for one
another but not for other rows. Elsewhere, and as the reference of its bits, torch's elementwise
operations do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from codecllm.converter.plan.params import WIDE_CODES
from codecllm.converter.rate.feedback import FARTHEST, RIDGE
from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader.kernels.nvrtc import Kernel

PANEL = 64
"""Columns of a panel; rounding.cu keeps so many errors of a row."""

_THREADS = 64
_SOURCE = Path(__file__).with_name("rounding.cu")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceFactor:
    """As `converter.rate.feedback.Factor`, on a device.

    Attributes:
        order: int64 [cols].
        ratios: float32 [cols, cols]; elements on and above the diagonal are undefined.
    """

    order: torch.Tensor
    ratios: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """Some columns to be rounded, one after another; all tensors lie on one device.

    Attributes:
        weights: float32 [columns, rows], in order.
        shifted: the same with the errors of earlier panels added; may be overwritten.
        row_scale: float32 [rows].
        col_scale: float32 [columns].
        ratios: float32 [columns, columns], a view of the factor's.
        deadzone: float32 [1].
        errors: float32 [columns, rows], receives the errors.
        codes: int16 [columns, rows], receives the codes.
        limits: the smallest and the largest of them.
    """

    weights: torch.Tensor
    shifted: torch.Tensor
    row_scale: torch.Tensor
    col_scale: torch.Tensor
    ratios: torch.Tensor
    deadzone: torch.Tensor
    errors: torch.Tensor
    codes: torch.Tensor
    limits: tuple[int, int] = WIDE_CODES


def factor_on_device(
    products: torch.Tensor,
    shrunk: float,
) -> DeviceFactor:
    """Factors X^T X where it lies; see `converter.rate.feedback.factor_of`."""
    diagonal = products.diagonal().double()
    order = torch.sort(diagonal, descending=True, stable=True).indices
    backward = order.flip(0)
    matrix = products[backward][:, backward].double()
    matrix *= 1 - shrunk
    matrix.diagonal().copy_(diagonal[backward] + RIDGE * diagonal.mean())
    lower = torch.linalg.cholesky(matrix)
    del matrix
    lower /= lower.diagonal().clone()
    return DeviceFactor(order, lower.flip(0, 1).t().float().contiguous())


def codes_on_device(
    weights: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor | None],
    factor: DeviceFactor,
    deadzone: float = 0.0,
    round_panel: Callable[[Panel], None] | None = None,
    limits: tuple[int, int] = WIDE_CODES,
) -> torch.Tensor:
    """Quantizes rows with error feedback; see `converter.rate.feedback.refined_codes`.

    Args:
        weights: float32 [rows, cols], finite.
        scales: float32 [rows], and factors of the columns, float32 [cols], or None.
        factor: of the inputs.
        deadzone: as in `QuantParams`.
        round_panel: rounds a panel; None takes the fastest way of the device.
        limits: as in `QuantParams`.

    Returns:
        int16 [rows, cols], the codes, on the device of the weights.
    """
    rows, cols = weights.shape
    device, order = weights.device, factor.order
    run = round_panel or _fastest(device)
    ones = torch.ones(cols, device=device)
    col_scale = ones if scales[1] is None else scales[1].index_select(0, order)
    by_column = weights.index_select(1, order).t().contiguous()
    errors = torch.empty_like(by_column)
    codes = torch.empty((cols, rows), dtype=torch.int16, device=device)
    dead = torch.full((1,), deadzone, device=device)
    for first in range(0, cols, PANEL):
        part = slice(first, min(first + PANEL, cols))
        own_weights, ratios = by_column[part], factor.ratios[part]
        shifted = (
            torch.addmm(own_weights, ratios[:, :first], errors[:first])
            if first
            else own_weights.clone()
        )
        run(
            Panel(
                own_weights,
                shifted,
                scales[0],
                col_scale[part],
                ratios[:, part],
                dead,
                errors[part],
                codes[part],
                limits,
            )
        )
    far = errors.double().norm(dim=0) > FARTHEST * by_column.double().norm(dim=0)
    if bool(far.any()):
        quotients = by_column[:, far] / (scales[0][far] * col_scale[:, None])
        codes[:, far] = _rounded(quotients, dead, limits).to(torch.int16)
    return codes.t().index_select(1, torch.argsort(order))


def round_by_columns(panel: Panel) -> None:
    """Rounds a panel by operations on its columns."""
    for col in range(len(panel.weights)):
        step = panel.row_scale * panel.col_scale[col]
        code = _rounded(panel.shifted[col] / step, panel.deadzone, panel.limits)
        panel.codes[col] = code
        error = panel.weights[col] - code * step
        panel.errors[col] = error
        panel.shifted[col + 1 :] += panel.ratios[col + 1 :, col, None] * error


def _rounded(
    quotients: torch.Tensor, deadzone: torch.Tensor, limits: tuple[int, int]
) -> torch.Tensor:
    """Rounds float32 of any shape in place."""
    quotients -= torch.copysign(deadzone, quotients)
    return quotients.round_().clamp_(*limits)


def round_by_kernel(panel: Panel) -> None:
    """Rounds a panel by one launch of the kernel.

    Raises:
        UnsupportedEnvironmentError: it cannot be compiled here.
    """
    columns, rows = panel.weights.shape
    kernel = _kernel(panel.weights.device)
    arguments: list[torch.Tensor | int] = [
        panel.weights,
        panel.shifted,
        panel.row_scale,
        panel.col_scale,
        panel.ratios,
        panel.deadzone,
        panel.errors,
        panel.codes,
        rows,
        columns,
        panel.ratios.stride(0),
        *panel.limits,
    ]
    kernel.launch(-(-rows // _THREADS), _THREADS, 0, arguments)


@cache
def _fastest(device: torch.device) -> Callable[[Panel], None]:
    """Returns the fastest way to round a panel on a device; all give the same bits."""
    if device.type != "cuda":
        return round_by_columns
    try:
        _kernel(device)
    except UnsupportedEnvironmentError:  # without NVRTC it takes minutes more
        return round_by_columns
    return round_by_kernel


@cache
def _kernel(device: torch.device) -> Kernel:
    return Kernel(_SOURCE.read_text(), "round_panel", device)
