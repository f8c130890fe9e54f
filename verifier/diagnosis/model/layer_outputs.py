"""Stage 4: one prompt through source, reference and loaded model, compared layer by layer.

The reference is the model class with weights that the verifier quantized from the source itself.
Reference and loaded model have the same error of quantization: a difference between these two is a
fault, a difference between them and the source is precision. The stage names the first layer,
module and channel that departs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from codecllm.formats.errors import ModelMismatchError, one_line
from codecllm.loader.resident.int8_matmul import PACKED_ROWS
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.codes.rows import describe_order, head_size, is_attention
from codecllm.verifier.diagnosis.model.distances import (
    channel_order,
    cosine,
    relative_error,
    worst_channel,
)
from codecllm.verifier.diagnosis.model.layer_runs import (
    INPUT,
    Run,
    first_layers_of,
    layer_names,
    main_layers,
    run_model,
)
from codecllm.verifier.report import Stage

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Largest relative difference between the same computation by two kernels.

On one machine the bits are mostly the same.
"""

CACHED_TOKENS = 6
"""Tokens at the end of the prompt that run again, one at a time, from the cache."""

FEW_ROWS_SLACK = 40.0
"""Factor of the tolerances for resident `int8` with few rows of inputs.

The kernel for few rows rounds in another order, and single channels with large values differ by
more than themselves. The tolerances then hold for whole outputs, not for each channel.
"""

# Each point is one run of the model, and a curve of 17 points shows where it bends.
BISECT_POINTS = 16


def compare_layers(source: Run, reference: Run, loaded: Run) -> list[dict[str, Any]]:
    """Returns figures per layer, in the order of execution, as JSON values.

    `cosine` and `relative_error`: loaded against source, over all positions.
    `relative_error_of_reference`: the error of quantization alone. `off_reference`: loaded against
    reference, 0 where every bit is the same. `not_finite`: NaN and infinities.
    """
    rows = []
    for name in loaded.outputs:
        # A layer may not run in one of the models, where routing decides on other experts.
        if name not in source.outputs or name not in reference.outputs:
            continue
        base = source.outputs[name]
        right = reference.outputs[name]
        output = loaded.outputs[name]
        rows.append(
            {
                "name": name,
                "cosine": cosine(base, output),
                "relative_error": relative_error(base, output),
                "relative_error_of_reference": relative_error(base, right),
                "off_reference": relative_error(right, output),
                "not_finite": int((~torch.isfinite(output)).sum()),
                "not_finite_in_source": int((~torch.isfinite(base)).sum()),
            }
        )
    return rows


def suspects(reference: Run, loaded: Run, dtype: torch.dtype) -> list[str]:
    """Returns the layers to examine.

    These are the first whose bits differ, and the first that differs by more than `TOLERANCES`.
    Residual connections dilute the error of a module, so even the smallest difference counts.
    """
    different = (
        name
        for name in loaded.outputs
        if _departs(reference.outputs.get(name), loaded.outputs[name], 0.0)
    )
    names = [next(different, None), first_departure(reference, loaded, dtype)]
    return list(dict.fromkeys(name for name in names if name is not None))


def slack_for(resident: str, tokens: int) -> float:
    """Returns how many times `TOLERANCES` are allowed where so many tokens pass a model at once."""
    return FEW_ROWS_SLACK if resident == "int8" and tokens <= PACKED_ROWS else 1.0


def first_departure(
    reference: Run, loaded: Run, dtype: torch.dtype, slack: float = 1.0
) -> str | None:
    """Returns the first module whose output is not the reference's, within `TOLERANCES`.

    With a `slack` of more than 1 these are so many times as large, and single channels are not
    looked at.
    """
    limit = slack * TOLERANCES.get(dtype, 1e-4)
    each = slack == 1.0
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
        explained: whether an earlier stage has found weights wrong: then the departure is their
            consequence.
        slack: how many times `TOLERANCES` are allowed.
        stage: receives the finding.

    Returns:
        Where it is, as JSON values; None where no module of the layer departs by more than
        `TOLERANCES`.
    """
    # A second run: outputs of all modules of all layers at once would not fit in memory.
    names = _inside(reference, layer)
    right = run_model(reference, tokens, names)
    run = run_model(loaded, tokens, names)
    key = first_departure(right, run, loaded.dtype, slack)
    if key is None:
        return None
    remark = "; an earlier stage names the weight behind it" if explained else ""
    return _blame(
        key, (right, run), layer, (Cause.COMPUTATION, remark), head_size(loaded.config), stage
    )


def name_cached_departure(
    reference: Any, loaded: Any, tokens: list[int], count: int, slack: float, stage: Stage
) -> dict[str, Any] | None:
    """Runs the last tokens one at a time through both models, and names module and channel.

    The models agree on the whole prompt at once.

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
        run = run_model(loaded, tokens, names, cached=count)
    except Exception as exc:  # the reference can, so that this one must
        reason = one_line(exc)
        failure = f"{type(exc).__name__}: {reason}"
        text = f"the loaded model runs a prompt and cannot go on from it ({failure})"
        stage.fail(ModelMismatchError(text), cause=Cause.CACHE)
        return None
    key = first_departure(right, run, loaded.dtype, slack)
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
    return _blame(key, (right, run), layer, (Cause.CACHE, remark), head_size(loaded.config), stage)


def _inside(model: Any, layer: str) -> list[str]:
    """Returns the names under which a run keeps outputs and inputs of a layer and its modules.

    An empty name stands for the model.
    """
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
    """Adds the finding for the first value that departs.

    It is a module's output, or its input, which its parent computed.
    """
    name, (cause, remark) = key.removesuffix(INPUT), words
    a, b = (run.outputs[key] for run in runs)
    channel, share, error = worst_channel(a, b)
    not_finite = int((~torch.isfinite(b)).sum()) - int((~torch.isfinite(a)).sum())
    if not_finite > 0:
        damage = f"{not_finite} values are NaN or infinite, first"
    else:
        damage = f"{share:.1%} of the channels are off, worst"
    where = f"in it {name!r}" if key == name else f"in it the input of {name!r}"
    text = (
        f"first layer to depart is {layer!r}, {where}: {damage} in channel {channel} "
        f"(relative error {error:.3g})"
    )
    # Right modules before and a wrong input: the code between them is the parent's.
    if key != name and name != layer:
        name = name.rpartition(".")[0]
        text += f"; {name!r} computes that itself"
    # A permutation explains the error, whatever its size.
    order = channel_order(a, b)
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
    """Measures the logits of the source with its first N layers taken from `loaded`.

    Returns:
        One row per N, in growing order: `layers` and `value`.
    """
    layer_list = main_layers(source)
    if layer_list is None:
        return []
    count = len(layer_list[1])
    points = sorted({round(count * step / BISECT_POINTS) for step in range(BISECT_POINTS + 1)})
    rows = []
    for layers in points:
        with first_layers_of(source, loaded, layers):
            rows.append({"layers": layers, "value": measure(run_model(source, tokens, []).logits)})
    return rows


def _departs(
    right: torch.Tensor | None, found: torch.Tensor, limit: float, each: bool = True
) -> bool:
    """Tells whether an output is off by more than `limit`.

    With `each`, a channel that is off by more than ten times that counts too.
    """
    if right is None:
        return False
    # `not x <= limit`: an error that is NaN counts as a departure.
    if right.shape != found.shape or not relative_error(right, found) <= limit:
        return True
    return each and worst_channel(right, found)[2] > 10 * limit


def _has_attention(name: str) -> bool:
    return is_attention(name) or "attn" in name or "attention" in name
