"""A base model and others on one text: KL divergence per token, top-1 agreement, perplexities.

The text is read in windows, whose logits exist for a moment only. One number per token stays and,
of the base, the input of its head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from codecllm.formats.errors import ModelMismatchError, UsageError, foreign_errors_as

_ROWS = 8
"""Positions whose distributions are compared at once, in float64.

So few stay in the cache of a processor.
"""


@dataclass(slots=True)
class Divergence:
    """Results so far, one entry per predicted token.

    Attributes:
        kl: KL(base || other) in nats.
        same_top: whether both models find the same token most likely.
        base_nll: the base's negative log-likelihood of the token of the text, in nats.
        other_nll: the other model's.
    """

    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    base_nll: list[float] = field(default_factory=list)
    other_nll: list[float] = field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        """Mean KL per token."""
        return sum(self.kl) / len(self.kl)

    @property
    def kl_99(self) -> float:
        """The value that 99 % of the tokens do not exceed."""
        return sorted(self.kl)[math.ceil(0.99 * len(self.kl)) - 1]

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely successor is the same."""
        return sum(self.same_top) / len(self.same_top)

    @property
    def perplexities(self) -> tuple[float, float]:
        """Exp of the mean negative log-likelihood: base, other."""
        return _perplexity(self.base_nll), _perplexity(self.other_nll)


class Base:
    """The model that others are compared with.

    Its layers run once over the text, for any number of other models.
    """

    def __init__(
        self, model: Any, tokens: list[int], window: int, start: Sequence[int] = ()
    ) -> None:
        """Cuts the text into windows.

        Args:
            model: causal language model whose distribution is the reference.
            tokens: the text, which begins with `start`.
            window: tokens that a model sees at once, more than `start` has; the first of each
                window is only seen, not predicted.
            start: the start token that every window gets, or nothing.

        Raises:
            UsageError: no window has a token that is predicted.
        """
        given = list(start)
        text = tokens[len(given) :]
        piece = window - len(given)
        starts = range(0, len(text), piece) if piece > 0 else ()
        parts = [given + text[first : first + piece] for first in starts]
        # A window shorter than two tokens predicts nothing.
        self._model = model
        self._windows = [
            torch.tensor([part], device=next(model.parameters()).device)
            for part in parts
            if len(part) > 1
        ]
        if not self._windows:
            raise UsageError(
                "no token of the text is predicted",
                got=f"{len(tokens)} tokens in windows of {window}",
                expected="windows of two tokens or more behind the start token",
            )
        self._entering: list[torch.Tensor] = []  # per window: float [1, tokens, hidden]

    def compare(
        self, other: Any, on_window: Callable[[int, int], None] | None = None
    ) -> Divergence:
        """Runs another model of the same vocabulary on the text.

        Args:
            other: causal language model on the same device.
            on_window: called with the tokens done and all of them.

        Raises:
            ModelMismatchError: the vocabularies differ, a distribution is not finite, or a model
                cannot read the text.
        """
        # A model of a damaged config fails in any way.
        with foreign_errors_as(
            ModelMismatchError, "the models cannot read the text", file="config.json"
        ):
            return self._compare(other, on_window)

    def _compare(self, other: Any, on_window: Callable[[int, int], None] | None) -> Divergence:
        divergence = Divergence()
        tokens_done = 0
        total = sum(ids.shape[1] for ids in self._windows)
        for number, ids in enumerate(self._windows):
            with torch.inference_mode():
                ours = self._logits(number)
                theirs = other(input_ids=ids, use_cache=False).logits[0, :-1]
                if ours.shape != theirs.shape:
                    raise ModelMismatchError(
                        "vocabularies differ", got=theirs.shape[-1], expected=ours.shape[-1]
                    )
                for row in range(0, len(ours), _ROWS):
                    block = slice(row, row + _ROWS)
                    _add(divergence, ours[block], theirs[block], ids[0, 1:][block])
            tokens_done += ids.shape[1]
            if on_window is not None:
                on_window(tokens_done, total)
        if not all(map(math.isfinite, divergence.kl)):
            place = next(
                number for number, value in enumerate(divergence.kl) if not math.isfinite(value)
            )
            raise ModelMismatchError(f"a distribution is not finite at token {place}")
        return divergence

    def _logits(self, number: int) -> torch.Tensor:
        """Returns the logits of a window, [tokens - 1, vocabulary].

        From the second call on, only the head runs.
        """
        ids = self._windows[number]
        head = self._model.get_output_embeddings()
        if number < len(self._entering):
            again: torch.Tensor = head(self._entering[number])
            return again[0, :-1]
        head_tensors: list[torch.Tensor] = []
        hook = (
            None
            if head is None
            else head.register_forward_hook(
                lambda _, entering, out: head_tensors.extend((*entering, out))
            )
        )
        try:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        # A model that does more to its logits than its head does (caps, scales) runs whole each
        # time.
        if (
            len(head_tensors) == 2
            and len(self._entering) == number
            and torch.equal(head_tensors[1], logits)
        ):
            self._entering.append(head_tensors[0])
        return logits[0, :-1]


def _add(
    divergence: Divergence, base: torch.Tensor, other: torch.Tensor, text: torch.Tensor
) -> None:
    # In float32 the error of a sum over the vocabulary can exceed a small divergence.
    p = torch.log_softmax(base.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    divergence.kl += (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
    divergence.same_top += (base.argmax(-1) == other.argmax(-1)).tolist()
    for values, log_probability in ((divergence.base_nll, p), (divergence.other_nll, q)):
        values += (-log_probability.gather(1, text[:, None])[:, 0]).tolist()


def _perplexity(nll: list[float]) -> float:
    return math.exp(min(700.0, sum(nll) / len(nll)))
