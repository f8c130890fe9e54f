"""Faults of the bad containers, by the rule of SPEC.md that each breaks.

Most are those of `tests.malformed`, by name; the others are here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from codecllm.formats import limits
from codecllm.formats.manifest.manifest import INDEX_NAME, MANIFEST_NAME
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from tests import tampering
from tests.malformed import builders, test_columns, test_manifest, test_paths, test_rans, test_shard
from tests.malformed.builders import SHARD, put_shard, rewrite_shard

Damage = Callable[[Path], object]
Q = 1
"""Place of `q` in the manifest's tensors."""


@dataclass(frozen=True)
class Fault:
    """One bad container.

    Attributes:
        rule: rule of SPEC.md.
        name: few words.
        base: the good container that is damaged: `plain`, `flags`, `rans` or `columns`.
        damage: damages it.
    """

    rule: str
    name: str
    base: str
    damage: Damage


def _shard_bytes(folder: Path) -> tuple[bytes, bytes]:
    """Returns length prefix and header, and the data."""
    raw = (folder / SHARD).read_bytes()
    base = PREFIX_BYTES + int.from_bytes(raw[:PREFIX_BYTES], "little")
    return raw[:base], raw[base:]


def _folder_in_place_of_the_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    (folder / SHARD / "inside").write_bytes(b"a folder")


def _unlisted_shard(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / SHARD).read_bytes())


def _seven_bytes(folder: Path) -> None:
    put_shard(folder, b"", bytes(7))


def _long_header(folder: Path) -> None:
    head, data = _shard_bytes(folder)
    size = (limits.HEADER_BYTES + 1).to_bytes(PREFIX_BYTES, "little")
    put_shard(folder, size + head[PREFIX_BYTES:], data)


def _cut_data(folder: Path) -> None:
    head, data = _shard_bytes(folder)
    put_shard(folder, head, data[:-1])


def _half_a_byte(folder: Path) -> None:
    """Declares `n` as nine elements of four bits."""
    builders.edit_header(folder, lambda header: header["n"].update(dtype="F4", shape=[9]))


def _payload_bit(folder: Path) -> None:
    def edit(tensors: builders.Tensors) -> None:
        tensors["q"][2][40] ^= 1

    rewrite_shard(folder, edit)


def _plain_bit(folder: Path) -> None:
    head, data = _shard_bytes(folder)
    put_shard(folder, head, data[:-1] + bytes([data[-1] ^ 1]))


