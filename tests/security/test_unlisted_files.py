"""Unlisted files beside a container change nothing; beside a pinned one they are refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

import codecllm
from codecllm.cli import main
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, SchemaError, UnsafePathError
from codecllm.generation import generate
from codecllm.loader.hf.folder import read_config, read_tokenizer
from codecllm.verifier.baseline.model_output import PromptCoder
from codecllm.verifier.evaluation.evaluate import evaluate
from tests.tampering import copy_of, replace_listed

IDS = torch.tensor([[1, 2, 3]])
PROMPT = "w1 w2 w3"
TEXT = "w1 w2 w3 w4 w5 w6 w7 w8"
UNLISTED = {
    "added_tokens.json": {"w1 w2": 9},
    "special_tokens_map.json": {"eos_token": "w5", "bos_token": "w6"},
    "generation_config.json": {"do_sample": True, "temperature": 9.0, "max_length": 4},
    "chat_template.jinja": "{{ 'another' }}",
    "additional_chat_templates/tool_use.jinja": "{{ 'another' }}",
    "vocab.json": {"w1": 3, "w2": 2, "w3": 1},
}


@pytest.fixture
def surrounded(container, tmp_path):
    folder = copy_of(container, tmp_path / "out")
    for name, content in UNLISTED.items():
        path = folder / name
        assert not path.exists(), f"{name} is listed: it shows nothing"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _seen(folder):
    """Everything that is read of a container, in a form that can be compared."""
    model = codecllm.from_pretrained(folder)
    tokenizer = read_tokenizer(folder)
    scores = evaluate(folder, [folder], text=TEXT * 4)
    return {
        "config": {k: v for k, v in read_config(folder).to_dict().items() if k != "_name_or_path"},
        "tokens": tokenizer(PROMPT)["input_ids"],
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "prompts": PromptCoder(folder, model.config).prompts(),
        "generation": model.generation_config.to_dict(),
        "logits": model(IDS).logits.tolist(),
        "text": generate(folder, PROMPT, max_new_tokens=4),
        "perplexity": scores.base_perplexity,
    }


def test_unlisted_files_change_nothing(container, surrounded):
    expected = _seen(container)
    got = _seen(surrounded)
    for key, value in expected.items():
        assert got[key] == value, key
    report = codecllm.verify(surrounded)
    assert report.ok, report.stages
    assert sum("not listed" in line for line in report.warnings) == len(UNLISTED)


def test_transformers_itself_would_read_them(container, surrounded):
    """Guards the test above: the files that it adds are such as transformers reads."""
    plain, other = (hf.AutoTokenizer.from_pretrained(path) for path in (container, surrounded))
    assert plain.chat_template != other.chat_template
    assert hf.GenerationConfig.from_pretrained(surrounded).temperature == 9.0
    tokens = [hf.AutoTokenizer.from_pretrained(path)(PROMPT) for path in (container, surrounded)]
    assert tokens[0]["input_ids"] != tokens[1]["input_ids"]


def test_a_listed_config_cannot_point_to_an_unlisted_one(container, tmp_path):
    folder = copy_of(container, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps(config | {"hidden_size": 8}))
    config["configuration_files"] = ["config.4.0.0.json"]
    replace_listed(folder, "config.json", json.dumps(config).encode())
    assert hf.AutoConfig.from_pretrained(folder).hidden_size == 8
    for read in (read_config, codecllm.from_pretrained):
        with pytest.raises(UnsafePathError, match="configuration_files leads transformers"):
            read(folder)


@pytest.mark.parametrize("name", UNLISTED)
def test_beside_a_pinned_manifest_they_are_an_error(container, tmp_path, name, monkeypatch):
    folder = copy_of(container, tmp_path / "out")
    with Container(folder) as opened:
        sha256 = opened.manifest_sha256
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    report = codecllm.verify(folder, level="structure", expected_manifest_sha256=sha256)
    (finding,) = report.stages[0].findings
    shown = name.split("/")[0]
    assert isinstance(finding.error, SchemaError)
    assert finding.error.file == shown
    with pytest.raises(SchemaError) as caught:
        codecllm.from_pretrained(folder, expected_manifest_sha256=sha256)
    assert caught.value.file == shown
    monkeypatch.setattr(
        "sys.argv", ["codecllm", "verify", str(folder), "--manifest-sha256", sha256]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1


def test_what_no_class_reads_is_a_warning_beside_a_pinned_manifest(container, tmp_path):
    folder = copy_of(container, tmp_path / "out")
    for name in ("README.md", "notes.md", ".cache"):
        (folder / name).write_text("of the user")
    with Container(folder) as opened:
        sha256 = opened.manifest_sha256
    report = codecllm.verify(folder, expected_manifest_sha256=sha256)
    assert report.ok
    assert report.warnings == ["notes.md is not listed in the manifest: not checked"]
    assert codecllm.from_pretrained(folder, expected_manifest_sha256=sha256) is not None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_changed_listed_file_never_reaches_transformers(container, tmp_path, name):
    folder = copy_of(container, tmp_path / "out")
    (folder / name).write_bytes((folder / name).read_bytes().replace(b"w1", b"w7", 1)[:-1] + b" ")
    with pytest.raises(ChecksumError) as caught:
        read_tokenizer(folder)
    assert caught.value.file == name
    with Container(folder) as opened, pytest.raises(ChecksumError):
        PromptCoder(opened, read_config(container))


def test_the_copies_are_gone_afterwards(container, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    read_tokenizer(container)
    codecllm.from_pretrained(container)
    assert list(tmp_path.iterdir()) == []
