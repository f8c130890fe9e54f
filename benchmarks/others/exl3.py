"""EXL3's quantizer, from the package `exllamav3`: all contact with it.

Optional: `pip install exllamav3`, with an NVIDIA GPU, and nvcc for the package's first import. What
it has no public name for stands here alone: `quantize_exl3` with the dictionaries that its own
conversion fills, and the files of its calibration text. Tried with 1.6.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch

MULTIPLE = 128
"""Rows and columns must be multiples of it: the size of its Hadamard transforms."""

TEXTS = ("wiki", "c4", "code", "technical", "multilingual", "tiny")
"""Files of its calibration text."""


@dataclass(slots=True)
class Inputs:
    """What the linear layers with one common input saw on the calibration text.

    Attributes:
        products: sum of x x^T over all inputs, float32 [cols, cols]. EXL3 takes it over for good.
        count: how many inputs.
        shared: EXL3's own dictionary of them, from the first matrix on.
    """

    products: torch.Tensor
    count: int = 0
    shared: dict[str, Any] = field(default_factory=dict)


Quantizer = Callable[
    [torch.Tensor, Inputs, float, int, torch.Tensor | None], tuple[torch.Tensor, int]
]
"""Matrix, its inputs, bits per weight, number of the block, and how sensitive the model is to each
row (float32 [rows], or None) -> the de-quantized matrix, float32 [rows, cols], and its stored bits.
"""


def quantize(
    matrix: torch.Tensor,
    inputs: Inputs,
    rate: float,
    number: int,
    sensitivity: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Quantizes one matrix with the settings that EXL3's conversion has by default.

    Args:
        matrix: float32 [rows, cols] on a GPU.
        inputs: of the layer, on the same GPU.
        rate: bits per weight: 1 to 8, or 1.5, 2.5, 3.5.
        number: of the block, the seed of its signs.
        sensitivity: see `Quantizer`; for gate and up projections.

    Raises:
        ValueError: rows or columns are no multiples of 128.
        ImportError: the package is not there.
    """
    if any(size % MULTIPLE for size in matrix.shape):
        raise ValueError(
            f"EXL3 takes multiples of {MULTIPLE}: got {tuple(matrix.shape)} in block {number}"
        )
    from exllamav3.modules.quant.exl3_lib.quantize import quantize_exl3

    if not inputs.shared:
        inputs.shared |= {
            "H": inputs.products,
            "count": inputs.count,
            "num_total": inputs.count,
            "finalized": False,
            "device": matrix.device,
            "first_key": f"block {number}",
            "inf_nan": torch.zeros(2, dtype=torch.long, device=matrix.device),
        }
    settings: dict[str, Any] = {
        "seed": number,
        "K": int(rate) if float(rate).is_integer() else rate,
        "devices": [matrix.device.index or 0],
        "device_ratios": None,
        "apply_out_scales": None,
        "mul1": True,
    }
    if sensitivity is not None:
        settings["out_sensitivity"] = sensitivity
    # Its matrices are [in, out]; it works in the memory that it is given.
    transposed = matrix.T.contiguous().float().clone()
    found, _, stored = quantize_exl3(transposed, inputs.shared, settings, True)
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in stored.values())
    return found.T.contiguous(), bits


def texts() -> list[str]:
    """Returns the texts that EXL3 calibrates on.

    Raises:
        ImportError: the package is not there.
    """
    folder = files("exllamav3") / "conversion" / "standard_cal_data"
    return [(folder / f"{name}.utf8").read_text(encoding="utf-8") for name in TEXTS]
