"""Records the output of a model before and after conversion, and compares it again later."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    BaselineError,
    CodecLLMError,
    UnsupportedEnvironmentError,
    one_line,
)
from codecllm.formats.files import as_path
from codecllm.formats.manifest.manifest import BASELINE_NAME, Manifest
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.verifier.baseline.record import Agreement, Baseline, pack_baseline, parse_baseline
from codecllm.verifier.side_file import attach

if TYPE_CHECKING:
    import torch

    from codecllm.verifier.report import Stage

MAX_SECONDS = 600
"""A baseline that is not asked for is recorded only if it takes less."""

_BYTES_PER_SECOND = {"cpu": 4e9, "cuda": 1e11}
"""Weights that the memory of two cores, or of a GPU, delivers to a model that generates: cautious
guesses.
"""

# For source and converted model: 32 steps of the batch, and passes over all its tokens, which cost
# as much again and more.
_FORWARDS = 2 * (32 + 48)
_TEXT_FORWARDS = 2 * 36
"""The same for the fixed text."""

# Memory of a run for each byte of weights: activations, caches, buffers of the decoder.
MEMORY_FACTOR = 1.3


@dataclass(frozen=True, slots=True)
class BaselineOutcome:
    """The outcome of recording a baseline.

    Attributes:
        kind: `greedy`, `hidden` or `none`.
        reason: why it is `none`.
        agreement: figures as in `Agreement`, those that apply.
        seconds: how long it took.
    """

    kind: str
    reason: str | None = None
    agreement: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self) -> str:
        """Returns one line for people."""
        if self.kind == "none":
            return f"no baseline: {self.reason}"
        figures = describe_agreement(self.agreement)
        return (
            f"baseline recorded ({self.kind}) in {self.seconds:.0f} s; "
            f"against the source: {figures}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the outcome as JSON values."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "agreement": self.agreement,
            "seconds": round(self.seconds, 3),
        }


def record_baseline(
    out: str | Path,
    source_folder: str | Path,
    *,
    required: bool = False,
    device: str = "cpu",
    on_stage: Callable[[str], None] | None = None,
) -> BaselineOutcome:
    """Runs source and container on the fixed prompts and adds `baseline.json` to the container.

    The container is whole before and after: `baseline.json` is written first, then the manifest
    that lists it replaces the old one in one step.

    Args:
        out: a whole container, finished or staged.
        source_folder: the folder it was made from.
        required: record at any cost of time or memory, and raise where it is impossible.
        device: `cpu` or `cuda:N`: where both models run. The record names it, and elsewhere it is
            compared as another environment's.
        on_stage: called with a sentence when a stage begins.

    Raises:
        BaselineError: it is required and impossible, or a lossless container gives another output
            than its source.
        FormatError: the container is damaged.
    """
    began = time.monotonic()
    folders = as_path(source_folder, "source_folder"), as_path(out, "out")
    check_arguments(required=required, on_stage=on_stage)
    tell = on_stage or (lambda text: None)
    with Container(out) as container:
        manifest = container.manifest
        # Imported late: a verification that runs no model needs no torch.
        from codecllm.loader.places import device_of

        place = device_of(device)
        reason = _obstacle(container, required, place)
        if reason is not None:
            outcome = BaselineOutcome("none", reason)
            baseline = Baseline(format="codecllm-baseline", version=1, kind="none", reason=reason)
        else:
            try:
                text = _text_wanted(manifest, required, place)
                baseline = _run_both(folders, manifest, text, place, tell)
            except _NoBaselineError as exc:
                reason = str(exc)
                baseline = Baseline(
                    format="codecllm-baseline", version=1, kind="none", reason=reason
                )
            except (BaselineError, MemoryError):
                raise
            except Exception as exc:
                # A model class may refuse plain text with any type: it has no text baseline.
                reason = (
                    f"the model could not be run on text: {type(exc).__name__}: {one_line(exc)}"
                )
                # A class that this transformers lacks, or code that must not run, is no fault of
                # the container.
                is_fault = isinstance(exc, CodecLLMError) and not isinstance(
                    exc, UnsupportedEnvironmentError
                )
                if required or is_fault:
                    raise BaselineError(reason) from exc
                baseline = Baseline(
                    format="codecllm-baseline", version=1, kind="none", reason=reason
                )
            agreement = (
                baseline.agreement.model_dump(exclude_none=True) if baseline.agreement else {}
            )
            outcome = BaselineOutcome(
                baseline.kind, baseline.reason, agreement, time.monotonic() - began
            )
    if reason is not None and required:
        raise BaselineError(reason)
    attach(folders[1], manifest, BASELINE_NAME, pack_baseline(baseline))
    return outcome


def check_baseline(container: Container, stage: Stage, *, required: bool, workers: int) -> None:
    """Runs the recorded prompts and compares.

    In the recorded environment tokens and digests must be equal. In another one, teacher-forced
    along the record, at least 99 % of the most likely tokens must be the same and the mean KL
    divergence at most 1e-3 nats.

    Raises:
        BaselineError: the output differs, or there is no baseline and it is required.
    """
    record = container.manifest.file(BASELINE_NAME)
    baseline = parse_baseline(container.read_side_file(record)) if record is not None else None
    if baseline is None or baseline.kind == "none":
        reason = baseline.reason if baseline is not None else "the container has no baseline"
        if required:
            raise BaselineError("a baseline is required", file=BASELINE_NAME, got=reason)
        stage.skipped = True
        stage.summary = str(reason)
        return
    from codecllm.loader.hf.quiet import without_progress_bars
    from codecllm.loader.places import CPU, usual_settings
    from codecllm.loader.pretrained import load_opened
    from codecllm.verifier.baseline.runs import compare_with_record

    with without_progress_bars(), usual_settings(CPU):
        model = load_opened(container, workers)
        compare_with_record(model, baseline, stage)
    if baseline.agreement is not None:
        _refuse_below_floor(baseline, container.manifest)
        agreement = baseline.agreement.model_dump(exclude_none=True)
        stage.facts["agreement_with_source"] = agreement
        stage.summary += f"; against the source: {describe_agreement(agreement)}"


def describe_agreement(agreement: dict[str, Any]) -> str:
    """Returns the figures of an `Agreement` in words: on the text, else along the prompts."""
    text = agreement.get("text")
    figures = agreement if text is None else {**agreement, **text}
    words = {
        "top1": "top-1 {:.1%}",
        "mean_kl": "mean KL {:.2e} nats",
        "same_tokens": "same text on {:.0%} of the prompts",
        "cosine": "smallest cosine {:.6f}",
    }
    if text is not None:
        words["mean_kl"] += f" over {text['tokens']} tokens of text"
    parts = [form.format(figures[name]) for name, form in words.items() if name in figures]
    if "text_missing" in agreement:
        parts.append(f"not measured on text: {agreement['text_missing']}")
    return ", ".join(parts)


def _run_both(
    folders: tuple[Path, Path],
    manifest: Manifest,
    text: bool | str,
    place: torch.device,
    tell: Callable[[str], None],
) -> Baseline:
    from codecllm.loader import from_pretrained
    from codecllm.loader.hf.plain import load_plain
    from codecllm.loader.hf.quiet import without_progress_bars
    from codecllm.loader.places import CPU, usual_settings
    from codecllm.verifier.baseline.runs import (
        combine,
        run_converted,
        run_source,
        same_output,
    )

    source, out = folders
    inputs = "8 prompts and a text" if text is True else "8 prompts"
    options: dict[str, Any] = {} if place == CPU else {"device_map": {"": place}}
    with without_progress_bars(), usual_settings(place):
        tell(f"baseline: running the source on {inputs}")
        model, info = load_plain(source, output_loading_info=True, **options)
        try:
            source_run = run_source(model, source, text)
        except (IndexError, RuntimeError) as exc:
            _explain_short_context(model, exc)
            raise
        # A model is full of reference cycles. Without this call both would be in memory at once.
        del model
        gc.collect()
        tell(f"baseline: running the converted model on {inputs}")
        converted = from_pretrained(out, resident="dense", **options)
        converted_run = run_converted(converted, source_run)
        del converted
        baseline = combine(source_run, converted_run)
        fault = None
        try:
            _refuse_another_output(baseline, manifest)
        except BaselineError as exc:
            fault = exc
        if fault is not None or info["missing_keys"]:
            gc.collect()
            tell("baseline: running the source once more")
            model = load_plain(source, **options)
            if not same_output(source_run, run_source(model, source)):
                raise _NoBaselineError(_why_random(info["missing_keys"])) from fault
    if fault is not None:
        raise fault
    return baseline


class _NoBaselineError(Exception):
    """The source cannot be run on the prompts, or not twice alike: the text says why."""


def _explain_short_context(model: Any, error: Exception) -> None:
    """Raises an error that says so where the model's context is shorter than the prompts."""
    from codecllm.verifier.baseline.model_output import generates
    from codecllm.verifier.baseline.prompts import NEW_TOKENS, PROMPT_TOKENS

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Position tables of some encoders have two entries that no token uses.
    needed = PROMPT_TOKENS + (NEW_TOKENS if generates(model) else 2)
    if isinstance(context, int) and context < needed:
        raise _NoBaselineError(
            f"the model's context of {context} tokens is shorter than the {needed} of a prompt "
            "and what follows it"
        ) from error


