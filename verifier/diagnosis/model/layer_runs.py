"""Runs of a model on a prompt, with the outputs of its layers and modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from codecllm.verifier.baseline.inference import repeatable_inference
from codecllm.verifier.baseline.model_output import forced_logits, generates

INPUT = " (input)"
"""Ends the name under which a run keeps what a module is given, beside what it gives."""

# Enough for attention to matter; outputs of all layers stay in memory three times.
PROMPT_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Run:
    """Outputs of one run.

    Attributes:
        outputs: module name -> its first output, float32 on the CPU, in the order in which the
            modules finished.
        logits: float32 [positions, ...]: the model's own first output.
    """

    outputs: dict[str, torch.Tensor]
    logits: torch.Tensor


def layer_names(model: Any) -> list[str]:
    """Returns the names of the model's layers.

    These are the entries of every outermost ModuleList, embeddings and output layer.
    """
    names = []
    lists = list[str]()
    # A ModuleList inside a layer (experts, say) is a part of that layer.
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append(name)
            names += [f"{name}.{index}" for index in range(len(module))]
    ends = (_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings"))
    names_by_id = {id(module): name for name, module in model.named_modules()}
    first, last = (
        [names_by_id[id(module)]] if module is not None and id(module) in names_by_id else []
        for module in ends
    )
    return [*first, *names, *[name for name in last if name not in first]]


def main_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """Returns name and list of the longest outermost ModuleList; None without one.

    Of two that are equally long it is the last.
    """
    best: tuple[str, nn.ModuleList] | None = None
    outermost = list[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in outermost
        ):
            outermost.append(name)
            if best is None or len(module) >= len(best[1]):
                best = (name, module)
    return best


def run_model(model: Any, tokens: list[int], names: list[str], *, cached: int = 0) -> Run:
    """Runs a prompt and keeps the outputs of some modules.

    Args:
        model: source, reference or loaded model.
        tokens: the prompt.
        names: of the modules whose outputs are kept; `name + INPUT` keeps the input of a module.
        cached: so many tokens at the end go in one at a time, as in generation; the outputs are
            those of all of them.
    """
    calls: dict[str, list[torch.Tensor]] = {}
    with _recording(model, names, calls, max(1, cached)), repeatable_inference(model):
        logits = forced_logits(model, tokens, cached) if cached else _forward(model, tokens)
    return Run({name: _joined(values) for name, values in calls.items()}, logits)


@contextmanager
def first_layers_of(source: Any, loaded: Any, count: int) -> Iterator[Any]:
    """Yields the source model with its first `count` layers taken from the loaded one.

    Its own layers are put back at the end.
    """
    ours = main_layers(source)
    theirs = main_layers(loaded)
    if ours is None or theirs is None:
        yield source
        return
    layers = ours[1]
    layers_before = list(layers)
    try:
        for index in range(min(count, len(layers))):
            layers[index] = theirs[1][index]
        yield source
    finally:
        # The caller goes on with its own model, also after an error.
        for index, layer in enumerate(layers_before):
            layers[index] = layer


def prompt_of(tokens: list[int], config: Any) -> list[int]:
    """Cuts a prompt to a length that any model takes."""
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or PROMPT_TOKENS)
    return tokens[: min(PROMPT_TOKENS, max(2, longest - 2))]


def _forward(model: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        start = (
            getattr(model.generation_config, "decoder_start_token_id", None)
            if generates(model)
            else None
        )
        # The same text for the decoder: only the computation counts, and not the sense.
        inputs["decoder_input_ids"] = torch.cat(
            [torch.tensor([[start or 0]], device=model.device), ids[:, :15]], 1
        )
    output = model(**inputs)
    logits = (
        output.logits
        if getattr(output, "logits", None) is not None
        else next(iter(output.values()))
    )
    result: torch.Tensor = logits.detach()[0].to("cpu", torch.float32)
    return result


@contextmanager
def _recording(
    model: Any, names: list[str], calls: dict[str, list[torch.Tensor]], count: int
) -> Iterator[None]:
    """Keeps first outputs, or inputs, of the last `count` calls of each named module.

    They are in the order of the last calls.
    """
    handles = []

    def keep(name: str, value: Any) -> None:
        # Modules return tensors, tuples or objects; the first value is the hidden state.
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            before = calls.pop(name, [])
            calls[name] = [*before, first.detach().to("cpu", torch.float32)][-count:]

    present = dict(model.named_modules())
    try:
        for name in names:
            module = present.get(name.removesuffix(INPUT))
            if module is None:
                continue
            if name.endswith(INPUT):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, inputs, name=name: keep(name, inputs)
                    )
                )
            else:
                handles.append(
                    module.register_forward_hook(
                        lambda _, inputs, output, name=name: keep(name, output)
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """Joins the outputs of several calls along the positions.

    Where they differ in shape, only the last one is returned.
    """
    alike = len({value.shape for value in values}) == 1 and values[0].ndim > 1
    return torch.cat(values, -2) if alike and len(values) > 1 else values[-1]


def _end(model: Any, getter: str) -> nn.Module | None:
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None
