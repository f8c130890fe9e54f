"""A shard that ends early under an open container: each reader names the tensor."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import TruncatedError
from codecllm.formats.reference import read_tensor_bytes
from codecllm.loader.stream import stream_tensors
from tests.malformed.builders import SHARD
from tests.sources import bf16, write_source


def _by_the_reference(container):
    for name in container.records:
        read_tensor_bytes(container, name)


def _by_a_stream(container):
    for _ in stream_tensors(container, workers=1):
        pass


@pytest.fixture(scope="module", params=["zstd", "rans"])
def made(request, tmp_path_factory):
    rng = np.random.default_rng(1)
    tensors = {
        "l": ("BF16", bf16(rng.standard_normal((40, 64)))),
        "q": ("F32", (rng.standard_normal((30, 80)) ** 3).astype(np.float32)),
        "n": ("F32", np.linspace(0, 1, 9, dtype=np.float32)),
    }
    base = tmp_path_factory.mktemp(request.param)
    source = write_source(base / "source", tensors, {"model_type": "none"})
    convert(source, base / "out", codec=request.param, include=("*",), exclude=("l",))
    return base / "out"


@pytest.mark.parametrize("read", [_by_the_reference, _by_a_stream])
def test_the_tensor_is_named(made, tmp_path, read):
    folder = shutil.copytree(made, tmp_path / "c")
    with Container(folder) as container:
        _, header = container.shard(0)
        entries = list(header.tensors.values())
    assert {"l_chunks", "q_scale", "n"} <= {entry.name for entry in entries}
    for entry in entries:
        shutil.copyfile(made / SHARD, folder / SHARD)
        with Container(folder) as container:
            container.shard(0)
            os.truncate(folder / SHARD, entry.start + entry.bytes // 2)
            with pytest.raises(TruncatedError) as caught:
                read(container)
        assert caught.value.tensor in container.records
        assert caught.value.file == SHARD
