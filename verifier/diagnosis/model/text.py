"""Stage 5: texts of source and loaded model, divergence, perplexity, undecodable bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from codecllm.formats.errors import BaselineError, ModelMismatchError
from codecllm.verifier.baseline import model_output as output
from codecllm.verifier.baseline.inference import repeatable_inference
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.model.sample_text import SAMPLE_TEXT
from codecllm.verifier.report import Stage

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
"""The character that a tokenizer writes for bytes that are no UTF-8."""

PERPLEXITY_TOKENS = 1024
WINDOW_TOKENS = 512
MAX_KL, MIN_TOP1 = 0.1, 0.9
Floor = tuple[float, float] | None
"""Limits beyond which precision itself is the fault.

The mean divergence in nats must be larger and the top-1 agreement smaller.
"""


@dataclass(slots=True)
class ModelOutputs:
    """The outputs of one model for the inputs of a comparison.

    Attributes:
        tokens: per prompt, its greedy continuation (models that generate).
        logits: per prompt, float32 [positions, vocabulary] along the source's continuation, or the
            first output.
        nll: negative log-likelihood in nats of each token of the text; empty where it cannot be
            computed.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float | None:
        """Exponential of the mean negative log-likelihood, or None without a text."""
        return math.exp(min(700.0, sum(self.nll) / len(self.nll))) if self.nll else None


@dataclass(frozen=True, slots=True)
class EvalInputs:
    """Inputs of both models: prompts and text as tokens of the source's tokenizer.

    `start` is the start token that the tokenizer gives a text, or empty; `text` is without it.
    """

    prompts: list[output.PromptTokens]
    text: list[int]
    start: Sequence[int] = ()


def make_inputs(
    coder: output.PromptCoder, prompts: Sequence[str] | None, text: str | None
) -> EvalInputs:
    """Returns prompts and a text as tokens.

    Args:
        coder: the source's tokenizer.
        prompts: None takes the fixed ones of the baseline.
        text: None takes the built-in one.
    """
    start, tokens = coder.encode_apart(SAMPLE_TEXT if text is None else text)
    return EvalInputs(coder.prompts(prompts or None), tokens[:PERPLEXITY_TOKENS], start)


def evaluate_outputs(
    model: Any, inputs: EvalInputs, along: ModelOutputs | None = None
) -> ModelOutputs:
    """Runs a model on prompts and text.

    Args:
        model: source or loaded model.
        inputs: prompts and text.
        along: the source's outputs, along whose continuations the logits are taken; None takes the
            model's own continuations.
    """
    with output.threads_for(model):
        return _evaluate_outputs(model, inputs, along)


def _evaluate_outputs(model: Any, inputs: EvalInputs, along: ModelOutputs | None) -> ModelOutputs:
    outputs, prompts = ModelOutputs(), inputs.prompts
    together = output.is_batch(prompts)
    if not output.generates(model):
        outputs.logits = output.all_first_outputs(model, prompts, together)
        return outputs
    outputs.tokens = output.all_greedy_tokens(model, prompts, together)
    # Both models along the source's tokens: after the first other token free texts cannot be
    # compared.
    texts = along.tokens if along is not None else outputs.tokens
    outputs.logits = output.all_logits(model, prompts, texts, together)
    # An encoder and decoder gives no likelihood for a text without a source text.
    if not model.config.is_encoder_decoder:
        outputs.nll = negative_log_likelihood(model, inputs.text, inputs.start)
    return outputs


def negative_log_likelihood(
    model: Any, tokens: list[int], start: Sequence[int] = ()
) -> list[float]:
    """Returns the negative log-likelihood in nats of tokens.

    They are read in windows that fit the model, each behind the start token: a model that was
    trained so is distorted without. The first token of each window, the start token where there is
    one, is left out.

    Args:
        model: causal language model.
        tokens: the text, without start token.
        start: the start token, or nothing.
    """
    longest = int(
        getattr(model.config.get_text_config(), "max_position_embeddings", 0) or WINDOW_TOKENS
    )
    given = list(start)
    piece = min(WINDOW_TOKENS, longest) - len(given)
    values = list[float]()
    for first in range(0, len(tokens) if piece > 0 else 0, max(1, piece)):
        part = torch.tensor([given + tokens[first : first + piece]], device=model.device)
        # A single token predicts nothing.
        if part.shape[1] < 2:
            break
        with repeatable_inference(model):
            logits = model(input_ids=part, use_cache=False).logits[0, :-1].to("cpu", torch.float32)
        log_likelihood = torch.log_softmax(logits.double(), -1).gather(
            1, part[0, 1:].cpu()[:, None]
        )[:, 0]
        values += (-log_likelihood).tolist()
    return values


