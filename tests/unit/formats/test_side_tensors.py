"""The table of side tensors: their tensors, types and lengths; no other module has their names."""

import ast
import doctest
import os
from pathlib import Path

import pytest

import codecllm
from codecllm.formats.manifest.records import (
    Int8Tensor,
    LosslessTensor,
    PlaneRecord,
    SideChecksums,
)
from codecllm.formats.shards import side_tensors as table
from codecllm.formats.shards.side_tensors import (
    COL_GROUP,
    COL_SCALE,
    SCALE,
    SIDE_TENSORS,
    SUFFIXES,
    TABLES,
    misplaced_side,
    scale_bytes,
    side_names,
    side_tensors,
)

XXH3, SHA256 = "0" * 16, "0" * 64
ALWAYS = {"shape": XXH3, "chunks": XXH3}


def _int8(kind="row", codec="zstd", tables_bytes=None, scale_dtype=None, **checksums):
    return Int8Tensor(
        name="x",
        dtype="BF16",
        shape=[6, 10],
        scheme="int8",
        shard=0,
        channel_axis=0 if kind == "row" else 1,
        channel_kind=kind,
        tile=[6, 10],
        planes=[PlaneRecord(codec=codec, raw_bytes=60, stored_bytes=60, entropy_bits=1)],
        tables_bytes=tables_bytes,
        scale_dtype=scale_dtype,
        scale_range=[1.0, 1.0],
        worst_error=0.0,
        digest=SHA256,
        xxh3=SideChecksums(**ALWAYS, **checksums),
    )


def _lossless(**checksums):
    planes = [
        PlaneRecord(codec="zstd", raw_bytes=60, stored_bytes=60, entropy_bits=1) for _ in range(2)
    ]
    return LosslessTensor(
        name="x",
        dtype="BF16",
        shape=[6, 10],
        scheme="lossless",
        shard=0,
        tile=[6, 10],
        planes=planes,
        digest=SHA256,
        xxh3=SideChecksums(**ALWAYS, **checksums),
    )


def test_every_checksum_of_the_manifest_has_its_row():
    assert {side.key for side in SIDE_TENSORS} == set(SideChecksums.model_fields)


def test_types_and_lengths_follow_from_the_record():
    record = _int8(
        "row", "rans", 99, "BF16", scale=XXH3, col_scale=XXH3, col_group=XXH3, tables=XXH3
    )

    described = {stored.name: (stored.dtype, stored.length) for stored in side_tensors(record)}

    assert described == {
        "x_scale": ("BF16", 6),
        "x_col_scale": ("BF16", 10),
        "x_col_group": ("U8", 10),
        "x_shape": ("I64", 2),
        "x_chunks": ("U8", None),
        "x_tables": ("U8", 99),
    }
    assert scale_bytes(record) == 2 * 6 + 2 * 10 + 10


def test_columns_as_channels_have_one_scale_each():
    (scale, *_) = side_tensors(_int8("column", scale=XXH3))

    assert (scale.dtype, scale.length) == ("F32", 10)


def test_names_come_in_the_order_of_the_table():
    assert side_names(_lossless()) == ["x_shape", "x_chunks"]


@pytest.mark.parametrize(
    ("record", "misplaced"),
    [
        (_int8(scale=XXH3), None),
        (_int8(), SCALE),
        (_lossless(), None),
        (_lossless(scale=XXH3), SCALE),
        (_int8(scale=XXH3, col_scale=XXH3), None),
        (_int8("column", scale=XXH3, col_scale=XXH3), COL_SCALE),
        (_int8(scale=XXH3, col_group=XXH3), COL_GROUP),
        (_int8(scale=XXH3, col_scale=XXH3, col_group=XXH3), None),
        (_int8(codec="rans", scale=XXH3), TABLES),
        (_int8(codec="rans", scale=XXH3, tables=XXH3), None),
        (_int8(scale=XXH3, tables=XXH3), TABLES),
    ],
)
def test_a_side_tensor_stands_where_the_table_says(record, misplaced):
    assert misplaced_side(record) is misplaced


def _sources(root):
    """Yields the package's files; `rglob` follows no links."""
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def test_no_other_module_spells_a_suffix():
    root = Path(codecllm.__file__).parent
    spelled = [
        f"{path.relative_to(root)}:{node.lineno}: {node.value!r}"
        for path in _sources(root)
        if path.resolve() != Path(table.__file__).resolve()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in SUFFIXES
    ]

    assert spelled == []


def test_the_examples_of_the_table_hold():
    assert doctest.testmod(table).failed == 0
