"""Mean squared gradients of a model's parameters, summed over rows and over columns: its Fisher information, in short.

A language model's labels are drawn from its own predictions, so the mean squared gradient of their likelihood is the curvature
of the KL divergence that quantization causes. Of another model the last hidden state is projected on random signs: the same
for its mean squared error. Gradients of different tokens are independent in sign, so the square of a sequence's gradient has
the mean that single tokens would give. A parameter's gradient exists for a moment only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a parameter -> sums over its last dimension (its shape without that) and over all others but experts'."""


def squared_gradients(model: Any, tokens: torch.Tensor, on_sequence: Callable[[int, int], None] | None = None) -> Sums:
    """Runs a model forward and back over each sequence.

    Args:
        model: any transformers model in eval mode; its parameters need no gradients afterwards.
        tokens: int64 [sequences, length].
        on_sequence: called with the sequences done and all of them.

    Returns:
        For each parameter of rank 2 or more that gradients reach, in float32 on the CPU: rows, of its shape without the last
        dimension; and columns, of its shape without the last but one.
    """
    sums: Sums = {}
    watched = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim >= 2 and parameter.is_floating_point())
    hooks = [
        parameter.register_post_accumulate_grad_hook(_collector(name, sums))
        for name, parameter in watched.items()
        if parameter.requires_grad
    ]
    generator = torch.Generator().manual_seed(1)
    try:
        for number, sequence in enumerate(tokens):
            with torch.enable_grad():
                loss = _loss(model, sequence[None].to(model.device), generator)
                torch.autograd.backward(loss)
            if on_sequence is not None:
                on_sequence(number + 1, len(tokens))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    return sums


def _collector(name: str, sums: Sums) -> Callable[[torch.Tensor], None]:
    def collect(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        squares = parameter.grad.detach().float().square_()
        parameter.grad = None
        rows, cols = squares.sum(-1).cpu(), squares.sum(-2).cpu()
        if name in sums:
            rows, cols = rows + sums[name][0], cols + sums[name][1]
        sums[name] = rows, cols

    return collect


def _loss(model: Any, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns a scalar whose squared gradient has the mean that is wanted; ids: int64 [1, length]."""
    arguments = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    output = model(**arguments)
    logits = getattr(output, "logits", None)
    if logits is not None and logits.ndim >= 2:
        flat = logits.reshape(-1, logits.shape[-1]).float()
        chances = torch.softmax(flat.detach().cpu(), -1)
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(flat.device)
        likelihood: torch.Tensor = torch.nn.functional.cross_entropy(flat, labels, reduction="sum")
        return likelihood
    hidden = output.last_hidden_state.float()
    signs = 2.0 * torch.randint(2, hidden.shape, generator=generator) - 1
    projected: torch.Tensor = (hidden * signs.to(hidden.device)).sum()
    return projected
