"""The source as transformers loads it, beside the container as it is loaded.

Every other check compares the container with the converter's reading. This one asks transformers:
it resolves the files, the class, names, ties, dtypes and generation defaults by itself, so that a
file that the converter should have taken, or a rename that the loader missed, shows here.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError, ModelMismatchError, one_line, shown
from codecllm.formats.machine import available_memory
from codecllm.formats.manifest.manifest import CONFIG_NAME
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.verifier.baseline.baseline import MEMORY_FACTOR, asked_bits
from codecllm.verifier.baseline.floor import floor_of
from codecllm.verifier.report import Stage
from codecllm.verifier.source_files import NAMES_SHOWN, check_side_files, different_keys

MAX_RELATIVE_ERROR = 0.9
"""Root mean square error of a quantized parameter, as a share of its own, from which on it is
examined further. Two bits a weight stay below; two unlike tensors have 1.4. A rate for the whole
model may leave a tensor so few bits that most of its codes, or all, are zero: its error is 1."""

MIN_PROJECTION = 0.25
"""Smallest projection of the source's values on those of such a coarse parameter.

It is their product's sum over the sum of the parameter's squares: 0.5 to 1 for rounded values of
the source, about 0 for another tensor.
"""


def check_source_model(
    container: Container, source: SourceModel, stage: Stage, workers: int
) -> None:
    """Compares the loaded container with the source that transformers loads by itself.

    Compared are: the class; names, shapes, dtypes and ties of all parameters and buffers; their
    bits, or for quantized ones their distance; weights that the load leaves over; generation
    defaults; tokens of sample texts; chat templates; logits and generated texts; side files.

    Args:
        container: an undamaged container.
        source: the model that it was made from.
        stage: receives findings; is skipped where the two models do not fit in memory or
            transformers cannot load the source.
        workers: decoding threads.
    """
    check_side_files(container, source, stage)
    reason = _obstacle(container)
    if reason is None:
        reason = _compare_models(container, source, stage, workers)
    if reason is not None:
        stage.skipped, stage.summary = True, reason


def _obstacle(container: Container) -> str | None:
    if container.manifest.file(CONFIG_NAME) is None:
        return "the source has no config.json"
    # Both models are in memory at once: their outputs are compared prompt by prompt.
    needed_bytes = int(2 * MEMORY_FACTOR * _model_bytes(container))
    free = available_memory()
    if needed_bytes > free:
        return (
            f"the source and the container need {needed_bytes / 2**30:.1f} GiB "
            f"to run side by side, {free / 2**30:.1f} GiB of memory are free"
        )
    return None


def _model_bytes(container: Container) -> int:
    """Returns the bytes of the source's tensors, or of the model that is built, if it has more."""
    from codecllm.loader.hf.plain import parameter_count

    stored_bytes = container.manifest.source.tensor_bytes
    element_count = sum(math.prod(record.shape) for record in container.records.values())
    try:
        # Weights that no file has are made at random: a config may name far more than the files.
        parameters = parameter_count(container)
    except Exception:  # the load of the source names the reason, of any type
        return stored_bytes
    return max(stored_bytes, parameters * stored_bytes // max(element_count, 1))


def _keeps_codes(container: Container) -> bool:
    """Whether a tensor has a dtype of one byte, as codes of other libraries have."""
    return any(DTYPES[record.dtype].bits == 8 for record in container.records.values())


def _compare_models(
    container: Container, origin: SourceModel, stage: Stage, workers: int
) -> str | None:
    """Loads both models and compares them; returns why it could not."""
    from codecllm.loader.hf.plain import load_plain
    from codecllm.loader.hf.quiet import silenced, without_progress_bars
    from codecllm.loader.load_report import LoadReport, draws_most, read_report
    from codecllm.loader.pretrained import load_opened

    source = origin.folder
    with without_progress_bars(), silenced():
        try:
            plain, info = load_plain(source, output_loading_info=True)
        except Exception as exc:  # transformers raises any type for a source that it cannot load
            return f"transformers cannot load the source: {type(exc).__name__}: {one_line(exc)}"
        name = type(plain).__name__
        left_over = set(info["unexpected_keys"])
        if any(not tensor.is_stored for tensor in origin.tensors.values()):
            # Scales became a part of their weights, and those of activations are of no more use.
            left_over &= origin.tensors.keys()
        expected = LoadReport.of(name, info["missing_keys"], left_over)
        if draws_most(plain, info["missing_keys"]):
            return f"transformers would draw most weights of the source's {name} at random"
        # Of a source that another library quantized its quantizer alone says what is left over.
        is_kept = container.manifest.source.quantization is not None
        recorded_report = read_report(container) or LoadReport.of(name, (), ())
        if not is_kept and recorded_report != expected:
            error = ModelMismatchError(
                "the container records another load than that of the source",
                got=recorded_report.summary() or "nothing left over",
                expected=expected.summary() or "nothing left over",
            )
            stage.fail(error)
            return None
        container_model = load_opened(container, workers)
    lossless = not any(isinstance(item, Int8Tensor) for item in container.records.values())
    has_codes = any(value.dtype.itemsize == 1 for value in plain.parameters())
    if has_codes and not (lossless and _keeps_codes(container)):
        return "transformers keeps the source's weights in codes of its quantizer"
    differences = list(_differences(plain, container_model, container, lossless, expected.missing))
    for difference in differences:
        stage.fail(difference)
    if not differences:
        _compare_speech(container, source, (plain, container_model), lossless, stage)
    stage.facts |= {"class": name, "lossless": lossless}
    stage.summary = (
        f"{name} as transformers loads the source: parameters, ties, dtypes, generation defaults, "
        f"tokens, chat templates{stage.facts.pop('said', '')}"
    )
    del plain, container_model
    gc.collect()
    return None


def _differences(
    plain: Any, loaded: Any, container: Container, lossless: bool, missing: frozenset[str]
) -> Iterator[CodecLLMError]:
    """Yields the differences between two loaded models, parameters first."""
    if type(plain) is not type(loaded):
        got, expected = type(loaded).__name__, type(plain).__name__
        yield ModelMismatchError("another class is loaded", got=got, expected=expected)
        return
    theirs, ours = plain.state_dict(), loaded.state_dict()
    for name in sorted(theirs.keys() ^ ours.keys()):
        holder = "container" if name in ours else "source"
        yield ModelMismatchError(f"only the loaded {holder} has this parameter", tensor=name)
    for name in theirs.keys() & ours.keys():
        plain_value, loaded_value = theirs[name], ours[name]
        if _kind(plain_value) != _kind(loaded_value):
            yield ModelMismatchError(
                "the loaded parameter is of another type",
                tensor=name,
                got=_kind(loaded_value),
                expected=_kind(plain_value),
            )
        # Weights that the source lacks are drawn at random by each load: their values differ.
        elif name not in missing:
            yield from _value_difference(name, plain_value, loaded_value, container, lossless)
    if _ties(plain) != _ties(loaded):
        yield ModelMismatchError(
            "other parameters are tied", got=_ties(loaded), expected=_ties(plain)
        )
    yield from _generation_difference(plain, loaded)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}"


