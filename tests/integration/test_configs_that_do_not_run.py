"""A config with which a container loads, and its model fails or computes something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import codecllm
from codecllm.formats.errors import CodecLLMError, ModelMismatchError, UsageError
from codecllm.loader import from_pretrained
from codecllm.verifier import verify
from codecllm.verifier.diagnosis import diagnose
from codecllm.verifier.evaluation.candidates import find_candidate
from codecllm.verifier.evaluation.divergence import Base
from codecllm.verifier.evaluation.evaluate import evaluate
from codecllm.verifier.model_comparison import compare_models
from tests.tampering import copy_of, replace_listed

CHANGES = {
    "no finite logit": {"rms_norm_eps": -1e30},
    "another class": {"architectures": ["LlamaModel"]},
    "an encoder": {"is_encoder_decoder": True},
    "no named outputs": {"return_dict": False},
}


@pytest.fixture(params=CHANGES)
def changed(request, container, tmp_path):
    """A container whose config was changed."""
    folder = copy_of(container("llama", "int8"), tmp_path / "c")
    config = json.loads((folder / "config.json").read_bytes()) | CHANGES[request.param]
    replace_listed(folder, "config.json", json.dumps(config).encode())
    return folder


def test_verify_and_diagnose_have_findings(changed, tiny):
    for report in (verify(changed, source=tiny("llama")), diagnose(changed, tiny("llama"))):
        findings = [finding for stage in report.stages for finding in stage.findings]
        # A model that refuses plain text has no text to compare: its stage says so.
        assert findings or report.stage("text").skipped
        assert all(isinstance(finding.error, CodecLLMError) for finding in findings)
        assert all("unsupported format" not in str(finding.error) for finding in findings)


def test_a_comparison_says_so(changed, container):
    result = compare_models(container("llama", "int8"), changed)
    assert "not_run" in result or result["outputs"]["findings"]


@pytest.fixture(scope="module")
def worded(tiny, tmp_path_factory):
    """A model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = copy_of(tiny("llama"), tmp_path_factory.mktemp("worded") / "m")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(60)} | {"?": 60}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["no finite logit", "another class", "no named outputs"])
def test_an_evaluation_is_one_error(worded, tmp_path, name):
    folder = copy_of(worded, tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | CHANGES[name]))
    with pytest.raises(ModelMismatchError):
        evaluate(worded, [folder], text="w1 w2 w3 w4")


def test_a_window_without_a_predicted_token_is_refused(worded, tmp_path):
    folder = copy_of(worded, tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"max_position_embeddings": 1}))
    with pytest.raises(UsageError, match="no token of the text is predicted"):
        evaluate(folder, [worded], text="w1 w2 w3 w4")
    with pytest.raises(UsageError, match="no token of the text is predicted"):
        Base(None, [1, 2, 3], 2, [1, 2])


def test_the_size_of_a_hostile_header_is_refused(worded, tmp_path):
    folder = copy_of(worded, tmp_path / "m")
    with open(folder / "model.safetensors", "r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(2 << 40)
    with pytest.raises(CodecLLMError, match="header is too long"):
        find_candidate(folder).bits()


def test_no_pipe_of_a_tokenizers_name_is_waited_for(container, tiny, tmp_path):
    folder = copy_of(container("llama", "int8"), tmp_path / "c")
    source = copy_of(tiny("llama"), tmp_path / "source")
    tokens = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}}}
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    for name in ("tokenizer.json", "tokenizer.model"):
        os.mkfifo(folder / name)
    signal.alarm(120)
    try:
        verify(folder, source=source)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("change", [{"hidden_act": "nope"}, {"pad_token_id": 10**6}], ids=str)
def test_no_class_of_a_config_can_be_built(container, tmp_path, change):
    """Without a class in the config, each usual one is tried."""
    folder = copy_of(container("llama", "int8"), tmp_path / "c")
    config = json.loads((folder / "config.json").read_bytes()) | change | {"architectures": []}
    replace_listed(folder, "config.json", json.dumps(config).encode())
    with pytest.raises(ModelMismatchError, match="could not build"):
        from_pretrained(folder)


def test_a_class_that_cannot_be_imported_is_one_error(container, tmp_path):
    """Such as under -OO: transformers reads docstrings when it imports a class."""
    code = (
        "import sys, codecllm\n"
        "from codecllm.formats.errors import UnsupportedEnvironmentError\n"
        "try:\n    codecllm.from_pretrained(sys.argv[1])\n"
        "except UnsupportedEnvironmentError as exc:\n    print(exc)\n"
    )
    command = [sys.executable, "-OO", "-c", code, str(container("llama", "int8"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert "transformers cannot import LlamaForCausalLM: " in done.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "nope"},
        {"attn_implementation": "nope"},
        {"architectures": ["GPT2LMHeadModel"]},
        {"num_hidden_layers": 100_000},
    ],
    ids=str,
)
def test_an_export_that_needs_the_class_is_one_error(container, tmp_path, change):
    folder = copy_of(container("llama", "int8"), tmp_path / "c")
    config = json.loads((folder / "config.json").read_bytes()) | change
    replace_listed(folder, "config.json", json.dumps(config).encode())
    began = time.thread_time()
    with pytest.raises(ModelMismatchError, match=r"^config\.json: "):
        codecllm.export(folder, tmp_path / "out", format="compressed-tensors")
    assert time.thread_time() - began < 5
    assert not (tmp_path / "out").exists()
