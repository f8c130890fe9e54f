"""Tensors that are read together: what may be joined, and what is read by itself instead.

tests/loader/test_alike.py compares the bits.
"""

from __future__ import annotations

import pytest

from codecllm.formats.alike import join_alike, layout_key
from codecllm.formats.container import Container
from codecllm.formats.files import Excerpt
from codecllm.formats.shards.side_tensors import CHUNKS, SCALE, SHAPE, TABLES
from tests.malformed.builders import make_columns_container, make_container, make_rans_container


@pytest.fixture(scope="module", params=[make_container, make_rans_container])
def folder(tmp_path_factory, request):
    return request.param(tmp_path_factory.mktemp("alike"))


def _join(container, record, flipped=None):
    """Joins one tensor, with a bit of the side tensor `flipped` changed."""
    file, header = container.shard(0)
    data = bytearray(file.read(0, file.size))
    if flipped is not None:
        data[header.tensors[record.name + flipped].start] ^= 1
    return join_alike([record], header, Excerpt(file.name, 0, bytes(data)))


def _shape(record):
    return {"shape": [*record.shape, 1]}


def _tile(record):
    return {"tile": [record.tile[0] // 2, record.tile[1]]}


def _stored_bytes(record):
    first, *others = record.planes
    changed = first.model_copy(update={"stored_bytes": first.stored_bytes - 1})
    return {"planes": [changed, *others]}


def _codec(record):
    first, *others = record.planes
    other = "zstd" if first.codec == "rans" else "rans"
    return {"planes": [first.model_copy(update={"codec": other}), *others]}


def _planes(record):
    return {"planes": [*record.planes, record.planes[0]]}


@pytest.mark.parametrize("change", [_shape, _tile, _stored_bytes, _codec, _planes])
def test_a_tensor_that_differs_from_its_record_is_left_to_be_read_by_itself(folder, change):
    with Container(folder) as container:
        for name in ("l", "q"):
            record = container.records[name]
            joined = _join(container, record)
            assert joined is not None
            assert len(joined[1]) == int(joined[0].table.offsets[-1])
            assert _join(container, record.model_copy(update=change(record))) is None, name


@pytest.mark.parametrize("suffix", [side.suffix for side in (CHUNKS, SHAPE, SCALE, TABLES)])
def test_a_tensor_with_a_damaged_side_tensor_is_left_too(folder, suffix):
    with Container(folder) as container:
        _, header = container.shard(0)
        damaged = [
            record for name, record in container.records.items() if name + suffix in header.tensors
        ]
        assert damaged or suffix == TABLES.suffix
        for record in damaged:
            if layout_key(record) is not None:
                assert _join(container, record, suffix) is None, record.name


def test_tensors_of_one_layout_share_a_key(folder, tmp_path):
    with Container(folder) as container:
        keys = {name: layout_key(record) for name, record in container.records.items()}
        twin = container.records["q"].model_copy(update={"name": "other"})
        assert layout_key(twin) == keys["q"]
    assert keys["n"] is None
    assert None not in (keys["l"], keys["q"])
    assert keys["l"] != keys["q"]
    with Container(make_columns_container(tmp_path)) as container:
        # Scales of columns, channels in columns, codes in two planes: nothing is to be joined.
        assert {layout_key(record) for record in container.records.values()} == {None}
