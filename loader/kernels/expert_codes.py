"""What the kernel of experts multiplies with; without Triton, so that any machine reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """Matrices of all experts.

    Attributes:
        codes: int8 [experts, rows, cols]; an expert's are contiguous.
        scale: float32 [experts, rows], an expert's contiguous.
        col_scale: float32 [experts, parts, cols], or None: as many parts of equal rows as there are
            matrices, one behind the other, in an expert's codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    col_scale: torch.Tensor | None = None
