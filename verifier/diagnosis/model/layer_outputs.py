"""Stage 4: the same prompt through source, reference and loaded model; the first layer, module and channel that departs.

The reference is the model class with weights that the verifier quantized from the source itself. Whatever quantization costs,
reference and loaded model pay alike: a difference between these two is a fault, one between them and the source is precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from codecllm.formats.errors import ModelMismatchError, one_line
from codecllm.loader.resident.int8_matmul import PACKED_ROWS
from codecllm.verifier.baseline.model_output import forced_logits, generates
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.codes.rows import describe_order, head_size, is_attention
from codecllm.verifier.report import Stage

INPUT = " (input)"
"""Ends the name under which a run keeps what a module is given, beside what it gives."""

PROMPT_TOKENS = 48
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Largest relative difference between the same computation by two kernels; on one machine the bits are mostly the same."""

CACHED_TOKENS = 6
"""So many tokens at the end of the prompt are run again, one at a time from the cache of keys and values."""

FEW_ROWS_SLACK = 40.0
"""Of resident `int8` the kernel for few rows of inputs rounds in another order, and single channels with large values differ by
more than themselves: its tolerances are so many times as large, and hold for whole outputs, not for each channel."""

BISECT_POINTS = 16


@dataclass(frozen=True, slots=True)
class Run:
    """Outputs of one run.

    Attributes:
        outputs: module name -> its first output, float32 on the CPU, in the order in which the modules finished.
        logits: float32 [positions, ...]: the model's own first output.
    """

    outputs: dict[str, torch.Tensor]
    logits: torch.Tensor


