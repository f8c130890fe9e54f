"""The shard writer makes ordinary files, rolls back to a mark, and overwrites nothing."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import LayoutError
from codecllm.formats.files import SafeFile
from codecllm.formats.shards.safetensors_header import read_header
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter


def _planned(*names, max_bytes=100, shape=(99_999,)):
    return [PlannedTensor(name, DTYPES["U8"], shape, max_bytes) for name in names]


def test_what_is_written_is_an_ordinary_file(tmp_path):
    writer = ShardWriter(tmp_path / "s", _planned("a", "b"), {"format": "pt"})
    writer.write(b"12")
    writer.write(memoryview(np.frombuffer(b"3456", np.uint8)))
    assert writer.end_tensor("a", "U8", (6,)) == 6
    assert writer.add("b", "I16", (1, 2), np.array([1, 2], "<i2")) == 4
    assert writer.data_bytes == 10
    head, size = writer.finish()
    data = (tmp_path / "s").read_bytes()
    assert (data[: len(head)], len(data), data[len(head) :]) == (head, size, b"123456\x01\0\x02\0")
    arrays = load_file(tmp_path / "s")
    assert (arrays["a"].tobytes(), arrays["b"].tolist()) == (b"123456", [[1, 2]])
    with SafeFile(tmp_path, "s") as file:
        assert read_header(file).raw == head


def test_rollback_forgets_what_followed_the_mark(tmp_path):
    writer = ShardWriter(tmp_path / "s", _planned("a", "b"), {})
    writer.add("a", "U8", (3,), b"abc")
    mark = writer.mark()
    writer.add("b", "U8", (90,), b"x" * 90)
    writer.write(b"more without an end")
    writer.rollback(mark)
    assert writer.data_bytes == 3
    assert writer.add("b", "U8", (2,), b"de") == 2
    _, size = writer.finish()
    assert (tmp_path / "s").stat().st_size == size
    assert {name: array.tobytes() for name, array in load_file(tmp_path / "s").items()} == {
        "a": b"abc",
        "b": b"de",
    }


def test_a_name_stands_once(tmp_path):
    writer = ShardWriter(tmp_path / "s", _planned("a"), {})
    writer.add("a", "U8", (1,), b"x")
    with pytest.raises(LayoutError, match="used twice") as caught:
        writer.add("a", "U8", (1,), b"y")
    assert caught.value.tensor == "a"
    writer.abort()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "s").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "s", _planned("a"), {})
    assert (tmp_path / "s").read_bytes() == b"precious"


def test_the_reserved_header_is_enough_at_the_bounds(tmp_path):
    """Every size and offset has as many digits as the plan allows."""
    planned = _planned(*(f"t{i}" for i in range(30)), max_bytes=99, shape=(99,))
    writer = ShardWriter(tmp_path / "s", planned, {"format": "pt"})
    for tensor in planned:
        writer.add(tensor.name, "U8", (99,), bytes(99))
    writer.finish()
    assert len(load_file(tmp_path / "s")) == 30


def test_an_empty_shard_is_a_file(tmp_path):
    head, size = ShardWriter(tmp_path / "s", [], {}).finish()
    assert (len(head), size, head[8:]) == (16, 16, b"{}" + b" " * 6)
    assert load_file(tmp_path / "s") == {}
