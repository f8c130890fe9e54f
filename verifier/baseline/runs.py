"""The runs behind a baseline: source, converted model, and a later run against the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.errors import BaselineError, foreign_errors_as
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.verifier.baseline import model_output as output
from codecllm.verifier.baseline.record import (
    Agreement,
    Baseline,
    Environment,
    GreedyPrompt,
    HiddenPrompt,
    HiddenSamples,
    ModelTokens,
    TextAgreement,
)
from codecllm.verifier.baseline.text_agreement import (
    NoTextError,
    TextRun,
    compare_on_text,
    run_on_text,
)
from codecllm.verifier.report import Stage

_Prompts = list[output.PromptTokens]

MIN_TOP1 = 0.99
MAX_KL = 1e-3
HIDDEN_TOLERANCE = 0.02
"""Largest difference of a hidden value in another environment, relative to the root mean square."""


@dataclass(frozen=True, slots=True)
class SourceRun:
    """The source's side: per prompt its greedy tokens and their logits, or its first output.

    `text` is its run on the fixed text, or a sentence that says why there is none; None where none
    was asked for.
    """

    coder: output.PromptCoder
    prompts: _Prompts
    batched: bool
    greedy: bool
    tokens: list[list[int]]
    values: list[torch.Tensor]
    text: TextRun | str | None = None


@dataclass(frozen=True, slots=True)
class ConvertedRun:
    """The converted model's side.

    `along_source`: its logits along the source's continuations; `text`: its figures on the text.
    """

    environment: Environment
    tokens: list[list[int]]
    values: list[torch.Tensor]
    along_source: list[torch.Tensor]
    text: TextAgreement | None = None


def run_source(model: Any, folder: Path, text: bool | str = False) -> SourceRun:
    """Runs the source model on all prompts.

    Args:
        model: the source.
        folder: its files.
        text: whether it runs on the fixed text too, or a sentence that says why it does not.
    """
    with output.threads_for(model):
        return _run_source(model, folder, text)


def _run_source(model: Any, folder: Path, text: bool | str) -> SourceRun:
    coder = output.PromptCoder(folder, model.config)
    prompts = coder.prompts()
    batched = output.is_batch(prompts)
    if not output.generates(model):
        return SourceRun(
            coder, prompts, batched, False, [], output.all_first_outputs(model, prompts, batched)
        )
    tokens = output.all_greedy_tokens(model, prompts, batched)
    logits = output.all_logits(model, prompts, tokens, batched)
    return SourceRun(coder, prompts, batched, True, tokens, logits, _text_run(model, coder, text))


def _text_run(model: Any, coder: output.PromptCoder, text: bool | str) -> TextRun | str | None:
    if isinstance(text, str):
        return text
    try:
        return run_on_text(model, coder) if text else None
    except NoTextError as exc:
        return str(exc)


def run_converted(model: Any, source: SourceRun) -> ConvertedRun:
    """Runs the converted model on the same prompts, and along the source's continuations."""
    with output.threads_for(model):
        return _run_converted(model, source)


def _run_converted(model: Any, source: SourceRun) -> ConvertedRun:
    # The record is of the converted model: a later check runs that one, and not the source.
    where = output.environment(model)
    prompts = source.prompts
    batched = source.batched
    if not source.greedy:
        return ConvertedRun(where, [], output.all_first_outputs(model, prompts, batched), [])
    tokens = output.all_greedy_tokens(model, prompts, batched)
    logits = output.all_logits(model, prompts, tokens, batched)
    # Both models get the source's tokens: after the first other token, free texts say nothing about
    # the weights.
    along_source = (
        logits
        if tokens == source.tokens
        else output.all_logits(model, prompts, source.tokens, batched)
    )
    text = compare_on_text(model, source.text) if isinstance(source.text, TextRun) else None
    return ConvertedRun(where, tokens, logits, along_source, text)


def same_output(first: SourceRun, second: SourceRun) -> bool:
    """Whether two runs of one model on the same prompts gave the same bits."""
    pairs = zip(first.values, second.values, strict=True)
    return first.tokens == second.tokens and all(
        output.tensor_sha256(a) == output.tensor_sha256(b) for a, b in pairs
    )