def _value_difference(
    name: str, expected: Any, got: Any, container: Container, lossless: bool
) -> Iterator[CodecLLMError]:
    # Bits, not values: NaN differs from itself, and 0.0 equals -0.0.
    a, b = expected.detach().reshape(-1), got.detach().reshape(-1)
    if _same_bits(a, b) or not a.numel():
        return
    if lossless or not a.is_floating_point():
        yield ModelMismatchError("the loaded parameter is not the source's", tensor=name)
        return
    energy = float(a.double().square().sum())
    error = (float((a.double() - b.double()).square().sum()) / max(energy, 1e-300)) ** 0.5
    if not error <= MAX_RELATIVE_ERROR and not _is_coarse(name, a, b, container):
        yield ModelMismatchError(
            "the loaded parameter is far from the source's: relative error",
            tensor=name,
            got=f"{error:.3f}",
            expected=f"at most {MAX_RELATIVE_ERROR}",
        )


def _is_coarse(name: str, expected: Any, got: Any, container: Container) -> bool:
    """Tells whether a parameter is far from the source's only because it has few bits.

    Its bits must be those that the container holds under its name, which the comparison of tensors
    has judged weight by weight, and its values, unless all are zero, must follow the source's.
    """
    from codecllm.verifier.diagnosis.model.reference_model import reference_tensor

    # A file may have the names of a part of the model, or of a model around it.
    stored_names = [
        stored_name
        for stored_name, record in container.records.items()
        if f".{name}".endswith(f".{stored_name}") or f".{stored_name}".endswith(f".{name}")
        if isinstance(record, Int8Tensor) and record.elements == got.numel()
    ]
    if len(stored_names) != 1:
        return False
    # A parameter that the load forgot, wholly or in part, is near zero too.
    if not _same_bits(reference_tensor(container, stored_names[0], got.dtype).reshape(-1), got):
        return False
    energy = float(got.double().square().sum())
    product = float((expected.double() * got.double()).sum())
    return energy == 0.0 or product / energy >= MIN_PROJECTION


