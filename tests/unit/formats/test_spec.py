"""No number stands in SPEC.md that differs from the code."""

from __future__ import annotations

import re

import numpy as np
import pytest
import zstandard

from codecllm.converter.plan.params import column_tiles
from codecllm.formats import BASE_VERSION, FORMAT_VERSION, errors, limits
from codecllm.formats.codecs import CODEC_NAMES
from codecllm.formats.codecs.rans_groups import HEADER as RANS_HEADER
from codecllm.formats.codecs.rans_groups import MAGIC as RANS_MAGIC
from codecllm.formats.codecs.rans_groups import SIZE, TABLES_VERSION, max_tables_bytes
from codecllm.formats.codecs.rans_reference import LANES, LOWER, STATE_BYTES
from codecllm.formats.codecs.rans_table import MAX_PRECISION, MAX_TABLE_BYTES, MIN_PRECISION
from codecllm.formats.codecs.zstd import _PARAMETERS, _SPARSE_PARAMETERS, SPARSE_SHARE
from codecllm.formats.dtypes import DTYPES, INT8_SOURCES
from codecllm.formats.manifest import records
from codecllm.formats.manifest.manifest import (
    KNOWN_FEATURES,
    Manifest,
    features_of,
    source_features,
)
from codecllm.formats.schemes.int8 import (
    MAX_CODE,
    MAX_SCALE,
    MAX_WIDE_CODE,
    MAX_WIDE_STEP,
    MIN_SCALE,
    MIN_WIDE_CODE,
)
from codecllm.formats.shards.chunk_table import HEADER, MAGIC, RECORD, TABLE_VERSION, slot_bytes
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS
from tests.unit.formats.spec_example import embed
from tests.unit.formats.spec_rules import SPEC, spec_rules, tables
from tools.wrap_markdown import wrap

TEXT = SPEC.read_text()
FLAT = " ".join(TEXT.split())
"""The text without line breaks."""

XXH3 = "0" * 16


def _tables(section):
    """Returns the tables of a section as rows of cells without header and backquotes."""
    return [[[cell.strip("`") for cell in row] for row in table[1:]] for table in tables(section)]


def test_version():
    assert f"format {FORMAT_VERSION}" in TEXT.splitlines()[0]
    assert _tables("Appendix D")[0][-1][0] == FORMAT_VERSION
    assert f"A writer names {FORMAT_VERSION} where" in TEXT
    assert f"`rans`, and {BASE_VERSION} otherwise" in TEXT
    assert f'"format_version": "{FORMAT_VERSION}"' in TEXT


def test_limits():
    rows, _ = _tables("10. Limits")
    assert {name: int(value) for name, value, _ in rows} == {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and name != "SOURCE_HEADER_BYTES"
    }
    assert limits.max_stored_bytes(1000) == 1000 + 1000 // 255 + 1024
    assert "raw_bytes + floor(raw_bytes / 255) + 1024" in TEXT


def test_chunk_table_layout():
    header, record, _ = _tables("5. The chunk table")
    types = {"u8": "u1", "u16": "<u2", "u32": "<u4", "u64": "<u8"}
    for rows, dtype in ((header, HEADER), (record, RECORD)):
        assert [row[3] for row in rows] == list(dtype.names)
        for offset, size, kind, name, *_ in rows:
            field, place = dtype.fields[name]
            assert (int(offset), int(size)) == (place, field.itemsize)
            assert kind == "bytes" or np.dtype(types[kind]) == field
    assert f"header of {HEADER.itemsize} bytes and one record of {RECORD.itemsize} bytes" in TEXT
    assert header[0][4].strip("`") == MAGIC.decode()
    assert int(header[1][4]) == TABLE_VERSION
    assert header[2][4] == f"planes per tile, 1 to {limits.PLANES}"


