"""An export of a container whose listed files are hostile: one typed error, and nothing stays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.exports.export import export
from codecllm.formats.errors import FormatError, LayoutError, SchemaError
from tests.sources import write_source
from tests.tampering import add_listed, copy_of, replace_listed

CONFIGS = {
    "a list": b"[]",
    "nested lists": b"[[]]",
    "null": b"null",
    "a text": b'"x"',
    "a number": b"5",
    "an open brace": b"{",
    "a byte that is no UTF-8": b"\xff",
    "5,000 levels": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "half a character": b'{"a":"\\ud800"}',
    "5,000 digits": b'{"a":' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    base = tmp_path_factory.mktemp("damaged")
    weights = np.random.default_rng(0).normal(0, 1, (64, 80)).astype(np.float32)
    tensors = dict.fromkeys(("a", "b", "c"), ("F32", weights))
    convert(write_source(base / "source", tensors, {"model_type": "x"}), base / "out")
    return base / "out"


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_that_is_no_object(container, tmp_path, content):
    folder = copy_of(container, tmp_path / "c")
    replace_listed(folder, "config.json", CONFIGS[content])
    with pytest.raises(FormatError, match=r"^config\.json: "):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantization_block_of_any_kind_is_taken_away(container, tmp_path):
    folder = copy_of(container, tmp_path / "c")
    replace_listed(folder, "config.json", b'{"a": 1, "quantization_config": []}')
    export(folder, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{\n  "a": 1\n}\n'


@pytest.mark.parametrize(
    ("name", "shard_bytes"),
    [
        ("model.safetensors/x", 10**9),
        ("model-00002-of-00003.safetensors/x", 10_000),
    ],
)
def test_a_side_file_below_the_name_of_a_weight_file(tmp_path, container, name, shard_bytes):
    folder = copy_of(container, tmp_path / "c")
    add_listed(folder, name, b"x")
    with pytest.raises(SchemaError, match="has the name of a file of the exported model"):
        export(folder, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", "no adapter"),
        ("adapter_model.safetensors", "no adapter"),
        ("adapter_model.bin", "no adapter"),
        # transformers reads it, and every file beside it, before model.safetensors.
        ("shard-00001-model-00001-of-00001.safetensors", "weights beside those of the container"),
        ("model.fp16.safetensors", "weights beside those of the container"),
    ],
)
def test_a_side_file_that_would_change_the_exported_model(container, tmp_path, name, words):
    folder = copy_of(container, tmp_path / "c")
    add_listed(folder, name, b"{}")
    with pytest.raises(LayoutError, match=words):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_the_config_names_are_no_part_of_an_export(container, tmp_path):
    folder = copy_of(container, tmp_path / "c")
    config = json.loads((folder / "config.json").read_bytes())
    named = json.dumps(config | {"transformers_weights": "other.safetensors"}).encode()
    replace_listed(folder, "config.json", named)
    export(folder, tmp_path / "out")
    assert "transformers_weights" not in (tmp_path / "out" / "config.json").read_text()