def combine(source: SourceRun, converted: ConvertedRun) -> Baseline:
    """Makes the record of both runs."""
    if not source.greedy:
        return _combine_hidden(source, converted)
    prompts = []
    for number, prompt in enumerate(source.prompts):
        sides = [
            ModelTokens(
                tokens=run.tokens[number],
                text=source.coder.decode(run.tokens[number]),
                logits_sha256=_sha(run, number),
            )
            for run in (source, converted)
        ]
        top = output.top_tokens(converted.values[number])
        prompts.append(
            GreedyPrompt(
                text=prompt.text, tokens=prompt.tokens, source=sides[0], converted=sides[1], top=top
            )
        )
    base = torch.cat(source.values)
    other = torch.cat(converted.along_source)
    same = [a == b for a, b in zip(source.tokens, converted.tokens, strict=True)]
    agreement = Agreement(
        top1=output.top1_agreement(base, other),
        mean_kl=output.mean_kl(base, other),
        same_tokens=sum(same) / len(same),
        text=converted.text,
        text_missing=source.text if isinstance(source.text, str) else None,
    )
    return Baseline(
        format="codecllm-baseline",
        version=1,
        kind="greedy",
        batched=source.batched,
        environment=converted.environment,
        agreement=agreement,
        greedy=prompts,
    )


def compare_with_record(
    model: Any,
    baseline: Baseline,
    stage: Stage,
    spoken: dict[tuple[int, ...], list[int]] | None = None,
) -> None:
    """Runs the recorded prompts on a loaded model and compares; see `baseline.check_baseline`.

    Args:
        model: the loaded model.
        baseline: the record.
        stage: receives findings and figures.
        spoken: greedy continuations of this very model from an earlier run, by the prompt's tokens;
            they are not run again.

    Raises:
        BaselineError: the output differs, or the model cannot run the recorded prompts.
    """
    if baseline.kind == "greedy" and not output.generates(model):
        raise BaselineError(
            "the record is of a model that generates text",
            file=BASELINE_NAME,
            got=type(model).__name__,
        )
    # A model fails in any way at tokens that it does not have.
    with foreign_errors_as(
        BaselineError, "the model cannot run the recorded prompts", file=BASELINE_NAME
    ):
        _compare(model, baseline, stage, spoken or {})


def _compare(
    model: Any, baseline: Baseline, stage: Stage, spoken: dict[tuple[int, ...], list[int]]
) -> None:
    with output.threads_for(model):
        # Another processor or library adds in another order, so bits are compared only where all
        # are as recorded.
        same_place = output.environment(model) == baseline.environment
        stage.facts = {"kind": baseline.kind, "same_environment": same_place}
        if baseline.kind == "hidden":
            _compare_hidden(model, baseline, same_place, stage)
        elif same_place:
            _compare_tokens(model, baseline, stage, spoken)
        else:
            # Free generation leaves the record at the first near tie, and says little after it.
            _compare_along_record(model, baseline, stage)


def _prompts(records: Sequence[GreedyPrompt | HiddenPrompt], batched: bool) -> _Prompts:
    """Returns the prompts of a record.

    Raises:
        BaselineError: the record says that they ran as one batch, and the lengths of prompts or of
            texts differ.
    """
    prompts = [output.PromptTokens(record.text, record.tokens) for record in records]
    texts = [record.converted.tokens for record in records if isinstance(record, GreedyPrompt)]
    for lengths in ({len(prompt.tokens) for prompt in prompts}, {len(text) for text in texts}):
        if batched and len(lengths) > 1:
            raise BaselineError(
                "prompts of one batch differ in length", file=BASELINE_NAME, got=sorted(lengths)
            )
    return prompts


def _compare_tokens(
    model: Any, baseline: Baseline, stage: Stage, spoken: dict[tuple[int, ...], list[int]]
) -> None:
    prompts = baseline.greedy
    known_texts = [spoken.get(tuple(prompt.tokens)) for prompt in prompts]
    texts = [text for text in known_texts if text is not None]
    if len(texts) < len(prompts):
        texts = output.all_greedy_tokens(
            model, _prompts(prompts, baseline.batched), baseline.batched
        )
    for number, (prompt, got) in enumerate(zip(prompts, texts, strict=True)):
        if got != prompt.converted.tokens:
            place = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(got, prompt.converted.tokens, strict=False))
                    if a != b
                ),
                len(got),
            )
            stage.fail(
                BaselineError(
                    f"prompt {number} ({prompt.text[:40]!r}): tokens differ from the record "
                    f"from token {place} on",
                    file=BASELINE_NAME,
                    got=got[place : place + 4],
                    expected=prompt.converted.tokens[place : place + 4],
                )
            )
    tokens = sum(len(prompt.converted.tokens) for prompt in prompts)
    stage.summary = (
        f"{len(prompts)} prompts, all {tokens} greedy tokens as recorded (same environment)"
    )
    stage.facts["tokens"] = tokens


