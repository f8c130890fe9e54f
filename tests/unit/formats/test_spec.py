"""No number stands in SPEC.md that differs from the code."""

from __future__ import annotations

import re

import numpy as np
import pytest
import zstandard

from codecllm.formats import FORMAT_VERSION, errors, limits
from codecllm.formats.codecs import CODEC_NAMES
from codecllm.formats.codecs.rans_groups import HEADER as RANS_HEADER
from codecllm.formats.codecs.rans_groups import MAGIC as RANS_MAGIC
from codecllm.formats.codecs.rans_groups import SIZE, TABLES_VERSION, max_tables_bytes
from codecllm.formats.codecs.rans_reference import LANES, LOWER, STATE_BYTES
from codecllm.formats.codecs.rans_table import MAX_PRECISION, MAX_TABLE_BYTES, MIN_PRECISION
from codecllm.formats.codecs.zstd import _PARAMETERS, _SPARSE_PARAMETERS, SPARSE_SHARE
from codecllm.formats.dtypes import DTYPES, INT8_SOURCES
from codecllm.formats.manifest import records
from codecllm.formats.manifest.manifest import KNOWN_FEATURES, Manifest
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
from tests.unit.formats.spec_example import SPEC, embed

TEXT = SPEC.read_text()


def _tables(section):
    """Returns the tables of a section as lists of rows of cells, without header and ruler."""
    body = re.split(r"\n#+ ", TEXT)
    body = next(part for part in body if part.startswith(section))
    tables, rows = [], []
    for line in [*body.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif rows:
            tables.append(rows[2:])
            rows = []
    return tables


def test_version():
    assert f"format {FORMAT_VERSION}" in TEXT.splitlines()[0]
    assert _tables("Appendix D")[0][-1][0] == FORMAT_VERSION
    assert f'"format_version": "{FORMAT_VERSION}"' in TEXT


def test_limits():
    (rows,) = _tables("10. Limits")
    assert {name: int(value) for name, value, _ in rows} == {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and name != "SOURCE_HEADER_BYTES"
    }
    assert limits.max_stored_bytes(1000) == 1000 + 1000 // 255 + 1024
    assert "raw_bytes + floor(raw_bytes / 255) + 1024" in TEXT


def test_chunk_table_layout():
    header, record = _tables("5. The chunk table")
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


def test_codecs():
    (rows,) = _tables("6. Codecs")
    assert {int(number): name for number, name, _ in rows} == CODEC_NAMES
    assert f"Ids {max(CODEC_NAMES) + 1} to 127 are reserved" in TEXT
    assert f"MUST NOT exceed {limits.ZSTD_WINDOW_BYTES} bytes" in TEXT
    assert f"longer than 1/{SPARSE_SHARE} of raw_bytes" in TEXT
    sizes = ",".join(
        rf"\s+{name} (\d+)"
        for name in ("windowLog", "hashLog", "chainLog", "searchLog", "minMatch", "targetLength")
    )
    found = re.findall(rf"strategy (\w+),{sizes}", TEXT)
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
    table, header = _tables("6.1 rans")
    assert table[0][3] == f"{MIN_PRECISION} to {MAX_PRECISION}"
    assert [row[2] for row in table] == ["precision", "present", "frequencies"]
    assert [row[3] for row in header] == list(RANS_HEADER.names)
    for offset, size, kind, name, *_ in header:
        field, place = RANS_HEADER.fields[name]
        assert (int(offset), int(size)) == (place, field.itemsize)
        assert kind == "bytes" or np.dtype({"u8": "u1", "u16": "<u2", "u32": "<u4"}[kind]) == field
    assert header[0][4].strip("`") == RANS_MAGIC.decode()
    assert int(header[1][4]) == TABLES_VERSION
    assert f"header of {RANS_HEADER.itemsize} bytes, one u{8 * SIZE.itemsize} per group" in TEXT
    assert f"The stored bytes are {LANES} states of 4 bytes" in TEXT
    assert f"at least {STATE_BYTES}." in TEXT
    assert f"MUST be at least {LOWER}\n" in TEXT
    assert f"at most {MAX_TABLE_BYTES} bytes" in TEXT
    assert max_tables_bytes(1000) == 16 + 547 * 1000


def test_features():
    features = _tables("8. The manifest")[-1]
    assert {name for name, _ in features} == KNOWN_FEATURES


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
    assert f"Codes lie in [-{MAX_CODE}, {MAX_CODE}]" in TEXT
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


def test_manifest_fields():
    top, schemes, _ = _tables("8. The manifest")
    fields = list(Manifest.model_fields)
    assert [row[0] for row in top] == [*fields, "manifest_sha256"]
    classes = {
        "raw": records.RawTensor,
        "lossless": records.LosslessTensor,
        "int8": records.Int8Tensor,
        "alias": records.AliasTensor,
    }
    assert [row[0] for row in schemes] == list(classes)
    for name, text in schemes:
        own = set(classes[name].model_fields) - {"name", "dtype", "shape", "scheme"}
        assert own == {word for word in re.findall(r"\w+", text) if word in own}
        for field in own:
            assert field in text
    for kind in (
        records.PlaneRecord,
        records.ShardRecord,
        records.FileRecord,
        records.Options,
        records.Calibration,
    ):
        assert all(f"`{field}`" in TEXT for field in kind.model_fields)


def test_errors_and_exit_codes():
    rows = _tables("11. Reading")[-1]
    stated = {name: int(code) for _, name, code in rows}
    classes = {cls.__name__: cls.exit_code for cls in errors.FormatError.__subclasses__()}
    assert stated == classes


def test_appendices_are_what_the_code_makes():
    assert embed(TEXT) == TEXT, "run: python -m tests.unit.formats.spec_example --write"


@pytest.mark.parametrize("section", range(1, 15))
def test_sections_are_numbered(section):
    assert re.search(rf"^## {section}\. ", TEXT, re.MULTILINE)


def test_lines_fit_a_page():
    assert max(map(len, TEXT.splitlines())) <= 180
