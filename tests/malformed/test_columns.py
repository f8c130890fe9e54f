"""Faults of containers with scales of columns or wide codes, whose checksums all fit."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    DecodeError,
    LayoutError,
    SchemaError,
    UnsupportedVersionError,
)
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.schemes.columns import order_of
from codecllm.verifier import verify
from tests import tampering
from tests.malformed.builders import fix_chunks, make_columns_container, read_tensors, rewrite_shard


@pytest.fixture(scope="session")
def columns_container(tmp_path_factory):
    return make_columns_container(tmp_path_factory.mktemp("columns"))


@pytest.fixture
def folder(columns_container, tmp_path):
    return tampering.copy_of(columns_container, tmp_path / "container")


def _values(name, values, dtype):
    """Overwrites the head of a side tensor."""

    def edit(tensors):
        data = np.array(values, dtype).tobytes()
        tensors[name][2][: len(data)] = data

    return lambda folder: rewrite_shard(folder, edit)


def _everywhere(name, factor):
    """Multiplies all scales of a side tensor."""

    def edit(tensors):
        with np.errstate(over="ignore", under="ignore"):
            tensors[name][2][:] = (
                np.frombuffer(tensors[name][2], "<f4") * np.float32(factor)
            ).tobytes()

    return lambda folder: rewrite_shard(folder, edit)


def _stored(name, dtype=None, shape=None):
    def edit(tensors):
        old_dtype, old_shape, data = tensors[name]
        kept = len(data) // old_shape[0] * shape[0] if shape else len(data)
        tensors[name] = (dtype or old_dtype, shape or old_shape, data[:kept])

    return lambda folder: rewrite_shard(folder, edit)


def _payload(chunk_of_zeros, offset, value):
    """Makes every symbol of the high plane of `w` the same, raw."""

    def edit(tensors):
        _, _, payload = tensors["w"]
        table = tensors["w_chunks"][2]
        low = -(-int.from_bytes(table[32:36], "little") // 16) * 16
        high = bytearray(chunk_of_zeros)
        high[offset] = value
        tensors["w"] = ("U8", [low + len(high)], payload[:low] + high)
        table[48:52], table[52] = len(high).to_bytes(4, "little"), 0
        fix_chunks(tensors, "w")

    def damage(folder):
        rewrite_shard(folder, edit)
        tampering.reseal(
            folder, lambda d: _record(d, "w")["planes"][1].update(stored_bytes=40 * 64, codec="raw")
        )

    return damage


def _low_bits(name, chunk, value):
    """Sets the low bits in the record of a chunk."""

    def edit(tensors):
        tensors[f"{name}_chunks"][2][32 + 16 * chunk + 5] = value

    return lambda folder: rewrite_shard(folder, edit)


def _record(document, name):
    return next(record for record in document["tensors"] if record["name"] == name)


def _manifest(edit):
    return lambda folder: tampering.reseal(folder, edit)


def _both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def _without(name):
    return _manifest(lambda d: d["required_features"].remove(name))


def _drop(side):
    def edit(tensors):
        del tensors[f"q_{side}"]

    return _both(
        lambda folder: rewrite_shard(folder, edit),
        _manifest(lambda d: _record(d, "q")["xxh3"].pop(side)),
    )


def _one_plane(document):
    _record(document, "w")["planes"].pop()


FLAWS = {
    "low_bits 0 of a high plane": (
        _low_bits("w", 1, 0),
        SchemaError,
        "low_bits of the chunk record.*got 0, expected 1 to 8",
    ),
    "low_bits 9 of a high plane": (
        _low_bits("w", 1, 9),
        SchemaError,
        "low_bits of the chunk record.*got 9, expected 1 to 8",
    ),
    "low_bits of the low wide plane": (
        _low_bits("w", 0, 8),
        SchemaError,
        "low_bits of the chunk record.*got 8, expected 0",
    ),
    "low_bits of one plane": (
        _low_bits("q", 0, 1),
        SchemaError,
        "low_bits of the chunk record.*got 1, expected 0",
    ),
    "steps not listed": (_without("steps"), SchemaError, "'steps' is used"),
    "col_scale not listed": (_without("col_scale"), SchemaError, "'col_scale' is used"),
    "wide not listed": (_without("wide"), SchemaError, "'wide' is used"),
    "calibration without its feature": (
        _manifest(
            lambda d: d.update(calibration={"kind": "self", "tokens": "1", "sha256": "0" * 64})
        ),
        SchemaError,
        "calibration",
    ),
    "unknown feature": (
        _manifest(lambda d: d["required_features"].append("rows")),
        UnsupportedVersionError,
        "'rows'",
    ),
    "no rounding": (_manifest(lambda d: _record(d, "q").pop("rounding")), SchemaError, "rounding"),
    "no worst error": (
        _manifest(lambda d: _record(d, "q").pop("worst_steps")),
        SchemaError,
        "rounding",
    ),
    "neither": (
        _manifest(lambda d: [_record(d, "q").pop(key) for key in ("rounding", "worst_steps")]),
        SchemaError,
        "rounding",
    ),
    "a rounding of many words": (
        _manifest(lambda d: _record(d, "q").update(rounding="To Nearest")),
        SchemaError,
        "rounding",
    ),
    "no deadzone": (
        _manifest(lambda d: _record(d, "q").update(rounding="deadzone")),
        SchemaError,
        "deadzone",
    ),
    "a deadzone where none is": (
        _manifest(lambda d: _record(d, "q").update(deadzone=0.1)),
        SchemaError,
        "deadzone",
    ),
    "half a step of deadzone": (
        _manifest(lambda d: _record(d, "q").update(rounding="deadzone", deadzone=0.5)),
        SchemaError,
        "deadzone",
    ),
    "a negative worst error": (
        _manifest(lambda d: _record(d, "q").update(worst_steps=-1.0)),
        SchemaError,
        "worst_steps",
    ),
    "groups without scales": (_drop("col_scale"), SchemaError, "do not fit the tensor"),
    "no checksum of the groups": (
        _manifest(lambda d: _record(d, "q")["xxh3"].pop("col_group")),
        LayoutError,
        "does not place there",
    ),
    "columns of a column": (
        _manifest(
            lambda d: _record(d, "h.0.attn.c_attn.weight")["xxh3"].update(col_scale="0" * 16)
        ),
        SchemaError,
        "do not fit the tensor",
    ),
    "columns of a lossless one": (
        _manifest(lambda d: _record(d, "q").update(scheme="lossless")),
        SchemaError,
        "field tensors",
    ),
    "three planes": (
        _manifest(lambda d: _record(d, "w")["planes"].append(_record(d, "w")["planes"][0])),
        SchemaError,
        "planes",
    ),
    "one plane": (_manifest(_one_plane), LayoutError, "disagree"),
    "groups of signed numbers": (
        _stored("q_col_group", dtype="I8"),
        LayoutError,
        "stored type differs",
    ),
    "scales of integers": (_stored("q_col_scale", dtype="I16"), LayoutError, "stored type differs"),
    "scales of another float": (
        _stored("q_scale", dtype="F16"),
        LayoutError,
        "stored type differs",
    ),
    "scales that the manifest calls F32": (
        _manifest(lambda d: _record(d, "q").pop("scale_dtype")),
        LayoutError,
        "stored type differs",
    ),
    "scales that the manifest calls BF16": (
        _manifest(lambda d: _record(d, "s").update(scale_dtype="BF16")),
        LayoutError,
        "stored type differs",
    ),
    "scales of a type that has no name": (
        _manifest(lambda d: _record(d, "q").update(scale_dtype="F16")),
        SchemaError,
        "scale_dtype",
    ),
    "a scale less": (_stored("q_col_scale", shape=[63]), LayoutError, "stored type differs"),
    "a column less": (_stored("q_col_group", shape=[63]), LayoutError, "stored type differs"),
    "scale of zero": (_values("s_col_scale", [0.0], "<f4"), DecodeError, "scale of column 0"),
    "scale not a number": (
        _values("s_col_scale", [1.0, np.nan], "<f4"),
        DecodeError,
        "scale of column 1",
    ),
    "negative scale": (_values("s_col_scale", [-1.0], "<f4"), DecodeError, "scale of column 0"),
    "infinite scale": (_values("s_col_scale", [np.inf], "<f4"), DecodeError, "scale of column 0"),
    "subnormal steps": (
        _both(_everywhere("s_scale", 2.0**-60), _everywhere("s_col_scale", 2.0**-70)),
        DecodeError,
        "a step",
    ),
    "infinite steps": (
        _both(_everywhere("s_scale", 2.0**70), _everywhere("s_col_scale", 2.0**70)),
        DecodeError,
        "a step",
    ),
    "BF16 scale of zero": (
        _values("q_scale", [0x3F80, 0], "<u2"),
        DecodeError,
        "scale of channel 1",
    ),
    "BF16 scale that is subnormal": (
        _values("q_col_scale", [0x3F80, 0x007F], "<u2"),
        DecodeError,
        "scale of column 1",
    ),
    "BF16 scale not a number": (
        _values("q_col_scale", [0x7FC0], "<u2"),
        DecodeError,
        "scale of column 0",
    ),
    "negative BF16 scale": (
        _values("q_col_scale", [0xBF80], "<u2"),
        DecodeError,
        "scale of column 0",
    ),
    "infinite BF16 scale": (_values("q_scale", [0x7F80], "<u2"), DecodeError, "scale of channel 0"),
    "BF16 scale that is too large": (
        _values("q_scale", [0x7C02], "<u2"),
        DecodeError,
        "scale of channel 0",
    ),
    "steps too large for wide codes": (_everywhere("w_scale", 2.0**119), DecodeError, "a step"),
    "high code of -128": (_payload(bytes(40 * 64), 77, 128), DecodeError, "code -128"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(folder, name):
    damage, expected, words = FLAWS[name]
    damage(folder)
    with pytest.raises(expected, match=words) as caught:
        read_tensors(folder)
    assert type(caught.value) is expected
    assert caught.value.file is not None
    if expected is DecodeError:
        assert caught.value.tensor == (
            "w" if "wide" in name or "high" in name else "q" if "BF16" in name else "s"
        )


def test_large_steps_that_one_plane_allows(folder):
    _everywhere("s_scale", 2.0**119)(folder)
    assert np.isfinite(np.frombuffer(read_tensors(folder)["s"], np.float32)).all()


@pytest.mark.parametrize("value", [0, 1, 127, 129, 255])
@pytest.mark.many_inputs
def test_any_other_high_plane_is_codes(folder, value):
    """Hostile, but codes: a digest tells, not the decoder."""
    before = read_tensors(folder)["w"]
    _payload(bytes([value]) * (40 * 64), 0, value)(folder)
    weights = np.frombuffer(read_tensors(folder)["w"], np.float32)
    assert np.isfinite(weights).all()
    assert weights.tobytes() != before
    report = verify(folder)
    assert not report.ok
    assert "differs from its digest" in report.to_json()


@pytest.mark.parametrize("group", [0, 1, 52, 255])
def test_any_byte_is_a_group_and_a_wrong_one_is_found_by_the_digest(folder, group):
    def edit(tensors):
        groups = np.frombuffer(tensors["q_col_group"][2], np.uint8)
        others = [
            np.where(np.arange(64) == column, group, groups).astype(np.uint8)
            for column in range(64)
        ]
        moved = next(
            other for other in others if not np.array_equal(order_of(other), order_of(groups))
        )
        tensors["q_col_group"][2][:] = moved.tobytes()

    rewrite_shard(folder, edit)
    assert len(read_tensors(folder)["q"]) == 2 * 40 * 64
    report = verify(folder)
    assert not report.ok
    assert "differs from its digest" in report.to_json()
    assert "'s'" not in report.to_json()


@settings(max_examples=80)
@given(
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    where=st.sampled_from(
        ["q_col_scale", "q_col_group", "w_col_scale", "w_col_group", "w_chunks", "w"]
    ),
)
@pytest.mark.many_inputs
def test_any_byte_of_anything(columns_container, tmp_path_factory, changes, where):
    """An error of ours, or bytes of the right size."""
    folder = tampering.copy_of(columns_container, tmp_path_factory.mktemp("any") / "c")

    def edit(tensors):
        data = tensors[where][2]
        for place, value in changes:
            data[place % len(data)] = value
        if where == "w":
            fix_chunks(tensors, "w")

    rewrite_shard(folder, edit)
    with suppress(CodecLLMError), Container(folder) as container:
        for name, record in container.records.items():
            with suppress(CodecLLMError):
                assert len(read_tensor_bytes(container, name)) == record.source_bytes
