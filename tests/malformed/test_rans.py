"""Containers with codec `rans` in which one thing is wrong and every checksum around it fits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    DecodeError,
    LayoutError,
    SchemaError,
    UnsupportedVersionError,
)
from codecllm.formats.manifest import reading as manifest_module
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.shards.chunk_table import RECORD
from codecllm.verifier import verify
from tests import tampering
from tests.malformed.builders import fix_chunks, make_rans_container, read_tensors, rewrite_shard

SIZES = 16  # where the sizes of the tables begin; q has one group of one plane, l one of two planes
TABLE = 18


@pytest.fixture(scope="session")
def rans_container(tmp_path_factory):
    return make_rans_container(tmp_path_factory.mktemp("rans"))


@pytest.fixture
def folder(rans_container, tmp_path):
    return tampering.copy_of(rans_container, tmp_path / "container")


def _set(name, offset, data):
    """Overwrites bytes of a stored tensor (from its end where the offset is negative)."""

    def edit(tensors):
        held = tensors[name][2]
        place = offset % len(held) if offset < 0 else offset
        held[place : place + len(data)] = data

    return lambda folder: rewrite_shard(folder, edit)


def _resize(name, change):
    def edit(tensors):
        dtype, _, held = tensors[name]
        held = held[:change] if change < 0 else held + bytes(change)
        tensors[name] = (dtype, [len(held)], held)

    def count(document):
        _record(document, name.removesuffix("_tables"))["tables_bytes"] += change

    def damage(folder):
        rewrite_shard(folder, edit)
        tampering.reseal(folder, count)

    return damage


def _payload(offset, data):
    """Overwrites bytes of q's chunk and makes its checksum fit."""

    def edit(tensors):
        tensors["q"][2][offset : offset + len(data)] = data
        fix_chunks(tensors, "q")

    return lambda folder: rewrite_shard(folder, edit)


def _stored_bytes(change):
    """Lets q's chunk end earlier or later within its slot, and pads it with zeros."""

    def edit(tensors):
        payload, table = tensors["q"][2], tensors["q_chunks"][2]
        record = np.frombuffer(table, RECORD, offset=32).copy()
        record["stored_bytes"] = int(record["stored_bytes"][0]) + change
        table[32:] = record.tobytes()
        stored = int(record["stored_bytes"][0])
        payload[stored:] = bytes(len(payload) - stored)
        fix_chunks(tensors, "q")

    def damage(folder):
        rewrite_shard(folder, edit)

        def count(document):
            _record(document, "q")["planes"][0]["stored_bytes"] += change

        tampering.reseal(folder, count)

    return damage


def _codec(name, chunk, codec):
    def edit(tensors):
        tensors[name + "_chunks"][2][32 + 16 * chunk + 4] = codec

    return lambda folder: rewrite_shard(folder, edit)


def _record(document, name):
    return next(record for record in document["tensors"] if record["name"] == name)


def _manifest(edit):
    return lambda folder: tampering.reseal(folder, edit)


def _tables_swapped(folder):
    """Says that the second plane has the table of the first one."""

    def edit(tensors):
        data = tensors["l_tables"][2]
        assert data[SIZES + 2 : SIZES + 4] == bytes(2)
        data[SIZES : SIZES + 4] = data[SIZES + 2 : SIZES + 4] + data[SIZES : SIZES + 2]

    rewrite_shard(folder, edit)


def _rename_feature(document):
    document["required_features"] = ["rans2"]


