"""Calibration: from an opened source to statistics for the quantizer and a record of their text."""

from __future__ import annotations

import errno
import gc
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from codecllm.calibrator.activations import mean_squared_inputs
from codecllm.calibrator.device_feedback import DeviceFeedback, DeviceProducts, StagedProducts
from codecllm.calibrator.gradients import squared_gradients
from codecllm.calibrator.inputs import input_products
from codecllm.calibrator.names import by_source
from codecllm.calibrator.repeatable import repeatable
from codecllm.calibrator.text import (
    LENGTH,
    REFINED_LENGTH,
    begins_with_start,
    file_text,
    mixed_text,
    own_text,
    random_text,
    record,
)
from codecllm.converter.rate.allocation import Sensitivity
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.products import Sums
from codecllm.converter.rate.stages import now_and_then
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import (
    CodecLLMError,
    ModelMismatchError,
    UnsupportedEnvironmentError,
    one_line,
)
from codecllm.formats.manifest.records import Calibration
from codecllm.loader.hf.plain import load_offloaded, load_plain
from codecllm.loader.hf.quiet import silenced, without_progress_bars
from codecllm.loader.places import CPU, device_of, free_memory, usual_settings

_ROOM = 1.6
"""Memory of a backward pass, as a multiple of the weights' size.

It holds the weights, the gradient of the largest parameter, and activations.
"""


_WORK = 4 << 30
"""Memory of a device that sums of products leave: activations, and the factors of large layers."""

