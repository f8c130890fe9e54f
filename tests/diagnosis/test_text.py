"""Verdicts about text that has gone wrong, from made-up answers of two models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from codecllm.verifier.baseline.model_output import PromptTokens
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.model.text import (
    EvalInputs,
    ModelOutputs,
    compare_text,
    kl_per_position,
    negative_log_likelihood,
)
from codecllm.verifier.report import Stage

INPUTS = EvalInputs([PromptTokens("The capital of France is", [1, 2])], [])


class Bytes:
    """Decodes tokens as UTF-8 bytes, as byte-level tokenizers do."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def _judged(source, loaded, lossless=False):
    stage = Stage("text")
    compare_text(INPUTS, source, loaded, (Bytes(), Bytes()), lossless, stage)
    return stage


def _said(text, favour, noise=0.0):
    """Answers with the given bytes; the logits prefer the token `favour` by 6."""
    logits = torch.zeros(len(text), 256)
    logits[:, favour] = 6.0 + noise
    return ModelOutputs([list(text)], [logits], [1.0, 2.0])


def test_undecodable_bytes_are_called_that():
    stage = _judged(_said(b" Paris. The answer", 5), _said(b"\xff" * 10 + b" Paris..", 9))
    (finding,) = [one for one in stage.findings if one.cause == Cause.UNDECODABLE]
    assert "10 undecodable bytes" in finding.error.message
    assert "0 in the source's" in finding.error.message
    assert "first differing token 0" in finding.error.message
    assert stage.findings[0] is finding
    assert "10 undecodable bytes in its text" in stage.summary


def test_a_character_cut_in_half_at_the_end_is_none():
    stage = _judged(_said("Österreich".encode(), 5), _said("Österreic".encode() + b"\xc3", 5))
    assert not stage.findings
    assert stage.facts["prompts"][0]["undecodable_in_loaded"] == 0


def test_too_little_precision_and_lost_logits():
    stage = _judged(_said(b"abcdef", 5), _said(b"abcdxf", 9))
    assert [one.cause for one in stage.findings] == [Cause.PRECISION]
    assert stage.facts["prompts"][0]["first_differing_token"] == 4
    broken = _said(b"abcdef", 5)
    broken.logits[0][2, 7] = float("nan")
    stage = _judged(_said(b"abcdef", 5), broken)
    assert "at 1 positions" in stage.findings[0].error.message


def test_a_lossless_container_must_say_the_same():
    assert not _judged(_said(b"abcdef", 5), _said(b"abcdef", 5), lossless=True).findings
    for other in (_said(b"abcdxf", 5), _said(b"abcdef", 5, noise=0.01)):
        assert [
            one.cause for one in _judged(_said(b"abcdef", 5), other, lossless=True).findings
        ] == [Cause.TEXT_DIFFERS]
        assert not _judged(_said(b"abcdef", 5), other).findings


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * (torch.log(p / q)).sum()
    assert kl_per_position(p.log(), q.log()).item() == pytest.approx(float(expected), rel=1e-6)
    assert kl_per_position(p.log(), torch.tensor([[0.0, float("inf")]])).isnan().all()


class Counting:
    """A model of 16 equally likely tokens and windows of 4, which keeps what it was given."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4))

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, use_cache):
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 16))


@pytest.mark.parametrize(
    ("start", "windows", "predicted"),
    [
        # Behind the start token every token of the text is predicted, the last one too.
        ([1], [[1, 5, 6, 7], [1, 8, 9, 10], [1, 11]], 7),
        # Without one the first token of each window is only seen.
        ([], [[5, 6, 7, 8], [9, 10, 11]], 5),
    ],
)
def test_windows_of_the_perplexity_begin_with_the_start_token(start, windows, predicted):
    model = Counting()
    values = negative_log_likelihood(model, [5, 6, 7, 8, 9, 10, 11], start)
    assert model.seen == windows
    assert values == pytest.approx([math.log(16)] * predicted)