FLAWS = {
    "feature not listed": (
        _manifest(lambda d: d.update(required_features=[])),
        SchemaError,
        "required_features",
    ),
    "unknown feature": (_manifest(_rename_feature), UnsupportedVersionError, "'rans2'"),
    "no checksum of the tables": (
        _manifest(lambda d: _record(d, "q")["xxh3"].pop("tables")),
        SchemaError,
        "rans tables",
    ),
    "no size of the tables": (
        _manifest(lambda d: _record(d, "q").pop("tables_bytes")),
        SchemaError,
        "rans tables",
    ),
    "size of the tables": (
        _manifest(lambda d: _record(d, "q").update(tables_bytes=5)),
        LayoutError,
        "stored type differs",
    ),
    "plane says zstd": (
        _manifest(lambda d: _record(d, "q")["planes"][0].update(codec="zstd")),
        SchemaError,
        "rans tables",
    ),
    "other plane says rans": (
        _manifest(lambda d: _record(d, "l")["planes"].reverse()),
        LayoutError,
        "its plane does not",
    ),
    "magic": (_set("q_tables", 0, b"CLRU"), SchemaError, "magic"),
    "version": (_set("q_tables", 4, b"\2"), UnsupportedVersionError, "version of rans tables"),
    "planes": (_set("q_tables", 5, b"\2"), LayoutError, "disagree on planes"),
    "reserved": (_set("q_tables", 7, b"\1"), SchemaError, "reserved"),
    "no rows": (_set("q_tables", 8, bytes(4)), LayoutError, "no extent"),
    "no columns": (_set("q_tables", 12, bytes(4)), LayoutError, "no extent"),
    "a byte more": (_resize("q_tables", 1), LayoutError, "wrong size"),
    "a byte less": (_resize("q_tables", -1), LayoutError, "wrong size"),
    "larger than any": (_resize("q_tables", 600), LayoutError, "too large"),
    "size too large": (_set("q_tables", SIZES, b"\xff\xff"), LayoutError, "wrong size"),
    "no table": (_set("l_tables", SIZES, bytes(4)), LayoutError, "wrong size"),
    "precision": (_set("q_tables", TABLE, b"\x0f"), DecodeError, "precision"),
    "sum": (_set("q_tables", -1, b"\x7f"), DecodeError, r"add up|cut off"),
    "a symbol more": (_set("q_tables", TABLE + 1 + 8, b"\xff"), DecodeError, r"cut off|add up"),
    "a raw chunk says rans": (_codec("l", 1, 2), LayoutError, "its plane does not"),
    "a rans chunk says zstd": (_codec("q", 0, 1), LayoutError, "its plane does not"),
    "no chunk uses the plane's codec": (
        _manifest(lambda d: _record(d, "l")["planes"][1].update(codec="rans")),
        LayoutError,
        "no chunk of plane 1 uses its codec 'rans'",
    ),
    "table of another plane": (_tables_swapped, LayoutError, "do not fit the chunks of group 0"),
    "a rans chunk says codec 3": (_codec("q", 0, 3), UnsupportedVersionError, "codec id"),
    "a small state": (_payload(4, bytes(4)), DecodeError, "too small"),
    "states": (_payload(0, b"\xff" * 128), DecodeError, r"words|early|initial state"),
    "words": (_payload(200, b"\xff" * 64), DecodeError, r"words|early|initial state"),
    "a word less": (_stored_bytes(-2), DecodeError, "early"),
    "half a word": (_stored_bytes(-1), DecodeError, "impossible size"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(folder, name):
    damage, expected, words = FLAWS[name]
    intact = read_tensors(folder)
    assert sorted(intact) == ["l", "n", "q"]
    damage(folder)
    with pytest.raises(expected, match=words) as caught:
        read_tensors(folder)
    assert type(caught.value) is expected
    assert caught.value.file is not None
    if expected is DecodeError:
        assert (caught.value.tensor, caught.value.chunk) == ("q", 0)
        assert caught.value.byte is not None


def test_readers_without_the_feature_refuse_it_by_name(folder, monkeypatch):
    monkeypatch.setattr(manifest_module, "KNOWN_FEATURES", frozenset())
    with pytest.raises(UnsupportedVersionError, match="unknown required feature 'rans'") as caught:
        Container(folder)
    assert caught.value.exit_code == 3


def test_verify_lists_the_damaged_chunks_and_goes_on(folder):
    assert verify(folder).ok
    _payload(200, b"\xff" * 64)(folder)
    report = verify(folder)
    assert not report.ok
    assert "'q'" in report.to_json()
    assert "'l'" not in report.to_json()


@given(
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    where=st.sampled_from(["payload", "q_tables", "l_tables", "q_chunks"]),
)
@pytest.mark.many_inputs
def test_any_byte_of_anything(rans_container, tmp_path_factory, changes, where):
    """An error of ours, or bytes of the right size."""
    folder = tampering.copy_of(rans_container, tmp_path_factory.mktemp("any") / "c")

    def edit(tensors):
        data = tensors["q" if where == "payload" else where][2]
        for place, value in changes:
            data[place % len(data)] = value
        if where == "payload":
            fix_chunks(tensors, "q")

    rewrite_shard(folder, edit)
    try:
        with Container(folder) as container:
            for name, record in container.records.items():
                assert len(read_tensor_bytes(container, name)) == record.source_bytes
    except CodecLLMError:
        pass
