"""Modules of transformers that hold the experts of a layer as one weight with three dimensions."""

from __future__ import annotations

from typing import Any

from torch import nn


def loops_over_experts(module: nn.Module) -> bool:
    """Whether a module can take the weight of one expert after the other.

    That is the loop that transformers calls `eager`: it multiplies with `weight[expert]`, for
    experts that have tokens alone. transformers marks the classes that have it and others; those
    with transposed weights multiply in other ways.
    """
    return hasattr(module, "has_gate") and getattr(module, "is_transposed", None) is False


def use_loop(model: Any) -> None:
    """Lets a model's experts run in that loop: other ways read the weights of all experts."""
    model.set_experts_implementation("eager")
