"""An index of weight files leads a load to no file of another folder, and to no pipe."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import transformers as hf

import codecllm
from codecllm.formats.errors import LayoutError, UnsafePathError
from codecllm.loader.hf.plain import load_plain
from tests.integration import tiny_models
from tests.tampering import replace_listed, reseal

INDEX = "model.safetensors.index.json"


@pytest.fixture
def two(container, tmp_path):
    """Two containers of one class beside each other: of `out` the index is to be changed."""
    other = tiny_models.llama(tmp_path / "source")
    codecllm.convert(other, tmp_path / "other", scheme="lossless")
    shutil.copytree(container, tmp_path / "out")
    shutil.copytree(tmp_path / "other", tmp_path / "out" / "sub")
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "out" / "pipe.safetensors")
    return tmp_path


def _point(base, change, *, listed=True):
    """Writes another weight_map into the container's index."""
    path = base / "out" / INDEX
    document = json.loads(path.read_bytes())
    document["weight_map"] = {key: change(value) for key, value in document["weight_map"].items()}
    data = json.dumps(document).encode()
    if listed:
        replace_listed(base / "out", INDEX, data)
        return

    def unlist(manifest):
        manifest["files"] = [record for record in manifest["files"] if record["name"] != INDEX]

    reseal(base / "out", unlist)
    path.write_bytes(data)


LED = {
    "another container": lambda base: lambda name: f"../other/{name}",
    "an absolute path": lambda base: lambda name: f"{base}/other/{name}",
    "a folder below": lambda base: lambda name: f"sub/{name}",
    "a pipe elsewhere": lambda base: lambda name: f"{base}/pipe.safetensors",
    "a pipe": lambda base: lambda name: "pipe.safetensors",
}


@pytest.mark.parametrize("case", LED)
def test_a_container_takes_its_own_shards(two, case):
    """A pipe would wait for ever inside of a library that no signal ends."""
    _point(two, LED[case](two))
    with pytest.raises(LayoutError, match="weight_map differs"):
        codecllm.from_pretrained(two / "out")
    with pytest.raises((LayoutError, UnsafePathError), match=r"weight_map|names no shard"):
        hf.AutoModelForCausalLM.from_pretrained(two / "out")


@pytest.mark.parametrize("case", LED)
def test_an_index_that_is_not_listed_leads_nowhere_either(two, case):
    _point(two, LED[case](two), listed=False)
    with pytest.raises((LayoutError, UnsafePathError), match=r"weight_map|names no shard"):
        hf.AutoModelForCausalLM.from_pretrained(two / "out")


def test_weights_that_the_config_names(two):
    shard = next((two / "other").glob("*.safetensors")).name
    document = json.loads((two / "out" / "config.json").read_bytes())
    document["transformers_weights"] = f"sub/{shard}"
    replace_listed(two / "out", "config.json", json.dumps(document).encode())
    for load in (codecllm.from_pretrained, hf.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(Exception, match="transformers_weights"):
            load(two / "out")


def test_a_plain_model_takes_files_of_its_folder(two):
    source = two / "source"
    weights = source / "model.safetensors"
    names = json.loads((two / "other" / INDEX).read_bytes())["weight_map"]

    def write(name):
        document = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (source / INDEX).write_text(json.dumps(document))

    write("model.safetensors")
    load_plain(source)
    weights.rename(source / "other-name.safetensors")
    for name in ("../pipe.safetensors", str(two / "pipe.safetensors"), "/dev/zero"):
        write(name)
        with pytest.raises(UnsafePathError, match="another folder"):
            load_plain(source)
    (source / "sub").mkdir()
    (source / INDEX).rename(source / "sub" / INDEX)  # its names are those of /dev/zero
    os.mkfifo(source / "sub" / "pipe.safetensors")
    config = json.loads((source / "config.json").read_bytes())
    for name, words in (
        (f"sub/{INDEX}", "another folder"),
        ("sub/pipe.safetensors", "not a regular file"),
        ("../pipe.safetensors", "another folder"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(UnsafePathError, match=words):
            load_plain(source)
    (source / "config.json").write_text(json.dumps(config))
    os.mkfifo(weights)
    with pytest.raises(UnsafePathError, match="not a regular file"):
        load_plain(source)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}'])
def test_a_damaged_index_of_a_plain_model_is_left_to_transformers(two, text):
    (two / "source" / INDEX).write_text(text)
    load_plain(two / "source")  # model.safetensors comes first