def _compare_along_record(model: Any, baseline: Baseline, stage: Stage) -> None:
    hits = positions = 0
    divergence = 0.0
    prompts = baseline.greedy
    texts = [prompt.converted.tokens for prompt in prompts]
    all_logits = output.all_logits(
        model, _prompts(prompts, baseline.batched), texts, baseline.batched
    )
    for prompt, want, logits in zip(prompts, texts, all_logits, strict=True):
        hits += int((logits.argmax(-1) == torch.tensor(want, dtype=torch.long)).sum())
        positions += len(want)
        divergence += float(output.recorded_kl(prompt.top, logits).sum())
    top1 = hits / max(1, positions)
    kl = divergence / max(1, positions)
    stage.facts |= {"top1": top1, "mean_kl": kl, "positions": positions}
    if top1 < MIN_TOP1 or not kl <= MAX_KL:
        raise BaselineError(
            "output differs from the record",
            file=BASELINE_NAME,
            got=f"top-1 {top1:.2%}, mean KL {kl:.2e} nats",
            expected=(
                f"top-1 >= {MIN_TOP1:.0%}, mean KL <= {MAX_KL:.0e} "
                "(recorded in another environment)"
            ),
        )
    stage.summary = (
        f"{len(prompts)} prompts in another environment: top-1 {top1:.1%}, "
        f"mean KL {kl:.1e} nats against the record"
    )


def _combine_hidden(source: SourceRun, converted: ConvertedRun) -> Baseline:
    prompts = []
    cosine = 1.0
    for prompt, base, other in zip(source.prompts, source.values, converted.values, strict=True):
        sides = (output.sampled(base), output.sampled(other))
        prompts.append(
            HiddenPrompt(
                text=prompt.text, tokens=prompt.tokens, source=sides[0], converted=sides[1]
            )
        )
        similarity = torch.nn.functional.cosine_similarity(
            base.double().reshape(-1), other.double().reshape(-1), 0
        )
        cosine = min(cosine, float(similarity))
    return Baseline(
        format="codecllm-baseline",
        version=1,
        kind="hidden",
        batched=source.batched,
        environment=converted.environment,
        agreement=Agreement(cosine=cosine),
        hidden=prompts,
    )


def _compare_hidden(model: Any, baseline: Baseline, same_place: bool, stage: Stage) -> None:
    worst = 0.0
    prompts = baseline.hidden
    outputs = output.all_first_outputs(model, _prompts(prompts, baseline.batched), baseline.batched)
    for number, (prompt, values) in enumerate(zip(prompts, outputs, strict=True)):
        got = output.sampled(values)
        off = _worst_sample(got, prompt.converted)
        worst = max(worst, off)
        if got.sha256 != prompt.converted.sha256 if same_place else not off <= HIDDEN_TOLERANCE:
            stage.fail(
                BaselineError(
                    f"prompt {number} ({prompt.text[:40]!r}): hidden state differs from the record",
                    file=BASELINE_NAME,
                    got=f"{off:.2e} of its root mean square",
                    expected="the same bytes"
                    if same_place
                    else f"at most {HIDDEN_TOLERANCE} in another environment",
                )
            )
    kind = (
        "bit for bit as recorded (same environment)"
        if same_place
        else f"within {worst:.1e} of the record"
    )
    stage.summary = f"{len(prompts)} prompts, hidden states {kind}"
    stage.facts["worst_difference"] = worst


def _worst_sample(got: HiddenSamples, record: HiddenSamples) -> float:
    if got.shape != record.shape or len(got.samples) != len(record.samples):
        return float("inf")
    pairs = zip(got.samples, record.samples, strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0) / max(record.rms, 1e-30)


def _sha(run: SourceRun | ConvertedRun, number: int) -> str:
    return output.tensor_sha256(run.values[number])