def layer_names(model: Any) -> list[str]:
    """Returns the names of the model's layers: the entries of every outermost ModuleList, and embeddings and output layer."""
    names, lists = [], list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists.append(name)
            names += [f"{name}.{index}" for index in range(len(module))]
    ends = (_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings"))
    known = {id(module): name for name, module in model.named_modules()}
    first, last = (
        [known[id(module)]] if module is not None and id(module) in known else [] for module in ends
    )
    return [*first, *names, *[name for name in last if name not in first]]


def main_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """Returns name and list of the longest outermost ModuleList, the last one where two are equally long; None without one."""
    best: tuple[str, nn.ModuleList] | None = None
    seen = list[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in seen
        ):
            seen.append(name)
            if best is None or len(module) >= len(best[1]):
                best = (name, module)
    return best


def run_model(model: Any, tokens: list[int], names: list[str], *, cached: int = 0) -> Run:
    """Runs a prompt and keeps the outputs of some modules.

    Args:
        model: source, reference or loaded model.
        tokens: the prompt.
        names: of the modules whose outputs are kept; `name + INPUT` keeps what a module is given.
        cached: so many tokens at the end go in one at a time, as in generation; the outputs are those of all of them.
    """
    calls: dict[str, list[torch.Tensor]] = {}
    with _recording(model, names, calls, max(1, cached)), torch.inference_mode():
        logits = forced_logits(model, tokens, cached) if cached else _forward(model, tokens)
    return Run({name: _joined(values) for name, values in calls.items()}, logits)


def compare_layers(source: Run, reference: Run, loaded: Run) -> list[dict[str, Any]]:
    """Returns figures per layer, in the order of execution, as JSON values.

    `cosine` and `relative_error`: loaded against source, over all positions. `relative_error_of_reference`: what quantization
    alone costs. `off_reference`: loaded against reference, 0 where every bit is the same. `not_finite`: NaN and infinities.
    """
    rows = []
    for name in loaded.outputs:
        if name not in source.outputs or name not in reference.outputs:
            continue
        base, right, found = source.outputs[name], reference.outputs[name], loaded.outputs[name]
        rows.append(
            {
                "name": name,
                "cosine": cosine(base, found),
                "relative_error": relative_error(base, found),
                "relative_error_of_reference": relative_error(base, right),
                "off_reference": relative_error(right, found),
                "not_finite": int((~torch.isfinite(found)).sum()),
                "not_finite_in_source": int((~torch.isfinite(base)).sum()),
            }
        )
    return rows


def suspects(reference: Run, loaded: Run, dtype: torch.dtype) -> list[str]:
    """Returns the layers to look into: the first whose bits differ, and the first that differs by more than `TOLERANCES`.

    Residual connections dilute what a module does wrong, so the first difference of all is looked into, however small.
    """
    different = (
        name
        for name in loaded.outputs
        if _departs(reference.outputs.get(name), loaded.outputs[name], 0.0)
    )
    found = [next(different, None), first_departure(reference, loaded, dtype)]
    return list(dict.fromkeys(name for name in found if name is not None))


def slack_for(resident: str, tokens: int) -> float:
    """Returns how many times `TOLERANCES` are allowed where so many tokens pass a model at once."""
    return FEW_ROWS_SLACK if resident == "int8" and tokens <= PACKED_ROWS else 1.0


def first_departure(
    reference: Run, loaded: Run, dtype: torch.dtype, slack: float = 1.0
) -> str | None:
    """Returns the first module whose output in the loaded model is not the reference's, within `TOLERANCES`; None if none.

    With a `slack` of more than 1 these are so many times as large, and single channels are not looked at.
    """
    limit, each = slack * TOLERANCES.get(dtype, 1e-4), slack == 1.0
    return next(
        (
            name
            for name in loaded.outputs
            if _departs(reference.outputs.get(name), loaded.outputs[name], limit, each)
        ),
        None,
    )


def name_departure(
    reference: Any,
    loaded: Any,
    tokens: list[int],
    layer: str,
    explained: bool,
    slack: float,
    stage: Stage,
) -> dict[str, Any] | None:
    """Runs both models again, inside a layer that may depart, and names module and channel.

    Args:
        reference: the right model.
        loaded: the loaded one.
        tokens: the prompt.
        layer: name of the layer.
        explained: whether an earlier stage has found weights wrong: then the departure is their consequence.
        slack: how many times `TOLERANCES` are allowed.
        stage: receives the finding.

    Returns:
        Where it is, as JSON values; None where no module of the layer departs by more than `TOLERANCES`.
    """
    names = _inside(reference, layer)
    right, found = run_model(reference, tokens, names), run_model(loaded, tokens, names)
    key = first_departure(right, found, loaded.dtype, slack)
    if key is None:
        return None
    remark = "; an earlier stage names the weight behind it" if explained else ""
    return _blame(
        key, (right, found), layer, (Cause.COMPUTATION, remark), head_size(loaded.config), stage
    )


def name_cached_departure(
    reference: Any, loaded: Any, tokens: list[int], count: int, slack: float, stage: Stage
) -> dict[str, Any] | None:
    """Runs the last tokens one at a time through both models, which agree on the whole prompt; names module and channel.

    Args:
        reference: the right model; it generates.
        loaded: the loaded one.
        tokens: the prompt.
        count: how many of its tokens.
        slack: how many times `TOLERANCES` are allowed.
        stage: receives the finding.

    Returns:
        Where they first depart, as JSON values; None where they agree.
    """
    names = _inside(reference, "")
    right = run_model(reference, tokens, names, cached=count)
    try:
        found = run_model(loaded, tokens, names, cached=count)
    except Exception as exc:  # the reference can, so that this one must
        reason = one_line(exc)
        text = f"the loaded model runs a prompt and cannot go on from it ({type(exc).__name__}: {reason})"
        stage.fail(ModelMismatchError(text), cause=Cause.CACHE)
        return None
    key = first_departure(right, found, loaded.dtype, slack)
    if key is None:
        return None
    layer = next(
        (
            name
            for name in layer_names(reference)
            if f"{key}.".startswith(f"{name}.") or key == name + INPUT
        ),
        "",
    )
    remark = "; only where tokens come one at a time, from the cache of keys and values"
    return _blame(
        key, (right, found), layer, (Cause.CACHE, remark), head_size(loaded.config), stage
    )


def _inside(model: Any, layer: str) -> list[str]:
    """Returns the names under which a run keeps outputs and inputs of a layer (empty: the model) and all modules in it."""
    outer = model.get_submodule(layer) if layer else model
    names = [f"{layer}.{name}".strip(".") for name, _ in outer.named_modules()]
    return [key for name in names if name for key in (name, name + INPUT)]


def _blame(
    key: str,
    runs: tuple[Run, Run],
    layer: str,
    words: tuple[Cause, str],
    head: int | None,
    stage: Stage,
) -> dict[str, Any]:
    """Adds the finding for the first value that departs: a module's output, or its input, which its parent computed."""
    name, (cause, remark) = key.removesuffix(INPUT), words
    a, b = (run.outputs[key] for run in runs)
    channel, share, error = worst_channel(a, b)
    lost = int((~torch.isfinite(b)).sum()) - int((~torch.isfinite(a)).sum())
    what = (
        f"{lost} values are NaN or infinite, first"
        if lost > 0
        else f"{share:.1%} of the channels are off, worst"
    )
    where = f"in it {name!r}" if key == name else f"in it what {name!r} is given"
    text = f"first layer to depart is {layer!r}, {where}: {what} in channel {channel} (relative error {error:.3g})"
    if key != name and name != layer:
        name = name.rpartition(".")[0]
        text += f"; {name!r} computes that itself"
    order = _channel_order(a, b)
    if order is not None:
        cause = Cause.HEAD_ORDER if _has_attention(name) else Cause.ROW_ORDER
        text += f"; {describe_order(order, head)}".replace("row", "channel")
    stage.fail(ModelMismatchError(text + remark), cause=cause, channel=channel, module=name)
    return {
        "layer": layer,
        "module": name,
        "channel": channel,
        "channels_off": share,
        "relative_error": error,
    }


def bisect(
    source: Any, loaded: Any, tokens: list[int], measure: Callable[[torch.Tensor], float]
) -> list[dict[str, Any]]:
    """Returns, for growing N, what `measure` says of the logits of the source with its first N layers taken from `loaded`."""
    found = main_layers(source)
    if found is None:
        return []
    count = len(found[1])
    points = sorted({round(count * step / BISECT_POINTS) for step in range(BISECT_POINTS + 1)})
    rows = []
    for layers in points:
        with first_layers_of(source, loaded, layers):
            rows.append({"layers": layers, "value": measure(run_model(source, tokens, []).logits)})
    return rows


@contextmanager
def first_layers_of(source: Any, loaded: Any, count: int) -> Iterator[Any]:
    """Yields the source model with its first `count` layers taken from the loaded one, and puts its own back behind."""
    found, theirs = main_layers(source), main_layers(loaded)
    if found is None or theirs is None:
        yield source
        return
    layers, own = found[1], list(found[1])
    try:
        for index in range(min(count, len(layers))):
            layers[index] = theirs[1][index]
        yield source
    finally:
        for index, layer in enumerate(own):
            layers[index] = layer


def relative_error(right: torch.Tensor, found: torch.Tensor) -> float:
    """Returns |found - right| / |right| (Frobenius), infinite where one has NaN or infinities that the other has not."""
    if right.shape != found.shape:
        return float("inf")
    whole = torch.isfinite(right)
    if not torch.equal(whole, torch.isfinite(found)):
        return float("inf")
    a, b = right[whole].double(), found[whole].double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the cosine between two tensors, 0 where one is not finite."""
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return 0.0
    return float(
        torch.nn.functional.cosine_similarity(a.double().reshape(-1), b.double().reshape(-1), 0)
    )


def worst_channel(right: torch.Tensor, found: torch.Tensor) -> tuple[int, float, float]:
    """Returns, over the last dimension: the channel with the largest error, the share of channels off by 1 %, that error.

    A channel's error is relative to the root mean square channel, so that small channels do not stand out by themselves.
    """
    a, b = (value.double().reshape(-1, value.shape[-1]) for value in (right, found))
    if a.shape != b.shape:
        return 0, 1.0, float("inf")
    lost = (torch.isfinite(a) != torch.isfinite(b)).any(0)
    if lost.any():
        return int(lost.nonzero()[0]), float(lost.double().mean()), float("inf")
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    errors = (a - b).norm(dim=0) / a.norm(dim=0).square().mean().sqrt().clamp_min(1e-300)
    return int(errors.argmax()), float((errors > 0.01).double().mean()), float(errors.max())


def prompt_of(tokens: list[int], config: Any) -> list[int]:
    """Cuts a prompt to what any model takes."""
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
    """Keeps, of the last `count` calls of each named module, its first output or input; in the order of the last ones."""
    handles = []

    def keep(name: str, value: Any) -> None:
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
    """Puts the outputs of several calls beside each other; only the last one where they are not of one shape."""
    alike = len({value.shape for value in values}) == 1 and values[0].ndim > 1
    return torch.cat(values, -2) if alike and len(values) > 1 else values[-1]


def _departs(
    right: torch.Tensor | None, found: torch.Tensor, limit: float, each: bool = True
) -> bool:
    """Whether an output is off by more than `limit`, or, with `each`, one of its channels by more than ten times that."""
    if right is None:
        return False
    if right.shape != found.shape or not relative_error(right, found) <= limit:
        return True
    return each and worst_channel(right, found)[2] > 10 * limit


def _channel_order(
    right: torch.Tensor, found: torch.Tensor
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Returns which channel of `right` each one of `found` is, where they are the same ones in another order."""
    a, b = (value.reshape(-1, value.shape[-1]) for value in (right, found))
    if (
        a.shape != b.shape
        or not 1 < a.shape[1] <= 8192
        or not bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    ):
        return None
    order = torch.cdist(b.T.double(), a.T.double()).argmin(1)
    if len(set(order.tolist())) != len(order) or bool((order == torch.arange(len(order))).all()):
        return None
    return (
        order.numpy()
        if torch.allclose(a[:, order], b, rtol=1e-2, atol=1e-3 * float(a.abs().max()))
        else None
    )


def _has_attention(name: str) -> bool:

    return is_attention(name) or "attn" in name or "attention" in name


def _end(model: Any, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