def _why_random(missing: Iterable[str]) -> str:
    names = sorted(missing)
    why = "two loads of the source give different outputs"
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        why = f"its files lack weights, which each load draws anew: {', '.join(names[:3])}{rest}"
    return f"this model's own output is random: {why}"


def _refuse_another_output(baseline: Baseline, manifest: Manifest) -> None:
    """Refuses a baseline of a container whose output is not that of its source.

    Raises:
        BaselineError: it differs, or is too far off for the loss of the quantization.
    """
    agreement = baseline.agreement or Agreement()
    lossless = manifest.options.scheme == "lossless"
    if lossless and (
        agreement.same_tokens not in (None, 1.0) or agreement.mean_kl not in (None, 0.0)
    ):
        raise BaselineError(
            "the lossless container gives another output than its source",
            got=agreement.model_dump(),
        )
    _refuse_below_floor(baseline, manifest)


def _refuse_below_floor(baseline: Baseline, manifest: Manifest) -> None:
    """Refuses a baseline that is too far from the source to be the loss of the quantization.

    Raises:
        BaselineError: it is; see `floor.below_floor`.
    """
    from codecllm.verifier.baseline.floor import below_floor, certainty_of

    agreement = baseline.agreement or Agreement()
    fault = below_floor(agreement, asked_bits(manifest), certainty_of(baseline))
    if fault is not None:
        raise BaselineError(
            "the converted model is far from its source; a tensor may be quantized that must not "
            "be, or loaded as another: `codecllm diagnose CONTAINER SOURCE` looks for the cause",
            file=BASELINE_NAME,
            got=fault,
        )


