"""Mean squared inputs of linear layers, from one forward pass.

They take the place of gradients where a model is too large to train in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from codecllm.calibrator.names import known_name
from codecllm.converter.rate.allocation import Sensitivity


def mean_squared_inputs(
    model: Any, tokens: torch.Tensor, known: set[str]
) -> dict[str, Sensitivity]:
    """Runs a model once, its layers one after another wherever they lie.

    Args:
        model: any transformers model; blocks may be offloaded to disk.
        tokens: int64 [sequences, length].
        known: names of the source's tensors.

    Returns:
        For the weight of each nn.Linear of the source the mean square of each input; no sums of
        rows.
    """
    by_target: dict[str, Sensitivity] = {}
    hooks = []
    for name, module in model.named_modules():
        target = known_name(f"{name}.weight", known) if isinstance(module, nn.Linear) else None
        if target is not None:
            hooks.append(module.register_forward_pre_hook(_watcher(target, by_target)))
    arguments = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens
    try:
        with torch.inference_mode():
            model(**arguments)
    finally:
        # A hook that stayed would keep the statistics alive with the model.
        for hook in hooks:
            hook.remove()
    return by_target


def _watcher(
    target: str, by_target: dict[str, Sensitivity]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach()
        squares = values.reshape(-1, values.shape[-1]).float().square().mean(0).cpu()
        mean_squares = np.asarray(squares.numpy(), np.float32)
        # A layer that is called several times gets the sum of its means.
        before = by_target.get(target)
        by_target[target] = Sensitivity(
            mean_squares if before is None else before.cols + mean_squares
        )

    return watch
