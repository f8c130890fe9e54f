"""From a model's parameters to the tensors of its source.

transformers may fuse, rename or tie parameters that the files hold as separate tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from codecllm.calibrator.gradients import Sums
from codecllm.converter.rate.allocation import Sensitivity
from codecllm.loader.hf.hooks import as_saved, tied_parameters

_LAYER = re.compile(r"^(.*?\.\d+)\.")


def by_source(model: Any, sums: Sums, known: set[str]) -> dict[str, Sensitivity]:
    """Translates sums of parameters into sensitivities of the source's tensors.

    The sums of a parameter are spread over it as rows x columns / total, and transformers turns
    that back into the tensors of a checkpoint, layer by layer.

    Args:
        model: the model.
        sums: of its parameters.
        known: names of the source's tensors.

    Returns:
        Sensitivities by names out of `known`.
    """
    sensitivities: dict[str, Sensitivity] = {}
    for group in _layers(sums):
        spread = {name: _spread(*sums[name]) for name in group}
        # Fused tensors can be taken apart only with all parameters of their layer.
        for name, values in as_saved(model, spread).items():
            target = known_name(name, known)
            if target is not None and values.ndim >= 2:
                matrix = values.reshape(-1, values.shape[-1]).double()
                sensitivities[target] = Sensitivity(_array(matrix.sum(0)), _array(matrix.sum(1)))
    for name, other in tied_parameters(model).items():
        # A checkpoint holds a tied tensor under one of its names.
        copies = known_name(name, known), known_name(other, known)
        for copy, original in (copies, copies[::-1]):
            if copy is not None and original in sensitivities:
                sensitivities.setdefault(copy, sensitivities[original])
    return sensitivities


def _layers(sums: Sums) -> Iterator[list[str]]:
    """Groups names by their layer: fused tensors come from one layer."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sums:
        match = _LAYER.match(name)
        groups[match[1] if match else name].append(name)
    yield from groups.values()


def _spread(rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    # The bound keeps a tensor without gradients at 0 in place of NaN.
    total = rows.sum(-1, keepdim=True).clamp_min(1e-37)
    return rows[..., None] * (cols / total)[..., None, :]


def known_name(name: str, known: set[str]) -> str | None:
    """Returns the source's name of a tensor: the same, or the only one that differs by a prefix."""
    if name in known:
        return name
    alike = [other for other in known if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return alike[0] if len(alike) == 1 else None


def _array(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return values.cpu().numpy().astype(np.float32)