def test_slots_and_tiles():
    assert f"multiple of {limits.SLOT_ALIGNMENT}" in TEXT
    assert [slot_bytes(size) for size in (1, 16, 17)] == [16, 16, 32]
    assert f"up to {DEFAULT_TILE_SYMBOLS} elements" in TEXT
    assert f"ceil(cols / {DEFAULT_TILE_SYMBOLS})" in TEXT


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 70_000), (300, 31), (512, 256), (4096, 4096), (3, 7), (896, 4864)]
)
def test_tiles_of_columns_in_the_annex_are_the_reference_writers(rows, cols):
    assert "max(1, min(8, rows * cols div 65536, cols div 32))" in TEXT
    side_by_side = max(1, min(8, rows * cols // 65536, cols // 32))
    tile_cols = -(-cols // side_by_side)
    assert column_tiles(rows, cols) == (max(1, min(rows, 131072 // tile_cols)), tile_cols)


def test_codecs():
    rows, _ = _tables("6. Codecs")
    assert {int(number): name for number, name, _ in rows} == CODEC_NAMES
    assert f"Ids {max(CODEC_NAMES) + 1} to 127 are reserved" in TEXT
    assert f"Window_Size above {limits.ZSTD_WINDOW_BYTES} bytes" in TEXT
    assert f"above {limits.ZSTD_WINDOW_BYTES} symbols" in FLAT
    assert f"longer than 1/{SPARSE_SHARE} of raw_bytes" in FLAT
    sizes = ",".join(
        rf"\s+{name} (\d+)"
        for name in ("windowLog", "hashLog", "chainLog", "searchLog", "minMatch", "targetLength")
    )
    found = re.findall(rf"strategy (\w+),{sizes}", FLAT)
    names = (
        "strategy",
        "window_log",
        "hash_log",
        "chain_log",
        "search_log",
        "min_match",
        "target_length",
    )
    own = [
        [getattr(parameters, name) for name in names]
        for parameters in (_PARAMETERS, _SPARSE_PARAMETERS)
    ]
    strategies = {"fast": zstandard.STRATEGY_FAST, "btultra": zstandard.STRATEGY_BTULTRA}
    assert [[strategies[name], *map(int, numbers)] for name, *numbers in found] == own


def test_rans():
    table, header, _, _ = _tables("6.1 rans")
    assert table[0][3] == f"{MIN_PRECISION} to {MAX_PRECISION}"
    assert [row[2] for row in table] == ["precision", "present", "frequencies"]
    assert [row[3] for row in header] == list(RANS_HEADER.names)
    for offset, size, kind, name, *_ in header:
        field, place = RANS_HEADER.fields[name]
        assert (int(offset), int(size)) == (place, field.itemsize)
        assert kind == "bytes" or np.dtype({"u8": "u1", "u16": "<u2", "u32": "<u4"}[kind]) == field
    assert header[0][4].strip("`") == RANS_MAGIC.decode()
    assert int(header[1][4]) == TABLES_VERSION
    assert f"header of {RANS_HEADER.itemsize} bytes, one u{8 * SIZE.itemsize} per group" in FLAT
    assert f"The stored bytes are {LANES} states of 4 bytes" in TEXT
    assert f"at least {STATE_BYTES}." in FLAT
    assert f"MUST be at least {LOWER}\n" in TEXT
    assert f"at most {MAX_TABLE_BYTES} bytes" in TEXT
    assert max_tables_bytes(1000) == 16 + 547 * 1000


def test_features():
    (features,) = _tables("8.4 Features")
    assert [name for name, _ in features] == list(features_in_order())
    assert {name for name, _ in features} == KNOWN_FEATURES


def features_in_order():
    """The features in the order in which a writer lists them."""
    asked = records.Options(
        scheme="int8", bits=4.0, include=[], exclude=[], non_finite="error", max_shard_bytes=1
    )
    side = records.SideChecksums(shape=XXH3, chunks=XXH3, scale=XXH3, col_scale=XXH3, tables=XXH3)
    plane = records.PlaneRecord(codec="rans", raw_bytes=4, stored_bytes=4, entropy_bits=4)
    tensor = records.Int8Tensor(
        name="x",
        dtype="F32",
        shape=[2, 2],
        scheme="int8",
        shard=0,
        channel_axis=0,
        channel_kind="row",
        tile=[2, 2],
        planes=[plane, plane],
        scale_range=[1.0, 1.0],
        worst_error=0.0,
        digest="0" * 64,
        xxh3=side,
    )
    return features_of([tensor], asked, None) + source_features(["a b/x.py"], "fp8")


def test_dtypes():
    rows = _tables("7. Schemes")[0]
    assert [row[0] for row in rows] == list(DTYPES)
    for name, bits, planes, rotated, int8 in rows:
        dtype = DTYPES[name]
        assert (int(bits), int(planes), rotated == "yes") == (
            dtype.bits,
            dtype.planes,
            dtype.rotates,
        )
        assert (int8 == "yes") == (name in INT8_SOURCES)


def test_int8_constants():
    assert f"Codes of one plane thus lie in [-{MAX_CODE}, {MAX_CODE}]" in FLAT
    assert MIN_SCALE == 2.0**-126
    stated = set(re.findall(r"0x1\.[0-9a-f]+p\+\d+", TEXT))
    assert {float.fromhex(text) for text in stated} == {MAX_SCALE}
    assert f"[{MIN_WIDE_CODE}, {MAX_WIDE_CODE}]" in TEXT
    assert MAX_WIDE_STEP == 2.0**112
    assert "2^112" in TEXT
    assert np.isfinite(np.float32(MIN_WIDE_CODE) * np.float32(MAX_WIDE_STEP))
    largest = np.float32(MAX_SCALE)
    with np.errstate(over="ignore"):
        assert np.isfinite(np.float32(127) * largest)
        assert not np.isfinite(np.float32(127) * np.nextafter(largest, np.float32(np.inf)))


def _names(cell):
    return re.findall(r"`?(\w+)`?", cell)


def test_manifest_fields():
    top, objects, _ = _tables("8.2 Top level")
    assert [row[0] for row in top] == [*Manifest.model_fields, "manifest_sha256"]
    for name, kind in (
        ("shards[]", records.ShardRecord),
        ("files[]", records.FileRecord),
        ("source", records.Source),
        ("options", records.Options),
        ("calibration", records.Calibration),
    ):
        rows = [row for row in objects if row[0] == name]
        assert [field for row in rows for field in _names(row[1])] == list(kind.model_fields) or (
            sorted(field for row in rows for field in _names(row[1])) == sorted(kind.model_fields)
        )
        for _, fields, values, _ in rows:
            for field in _names(fields):
                assert ("optional" in values) == (not kind.model_fields[field].is_required()), field


def test_fields_of_tensors():
    fields, planes, _ = _tables("8.3 Tensors")
    assert [row[0] for row in planes] == list(records.PlaneRecord.model_fields)
    classes = {
        "raw": records.RawTensor,
        "lossless": records.LosslessTensor,
        "int8": records.Int8Tensor,
        "alias": records.AliasTensor,
    }
    for scheme, kind in classes.items():
        rows = [row for row in fields if row[1] == "all" or scheme in _names(row[1])]
        names = {row[0].split("`")[0]: "(o)" in row[0] for row in rows}
        assert names == {
            name: not field.is_required() for name, field in kind.model_fields.items()
        }, scheme
    sides = next(row for row in fields if row[0] == "xxh3" and "lossless" in row[1])
    assert set(records.SideChecksums.model_fields) <= set(_names(sides[2]))


def test_errors_and_exit_codes():
    classes = {cls.__name__: cls.exit_code for cls in errors.FormatError.__subclasses__()}
    assert [name for name, _ in _tables("11. Reading")[-1]] == list(classes)
    stated = {name: int(code) for name, code in _tables("Appendix E")[-1]}
    assert stated == classes


def test_rules_are_named_by_section_and_letter_and_have_an_error_of_ours():
    rules = spec_rules()
    sections = re.findall(r"^#+ ([\d.]+?)\.? ", TEXT, re.MULTILINE)
    for name, rule in rules.items():
        section, letter = re.fullmatch(r"([\d.]+)([a-z])", name).groups()
        assert section in sections, name
        assert rule.error in {cls.__name__ for cls in errors.FormatError.__subclasses__()}, name
        earlier = [f"{section}{chr(code)}" for code in range(ord("a"), ord(letter))]
        assert set(earlier) <= set(rules), f"a letter before {name} is missing"
    mentioned = set(
        re.findall(
            r"(?<![\w.])\d(?:\.\d)?[a-z]\b", re.sub(r"`[^`]*`", "", TEXT.split("## Appendix A")[0])
        )
    )
    assert mentioned <= set(rules), mentioned - set(rules)


def test_prose_is_wrapped():
    assert wrap(TEXT) == TEXT, "run: python -m tools.wrap_markdown SPEC.md"
    indented = [line for line in TEXT.splitlines() if line.startswith("    ")]
    assert max(map(len, indented)) <= 100


def test_appendices_are_what_the_code_makes():
    assert embed(TEXT) == TEXT, "run: python -m tests.unit.formats.spec_example --write"


@pytest.mark.parametrize("section", range(1, 15))
def test_sections_are_numbered(section):
    assert re.search(rf"^## {section}\. ", TEXT, re.MULTILINE)
