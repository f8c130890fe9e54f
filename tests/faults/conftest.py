"""Conversions under the shim: a server, a source, a new and an old container."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from codecllm.formats.container import Container
from codecllm.formats.reference import tensor_digest
from codecllm.verifier.baseline.record import parse_baseline
from tests.faults.shim import (
    OWN_FILES,
    Server,
    command,
    command_with_baseline,
    compile_shim,
    files_of,
)
from tests.sources import bf16, write_source

# A model that runs in milliseconds, for a baseline. Its class has not all tensors of the source:
# the container gets a load report too.
CONFIG = {
    "architectures": ["LlamaModel"], "model_type": "llama", "num_hidden_layers": 0,
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 40,
}  # fmt: skip


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("shim")
    running = Server(compile_shim(scratch), scratch)
    yield running
    running.close()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Two shards and, as sentence-transformers have it, a side file in a subfolder."""
    rng = np.random.default_rng(0)
    tensors = {
        "embed_tokens.weight": ("BF16", bf16(rng.standard_normal((40, 64)))),
        "norm.weight": ("BF16", bf16(np.ones(64))),
        "unexpected": ("BF16", bf16(rng.standard_normal((60, 64)))),
    }
    base = tmp_path_factory.mktemp("source") / "model"
    folder = write_source(base, tensors, CONFIG)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def undisturbed(server, source, tmp_path_factory):
    """The bytes of a conversion that nothing disturbed, and its operations."""
    base = tmp_path_factory.mktemp("undisturbed")
    done = server.run(command(source, base / "out"), base)
    assert done.code == 0, done.text
    with Container(base / "out") as container:
        assert len(container.manifest.shards) == 2
        assert container.manifest.file("load_report.json") is not None
        for name, record in container.records.items():
            assert tensor_digest(container, name) == record.digest
    return files_of(base / "out"), done.count


@pytest.fixture(scope="session")
def with_baseline(server, source, undisturbed, tmp_path_factory):
    """The bytes of a conversion with a baseline, and its operations."""
    base = tmp_path_factory.mktemp("baseline")
    done = server.run(command_with_baseline(source, base / "out"), base)
    assert done.code == 0, done.text
    files = files_of(base / "out")
    assert parse_baseline(files["baseline.json"]).kind == "hidden"
    assert files["codecllm.json"] != undisturbed[0]["codecllm.json"]
    return files, done.count


@pytest.fixture(scope="session")
def old(server, source, tmp_path_factory):
    """Another container with files of the user, and the operations of its replacement."""
    base = tmp_path_factory.mktemp("old")
    (source.parent / "other").mkdir()
    other = shutil.copytree(source, source.parent / "other" / "model")
    (other / "2_Dense").mkdir()
    (other / "2_Dense" / "config.json").write_text("[]")
    done = server.run(command(other, base / "out", "--codec", "rans"), base)
    assert done.code == 0, done.text
    for name, data in OWN_FILES.items():
        (base / "out" / name).write_bytes(data)
    copy = shutil.copytree(base / "out", base / "copy" / "out")
    replaced = server.run(command(source, copy, "--force"), copy.parent)
    assert replaced.code == 0, replaced.text
    return base / "out", files_of(base / "out"), replaced.count
