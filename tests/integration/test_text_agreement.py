"""The figures on a fixed text that a conversion records: KL and top-1, source against converted."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

import codecllm
from codecllm.formats.errors import BaselineError
from codecllm.info import describe, render
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier import record_baseline, verify
from codecllm.verifier.baseline import baseline, text_agreement
from codecllm.verifier.baseline.model_output import PromptCoder
from codecllm.verifier.evaluation import sample_text
from tests import tampering

START = 511
LENGTH = 64
"""Tokens of a window: no more positions has the model."""


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A tiny model whose tokenizer knows the first words of the text and begins with a token."""
    folder = tampering.copy_of(tiny("llama"), tmp_path_factory.mktemp("text") / "source")
    splitter = pre_tokenizers.Whitespace()
    words = [word for word, _ in splitter.pre_tokenize_str(sample_text())]
    known = {word: number for number, word in enumerate(dict.fromkeys(words[:800]))}
    assert len(known) < START
    tokenizer = Tokenizer(WordLevel({**known, "<s>": START}, unk_token="the"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds))
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "c"
    codecllm.convert(source, out, bits=4, calibrate="none", include=("*",), baseline=True)
    return out


def _agreement(folder):
    return json.loads((folder / "baseline.json").read_bytes())["agreement"]


def test_figures_are_those_of_a_direct_computation(source, converted):
    model, coded = load_plain(source), from_pretrained(converted, resident="dense")
    coder = PromptCoder(source, model.config)
    windows = torch.tensor(coder.windows(sample_text(), 4, LENGTH))
    assert (windows[:, 0] == START).all()
    with torch.inference_mode():
        base, other = (
            each(input_ids=windows).logits[:, :-1].double().flatten(0, 1) for each in (model, coded)
        )
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    record = _agreement(converted)["text"]
    assert (record["windows"], record["tokens"]) == (4, 4 * 63)
    assert record["mean_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert record["top1"] == float((base.argmax(-1) == other.argmax(-1)).double().mean())
    assert record["mean_kl"] > 0
    assert record["sha256"] == hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()


def test_windows_are_spread_over_the_text(source):
    coder = PromptCoder(source, load_plain(source).config)
    words = coder.encode(sample_text())[1:]
    windows = coder.windows(sample_text(), 4, LENGTH)
    assert windows[0] == [START, *words[:63]]
    assert windows[-1] == [START, *words[-63:]]
    assert coder.windows(" ".join(["the"] * 251), 4, LENGTH) == []
    assert len(coder.windows(" ".join(["the"] * 252), 4, LENGTH)) == 4


def test_info_and_verify_show_the_text(converted):
    facts = describe(converted)
    figures = facts["agreement"]["text"]
    console = Console(record=True, width=200)
    render(facts, console)
    words = (
        f"top-1 {figures['top1']:.1%}, mean KL {figures['mean_kl']:.2e} nats over 252 tokens of "
        "text, same text on "
    )
    assert words in console.export_text()
    assert words in verify(converted, require_baseline=True).stage("baseline").summary


def test_a_lossless_container_needs_no_text(source, tmp_path):
    codecllm.convert(source, tmp_path / "c", scheme="lossless", baseline=True)
    assert _agreement(tmp_path / "c") == {"top1": 1.0, "mean_kl": 0.0, "same_tokens": 1.0}


def test_a_text_that_takes_too_long_is_left_out_and_said(source, tmp_path, monkeypatch):
    out = tmp_path / "c"
    size = codecllm.convert(source, out, baseline=False).report.manifest.source.tensor_bytes
    # Fast enough for the prompts alone: 160 passes of the weights, not 232.
    monkeypatch.setattr(baseline, "_BYTES_PER_SECOND", {"cpu": size * 200 / baseline.MAX_SECONDS})
    outcome = record_baseline(out, source)
    assert outcome.kind == "greedy"
    assert "text" not in _agreement(out)
    reason = "it would take about 12 minutes (--baseline insists)"
    assert _agreement(out)["text_missing"] == reason
    assert f"not measured on text: {reason}" in outcome.summary()
    record_baseline(out, source, required=True)
    assert _agreement(out)["text"]["tokens"] == 252


def test_logits_that_are_not_finite_are_an_error():
    logits = torch.zeros(1, 4, 8)
    logits[0, 2, 5] = float("nan")
    model = SimpleNamespace(device="cpu")
    run = text_agreement.TextRun(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, 8))

    class Broken(SimpleNamespace):
        def __call__(self, **inputs):
            return SimpleNamespace(logits=logits)

    with pytest.raises(BaselineError, match="not finite"):
        text_agreement.compare_on_text(Broken(**vars(model)), run)