def asked_bits(manifest: Manifest) -> float | None:
    """Returns the bits per weight that the writer was asked for, by a rate or a ratio, or None.

    Steps that were chosen without a rate, for a width of codes or by a caller, count with the bits
    that came of them.
    """
    options = manifest.options
    elements = sum(record.elements for record in manifest.tensors)
    if options.bits is not None:
        return options.bits
    if options.ratio is not None and elements:
        return 8 * manifest.source.tensor_bytes / elements / options.ratio
    chosen = [
        record
        for record in manifest.tensors
        if isinstance(record, Int8Tensor) and record.rounding is not None
    ]
    if not chosen:
        return None
    stored = sum(plane.stored_bytes for record in chosen for plane in record.planes)
    return 8 * stored / sum(record.elements for record in chosen)


def _obstacle(container: Container, required: bool, place: torch.device) -> str | None:
    """Returns why a baseline cannot, or without being asked for should not, be recorded."""
    if container.manifest.file("config.json") is None:
        return "the source has no config.json"
    if required:
        return None
    from codecllm.loader.places import free_memory

    size = container.manifest.source.tensor_bytes
    available = free_memory(place)
    if size * MEMORY_FACTOR > available:
        return (
            f"the model needs {size / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory "
            f"are free on {place} (--baseline insists)"
        )
    return _too_slow(size * _FORWARDS, place)


def _text_wanted(manifest: Manifest, required: bool, place: torch.device) -> bool | str:
    """Returns whether both models are compared on the text, or why they are not."""
    # A lossless container has its source's logits, which the prompts show.
    if manifest.options.scheme == "lossless":
        return False
    slow = _too_slow(manifest.source.tensor_bytes * (_FORWARDS + _TEXT_FORWARDS), place)
    return True if required or slow is None else slow


def _too_slow(read_bytes: int, place: torch.device) -> str | None:
    """Returns a sentence where reading so many bytes takes too long for what nobody asked for."""
    seconds = read_bytes / _BYTES_PER_SECOND[place.type]
    if seconds > MAX_SECONDS:
        return f"it would take about {seconds / 60:.0f} minutes (--baseline insists)"
    return None
