"""A second reader, written from SPEC.md alone: nothing of codecllm is imported, nothing is clever.

It shows that SPEC.md is enough to read a container, and that the reference follows SPEC.md. The
numbers in brackets are sections of SPEC.md. It refuses bad containers by `independent_checks`, by
an assertion, or by an error of Python where bytes do not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from tests.golden import independent_checks as checks

BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8}
BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
ROTATED = {"BF16", "F16", "F32", "F64"}  # [7]


def read_container(folder: Path) -> dict[str, bytes]:
    """Returns every tensor's bytes, after all checks of SPEC.md."""
    manifest = checks.check_manifest((folder / "codecllm.json").read_bytes())
    for record in manifest["files"] + manifest["shards"]:
        content = (folder / record["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            record["bytes"],
            record["sha256"],
        )
    for number, record in enumerate(manifest["shards"]):
        raw = (folder / record["name"]).read_bytes()
        stored = checks.stored_tensors(manifest, number)
        checks.check_header(raw, record["header_xxh3"], stored)
    checks.check_folder(folder, manifest)
    shards = [_read_shard(folder / record["name"], record) for record in manifest["shards"]]
    tensors = {record["name"]: record for record in manifest["tensors"]}
    result = {}
    for name, record in tensors.items():
        stored = tensors[record["alias_of"]] if record["scheme"] == "alias" else record
        result[name] = _read_tensor(stored, shards[stored["shard"]])
    return result


def _read_shard(path: Path, record: dict[str, Any]) -> dict[str, bytes]:
    """[4] `u64 header_bytes | header | data`."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", raw)
    base = 8 + header_bytes
    assert _xxh3(raw[:base]) == record["header_xxh3"]
    header = json.loads(raw[8:base])
    header.pop("__metadata__", None)
    return {
        name: raw[base + entry["data_offsets"][0] : base + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def _read_tensor(record: dict[str, Any], shard: dict[str, bytes]) -> bytes:
    name, payload = record["name"], shard[record["name"]]
    if record["scheme"] == "raw":  # [7.1]
        assert _xxh3(payload) == record["xxh3"]
        assert hashlib.sha256(payload).hexdigest() == record["digest"]
        return payload
    for side, checksum in record["xxh3"].items():
        assert _xxh3(shard[f"{name}_{side}"]) == checksum
    assert (
        list(struct.unpack(f"<{len(record['shape'])}q", shard[name + "_shape"])) == record["shape"]
    )
    rows, cols, planes, low_bits = _read_planes(
        record, shard[name + "_chunks"], payload, shard.get(name + "_tables", b"")
    )
    checks.check_planes(record, shard[name + "_chunks"])
    if record["scheme"] == "lossless":
        assert (rows, cols) == (prod(record["shape"][:-1]), record["shape"][-1])
        data = _join(planes, record["dtype"])
        assert hashlib.sha256(data).hexdigest() == record["digest"]
        return data
    scales, factors = (
        _widened(shard.get(name + side, b""), record) for side in ("_scale", "_col_scale")
    )
    if name + "_col_group" in shard:
        groups = shard[name + "_col_group"]
        planes, low_bits = (
            [_in_order(plane, cols, groups) for plane in some] for some in (planes, low_bits)
        )
    codes = _codes(planes, low_bits[-1])
    packed = struct.pack(f"<{len(codes)}{'b' if len(planes) == 1 else 'h'}", *codes)
    assert hashlib.sha256(packed + scales + factors).hexdigest() == record["digest"]
    columns = struct.unpack(f"<{cols}f", factors) if factors else None
    values = struct.unpack(f"<{len(scales) // 4}f", scales)
    data = _dequantize(record, (rows, cols), codes, values, columns)
    recorded = [struct.unpack("<f", struct.pack("<f", end))[0] for end in record["scale_range"]]
    checks.refuse("8.3n", recorded != [min(values), max(values)])
    return data


def _widened(scales: bytes, record: dict[str, Any]) -> bytes:
    """[7.3] Scales as float32; a BF16 is the upper half of one."""
    if record.get("scale_dtype") != "BF16":
        return scales
    return b"".join(b"\0\0" + scales[place : place + 2] for place in range(0, len(scales), 2))


def _in_order(plane: bytes, cols: int, groups: bytes) -> bytes:
    """[7.3] Columns: group by group, in each as in the source."""
    assert len(groups) == cols
    order = [column for group in range(256) for column in range(cols) if groups[column] == group]
    source = bytearray(len(plane))
    for start in range(0, len(plane), cols):
        for j, column in enumerate(order):
            source[start + column] = plane[start + j]
    return bytes(source)


def _codes(planes: list[bytes], low_bits: bytes) -> list[int]:
    """[7.3] Signed bytes, or low + 2^low_bits * high."""
    low, *high = ([byte - 256 if byte > 127 else byte for byte in plane] for plane in planes)
    assert -128 not in (high[0] if high else low)
    return (
        low
        if not high
        else [a + (b << bits) for a, b, bits in zip(low, high[0], low_bits, strict=True)]
    )


def _read_planes(
    record: dict[str, Any], table: bytes, payload: bytes, group_tables: bytes
) -> tuple[int, int, list[bytes], list[bytes]]:
    """[5] Returns rows, columns, and two row-major streams per plane.

    The streams are the symbols, and the low_bits of their chunks.
    """
    magic, version, count, reserved, rows, cols, tile_rows, tile_cols = struct.unpack_from(
        "<4sBBHQQII", table
    )
    assert (magic, version, reserved, count) == (b"CLCT", 1, 0, len(record["planes"]))
    assert [tile_rows, tile_cols] == record["tile"]
    planes, low_bits = ([bytearray(rows * cols) for _ in range(count)] for _ in range(2))
    frequencies = (
        _group_tables(group_tables, count, -(-rows // tile_rows), -(-cols // tile_cols))
        if group_tables
        else {}
    )
    used = set()
    chunk, position = 0, 0
    for row, height, col, width in _tiles(rows, cols, tile_rows, tile_cols):
        for number, plane in enumerate(planes):
            stored_bytes, codec, bits, reserved, checksum = struct.unpack_from(
                "<IBB2sQ", table, 32 + 16 * chunk
            )
            slot = payload[position : position + (stored_bytes + 15) // 16 * 16]
            assert xxhash.xxh3_64_intdigest(slot) == checksum
            assert reserved == b"\0\0"
            assert 1 <= bits <= 8 if record["scheme"] == "int8" and number == 1 else bits == 0
            assert not any(slot[stored_bytes:])
            symbols = slot[:stored_bytes]
            if codec == 1:  # [6]
                checks.check_window(symbols, height * width)
                symbols = zstandard.ZstdDecompressor().decompress(symbols, allow_extra_data=False)
            if codec == 2:  # [6.1]
                place = (row // tile_rows, col // tile_cols, number)
                used.add(id(frequencies[place]))
                symbols = _decode_rans(symbols, height * width, frequencies[place])
            assert len(symbols) == height * width
            for line in range(height):
                start = (row + line) * cols + col
                plane[start : start + width] = symbols[line * width : (line + 1) * width]
                low_bits[number][start : start + width] = bytes([bits]) * width
            chunk, position = chunk + 1, position + len(slot)
    assert (len(table), len(payload)) == (32 + 16 * chunk, position)
    assert used == {id(f) for f in frequencies.values()}
    return rows, cols, [bytes(plane) for plane in planes], [bytes(bits) for bits in low_bits]


def _group_tables(
    data: bytes, planes: int, down: int, across: int
) -> dict[tuple[int, int, int], list[int]]:
    """[6.1] X_tables: returns the frequencies of each (i, j, plane) of the grid of tiles."""
    magic, version, count, reserved, group_rows, group_cols = struct.unpack_from("<4sBBHII", data)
    assert (magic, version, reserved, count) == (b"CLRT", 1, 0, planes)
    groups_across = -(-across // group_cols)
    groups = -(-down // group_rows) * groups_across
    sizes = struct.unpack_from(f"<{groups * planes}H", data, 16)
    position, tables = 16 + 2 * len(sizes), []
    for size in sizes:
        tables.append(_frequencies(data[position : position + size]) if size else None)
        position += size
    assert position == len(data)
    found = {}
    for i in range(down):
        for j in range(across):
            for plane in range(planes):
                table = tables[(i // group_rows * groups_across + j // group_cols) * planes + plane]
                if table is not None:
                    found[i, j, plane] = table
    return found


def _frequencies(table: bytes) -> list[int]:
    """[6.1] Frequency table: 256 frequencies, which add up to a power of two."""
    frequencies, position = [0] * 256, 33
    for symbol in range(256):
        if table[1 + symbol // 8] >> (symbol % 8) & 1:
            value, position = table[position], position + 1
            if value & 128:
                value, position = (value & 127) + (table[position] << 7), position + 1
            frequencies[symbol] = value + 1
    assert position == len(table)
    assert 12 <= table[0] <= 14
    assert sum(frequencies) == 1 << table[0]
    return frequencies


def _decode_rans(stored: bytes, raw_bytes: int, f: list[int]) -> bytes:
    """[6.1] Chunk."""
    symbol_of = [s for s in range(256) for _ in range(f[s])]
    start = [symbol_of.index(s) if f[s] else 0 for s in range(256)]
    total = len(symbol_of)
    words = (len(stored) - 128) // 2
    x, word = (
        list(struct.unpack_from("<32I", stored)),
        struct.unpack_from(f"<{words}H", stored, 128),
    )
    assert len(stored) == 128 + 2 * words
    assert min(x) >= 65536
    read, symbols = 0, bytearray()
    for n in range(raw_bytes):
        lane = n % 32
        k = x[lane] % total
        s = symbol_of[k]
        symbols.append(s)
        x[lane] = f[s] * (x[lane] // total) + k - start[s]
        if x[lane] < 65536:
            x[lane] = x[lane] * 65536 + word[read]
            read += 1
    assert (read, x) == (words, [65536] * 32)
    return bytes(symbols)


def _tiles(
    rows: int, cols: int, tile_rows: int, tile_cols: int
) -> Iterator[tuple[int, int, int, int]]:
    for row in range(0, rows, tile_rows):
        for col in range(0, cols, tile_cols):
            yield row, min(tile_rows, rows - row), col, min(tile_cols, cols - col)


def _join(planes: list[bytes], dtype: str) -> bytes:
    """[7.2]"""
    bits, data = BITS[dtype], bytearray()
    for symbols in zip(*planes, strict=True):
        word = int.from_bytes(bytes(symbols), "big")
        if dtype in ROTATED:
            word = (word >> 1) | ((word & 1) << (bits - 1))
        data += word.to_bytes(bits // 8, "little")
    return bytes(data)


def _dequantize(
    record: dict[str, Any],
    matrix: tuple[int, int],
    codes: list[int],
    scales: tuple[float, ...],
    columns: tuple[float, ...] | None,
) -> bytes:
    """[7.3] Products rounded to float32, one rounding to the target, each in exact arithmetic."""
    rows, cols = matrix
    axis, column = record["channel_axis"], record["channel_kind"] == "column"
    split = axis if column else axis + 1
    assert (rows, cols) == (prod(record["shape"][:split]), prod(record["shape"][split:]))
    assert len(scales) == (cols if column else rows)
    known: dict[tuple[int, Any], bytes] = {}
    data = bytearray()
    for index, code in enumerate(codes):
        step: Any = scales[index % cols if column else index // cols]
        if columns is not None:
            step = _round(Fraction(step) * Fraction(columns[index % cols]), 24, -126)
        assert (
            Fraction(2) ** -126
            <= step
            < Fraction(2) ** (112 if len(record["planes"]) == 2 else 122)
        )
        key = (code, step)
        if key not in known:
            known[key] = _cast(_round(key[0] * Fraction(key[1]), 24, -126), record["dtype"])
        data += known[key]
    return bytes(data)


def _round(value: Fraction, precision: int, lowest: int) -> Fraction:
    """To `precision` bits, ties to even, exponents not below `lowest`."""
    if value == 0:
        return value
    exponent = max(lowest, abs(value).numerator.bit_length() - value.denominator.bit_length() - 1)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    quantum = Fraction(2) ** (exponent - precision + 1)
    return round(value / quantum) * quantum


def _cast(value: Fraction, dtype: str) -> bytes:
    """[7.3] The bytes of a number of the type: a code of 0 gives +0, an overflow an infinity."""
    if dtype == "F32":
        return struct.pack("<f", float(value))
    precision, lowest, overflow = (11, -14, 2**16) if dtype == "F16" else (8, -126, 2**128)
    rounded = _round(value, precision, lowest)
    number = float(rounded) if abs(rounded) < overflow else math.copysign(math.inf, rounded)
    if dtype == "F16":
        return np.float16(number).astype("<f2").tobytes()
    return struct.pack("<f", number)[2:]


def _xxh3(data: bytes) -> str:
    return f"{xxhash.xxh3_64_intdigest(data):016x}"
