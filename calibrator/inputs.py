"""Sums of products of the inputs of linear layers, for error feedback: one pass forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from codecllm.calibrator.gradients import run
from codecllm.calibrator.names import known_name
from codecllm.converter.rate.products import InputProducts, Sums

_TOGETHER = 4
"""Sequences that run at once."""

_PARTS = 6
"""Parts of a sum's columns: only products on and below the diagonal's blocks are added up."""


def input_products(
    model: Any,
    tokens: torch.Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Collection[str],
    on_sequence: Callable[[int, int], None] | None = None,
    sums: Sums | None = None,
) -> Sums:
    """Runs a model forward over all sequences.

    Args:
        model: any transformers model in eval mode.
        tokens: int64 [sequences, length].
        shapes: of all tensors of the source, by name.
        wanted: names of the weights whose inputs are added up.
        on_sequence: called with the sequences done and all of them, over all runs.
        sums: receives the sums, empty, on the device of the model; None keeps them in a temporary
            file. Where they have not all room at once, the model runs several times.

    Returns:
        Sums for the weights of plain nn.Linear layers that the source has under their own names and
        in their shapes, that no other module uses, and whose inputs were finite.

    Raises:
        OSError: the disk that holds temporary files is full.
    """
    sums = InputProducts() if sums is None else sums
    layers = {name: layer for name, layer in _layers(model, shapes).items() if name in wanted}
    parts = _parts(layers, sums.room)
    done, total = 0, len(parts) * len(tokens)
    for part in parts:
        watch = _Watch(sums)
        hooks = [layer.register_forward_pre_hook(watch.hook(name)) for name, layer in part.items()]
        options = _without_logits(model, part.values())
        try:
            with torch.inference_mode():
                for ids in tokens.split(_TOGETHER):
                    run(model, ids.to(model.device), **options)
                    watch.forget()
                    done += len(ids)
                    if on_sequence is not None:
                        on_sequence(done, total)
        finally:
            for hook in hooks:
                hook.remove()
        watch.finish()
        sums.settle()
    return sums


def _parts(layers: dict[str, nn.Linear], room: int | None) -> list[dict[str, nn.Linear]]:
    """Returns the layers in parts whose sums have room at the same time, even if none is shared."""
    if room is None:
        return [layers]
    parts: list[dict[str, nn.Linear]] = [{}]
    used_bytes = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2
        if parts[-1] and used_bytes + size > room:
            parts.append({})
            used_bytes = 0
        parts[-1][name] = layer
        used_bytes += size
    return parts


def _layers(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Linear]:
    """Returns the layers to watch by the source's names of their weights."""
    # A weight that another module uses too has inputs that no hook here sees.
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    source_names = set(shapes)
    layers: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and uses[id(module.weight)] == 1:
            target = known_name(f"{name}.weight", source_names)
            if target is not None and tuple(shapes[target]) == tuple(module.weight.shape):
                layers[target] = module
    return layers


def _without_logits(model: Any, layers: Iterable[nn.Module]) -> dict[str, int]:
    """Returns arguments with which a model need not compute logits, if nothing sees its head."""
    if "logits_to_keep" not in signature(model.forward).parameters:
        return {}
    head = model.get_output_embeddings()
    return {} if any(layer is head for layer in layers) else {"logits_to_keep": 1}


def _blocks(cols: int) -> list[slice]:
    step = -(-cols // _PARTS)
    starts = range(0, cols, step)
    return [slice(start, min(start + step, cols)) for start in starts]


class _Watch:
    """Adds up products of the inputs of layers.

    A layer shares the sum of the layer that was called before it if both have the same tensor as
    input. That must hold in every call: a layer for which it does not is dropped.
    """

    def __init__(self, sums: Sums) -> None:
        self._products = sums
        self._calls: Counter[int] = Counter()
        self._followed: Counter[str] = Counter()
        self._follows: dict[str, bool] = {}
        self._last: torch.Tensor | None = None
        self._last_number = -1

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Returns the hook that sees the inputs of a layer."""
        return lambda layer, inputs: self._see(name, inputs[0])

    def forget(self) -> None:
        """Ends a pass: no tensor of the next one is one of this."""
        self._last = None

    def finish(self) -> None:
        """Completes the sums of the layers that were seen, and drops those of no use."""
        products = self._products
        for name in self._follows:
            number = products.number(name)
            total = torch.as_tensor(products.matrix(number))
            for block in _blocks(len(total)):
                below = total[block.stop :, block]
                total[block, block.stop :] = below.T
            diagonal = total.diagonal()
            # Infinite inputs make useless sums, and inputs of zeros a singular matrix.
            usable = bool(diagonal.isfinite().all() and diagonal.any())
            if self._follows[name] and self._followed[name] != self._calls[number]:
                usable = False
            if not usable:
                products.drop(name)

    def _see(self, name: str, values: torch.Tensor) -> None:
        # Layers such as query, key and value share one input: one sum serves all of them.
        same = self._last is not None and values is self._last
        if name not in self._follows:
            self._follows[name] = same
            self._products.assign(
                name, self._last_number if same else self._products.new(values.shape[-1])
            )
        number = self._products.number(name)
        if self._follows[name]:
            self._followed[name] += 1 if same and number == self._last_number else 0
            return
        self._calls[number] += 1
        self._add(number, values.detach().reshape(-1, values.shape[-1]).float())
        self._last = values
        self._last_number = number

    def _add(self, number: int, inputs: torch.Tensor) -> None:
        total = torch.as_tensor(self._products.matrix(number))
        for block in _blocks(len(total)):
            part = total[block.start :, block]
            left = inputs[:, block.start :].T
            part.addmm_(left, inputs[:, block])
        self._products.count(number, len(inputs))
