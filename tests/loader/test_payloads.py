"""Payloads as they are stored: in memory that the engine allocates, checked chunk by chunk."""

from __future__ import annotations

from contextlib import closing

import pytest

from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, TruncatedError
from codecllm.loader.engine import Request
from codecllm.loader.host.decode import Workspace
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.host.filling import plan_tensor
from tests.malformed.builders import SHARD, make_container

REQUEST = Request("l", "payload")


@pytest.fixture
def folder(tmp_path):
    return make_container(tmp_path)


def test_a_payload_is_that_of_the_shard(folder):
    with Container(folder) as container, closing(HostEngine(container, 1)) as engine:
        file, header = container.shard(0)
        entry = header.tensors["l"]
        payload = engine.take(REQUEST).get()
        assert payload.numpy().tobytes() == file.read(entry.start, entry.bytes)


def test_a_flipped_bit_names_its_chunk(folder):
    shard = bytearray((folder / SHARD).read_bytes())
    with Container(folder) as container:
        _, header = container.shard(0)
        shard[header.tensors["l"].end - 1] ^= 1
        (folder / SHARD).write_bytes(shard)
        with closing(HostEngine(container, 1)) as engine:
            error = engine.take(REQUEST).error()
    assert isinstance(error, ChecksumError)
    assert (error.tensor, error.chunk) == ("l", 1)


def test_a_payload_that_is_cut_while_it_is_read_names_shard_tensor_and_chunk(folder):
    with Container(folder) as container:
        source = container.tensor("l")
        plan = plan_tensor(source, REQUEST)
        with (folder / SHARD).open("r+b") as file:
            file.truncate(source.offset + 1)
        with pytest.raises(TruncatedError) as caught:
            plan.jobs[0](Workspace())
    assert (caught.value.file, caught.value.tensor, caught.value.chunk) == (SHARD, "l", 0)
