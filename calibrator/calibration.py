"""Calibration: one function from a source folder to statistics for the quantizer and the record of their text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from codecllm.calibrator.activations import mean_squared_inputs
from codecllm.calibrator.gradients import squared_gradients
from codecllm.calibrator.names import by_source
from codecllm.calibrator.text import file_text, own_text, random_text, record
from codecllm.converter.allocation import Sensitivity
from codecllm.converter.source import SourceModel
from codecllm.formats.errors import CodecLLMError, UnsupportedEnvironmentError
from codecllm.formats.machine import available_memory
from codecllm.formats.manifest import Calibration
from codecllm.loader import transformers_adapter as adapter

_ROOM = 1.6
"""Memory for weights, the gradient of the largest parameter and activations, in units of the weights."""


_FEW = 16
"""Sequences whose activations are watched: they pass a model that is read from disk all together."""

_PATIENCE = 20.0
"""Seconds between two sentences of a long stage."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration came to.

    Attributes:
        statistics: sensitivities by the names of the source's tensors.
        record: what the manifest says of the text.
        notes: sentences for the user.
    """

    statistics: dict[str, Sensitivity]
    record: Calibration
    notes: list[str] = field(default_factory=list)


def calibrate(folder: str | Path, kind: str, on_stage: Callable[[str], None] | None = None) -> Calibrated:
    """Runs the source model on a short text and learns where quantization hurts.

    Args:
        folder: the source: safetensors and config.json.
        kind: `self`: text that the model itself writes (random tokens, where it does not generate text); `random`: random
            tokens; anything else: path of a text file.
        on_stage: called with a sentence when a stage begins.

    Raises:
        UnsupportedEnvironmentError: transformers cannot load or run the model.
        UsageError: the text file is of no use.
        SourceError, FormatError: the source cannot be read.
    """
    folder, tell = Path(folder), on_stage or (lambda text: None)
    with SourceModel(folder) as source:
        known, elements, size = set(source.tensors), source.elements, source.tensor_bytes
    try:
        with adapter.without_progress_bars(), adapter.silenced():
            if 4 * elements * _ROOM <= available_memory():
                return _with_gradients(adapter.load_plain(folder, torch.float32), folder, kind, known, tell)
            if size * _ROOM <= available_memory():
                return _with_gradients(adapter.load_plain(folder), folder, kind, known, tell)
            return _layer_by_layer(folder, kind, known, tell)
    except CodecLLMError:
        raise
    except Exception as exc:  # whatever a model class raises when it is run on plain tokens
        reason = " ".join(str(exc).split())[:200]
        raise UnsupportedEnvironmentError(f"the model cannot be calibrated ({type(exc).__name__}: {reason})") from exc


def _with_gradients(model: Any, folder: Path, kind: str, known: set[str], tell: Callable[[str], None]) -> Calibrated:
    if torch.cuda.is_available() and _weight_bytes(model) * _ROOM <= torch.cuda.mem_get_info()[0]:
        model = model.to("cuda")
    model.eval()
    tokens = None
    if kind == "self" and _writes(model):
        tell("calibrating: the model writes its own text")
        tokens = own_text(model)
    notes = []
    if kind == "self" and tokens is None:
        notes.append(f"{type(model).__name__} does not write text: calibrated on random tokens")
        kind = "random"
    if tokens is None:
        tokens = _text(model, folder, kind)
    tell(f"calibrating: gradients on {tokens.numel():,} tokens")
    sums = squared_gradients(model, tokens, _now_and_then(tell))
    return Calibrated(by_source(model, sums, known), record(_kind(kind), tokens), notes)


def _layer_by_layer(folder: Path, kind: str, known: set[str], tell: Callable[[str], None]) -> Calibrated:
    notes = ["the model does not fit in memory: activations instead of gradients, layer by layer from disk"]
    if kind == "self":
        notes.append("and random tokens instead of its own text")
        kind = "random"
    tell(f"calibrating: {', '.join(notes)}")
    with tempfile.TemporaryDirectory(prefix="codecllm-") as offload:
        model = adapter.load_offloaded(folder, Path(offload), int(available_memory() / _ROOM)).eval()
        tokens = _text(model, folder, kind)[:_FEW]
        return Calibrated(mean_squared_inputs(model, tokens, known), record(_kind(kind), tokens), notes)


def _text(model: Any, folder: Path, kind: str) -> torch.Tensor:
    return random_text(model) if kind == "random" else file_text(model, folder, Path(kind))


def _now_and_then(tell: Callable[[str], None]) -> Callable[[int, int], None]:
    """Returns what tells of finished sequences, but not of each."""
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= _PATIENCE:
            last = time.monotonic()
            tell(f"calibrating: {done} of {total} sequences")

    return advance


def _kind(kind: str) -> str:
    return kind if kind in ("self", "random") else "file"


def _writes(model: Any) -> bool:
    return not model.config.is_encoder_decoder and bool(getattr(model, "can_generate", bool)())


def _weight_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
