"""Lets transformers' experts multiply by the kernel that reads the chosen experts' codes alone.

What the router chose is never read back, so that the host runs ahead and a CUDA graph can record a
token. Elsewhere, and where gradients are wanted, experts run in transformers' loop.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from codecllm.loader.device.codecs import why_no_kernels
from codecllm.loader.device.streams import is_accelerator
from codecllm.loader.experts.code_stack import ExpertStack, joined_codes
from codecllm.loader.experts.plane_stack import joined_planes
from codecllm.loader.hf import experts as hf
from codecllm.loader.resident.cell import Cell
from codecllm.loader.resident.coded_weight import CodedWeight

_EXPERT = re.compile(r"\.experts\.\d+\.")
_DTYPES = (torch.bfloat16, torch.float16)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device."""
    return is_accelerator(device) and why_no_kernels(device) is None


def will_be_joined(name: str, device: torch.device) -> bool:
    """Whether a tensor looks like a matrix of one expert, and the kernel runs on its device.

    If so its codes are left as they are until `join_experts`; a wrong guess costs time alone.
    """
    return _EXPERT.search(name) is not None and runs_on(device)


def join_experts(module: nn.Module) -> list[str]:
    """Gives a layer's experts codes in one tensor each, if the kernel can multiply with them.

    Args:
        module: the experts of a layer, whose weights are coded stacks.

    Returns:
        The container's names of the tensors whose forms are no longer used.
    """
    cells = _cells(module)
    if cells is None or not all(cell.dtype in _DTYPES and runs_on(cell.device) for cell in cells):
        return []
    stacks = [joined_codes(cell.form) or joined_planes(cell.form) for cell in cells]
    whole = [stack for stack in stacks if stack is not None]
    if len(whole) < len(cells):
        return []
    for cell, stack in zip(cells, whole, strict=True):
        cell.form = stack
    return [name for stack in whole for expert in stack.names for name in expert]


def use_kernel(model: Any) -> None:
    """Lets a model's experts run by the kernel where they can, and in the loop where not."""
    hf.use_function(model, experts_forward)


def experts_forward(
    module: Any, inputs: torch.Tensor, numbers: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Returns the weighted sums of the products of each token's experts.

    Args:
        module: the experts of a layer.
        inputs: float [tokens, hidden].
        numbers: integers [tokens, chosen], the experts of each token.
        shares: float [tokens, chosen], the weights of the sums.

    Returns:
        [tokens, hidden], dtype of the inputs.
    """
    stacks = _stacks(module, inputs, shares)
    if stacks is None:
        return hf.loop(module, inputs, numbers, shares)
    from codecllm.loader.kernels.int8_experts import experts_mlp

    gate_up, down = stacks
    return experts_mlp(inputs, numbers, shares, gate_up.matrix, down.matrix, module._apply_gate)


def _stacks(
    module: Any, inputs: torch.Tensor, shares: torch.Tensor
) -> tuple[ExpertStack, ExpertStack] | None:
    """Returns the weights of a layer if the kernel can take this call."""
    if torch.is_grad_enabled() and (inputs.requires_grad or shares.requires_grad):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    cells = _cells(module)
    if cells is None or inputs.dtype not in _DTYPES:
        return None
    forms = []
    for cell in cells:
        if cell.dtype != inputs.dtype or not isinstance(cell.form, ExpertStack):
            return None
        if cell.form.matrix.scale.device != inputs.device:
            return None
        forms.append(cell.form)
    return forms[0], forms[1]


def _cells(module: Any) -> list[Cell] | None:
    weights = hf.weights_of(module)
    if weights is None:
        return None
    coded = [weight for weight in weights if isinstance(weight, CodedWeight)]
    return [weight._cell for weight in coded] if len(coded) == len(weights) else None
