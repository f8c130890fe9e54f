"""Squared gradients of a model's weights, summed over rows and over columns.

A weight with large squared gradients is one whose error changes the output much.

The curvature of the KL divergence that errors cause is the mean square of the weights' gradients,
where the gradient at the logits has mean 0 and covariance diag(p) - p p^T, p being the model's own
predictions. Random signs z give such a one: sqrt(p) z - p <sqrt(p), z>. Of a model without logits
the last hidden state is projected on random signs: the same for its mean squared error.

A linear layer's or embedding's gradient is a sum over tokens of products of an input x[t] and the
gradient g[t] of an output. Squares are summed token by token, which needs no gradient of the weight
at all:

    rows[r] = sum over t of g[t, r]^2 |x[t]|^2        cols[c] = sum over t of x[t, c]^2 |g[t]|^2

This leaves out the products of gradients of two different tokens; these are mostly noise, and the
rest is known from a fraction of the text (docs/bits.md). Of all other parameters the gradient of
some sequences is squared; it exists for a moment only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a parameter -> sums of its squared gradients.

The first sums go over the last dimension, the others over all other dimensions but experts.
"""

_TOGETHER = 4
"""Sequences that run at once."""


def squared_gradients(
    model: Any, tokens: torch.Tensor, on_sequence: Callable[[int, int], None] | None = None
) -> Sums:
    """Runs a model forward and back over all sequences.

    Args:
        model: any transformers model in eval mode; its parameters need no gradients afterwards.
        tokens: int64 [sequences, length].
        on_sequence: called with the sequences done and all of them.

    Returns:
        For each parameter of rank 2 or more that gradients reach, in float32, where it lies: rows,
        of its shape without the last dimension; and columns, of its shape without the last but one.
    """
    sums: Sums = {}
    for parameter in model.parameters():
        # Gradients of outputs are enough; those of all weights would take as much memory again.
        parameter.requires_grad_(False)
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if _wanted(parameter)
    }
    layers = _layers_in_use(model, tokens[:1], parameters)
    hooks: list[Any] = [
        layer.register_forward_hook(_token_collector(name, sums)) for layer, name in layers
    ]
    others = parameters.keys() - {name for _, name in layers}
    for name in others:
        parameters[name].requires_grad_(True)
        hooks.append(
            parameters[name].register_post_accumulate_grad_hook(_whole_collector(name, sums))
        )
    # The same signs at every run, so that a conversion can be repeated.
    generator = torch.Generator().manual_seed(1)
    try:
        for first in range(0, len(tokens), _TOGETHER):
            ids = tokens[first : first + _TOGETHER].to(model.device)
            with torch.enable_grad():
                torch.autograd.backward(_projected(run(model, ids), generator))
            if on_sequence is not None:
                on_sequence(min(first + _TOGETHER, len(tokens)), len(tokens))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    return sums


def _wanted(parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and parameter.is_floating_point()


def _layers_in_use(
    model: Any, ids: torch.Tensor, parameters: dict[str, torch.Tensor]
) -> list[tuple[nn.Module, str]]:
    """Returns linear layers and embeddings that alone use their weights, with the weight's name.

    Some models multiply with a layer's weight themselves, tie it to a module of another kind, or
    call the layer for some tokens only. Gradients of such weights are squared.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    holders: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                holders.setdefault(names[id(parameter)], []).append(module)
    plain = {
        name: modules
        for name, modules in holders.items()
        if all(type(one) in (nn.Linear, nn.Embedding) for one in modules)
    }
    called_layers: set[nn.Module] = set()
    hooks = [
        one.register_forward_hook(lambda layer, *_: called_layers.add(layer))
        for modules in plain.values()
        for one in modules
    ]
    try:
        with torch.no_grad():
            run(model, ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (one, name)
        for name, modules in plain.items()
        if called_layers.issuperset(modules)
        for one in modules
    ]


def _token_collector(
    name: str, sums: Sums
) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def watch(
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: torch.Tensor,
    ) -> torch.Tensor:
        # The first layer: nothing before it needs a gradient, but its output does.
        if not output.requires_grad:
            output = output.detach().requires_grad_(True).clone()
        layer_input = inputs[0].detach()

        def collect(gradient: torch.Tensor) -> None:
            squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
            if isinstance(layer, nn.Embedding):
                rows = torch.zeros(len(layer.weight), device=squares.device).index_add_(
                    0, layer_input.reshape(-1), squares.sum(1)
                )
                _add(sums, name, rows, squares.sum(0))
            else:
                entering = layer_input.reshape(-1, layer_input.shape[-1]).float().square()
                _add(sums, name, entering.sum(1) @ squares, squares.sum(1) @ entering)

        output.register_hook(collect)
        return output

    return watch


def _whole_collector(name: str, sums: Sums) -> Callable[[torch.Tensor], None]:
    def collect(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        # The gradient is dropped at once: it is as large as the weight.
        squares = parameter.grad.detach().float().square_()
        parameter.grad = None
        _add(sums, name, squares.sum(-1), squares.sum(-2))

    return collect


def _add(
    sums: Sums,
    name: str,
    rows: torch.Tensor,
    cols: torch.Tensor,
) -> None:
    if name in sums:
        rows, cols = rows + sums[name][0], cols + sums[name][1]
    sums[name] = rows, cols


def run(
    model: Any,
    ids: torch.Tensor,
    **options: Any,
) -> Any:
    """Returns the output of a model for int64 [sequences, length] tokens, and more arguments."""
    arguments = {"input_ids": ids, **options}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    return model(**arguments)


def _projected(output: Any, generator: torch.Generator) -> torch.Tensor:
    """Returns a scalar whose squared gradient has the curvature of the KL divergence as mean."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim < 2:
        hidden = output.last_hidden_state.float()
        signed_sum: torch.Tensor = (hidden * _signs(hidden, generator)).sum()
        return signed_sum
    flat = logits.reshape(-1, logits.shape[-1]).float()
    chances = torch.softmax(flat.detach(), -1)
    gradient = chances.sqrt() * _signs(flat, generator)
    # Adding a constant to all logits changes no prediction: the mean of the gradient is 0.
    gradient -= chances * gradient.sum(-1, keepdim=True)
    projection: torch.Tensor = (flat * gradient).sum()
    return projection


def _signs(
    values: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Returns random signs of the shape of `values`, the same on every device."""
    # They are drawn on the CPU: each device has random numbers of its own.
    bits = torch.randint(2, values.shape, generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(values.device)
