"""JSON files of a source that are damaged or hostile: one typed error, at once, and no output."""

from __future__ import annotations

import json

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import LimitError, SchemaError, SourceError, UnsafePathError
from tests.malformed.measure import measured
from tests.sources import bf16, write_source

_LISTS = b"[" + b"[]," * 5_000_000 + b"[]]"


def _source(tmp_path, **files):
    tensors = {"a": ("BF16", bf16(np.ones((4, 4))))}
    return write_source(tmp_path / "source", tensors, {"model_type": "llama"} | files)


def _file(name, data):
    def edit(folder):
        (folder / name).write_bytes(data)

    return edit


def _config(**values):
    return _file("config.json", json.dumps({"model_type": "llama"} | values).encode())


def _sparse(name):
    def edit(folder):
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40)

    return edit


def _without_weights(edit):
    def edit_both(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        edit(folder)

    return edit_both


def _adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    _sparse("adapter_config.json")(folder)


HOSTILE = {
    "a surrogate in the config": (_config(note="\ud800"), SchemaError),
    "a surrogate in a key": (_config(**{"\ud800": 1}), SchemaError),
    "a surrogate in a file name": (_config(transformers_weights="\ud800.safetensors"), SchemaError),
    "a long file name": (_config(transformers_weights="a" * 300 + ".safetensors"), UnsafePathError),
    "a long path": (_config(transformers_weights="a/" * 3000 + "w.safetensors"), UnsafePathError),
    "many values": (_file("config.json", b'{"a":' + _LISTS + b"}"), LimitError),
    "depth": (_file("config.json", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), LimitError),
    "a long config": (_sparse("config.json"), LimitError),
    "a long list of modules": (_sparse("modules.json"), LimitError),
    "a module with a long path": (
        _file("modules.json", json.dumps([{"path": "a" * 300}]).encode()),
        SourceError,
    ),
    "many modules": (
        _file("modules.json", json.dumps([{"path": f"m{n}"} for n in range(10_000)]).encode()),
        SourceError,
    ),
    "many routes": (
        lambda folder: (
            _file("modules.json", b'[{"path":""}]')(folder),
            _file(
                "router_config.json",
                json.dumps({"types": {f"m{n}": 1 for n in range(999)}}).encode(),
            )(folder),
        ),
        SourceError,
    ),
    "a long index": (_without_weights(_sparse("model.safetensors.index.json")), LimitError),
    "many values of an index": (
        _without_weights(_file("model.safetensors.index.json", b'{"a":' + _LISTS + b"}")),
        LimitError,
    ),
    "a long name in an index": (
        _without_weights(
            _file(
                "model.safetensors.index.json",
                json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}).encode(),
            )
        ),
        UnsafePathError,
    ),
    "a long config of an adapter": (_adapter, SourceError),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_json_file_of_a_source_is_refused_at_once(tmp_path, case):
    edit, error = HOSTILE[case]
    source = _source(tmp_path)
    edit(source)
    with measured() as cost, pytest.raises(error) as caught:
        convert(source, tmp_path / "out")
    cost.check()
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "out").exists()


def test_a_config_that_python_reads_is_read(tmp_path):
    source = _source(tmp_path)
    (source / "config.json").write_bytes(b'{"a": NaN, "b": Infinity, "c": 1, "c": 2, "d": 1e999}')
    with SourceModel(source) as model:
        assert model.config is not None
        assert model.config["c"] == 2