_FEW = 16
"""Sequences of a calibration by activations.

They pass each layer together, because the model is read from disk layer by layer.
"""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The result of a calibration.

    Attributes:
        statistics: sensitivities by the names of the source's tensors.
        record: the text, as the manifest records it.
        notes: sentences for the user.
        products: sums of products of layers' inputs, if they were asked for.
        device: what refines codes.
    """

    statistics: dict[str, Sensitivity]
    record: Calibration
    notes: list[str] = field(default_factory=list)
    products: Sums | None = None
    device: torch.device = CPU

    def feedback(self) -> Feedback | None:
        """Returns what refines codes by the products, which it takes over for good."""
        if self.products is None:
            return None
        if self.device == CPU:
            return Feedback(self.products)
        return DeviceFeedback(self.products, self.device)


@dataclass(frozen=True, slots=True)
class _Task:
    """A calibration to run.

    Attributes:
        folder: the source model.
        kind: the kind of text, as for `calibrate`.
        refined: names of tensors whose inputs are counted in pairs.
        shapes: shapes of the source's tensors by name.
        device: where the model is to run.
        tell: called with a sentence when a stage begins.
    """

    folder: Path
    kind: str
    refined: Collection[str]
    shapes: dict[str, tuple[int, ...]]
    device: torch.device
    tell: Callable[[str], None]


def calibrate(
    source: SourceModel,
    kind: str,
    on_stage: Callable[[str], None] | None = None,
    *,
    refined: Collection[str] = (),
    device: str = "cpu",
) -> Calibrated:
    """Runs the source model on a short text and learns where quantization hurts.

    Args:
        source: the opened source: safetensors and config.json.
        kind: `text`: the text of several kinds that codecllm brings along (`self`, where the model
            has no tokenizer of use); `self`: text that the model itself writes (random tokens,
            where it does not generate text); `random`: random tokens; anything else: path of a text
            file.
        on_stage: called with a sentence when a stage begins.
        refined: names of tensors; of those that are weights of linear layers the inputs are to be
            known in pairs, from text four times as long.
        device: `auto`, `cpu`, `cuda` or `cuda:N`: where the model runs and codes are refined. Its
            figures are those of the CPU but for the rounding of sums.

    Raises:
        UnsupportedEnvironmentError: transformers cannot load or run the model, or there is no such
            device.
        UsageError: the text file is of no use.
        SourceError, FormatError: the source cannot be read.
        OSError: there is no room for temporary files.
    """
    folder = source.repository
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    target = device_of(device)
    task = _Task(folder, kind, refined, shapes, target, on_stage or (lambda text: None))
    try:
        with without_progress_bars(), silenced(), usual_settings(target), repeatable(target):
            return _in_memory(source, task) or _layer_by_layer(task)
    except Exception as exc:  # a model class may raise any type when it is run on plain tokens
        # A config of another model is a model that cannot run; other errors of ours say enough.
        if isinstance(exc, CodecLLMError) and not isinstance(exc, ModelMismatchError):
            raise
        # A full disk is no fault of the model: it keeps its own error.
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            raise
        reason = one_line(exc)
        raise UnsupportedEnvironmentError(
            f"the model cannot be calibrated ({type(exc).__name__}: {reason})"
        ) from exc


def _in_memory(source: SourceModel, task: _Task) -> Calibrated | None:
    """Calibrates with gradients where the whole model fits: on the device, or on the CPU."""
    notes: list[str] = []
    for place in dict.fromkeys((task.device, CPU)):
        if place != task.device:
            notes.append(f"the model does not fit into the memory of {task.device}: it runs on cpu")
        # Squares of gradients need float32; the dtype of the files is second best.
        for dtype, size in (
            (torch.float32, 4 * source.elements),
            ("auto", source.tensor_bytes),
        ):
            if size * _ROOM <= free_memory(place):
                model = _loaded(task.folder, dtype, place)
                calibration = _with_gradients(model, task, place)
                del model
                # A model is full of reference cycles: without this call it would stay in memory.
                gc.collect()
                return replace(calibration, notes=[*notes, *calibration.notes])
    return None


def _loaded(folder: Path, dtype: torch.dtype | str, place: torch.device) -> Any:
    if place == CPU:
        return load_plain(folder, dtype)
    # torch would convert a tensor on the CPU before it moves it: twice its bytes there and on the
    # way.
    model = load_plain(folder, device_map={"": place})
    return model.float() if dtype == torch.float32 else model


def _with_gradients(model: Any, task: _Task, place: torch.device) -> Calibrated:
    model.eval()
    tokens = None
    kind = task.kind
    notes = []
    tell = task.tell
    length = REFINED_LENGTH if task.refined else LENGTH
    if kind == "text":
        tokens = mixed_text(model, task.folder, length)
        if tokens is None:
            notes.append("no tokenizer of use: not calibrated on the text of codecllm")
            kind = "self"
    if kind == "self" and _writes(model):
        tell("calibrating: the model writes its own text")
        tokens = own_text(model, length, keep_start=begins_with_start(task.folder))
    if kind == "self" and tokens is None:
        notes.append(f"{type(model).__name__} does not write text: calibrated on random tokens")
        kind = "random"
    if tokens is None:
        tokens = _text(model, task.folder, kind, length)
    source_names = set(task.shapes)
    some = tokens[:, :LENGTH]
    tell(f"calibrating: gradients on {some.numel():,} tokens")
    sums = squared_gradients(model, some, now_and_then(tell, "calibrating: {} of {} sequences"))
    products = None
    if task.refined:
        tell(f"calibrating: pairs of inputs on {tokens.numel():,} tokens")
        advance = now_and_then(tell, "calibrating: {} of {} sequences")
        room = _room_for_sums(place, task)
        products = input_products(model, tokens, task.shapes, task.refined, advance, room)
    return Calibrated(
        by_source(model, sums, source_names),
        record(_kind(kind), tokens),
        notes,
        products,
        task.device,
    )


def _room_for_sums(device: torch.device, task: _Task) -> Sums | None:
    """Returns room on the device, or in a file where not all sums fit; None is a file."""
    if device == CPU:
        return None
    widths = [task.shapes[name][-1] for name in task.refined]
    needed = sum(4 * width**2 for width in widths) + 24 * max(widths, default=0) ** 2
    room = free_memory(device) - _WORK
    return DeviceProducts(device) if needed <= room else StagedProducts(device, room)


def _layer_by_layer(task: _Task) -> Calibrated:
    kind = task.kind
    notes = [
        "the model does not fit in memory: activations instead of gradients, "
        "layer by layer from disk"
    ]
    if kind == "self":
        notes.append("and random tokens instead of its own text")
        kind = "random"
    if task.refined:
        notes.append("no refinement, which needs the whole model in memory")
    task.tell(f"calibrating: {', '.join(notes)}")
    with tempfile.TemporaryDirectory(prefix="codecllm-") as offload:
        model = load_offloaded(task.folder, Path(offload), int(free_memory(CPU) / _ROOM)).eval()
        tokens = mixed_text(model, task.folder) if kind == "text" else None
        if tokens is None:
            if kind == "text":
                notes.append("random tokens: there is no tokenizer of use for the text of codecllm")
                kind = "random"
            tokens = _text(model, task.folder, kind, LENGTH)
        tokens = tokens[:_FEW]
        return Calibrated(
            mean_squared_inputs(model, tokens, set(task.shapes)), record(_kind(kind), tokens), notes
        )


def _text(model: Any, folder: Path, kind: str, length: int) -> torch.Tensor:
    return (
        random_text(model, length)
        if kind == "random"
        else file_text(model, folder, Path(kind), length)
    )


def _kind(kind: str) -> str:
    return kind if kind in ("text", "self", "random") else "file"


def _writes(model: Any) -> bool:
    return not model.config.is_encoder_decoder and bool(getattr(model, "can_generate", bool)())
