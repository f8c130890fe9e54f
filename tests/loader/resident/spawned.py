"""Runs in a process of its own, started without any of its parent's memory."""

from __future__ import annotations

from typing import Any

import torch


def answer(layers: dict[str, torch.nn.Linear], inputs: torch.Tensor, results: Any) -> None:
    """Puts the output of each layer into a queue, with class and sharing of its weight."""
    results.put(
        {
            name: (layer(inputs).numpy(), type(layer.weight).__name__, layer.weight.is_shared())
            for name, layer in layers.items()
        }
    )
