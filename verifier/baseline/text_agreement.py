"""How closely a converted model predicts a fixed text beside its source: KL and top-1.

Both models get the same tokens (teacher forcing), pieces of the text that `codecllm eval` takes by
default, in one batch. The figures of the prompts are taken along the source's own words, which a
model predicts better than other people's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from codecllm.formats.errors import BaselineError
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.loader.hf.quiet import silenced
from codecllm.verifier.baseline.inference import repeatable_inference
from codecllm.verifier.baseline.model_output import PromptCoder
from codecllm.verifier.baseline.record import TextAgreement
from codecllm.verifier.evaluation import sample_text

WINDOWS = 4
WINDOW_TOKENS = 128

_ROWS = 16
"""Positions whose distributions are compared at once, in float64."""


@dataclass(frozen=True, slots=True)
class TextRun:
    """A model on the text.

    Attributes:
        ids: int64 [WINDOWS, WINDOW_TOKENS].
        logits: [WINDOWS, WINDOW_TOKENS - 1, vocabulary] on the CPU, in the model's dtype.
    """

    ids: torch.Tensor
    logits: torch.Tensor


class NoTextError(Exception):
    """The text cannot be used; the message says why."""


def run_on_text(model: Any, coder: PromptCoder) -> TextRun:
    """Runs the source on the text.

    Raises:
        NoTextError: the model or its tokenizer has no use for it, or a logit is not finite.
    """
    if model.config.is_encoder_decoder:
        raise NoTextError("an encoder and decoder predicts no text without another one")
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
    with silenced():  # the whole text may be longer than the model's context
        windows = coder.windows(sample_text(), WINDOWS, min(WINDOW_TOKENS, longest))
    if not windows:
        raise NoTextError("the tokenizer makes no or too few tokens of it")
    ids = torch.tensor(windows)
    logits = _logits(model, ids)
    if not bool(logits.isfinite().all()):
        raise NoTextError("logits of the source are not finite")
    return TextRun(ids, logits)


def compare_on_text(model: Any, source: TextRun) -> TextAgreement:
    """Runs the converted model on the same tokens.

    Raises:
        BaselineError: one of its logits is not finite.
    """
    logits = _logits(model, source.ids)
    if not bool(logits.isfinite().all()):
        raise BaselineError("logits of the converted model are not finite", file=BASELINE_NAME)
    kl_sum = 0.0
    same = 0
    bases = source.logits.flatten(0, 1)
    others = logits.flatten(0, 1)
    for row in range(0, len(bases), _ROWS):
        block = slice(row, row + _ROWS)
        base = bases[block]
        other = others[block]
        # float64: the divergence is a small sum of a hundred thousand terms of both signs.
        p = torch.log_softmax(base.double(), -1)
        q = torch.log_softmax(other.double(), -1)
        kl_sum += float((p.exp() * (p - q)).sum())
        same += int((base.argmax(-1) == other.argmax(-1)).sum())
    positions = len(bases)
    digest = hashlib.sha256(source.ids.numpy().astype("<i8").tobytes()).hexdigest()
    return TextAgreement(
        windows=len(source.ids),
        tokens=positions,
        sha256=digest,
        top1=same / positions,
        mean_kl=max(0.0, kl_sum / positions),
    )


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with repeatable_inference(model):
        logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits[:, :-1].cpu()