def _boolean(folder: Path) -> None:
    """Codes the booleans anew, one of them 2."""

    def edit(tensors: builders.Tensors) -> None:
        table, payload = tensors["flags_chunks"][2], tensors["flags"][2]
        stored = int.from_bytes(table[32:36], "little")
        flags = bytearray(zstandard.ZstdDecompressor().decompress(bytes(payload[:stored])))
        flags[7] = 2
        frame = zstandard.ZstdCompressor().compress(bytes(flags))
        table[32:36] = len(frame).to_bytes(4, "little")
        slots = bytearray(frame.ljust(-(-len(frame) // 16) * 16, b"\0"))
        tensors["flags"] = ("U8", [len(slots)], slots)
        builders.fix_chunks(tensors, "flags")

    rewrite_shard(folder, edit)
    table = builders.split_shard(folder)[0]["flags_chunks"][2]
    stored = int.from_bytes(table[32:36], "little")
    tampering.reseal(
        folder,
        lambda document: document["tensors"][0]["planes"][0].update(stored_bytes=stored),
    )


def _short_tables(folder: Path) -> None:
    def edit(tensors: builders.Tensors) -> None:
        tensors["q_tables"] = ("U8", [15], tensors["q_tables"][2][:15])

    rewrite_shard(folder, edit)
    tampering.reseal(folder, lambda document: document["tensors"][Q].update(tables_bytes=15))


def _digest(folder: Path) -> None:
    tampering.reseal(folder, lambda document: document["tensors"][Q].update(digest="0" * 64))


def _scale_range(folder: Path) -> None:
    tampering.reseal(folder, lambda document: document["tensors"][Q].update(scale_range=[0.5, 1.0]))


def _expansion(folder: Path) -> None:
    """Declares `l` as two GiB of weights."""

    def edit(document: dict[str, Any]) -> None:
        record = document["tensors"][0]
        record["shape"] = [1 << 20, 1 << 10]
        for plane in record["planes"]:
            plane["raw_bytes"] = 1 << 30

    tampering.reseal(folder, edit)


def _index(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_bytes())
    index["weight_map"]["n"] = "model-00002-of-00002.safetensors"
    tampering.replace_listed(folder, INDEX_NAME, json.dumps(index).encode())


OWN = (
    Fault("3a", "no manifest", "plain", lambda folder: (folder / MANIFEST_NAME).unlink()),
    Fault("3c", "folder in place of the shard", "plain", _folder_in_place_of_the_shard),
    Fault("3k", "unlisted shard", "plain", _unlisted_shard),
    Fault("4a", "seven bytes", "plain", _seven_bytes),
    Fault("4b", "header beyond the limit", "plain", _long_header),
    Fault("4i", "elements of half a byte", "plain", _half_a_byte),
    Fault("4k", "data cut by one byte", "plain", _cut_data),
    Fault("4m", "bit of a plain tensor", "plain", _plain_bit),
    Fault("5r", "bit of a chunk", "plain", _payload_bit),
    Fault("6.1b", "fifteen bytes of tables", "rans", _short_tables),
    Fault("7.2a", "boolean of value two", "flags", _boolean),
    Fault("8.3m", "digest of another tensor", "plain", _digest),
    Fault("8.3n", "range of other scales", "plain", _scale_range),
    Fault("9a", "index of another shard", "plain", _index),
    Fault("10b", "two gigabytes of weights", "plain", _expansion),
)

_MANIFEST = {
    "3b": ("file outside", "trailing dot"),
    "3d": ("readme is listed", "manifest lists itself"),
    "3e": ("shard of another name",),
    "3f": ("shard as a side file",),
    "3g": ("listed file that is not there", "file too short"),
    "3h": ("file too long",),
    "3j": ("file of another digest",),
    "8.1a": ("not utf-8", "not json"),
    "8.1b": ("duplicate key at the top", "duplicate key in a side"),
    "8.1c": ("nan", "1e400"),
    "8.1d": ("huge integer",),
    "8.1e": ("deep nesting",),
    "8.1f": ("lone surrogate",),
    "8.2a": ("format of another",),
    "8.2b": ("major 2", "major with a leading zero"),
    "8.2c": ("unknown required feature",),
    "8.2d": ("unknown scheme", "unknown codec"),
    "8.2e": (
        "unknown key at the top",
        "unknown key in a record",
        "key missing",
        "true for an integer",
        "null for an optional key",
        "float for an integer",
        "version without minor",
        "minor with a leading zero",
        "digest in capitals",
    ),
    "8.3a": ("name twice", "names differ by normal form"),
    "8.3b": ("side tensor as a tensor of its own",),
    "8.3c": ("empty name", "unknown dtype"),
    "8.3d": ("alias chain", "alias of another shape"),
    "8.3e": ("shard that is not there",),
    "8.3f": ("lossless of rank 1", "int8 without elements"),
    "8.3g": ("int8 of integers", "lossless with one plane"),
    "8.3h": ("scale checksum missing", "scale checksum of a lossless"),
    "8.3j": ("channel axis beyond the rank", "column axis is not the last"),
    "8.3l": ("plane of another size",),
    "8.5a": ("html page", "byte order mark"),
    "8.5b": ("cut by one byte",),
    "8.5c": ("one byte changed", "seal of another"),
    "10a": ("rank 9", "elements overflow", "name of 600 bytes"),
}
_AGAINST_THE_SHARD = {
    "4d": ("header checksum", "header that is no JSON and differs"),
    "4l": ("plain tensor of another dtype", "tensor that the shard lacks"),
    "4m": ("chunk table checksum",),
    "4n": ("another shape of as many elements",),
    "5n": ("another tile",),
    "5o": (
        "codec of a plane that says raw",
        "codec of a plane that its chunks do not use",
    ),
    "5p": ("stored bytes of another",),
}
_SHARD = {
    "4c": ("header is cut",),
    "4e": ("header is an array", "header begins with a space"),
    "4f": ("metadata holds a number",),
    "4g": ("empty name",),
    "4h": ("entry with another key", "unknown dtype"),
    "4i": ("offsets of another size",),
    "4j": ("offsets overlap", "hole"),
    "4l": ("a tensor more", "payload of rank 2"),
    "5a": ("table shorter than its header",),
    "5b": ("table without magic",),
    "5c": ("table version 2",),
    "5d": ("table reserved bytes",),
    "5e": ("table with 0 planes", "table with 9 planes"),
    "5f": ("table of 2^63 rows",),
    "5g": ("table with tiles of 0 rows",),
    "5h": ("table with chunks of 4 GiB",),
    "5i": ("table too short",),
    "5j": ("record reserved bytes",),
    "5k": ("unknown codec id",),
    "5l": ("stored_bytes 0", "codec raw for a frame"),
    "5m": ("stored_bytes one slot longer",),
    "5n": ("table of other rows",),
    "5s": ("padding is not zero",),
    "6a": ("frame that is text", "skippable frame first"),
    "6b": ("frame of unknown size", "frame that is a bomb"),
    "6c": ("frame with a window of 16 MiB", "frame with a dictionary"),
    "6d": ("two frames", "frame with a damaged block", "frame that is cut"),
    "7.3a": ("code -128",),
    "7.3b": ("scale nan", "scale subnormal", "scale that makes an infinity"),
}
_PATHS = {"3i": ("shard is an lfs pointer", "shard is a page")}
_RANS = {
    "6.1a": ("larger than any",),
    "6.1c": ("magic",),
    "6.1d": ("version",),
    "6.1e": ("reserved",),
    "6.1f": ("planes",),
    "6.1g": ("no rows",),
    "6.1h": ("a byte more",),
    "6.1i": ("table of another plane",),
    "6.1j": ("precision",),
    "6.1k": ("a symbol more",),
    "6.1l": ("sum",),
    "6.1m": ("half a word",),
    "6.1n": ("a small state",),
    "6.1o": ("a word less",),
    "6.1p": ("words",),
    "8.2f": ("feature not listed",),
    "8.3i": ("no checksum of the tables", "no size of the tables"),
}
_COLUMNS = {
    "5q": ("low_bits 0 of a high plane", "low_bits of the low wide plane"),
    "7.3a": ("high code of -128",),
    "7.3b": ("negative scale", "BF16 scale that is subnormal"),
    "7.3c": ("subnormal steps", "infinite steps", "steps too large for wide codes"),
    "8.2f": ("steps not listed", "wide not listed"),
    "8.3h": ("groups without scales", "columns of a column"),
    "8.3k": ("no rounding", "no deadzone", "a deadzone where none is"),
}


def all_faults() -> list[Fault]:
    """Returns every fault, sorted by the order of the rules above."""
    sources = (
        ("plain", test_manifest.FLAWS, _MANIFEST),
        ("plain", test_manifest.SEEN_BY_TENSORS, _AGAINST_THE_SHARD),
        ("plain", test_shard.FLAWS, _SHARD),
        ("plain", test_paths.FLAWS, _PATHS),
        ("rans", test_rans.FLAWS, _RANS),
        ("columns", test_columns.FLAWS, _COLUMNS),
    )
    found = list(OWN)
    for base, flaws, rules in sources:
        for rule, names in rules.items():
            found += [Fault(rule, name, base, flaws[name][0]) for name in names]
    return found
