"""The files fetched from a source's repository: no model twice, every module, no pickle."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import pytest

from codecllm.hub.source_files import fetch_source

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


class Repository:
    """Files by name; fetching copies those that match, as huggingface_hub does."""

    def __init__(self, folder, *names, **texts):
        self.folder = folder
        self.files = dict.fromkeys(names, "x") | texts

    def fetch(self, wanted, unwanted):
        for name, text in self.files.items():
            is_wanted = any(fnmatchcase(name, pattern) for pattern in wanted)
            if is_wanted and not any(fnmatchcase(name, pattern) for pattern in unwanted):
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        self.folder.mkdir(exist_ok=True)
        return self.folder

    def fetched(self):
        _, found = fetch_source(self.fetch)
        files = {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()}
        return files, found


def _index(*names):
    return json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}})


def test_a_sharded_model(tmp_path):
    files, found = Repository(
        tmp_path / "r", *SHARDS, "config.json", **{INDEX: _index(*SHARDS)}
    ).fetched()
    assert found and files == {*SHARDS, "config.json", INDEX}


def test_a_single_file_beside_a_sharded_set(tmp_path):
    names = [*SHARDS, "model.safetensors", "config.json"]
    files, _ = Repository(tmp_path / "r", *names, **{INDEX: _index(*SHARDS)}).fetched()
    assert files == {"model.safetensors", "config.json", INDEX}


def test_other_formats_variants_and_other_models_stay_there(tmp_path):
    kept = {"model.safetensors", "config.json", "vocab.txt", "1 old (copy)/a.json", "x[1].json"}
    left = [
        *("model.fp16.safetensors", "consolidated.safetensors", "pytorch_model.bin", "m.gguf"),
        *("original/consolidated.00.pth", "onnx/model.onnx", "metal/model.safetensors"),
        *("flax_model.msgpack", "tf_model.h5", ".gitattributes"),
    ]
    files, _ = Repository(tmp_path / "r", *kept, *left).fetched()
    assert files == kept


def test_weights_that_the_config_names(tmp_path):
    config = json.dumps({"transformers_weights": "a[b].safetensors"})
    names = ["a[b].safetensors", "ab.safetensors", "model.safetensors"]
    files, _ = Repository(tmp_path / "r", *names, **{"config.json": config}).fetched()
    assert files == {"a[b].safetensors", "config.json"}


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "diffusion.safetensors"])
def test_weights_of_another_name(tmp_path, name):
    files, found = Repository(tmp_path / "r", name, "sub/other.safetensors").fetched()
    assert found and files == {name}


def test_modules_with_weights(tmp_path):
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    names = ["model.safetensors", "config.json", "1_Pooling/config.json"]
    names += ["2_Dense/model.safetensors", "2_Dense/config.json", "onnx/x.safetensors"]
    files, _ = Repository(tmp_path / "r", *names, **{"modules.json": modules}).fetched()
    assert files == {*names, "modules.json"} - {"onnx/x.safetensors"}


def test_a_main_module_in_a_folder_and_a_router(tmp_path):
    modules = json.dumps([{"path": "0_CLIPModel"}, {"path": "1_Router"}])
    router = json.dumps({"types": {"query_0_Dense": "x", "../evil": "x"}})
    names = ["0_CLIPModel/model.safetensors", "0_CLIPModel/config.json"]
    names += ["1_Router/query_0_Dense/model.safetensors"]
    texts = {"modules.json": modules, "1_Router/router_config.json": router}
    files, found = Repository(tmp_path / "r", *names, **texts).fetched()
    assert found and files == {*names, *texts}


def test_pickles_only(tmp_path):
    files, found = Repository(tmp_path / "r", "pytorch_model.bin", "config.json").fetched()
    assert not found and files == {"config.json"}


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', _index("../x.safetensors")])
def test_an_index_that_cannot_be_used(tmp_path, text):
    _, found = Repository(tmp_path / "r", "config.json", **{INDEX: text}).fetched()
    assert not found
