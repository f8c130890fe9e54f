"""Modules of transformers that hold the experts of a layer as one weight with three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "codecllm"
"""Of our function among transformers' ways to run experts."""


def loops_over_experts(module: nn.Module) -> bool:
    """Whether a module can take the weight of one expert after the other.

    That is the loop that transformers calls `eager`: it multiplies with `weight[expert]`, for
    experts that have tokens alone. transformers marks the classes that have it and others; those
    with transposed weights multiply in other ways.
    """
    return hasattr(module, "has_gate") and getattr(module, "is_transposed", None) is False


def weights_of(module: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the two weights of experts that are a gate, up and down, and nothing else.

    The first is [experts, 2 * inner, hidden], the second [experts, hidden, inner]. None: experts
    without a gate, with a bias or a norm, or spread over processes.
    """
    others = ("has_bias", "has_post_expert_norm", "_is_expert_parallel")
    if not loops_over_experts(module) or not module.has_gate:
        return None
    if any(getattr(module, name, False) for name in others) or not hasattr(module, "_apply_gate"):
        return None
    weights = (
        module._parameters.get("gate_up_proj"),
        module._parameters.get("down_proj"),
    )
    return None if weights[0] is None or weights[1] is None else weights


def use_loop(model: Any) -> None:
    """Lets a model's experts run in that loop: other ways read the weights of all experts."""
    model.set_experts_implementation("eager")


def use_function(model: Any, function: Callable[..., torch.Tensor]) -> None:
    """Lets a model's experts run by a function of module, inputs, numbers and shares."""
    ALL_EXPERTS_FUNCTIONS.register(_NAME, function)
    model.set_experts_implementation(_NAME)


def loop(
    module: Any, inputs: torch.Tensor, numbers: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Runs experts in the loop of their class."""
    result: torch.Tensor = type(module).forward.__wrapped__(module, inputs, numbers, shares)
    return result
