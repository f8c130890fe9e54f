"""Quantizes a model block by block: each sees the inputs that the quantized blocks before it give.

The order of EXL3's conversion. Models are those whose blocks look like Llama's (`model.layers`,
gated MLP), as Qwen2's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.others.exl3 import Inputs

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers of a block; those in one group have the same inputs."""

BATCH = 8
"""Sequences that run together."""

Quantize = Callable[[torch.Tensor, Inputs, int, torch.Tensor | None], tuple[torch.Tensor, int]]
"""`benchmarks.others.exl3.Quantizer` at one rate."""


class _EnteredError(Exception):
    """The first block has been entered: the rest of the model need not run."""


@torch.no_grad()
def quantized_layers(
    model: Any, ids: torch.Tensor, quantize: Quantize
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Quantizes the linear layers of a model in place, first block first.

    Args:
        model: causal language model in float32, in evaluation mode.
        ids: calibration text on the model's device, int64 [sequences, tokens].
        quantize: quantizes one matrix.

    Yields:
        Name of the weight, the new matrix (float32 [rows, cols] on the CPU) and its stored bits.
    """
    states, options = _entering(model, ids)
    for number, layer in enumerate(model.model.layers):
        inputs, sensitivity = _seen(layer, states, options)
        for group in GROUPS:
            for name in group:
                weight = layer.get_submodule(name).weight
                matrix, bits = quantize(
                    weight.float(), inputs[group[0]], number, sensitivity.get(name)
                )
                weight.copy_(matrix)
                yield f"model.layers.{number}.{name}.weight", matrix.cpu(), bits
        states = _run(layer, states, options)


def _entering(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Returns what the first block is given, per batch: its input and its other arguments."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ValueError(f"blocks of one kind were expected, got {sorted(kinds)}")
    states: list[torch.Tensor] = []
    options: list[dict[str, Any]] = []

    def catch(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        rest = dict(named)
        states.append(positional[0] if positional else rest.pop("hidden_states"))
        options.append(rest)
        raise _EnteredError

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in ids.split(BATCH):
            try:
                model(input_ids=batch, use_cache=False)
            except _EnteredError:
                continue
    finally:
        hook.remove()
    return states, options


def _run(
    layer: Any, states: list[torch.Tensor], options: list[dict[str, Any]]
) -> list[torch.Tensor]:
    outputs = [layer(state, **named) for state, named in zip(states, options, strict=True)]
    # Older transformers return a tuple.
    return [out[0] if isinstance(out, tuple) else out for out in outputs]


def _seen(
    layer: Any, states: list[torch.Tensor], options: list[dict[str, Any]]
) -> tuple[dict[str, Inputs], dict[str, torch.Tensor]]:
    """Runs a block; returns inputs by the first of each group, and sensitivities of rows."""
    hooks, inputs = [], {}
    for group in GROUPS:
        module = layer.get_submodule(group[0])
        size = module.in_features
        seen = Inputs(torch.zeros(size, size, device=module.weight.device))
        inputs[group[0]] = seen
        hooks.append(module.register_forward_pre_hook(_adder(seen)))
    slopes = _Slopes(layer)
    hooks += slopes.hooks()
    try:
        _run(layer, states, options)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, slopes.sensitivity()


def _adder(seen: Inputs) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def add(_: Any, positional: tuple[torch.Tensor, ...]) -> None:
        rows = positional[0].reshape(-1, positional[0].shape[-1]).float()
        seen.products.addmm_(rows.T, rows)
        seen.count += len(rows)

    return add


class _Slopes:
    """How an MLP's output answers to errors of its gate and up projections, per channel.

    EXL3 decides by it whether their rows get scales: mean squared slope of silu(gate) * up times
    the energy of the channel's column in the down projection.
    """

    def __init__(self, layer: Any) -> None:
        self._mlp = layer.mlp
        self._gate = torch.empty(0)
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = 0

    def hooks(self) -> list[Any]:
        """Returns the hooks, in place; none where the activation is another."""
        if (
            not isinstance(self._mlp.act_fn, torch.nn.SiLU)
            and "SiLU" not in type(self._mlp.act_fn).__name__
        ):
            return []
        return [
            self._mlp.gate_proj.register_forward_hook(self._keep),
            self._mlp.up_proj.register_forward_hook(self._add),
        ]

    def sensitivity(self) -> dict[str, torch.Tensor]:
        """Returns float32 [rows] on the CPU, by the projection's name in the block."""
        energy = self._mlp.down_proj.weight.double().square().sum(0)
        return {
            name: (total / max(1, self._rows) * energy).float().cpu()
            for name, total in self._sums.items()
        }

    def _keep(self, _: Any, __: Any, out: torch.Tensor) -> None:
        self._gate = out.reshape(-1, out.shape[-1]).float()

    def _add(self, _: Any, __: Any, out: torch.Tensor) -> None:
        gate, up = self._gate, out.reshape(-1, out.shape[-1]).float()
        part = gate.sigmoid()
        slopes = {"mlp.up_proj": gate * part, "mlp.gate_proj": part * (1 + gate - gate * part) * up}
        for name, slope in slopes.items():
            total = slope.double().square().sum(0)
            self._sums[name] = total + self._sums[name] if name in self._sums else total
        self._rows += len(gate)
