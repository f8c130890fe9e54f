"""Texts of a calibration begin as the texts that a model was trained on."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from codecllm.calibrator import calibrate, calibration
from codecllm.calibrator.text import (
    _start_token,
    begins_with_start,
    file_text,
    mixed_text,
    own_text,
    random_text,
    record,
)
from codecllm.converter.source.source import SourceModel
from codecllm.loader.hf.plain import load_plain
from tests.integration import tiny_models

WORDS = {"<s>": 0, "one": 1, "two": 2, "three": 3, "four": 4}
TEXT = "one two three four one two three four one two"


@pytest.fixture
def folder(tmp_path):
    return tiny_models.llama(tmp_path / "model")


def _with_tokenizer(folder, *, starts, words=None):
    tokenizer = Tokenizer(WordLevel(words or WORDS, unk_token="the" if words else "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", (words or WORDS)["<s>"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"})
    )


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        (True, [[0, 1, 2, 3], [0, 4, 1, 2], [0, 3, 4, 1]]),
        (False, [[1, 2, 3, 4], [1, 2, 3, 4]]),
    ],
)
def test_every_piece_of_a_file_has_the_start_token_that_the_tokenizer_gives_a_text(
    tmp_path, folder, starts, expected
):
    _with_tokenizer(folder, starts=starts)
    (tmp_path / "text").write_text(TEXT)
    tokens = file_text(load_plain(folder), folder, tmp_path / "text", 4)
    assert tokens.tolist() == expected


@pytest.mark.parametrize("starts", [True, False])
def test_a_models_own_text_has_a_start_token_where_its_tokenizer_gives_texts_one(folder, starts):
    assert not begins_with_start(folder)
    _with_tokenizer(folder, starts=starts)
    with SourceModel(folder) as source:
        recorded = calibrate(source, "self").record
    model = load_plain(folder, torch.float32)
    written = own_text(model, keep_start=starts)
    assert begins_with_start(folder) is starts
    assert record("self", written) == recorded
    assert bool((written[:, 0] == _start_token(model.config)).all()) is starts


def test_a_start_token_changes_nothing_of_what_is_written(folder):
    model = load_plain(folder)
    kept = own_text(model, 6, keep_start=True)
    assert kept.shape == (64, 6)
    assert torch.equal(kept[:, 1:], own_text(model, 5))


_TEXT = files("codecllm.calibrator").joinpath("mixed_text.txt").read_text(encoding="utf-8")
MANY_WORDS = {
    word: number
    for number, word in enumerate(["<s>", *dict.fromkeys(re.findall(r"\w+", _TEXT))][:500])
}


@pytest.mark.parametrize("starts", [True, False])
def test_the_text_of_codecllm_has_the_same_pieces_at_every_length(folder, starts):
    _with_tokenizer(folder, starts=starts, words=MANY_WORDS)
    model = load_plain(folder)
    whole = mixed_text(model, folder, 256)
    # The model sees 64 positions at most, of which encoders may keep two.
    assert whole.shape == (64, 62)
    assert torch.equal(mixed_text(model, folder, 20), whole[:, :20])
    assert len({tuple(piece) for piece in whole.tolist()}) == 64
    assert bool((whole[:, 0] == 0).all()) is starts
    with SourceModel(folder) as source:
        found = calibrate(source, "text")
    assert found.record == record("text", whole)
    assert found.notes == []


def test_without_a_tokenizer_of_use_the_model_writes_its_text(folder, monkeypatch):
    note = "no tokenizer of use: not calibrated on the text of codecllm"
    model = load_plain(folder)
    assert mixed_text(model, folder) is None
    with SourceModel(folder) as source:
        found = calibrate(source, "text")
    assert (found.record.kind, found.notes) == ("self", [note])
    # Ids that the model does not have are of no use either.
    _with_tokenizer(folder, starts=False, words={**MANY_WORDS, "the": model.config.vocab_size})
    assert mixed_text(model, folder) is None
    # So is a text in which nearly all words are unknown.
    _with_tokenizer(folder, starts=False)
    assert mixed_text(model, folder) is None
    monkeypatch.setattr(calibration, "free_memory", lambda device: 1000)
    with SourceModel(folder) as source:
        found = calibrate(source, "text")
    assert found.record.tokens == 16 * 62
    assert found.record == record("random", random_text(model)[:16])


def test_a_model_larger_than_memory_reads_the_text_of_codecllm(folder, monkeypatch):
    _with_tokenizer(folder, starts=False, words=MANY_WORDS)
    monkeypatch.setattr(calibration, "free_memory", lambda device: 1000)
    with SourceModel(folder) as source:
        found = calibrate(source, "text")
    assert found.record == record("text", mixed_text(load_plain(folder), folder)[:16])
