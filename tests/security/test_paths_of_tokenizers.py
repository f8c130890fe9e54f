"""Settings of a tokenizer lead to no file but those of its folder that are looked at before."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from codecllm.formats.errors import SchemaError, UnsafePathError
from codecllm.loader.hf.folder import read_tokenizer
from codecllm.loader.hf.tokenizer_paths import unread_paths
from tests.tampering import add_listed, reseal


@pytest.fixture
def copies(container, tmp_path):
    """A container and a plain model with the same tokenizer, and one of other numbers elsewhere."""
    shutil.copytree(container, tmp_path / "out")
    shutil.copytree(container.parent / "source", tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    document = json.loads((container / "tokenizer.json").read_bytes())
    vocabulary = document["model"]["vocab"]
    others = {word: len(vocabulary) - 1 - number for word, number in vocabulary.items()}
    document["model"]["vocab"] = others
    (elsewhere / "tokenizer.4.0.json").write_text(json.dumps(document))
    (elsewhere / "vocab.json").write_text(json.dumps(others))
    (elsewhere / "merges.txt").write_text("#version: 0.2\n")
    os.mkfifo(elsewhere / "pipe")
    return tmp_path


def _drop(base, name):
    def edit(document):
        document["files"] = [record for record in document["files"] if record["name"] != name]

    (base / "model" / name).unlink()
    (base / "out" / name).unlink()
    reseal(base / "out", edit)


def _settle(base, changes, name="tokenizer_config.json"):
    """Puts entries into the settings of both."""
    path = base / "model" / name
    document = json.loads(path.read_bytes()) if path.exists() else {}
    data = json.dumps(document | changes).encode()
    if path.exists():
        _drop(base, name)
    path.write_bytes(data)
    add_listed(base / "out", name, data)


LED = {
    "a vocabulary": {"vocab": "vocab.json", "merges": "merges.txt"},
    "a pipe": {"vocab": "pipe", "merges": "pipe"},
    "by position": {"init_inputs": ["vocab.json", "merges.txt"]},
    "a version": {"fast_tokenizer_files": ["tokenizer.4.0.json"]},
}


@pytest.mark.parametrize("case", LED)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_that_lead_elsewhere_are_refused(copies, case, name):
    """The pipe would wait for ever inside of a library that no signal ends."""
    elsewhere = copies / "elsewhere"
    changes = {
        key: [f"{elsewhere}/{one}" for one in value]
        if isinstance(value, list)
        else str(elsewhere / value)
        for key, value in LED[case].items()
    }
    if case != "a version":
        _drop(copies, "tokenizer.json")
    _settle(copies, {"tokenizer_class": "GPT2Tokenizer"})
    _settle(copies, changes, name)
    for folder in (copies / "out", copies / "model"):
        with pytest.raises(UnsafePathError, match=next(iter(changes))) as caught:
            read_tokenizer(folder)
        assert caught.value.file == name


def test_places_of_files_when_they_were_written_have_no_effect(copies):
    """As many published settings have them."""
    before = read_tokenizer(copies / "model")("w1 w2").input_ids
    elsewhere = copies / "elsewhere"
    changes = {
        "tokenizer_file": str(elsewhere / "tokenizer.4.0.json"),
        "vocab_file": str(elsewhere / "vocab.json"),
        "special_tokens_map_file": str(elsewhere / "pipe"),
        "spm_file": None,
        "name_or_path": str(elsewhere),
    }
    _settle(copies, changes)
    for folder in (copies / "out", copies / "model"):
        assert read_tokenizer(folder)("w1 w2").input_ids == before == [1, 2]
    _drop(copies, "tokenizer.json")
    for folder in (copies / "out", copies / "model"):
        with pytest.raises(Exception, match="transformers cannot read the tokenizer"):
            read_tokenizer(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config.json": {"tokenizer_class": "RagTokenizer"}},
        {"tokenizer_config.json": {"tokenizer_class": "RagTokenizerFast"}},
        {"tokenizer_config.json": {"tokenizer_class": "AutoTokenizer"}},
        {"tokenizer_config.json": {"tokenizer_class": "AutoModel"}},
        {"tokenizer_config.json": {"tokenizer_class": "pipeline"}},
        {"config.json": {"tokenizer_class": "RagTokenizer"}},
        {"config.json": {"model_type": "rag"}},
        {"config.json": {"model_type": "encoder-decoder", "encoder": {"model_type": "rag"}}},
    ],
    ids=str,
)
def test_classes_of_something_else_are_refused(copies, changes):
    """The tokenizers of a RAG model would wait for the pipe for ever, in folders of their own."""
    pipe = {"tokenizer_class": "GPT2Tokenizer", "vocab": str(copies / "elsewhere" / "pipe")}
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        (copies / "model" / part).mkdir()
        _settle(copies, pipe, f"{part}/tokenizer_config.json")
    for name, change in changes.items():
        _settle(copies, change, name)
    for folder in (copies / "out", copies / "model"):
        with pytest.raises(SchemaError, match="the class is not that of one tokenizer"):
            read_tokenizer(folder)


@pytest.mark.parametrize("name", ["GPT2TokenizerFast", "NoSuchTokenizer"])
def test_other_classes_are_left_to_transformers(copies, name):
    _settle(copies, {"tokenizer_class": name})
    for folder in (copies / "out", copies / "model"):
        assert len(read_tokenizer(folder)) > 2


def test_a_class_that_needs_a_library_is_left_to_transformers(copies):
    _settle(copies, {"tokenizer_class": "CpmTokenizer"})
    for folder in (copies / "out", copies / "model"):
        with pytest.raises(SchemaError, match="transformers cannot read the tokenizer"):
            read_tokenizer(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab": "a"},
        {"merges": "a"},
        {"entity_vocab": "a"},
        {"init_inputs": [None, "a"]},
        {"fast_tokenizer_files": ["tokenizer.json", "../tokenizer.4.0.json"]},
        {"fast_tokenizer_files": ["sub/tokenizer.4.0.json"]},
        {"fast_tokenizer_files": ["xtokenizer.4.0.json"]},
        {"fast_tokenizer_files": "tokenizer.4.0.json/../x"},
        {"fast_tokenizer_files": [5]},
        {"sp_model_kwargs": {"model_file": "a"}},
        {"mecab_kwargs": {"mecab_option": "-d /tmp"}},
        {"sudachi_kwargs": {"sudachi_config_path": "a"}},
    ],
    ids=str,
)
def test_entries_that_can_only_name_files_are_refused(settings):
    for documents in ((settings, None), (None, settings)):
        with pytest.raises(UnsafePathError, match=next(iter(settings))):
            unread_paths(*documents)


def test_settings_that_name_no_file_pass():
    settings = {
        "vocab": {"a": 0},
        "merges": [],
        "init_inputs": [],
        "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"],
        "sp_model_kwargs": {"alpha": 0.1, "enable_sampling": True},
        "mecab_kwargs": {"mecab_dic": "unidic_lite"},
        "unk_token": "/path/to_file",
        "vocab_file": None,
    }
    assert unread_paths(settings, {"unk_token": "<unk>", "vocab_file": None}) == {}
    assert unread_paths([], 5) == unread_paths(None, None) == {}
    assert unread_paths({"vocab_file": "/a", "target_spm": "b"}, None) == {
        "vocab_file": None,
        "target_spm": None,
    }
    with pytest.raises(UnsafePathError, match="vocab_file is no special token"):
        unread_paths(None, {"vocab_file": "a"})