def kl_per_position(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns KL(base || other) in nats at each position, float64 [positions].

    Args:
        base: logits [positions, vocabulary].
        other: logits of the same shape; NaN comes back where one of them is not finite.
    """
    # float64: nearly equal models differ by less than float32 resolves in a sum over a vocabulary.
    p = torch.log_softmax(base.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return torch.nansum(p.exp() * (p - q), -1).where(
        torch.isfinite(base).all(-1) & torch.isfinite(other).all(-1), torch.nan
    )


def compare_text(
    inputs: EvalInputs,
    source: ModelOutputs,
    loaded: ModelOutputs,
    coders: tuple[output.PromptCoder, output.PromptCoder],
    lossless: bool,
    stage: Stage,
    floor: Floor = (MAX_KL, MIN_TOP1),
) -> None:
    """Compares the outputs of both models.

    Args:
        inputs: prompts and text of both.
        source: the source's outputs.
        loaded: those of the loaded model, its logits along the source's continuations.
        coders: tokenizers of source and container.
        lossless: whether every weight is the source's, so that every difference is a fault.
        stage: receives findings and figures.
        floor: mean KL in nats, and top-1 agreement or cosine; one must hold. None: any may be.
    """
    if not _are_comparable(source, loaded, stage):
        return
    if not source.tokens:
        _compare_outputs(source, loaded, lossless, stage, floor)
        return
    prompts = []
    kls = list[float]()
    hits = 0
    places = 0
    for number, prompt in enumerate(inputs.prompts):
        base = source.tokens[number]
        other = loaded.tokens[number]
        first = next((i for i, (a, b) in enumerate(zip(base, other, strict=False)) if a != b), None)
        kl = kl_per_position(source.logits[number], loaded.logits[number])
        hits += int((source.logits[number].argmax(-1) == loaded.logits[number].argmax(-1)).sum())
        places += len(kl)
        kls += kl.tolist()
        prompts.append(
            {
                "prompt": prompt.text,
                "source": coders[0].decode(base),
                "loaded": coders[1].decode(other),
                "first_differing_token": first,
                "kl": [_plain(value) for value in kl.tolist()],
                "undecodable_in_source": coders[0]
                .decode(base)
                .rstrip(UNDECODABLE)
                .count(UNDECODABLE),
                "undecodable_in_loaded": coders[1]
                .decode(other)
                .rstrip(UNDECODABLE)
                .count(UNDECODABLE)
                + _tail(coders[1].decode(other)),
            }
        )
    # One position with NaN would make the mean useless; lost positions are a finding of their own.
    finite = [value for value in kls if math.isfinite(value)]
    facts = {
        "prompts": prompts,
        "mean_kl": sum(finite) / len(finite) if finite else None,
        "top1": hits / max(1, places),
        "same_text": sum(row["first_differing_token"] is None for row in prompts)
        / max(1, len(prompts)),
        "perplexity_of_source": _plain(source.perplexity),
        "perplexity_of_loaded": _plain(loaded.perplexity),
        "text_tokens": len(loaded.nll),
    }
    stage.facts |= facts
    _judge(facts, len(kls) - len(finite), lossless, stage, floor)
    stage.summary = _summary(facts)


def _are_comparable(source: ModelOutputs, loaded: ModelOutputs, stage: Stage) -> bool:
    """Tells whether outputs of two models have one form; otherwise that is a finding."""
    ours, theirs = (
        "text" if outputs.tokens else str([tuple(one.shape) for one in outputs.logits[:1]])
        for outputs in (loaded, source)
    )
    if ours == theirs and source.tokens:
        ours, theirs = (f"{one.logits[0].shape[-1]} tokens" for one in (loaded, source))
    if ours != theirs:
        error = ModelMismatchError(
            "the models give outputs of two kinds", got=ours, expected=theirs
        )
        stage.fail(error, cause=Cause.LOAD_FAILED)
        stage.summary = "outputs of two kinds"
    return ours == theirs


def _tail(text: str) -> int:
    """Counts undecodable characters at the end, without the one of a character cut in half."""
    return max(0, len(text) - len(text.rstrip(UNDECODABLE)) - 1)


def _judge(facts: dict[str, Any], lost: int, lossless: bool, stage: Stage, floor: Floor) -> None:
    if lost:
        stage.fail(
            BaselineError(f"logits are NaN or infinite at {lost} positions"), cause=Cause.PRECISION
        )
    # Small models differ in single tokens; both figures together show a real loss.
    far = facts["mean_kl"] is None or (
        floor is not None and facts["mean_kl"] > floor[0] and facts["top1"] < floor[1]
    )
    for number, row in enumerate(facts["prompts"]):
        # Small models write such bytes by themselves: a few more of them are no fault.
        if far and row["undecodable_in_loaded"] > row["undecodable_in_source"] + 2:
            text = (
                f"prompt {number} ({row['prompt'][:30]!r}): {row['undecodable_in_loaded']} "
                f"undecodable bytes in the loaded model's text (shown as {UNDECODABLE}), "
                f"{row['undecodable_in_source']} in the source's; first differing token "
                f"{row['first_differing_token']}"
            )
            stage.fail(BaselineError(text), cause=Cause.UNDECODABLE)
    different = [
        number
        for number, row in enumerate(facts["prompts"])
        if row["first_differing_token"] is not None
    ]
    if lossless and (different or facts["mean_kl"]):
        place = "the logits"
        if different:
            token = facts["prompts"][different[0]]["first_differing_token"]
            place = f"prompt {different[0]} from token {token} on"
        error = BaselineError(
            f"the container is lossless and gives another text than its source: {place}",
            got=f"mean KL {_kl_words(facts)}",
        )
        stage.fail(error, cause=Cause.TEXT_DIFFERS)
    elif far and floor is not None and facts["mean_kl"] is not None:
        agreement = f"top-1 agreement {facts['top1']:.1%} against the source"
        text = f"mean KL {facts['mean_kl']:.3f} nats, {agreement}"
        stage.fail(
            BaselineError(text, expected=f"at most {floor[0]} nats or at least {floor[1]:.0%}"),
            cause=Cause.PRECISION,
        )


def _compare_outputs(
    source: ModelOutputs, loaded: ModelOutputs, lossless: bool, stage: Stage, floor: Floor
) -> None:
    """Compares the first outputs of models that do not generate."""
    cosines = [
        float(
            torch.nn.functional.cosine_similarity(a.double().reshape(-1), b.double().reshape(-1), 0)
        )
        for a, b in zip(source.logits, loaded.logits, strict=True)
    ]
    same = all(torch.equal(a, b) for a, b in zip(source.logits, loaded.logits, strict=True))
    worst = min(cosines)
    stage.facts |= {"cosines": [_plain(value) for value in cosines], "same_outputs": same}
    stage.summary = (
        f"the model does not generate; smallest cosine of its output to the source's on "
        f"{len(cosines)} prompts: {worst:.6f}"
    )
    if lossless and not same:
        stage.fail(
            BaselineError(
                "the container is lossless and its model's output is not the source's", got=worst
            ),
            cause=Cause.TEXT_DIFFERS,
        )
    elif floor is not None and not worst > floor[1]:
        stage.fail(
            BaselineError(
                "output is far from the source's: cosine", got=worst, expected=f"above {floor[1]}"
            ),
            cause=Cause.PRECISION,
        )


def _kl_words(facts: dict[str, Any]) -> str:
    return "not finite" if facts["mean_kl"] is None else f"{facts['mean_kl']:.2e} nats"


def _summary(facts: dict[str, Any]) -> str:
    same = sum(row["first_differing_token"] is None for row in facts["prompts"])
    text = (
        f"{same} of {len(facts['prompts'])} texts equal the source's; along them KL "
        f"{_kl_words(facts)} per token, top-1 {facts['top1']:.1%}"
    )
    if facts["perplexity_of_source"] is not None and facts["perplexity_of_loaded"] is not None:
        perplexities = f"{facts['perplexity_of_source']:.3f} -> {facts['perplexity_of_loaded']:.3f}"
        text += f"; perplexity {perplexities} on {facts['text_tokens']} tokens"
    bad = [
        sum(row[f"undecodable_in_{which}"] for row in facts["prompts"])
        for which in ("source", "loaded")
    ]
    return (
        f"{text}; {bad[1]} undecodable bytes in its text, {bad[0]} in the source's"
        if any(bad)
        else text
    )


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
