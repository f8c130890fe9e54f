"""Codecs, schemes, grids, tables and headers come back from any input, or refuse it."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from codecllm.formats.codecs import CODECS
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.schemes.int8 import MAX_SCALE, MIN_SCALE, channel_scales, dequantize, quantize
from codecllm.formats.schemes.lossless import join_planes, split_planes, word_dtype
from codecllm.formats.shards.chunk_table import RECORD, pack_chunk_table, parse_chunk_table
from codecllm.formats.shards.safetensors_header import (
    PREFIX_BYTES,
    TensorEntry,
    pack_header,
    parse_header,
)
from codecllm.formats.strict_json import parse_json_object
from codecllm.formats.tiling import Grid, default_grid

PLANED = [dtype for dtype in DTYPES.values() if dtype.planes and dtype.name != "BOOL"]
grids = st.builds(
    Grid, st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(1, 12)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def _raises_only_ours(call, *args, **kwargs):
    """Any other error escapes and fails the test."""
    with suppress(CodecLLMError):
        call(*args, **kwargs)


@given(st.binary(min_size=1, max_size=4000), st.sampled_from(list(CODECS.values())))
def test_codecs_round_trip(data, codec):
    assert bytes(codec.decode(codec.encode(data), len(data))) == data


@given(st.binary(max_size=300), st.integers(0, 10_000), st.sampled_from(list(CODECS.values())))
def test_decoders_take_any_bytes(data, raw_bytes, codec):
    with suppress(CodecLLMError):
        assert len(codec.decode(memoryview(data), raw_bytes)) == raw_bytes


@given(st.binary(min_size=20, max_size=300), st.integers(0, 10_000), st.integers(0, 255))
def test_damaged_frames_are_refused_or_of_the_declared_size(data, place, value):
    codec = CODECS[1]
    frame = bytearray(codec.encode(data))
    frame[place % len(frame)] = value
    with suppress(CodecLLMError):
        assert len(codec.decode(bytes(frame), len(data))) == len(data)


@given(st.sampled_from(PLANED), st.binary(min_size=8, max_size=800))
def test_lossless_planes_come_back(dtype, data):
    words = np.frombuffer(data[: len(data) // 8 * 8], word_dtype(dtype))
    assert np.array_equal(join_planes(split_planes(words, dtype), dtype), words)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
def test_int8_is_within_half_a_step(values):
    weights = np.array(values, np.float32)
    absmax = np.abs(weights).max(keepdims=True)
    scale = channel_scales(absmax)
    if absmax[0] and scale[0] < MIN_SCALE:
        return
    assert MIN_SCALE <= scale[0] <= MAX_SCALE
    codes = quantize(weights, scale)
    assert np.abs(codes.astype(int)).max() <= 127
    error = np.abs(weights.astype(np.float64) - codes * scale.astype(np.float64))
    assert (error <= scale.astype(np.float64) / 2 * (1 + 2.0**-15)).all()
    assert np.isfinite(dequantize(codes, scale)).all()


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 5000))
def test_default_grid_covers_everything_once(rows, cols, symbols):
    grid = default_grid(rows, cols, symbols)
    assert sum(tile.symbols for tile in grid) == rows * cols
    assert all(tile.symbols <= max(symbols, 1) or tile.rows == 1 for tile in grid)
    assert grid.in_source_order


@given(grids, st.integers(1, 8), st.integers(0, 2**32))
def test_chunk_tables_come_back(grid, planes, seed):
    rng = np.random.default_rng(seed)
    records = np.zeros(len(grid) * planes, RECORD)
    sizes = np.array([grid.tile(i // planes).symbols for i in range(len(records))], np.int64)
    records["stored_bytes"] = np.maximum(1, sizes // 2)
    records["codec"] = 1
    records["xxh3"] = rng.integers(0, 2**63, len(records))
    payload = int(sum(-(-int(size) // 16) * 16 for size in records["stored_bytes"]))
    data = pack_chunk_table(grid, planes, records)
    table = parse_chunk_table(data, payload_bytes=payload, file="f", tensor="t")
    assert (table.grid, table.planes) == (grid, planes)
    assert np.array_equal(table.records, records)
    assert [chunk.raw_bytes for chunk in table.chunks] == sizes.tolist()


@given(
    grids,
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6),
    st.integers(0, 500),
)
def test_chunk_tables_take_any_bytes(grid, changes, payload):
    data = bytearray(pack_chunk_table(grid, 1, np.zeros(len(grid), RECORD)))
    for place, value in changes:
        data[place % len(data)] = value
    _raises_only_ours(parse_chunk_table, bytes(data), payload_bytes=payload, file="f", tensor="t")


@given(st.binary(max_size=400))
def test_parsers_take_any_bytes(data):
    _raises_only_ours(parse_manifest, data)
    _raises_only_ours(parse_json_object, data, file="f", max_bytes=1000)
    raw = len(data).to_bytes(PREFIX_BYTES, "little") + b"{" + data
    _raises_only_ours(parse_header, raw, file_bytes=len(raw), file="f")
    _raises_only_ours(parse_chunk_table, data, payload_bytes=0, file="f", tensor="t")


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_headers_take_any_json(document):
    text = json.dumps(document).encode()
    raw = len(text).to_bytes(PREFIX_BYTES, "little") + text
    _raises_only_ours(parse_header, raw, file_bytes=len(raw) + 100, file="f")


@given(
    st.lists(
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 9), max_size=4)),
        max_size=6,
    )
)
def test_headers_come_back(specs):
    entries, position = [], 0
    for number, (dtype, shape) in enumerate(specs):
        bits = int(np.prod(shape, dtype=np.int64)) * dtype.bits
        if bits % 8:
            continue
        entries.append(
            TensorEntry(f"t{number}", dtype, tuple(shape), position, position + bits // 8)
        )
        position += bits // 8
    head = pack_header(entries, {"format": "pt"})
    parsed = parse_header(head, file_bytes=len(head) + position, file="f")
    assert {name: (e.dtype, e.shape, e.bytes) for name, e in parsed.tensors.items()} == {
        e.name: (e.dtype, e.shape, e.bytes) for e in entries
    }