def _same_bits(a: Any, b: Any) -> bool:
    import torch

    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _ties(model: Any) -> list[list[str]]:
    """Returns the groups of parameters of one memory, sorted."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _generation_difference(plain: Any, loaded: Any) -> Iterator[CodecLLMError]:
    documents = [
        model.generation_config.to_dict() if hasattr(model, "generation_config") else {}
        for model in (plain, loaded)
    ]
    different = different_keys(*documents)
    if different:
        key = different[0]
        yield ModelMismatchError(
            f"generation defaults differ: {', '.join(different[:NAMES_SHOWN])}",
            got=documents[1].get(key),
            expected=documents[0].get(key),
        )


def _compare_speech(
    container: Container, source: Path, models: tuple[Any, Any], lossless: bool, stage: Stage
) -> None:
    """Compares tokens, chat templates, logits and texts of both models."""
    from codecllm.verifier.baseline.model_output import PromptCoder
    from codecllm.verifier.diagnosis.model import text
    from codecllm.verifier.diagnosis.model.tokenizers import check_tokenizers

    plain, container_model = models
    folders = (source, container.folder)
    coders = (PromptCoder(source, plain.config), PromptCoder(container, container_model.config))
    check_tokenizers(*coders, folders, stage)
    theirs, ours = _chat_templates(source), _chat_templates(container)
    for name in sorted(theirs.keys() | ours.keys(), key=str):
        if theirs.get(name) != ours.get(name):
            error = ModelMismatchError(
                f"chat template {shown(name)} differs",
                got=shown(ours.get(name))[:80],
                expected=shown(theirs.get(name))[:80],
            )
            stage.fail(error)
    try:
        inputs = text.make_inputs(coders[0], None, None)
        base = text.evaluate_outputs(plain, inputs)
        other = text.evaluate_outputs(container_model, inputs, base)
    except Exception as exc:  # a model class may refuse plain text with any type
        stage.facts["said"] = f"; the model does not run on text: {type(exc).__name__}"
        return
    # The rule of a conversion's baseline: few bits that the caller asked for are no fault.
    floor = floor_of(asked_bits(container.manifest))
    accepted = None if floor is None else floor[:2]
    text.compare_text(inputs, base, other, coders, lossless, stage, accepted)
    stage.facts["said"] = f"; {stage.summary}"


def _chat_templates(model: Path | Container) -> dict[Any, Any]:
    """Returns the texts of the model's chat templates by name.

    They are programs of strangers without a bound of time or memory, and are not run.
    """
    from codecllm.loader.hf.folder import read_tokenizer

    try:
        templates = read_tokenizer(model).chat_template or {}
    except CodecLLMError:
        return {}
    return templates if isinstance(templates, dict) else {"default": templates}
