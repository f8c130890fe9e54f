"""The rules by which the second reader refuses, written from the tables of SPEC.md alone.

Nothing of codecllm is imported. Each check raises `RuleError` with the rule's name. Rules about
bytes that are decoded (5a to 5s, 6, 7.2a, 7.3) are assertions of `independent_reader`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import xxhash

BITS = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "BOOL": 8, "C64": 64}
BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
UNCODED = {"F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "C64"}  # [7] 0 planes under lossless
FEATURES = {"rans", "steps", "col_scale", "wide", "paths", "code", "quantized"}
FORBIDDEN = re.compile(
    '["*:<>?\\\\|\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f'
    "\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
PART = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}"
NAME = r"[a-z][a-z0-9_-]{0,31}"
Check = Callable[[Any], bool]


class RuleError(Exception):
    """A rule of SPEC.md is broken."""


def refuse(rule: str, broken: bool) -> None:
    """Raises where a rule is broken."""
    if broken:
        raise RuleError(rule)


def parse_json(data: bytes) -> dict[str, Any]:
    """[8.1] Strict JSON."""
    strings_removed = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
    depth = deepest = 0
    for byte in strings_removed:
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    refuse("8.1e", deepest > 16)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse("8.1b", len(dict(items)) != len(items))
        return dict(items)

    def integer(digits: str) -> int:
        refuse("8.1d", len(digits) > 17 or abs(int(digits)) > 2**53)
        return int(digits)

    def number(digits: str) -> float:
        refuse("8.1c", abs(float(digits)) == float("inf"))
        return float(digits)

    def constant(_: str) -> None:
        raise RuleError("8.1c")

    try:
        text = data.decode()
        document = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
        )
    except ValueError:
        raise RuleError("8.1a") from None
    refuse("8.1a", not isinstance(document, dict))
    refuse(
        "8.1f", re.search("[\ud800-\udfff]", json.dumps(document, ensure_ascii=False)) is not None
    )
    return dict(document)


def _text(value: Any) -> bool:
    return type(value) is str


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _matches(pattern: str) -> Check:
    return lambda value: type(value) is str and re.fullmatch(pattern, value, re.ASCII) is not None


def _one_of(*values: str) -> Check:
    return lambda value: type(value) is str and value in values


def _list_of(check: Check, count: int | None = None) -> Check:
    return lambda value: (
        type(value) is list and count in (None, len(value)) and all(map(check, value))
    )


SHA256, XXH3 = _matches("[0-9a-f]{64}"), _matches("[0-9a-f]{16}")
Fields = dict[str, Check]


def fields(value: Any, required: Fields, optional: Fields | None = None) -> None:
    """[8.2e] Keys and types of an object."""
    known = required | (optional or {})
    refuse("8.2e", type(value) is not dict)
    refuse("8.2e", not required.keys() <= value.keys() <= known.keys())
    refuse("8.2e", not all(known[key](item) for key, item in value.items()))


def _object(required: Fields, optional: Fields | None = None) -> Check:
    def check(value: Any) -> bool:
        fields(value, required, optional)
        return True

    return check


FILE: Fields = {"name": _text, "bytes": _count, "sha256": SHA256}
TOP: Fields = {
    "format": _one_of("codecllm"),
    "format_version": _matches(r"(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})"),
    "required_features": _list_of(_text),
    "writer": lambda value: type(value) is dict and all(map(_text, value.values())),
    "source": _object(
        {
            "repo": lambda value: value is None or _text(value),
            "commit": lambda value: value is None or _matches("[0-9a-f]{40}")(value),
            "tensor_bytes": _count,
        },
        {"quantization": _matches(r"[a-z0-9][a-z0-9._-]{0,63}")},
    ),
    "options": _object(
        {
            "scheme": _one_of("int8", "lossless"),
            "include": _list_of(_text),
            "exclude": _list_of(_text),
            "non_finite": _one_of("error", "lossless"),
            "max_shard_bytes": _count,
        },
        {
            "codec": _one_of("rans"),
            "bits": lambda value: _number(value) and 0 < value <= 64,
            "ratio": lambda value: _number(value) and value > 0,
            "calibrate": lambda value: _text(value) and 1 <= len(value) <= 64,
            "refine": lambda value: type(value) is bool,
        },
    ),
    "shards": _list_of(_object(FILE | {"header_xxh3": XXH3})),
    "files": _list_of(_object(FILE)),
    "tensors": lambda value: type(value) is list,
    "manifest_sha256": SHA256,
}
CALIBRATION = _object(
    {"kind": _matches(NAME), "tokens": _count, "sha256": SHA256}, {"seed": _count}
)
PLANE = _object(
    {"codec": _text, "raw_bytes": _count, "stored_bytes": _count, "entropy_bits": _count}
)
ANY: Fields = {"name": _text, "dtype": _text, "shape": _list_of(_count), "scheme": _text}
STORED = ANY | {"shard": _count, "digest": SHA256}
SIDES = _object(
    {"shape": XXH3, "chunks": XXH3},
    dict.fromkeys(("scale", "col_scale", "col_group", "tables"), XXH3),
)
CODED = STORED | {
    "tile": _list_of(lambda value: type(value) is int and 1 <= value < 2**32, 2),
    "planes": lambda value: _list_of(PLANE)(value) and 1 <= len(value) <= 8,
    "xxh3": SIDES,
}
RECORDS: dict[str, tuple[Fields, Fields]] = {
    "raw": (STORED | {"xxh3": XXH3}, {"fallback": _text}),
    "lossless": (CODED, {"fallback": _text, "tables_bytes": _count}),
    "int8": (
        CODED
        | {
            "channel_axis": lambda value: type(value) is int and 0 <= value < 8,
            "channel_kind": _one_of("row", "column"),
            "scale_range": _list_of(_number, 2),
            "worst_error": lambda value: _number(value) and value >= 0,
        },
        {
            "tables_bytes": _count,
            "scale_dtype": _one_of("BF16"),
            "rounding": _matches(NAME),
            "worst_steps": lambda value: _number(value) and value >= 0,
            "deadzone": lambda value: _number(value) and 0 < value < 0.5,
        },
    ),
    "alias": (ANY | {"alias_of": _text}, {}),
}


def check_manifest(data: bytes) -> dict[str, Any]:
    """[8] Returns the manifest."""
    refuse("8.5a", not data.startswith(b"{"))
    seal = re.search(rb'"manifest_sha256":"([0-9a-f]{64})"}\n\Z', data)
    refuse("8.5b", seal is None)
    assert seal is not None
    refuse("8.5c", hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal[1])
    manifest = parse_json(data)
    refuse("8.2a", manifest.get("format") != "codecllm")
    version = manifest.get("format_version")
    refuse("8.2b", not _text(version) or str(version).split(".")[0] != "1")
    features = manifest.get("required_features")
    refuse("8.2c", _list_of(_text)(features) and not set(features or []) <= FEATURES)
    for record in manifest.get("tensors", []):
        scheme = record.get("scheme")
        refuse("8.2d", _text(scheme) and scheme not in RECORDS)
        codecs = [plane.get("codec") for plane in record.get("planes", [])]
        refuse(
            "8.2d", any(_text(codec) and codec not in ("raw", "zstd", "rans") for codec in codecs)
        )
    known = {key: value for key, value in manifest.items() if not key.startswith("x_")}
    fields(known, TOP, {"calibration": CALIBRATION})
    for record in manifest["tensors"]:
        refuse("8.2e", record.get("scheme") not in RECORDS)
        fields(record, *RECORDS[record["scheme"]])
    _check_files(manifest)
    _check_features(manifest)
    _check_tensors(manifest)
    return manifest


def _check_files(manifest: dict[str, Any]) -> None:
    """[3]"""
    count = len(manifest["shards"])
    names = [record["name"] for record in manifest["shards"] + manifest["files"]]
    refuse("3b", not all(_is_plain(name) or _is_path(name) for name in names))
    for number, record in enumerate(manifest["shards"], 1):
        refuse("3e", record["name"] != f"model-{number:05d}-of-{count:05d}.safetensors")
    folded = [_folded(name) for name in [*names, "codecllm.json", "README.md", ".gitattributes"]]
    folders = {name[:place] for name in folded for place, char in enumerate(name) if char == "/"}
    refuse("3d", len(set(folded)) != len(folded) or bool(folders & set(folded)))
    shard = _matches(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
    refuse("3f", any(shard(record["name"]) for record in manifest["files"]))


def _is_plain(name: str) -> bool:
    return _matches(f"(?:{PART}/)?{PART}")(name) and ".." not in name and not name.endswith(".")


def _is_path(name: str) -> bool:
    """[3] A name that needs the feature `paths`."""
    parts, forms = name.split("/"), (name, unicodedata.normalize("NFKC", name))
    if len(parts) > 8 or FORBIDDEN.search("".join(forms)) or len(name.encode()) > 1024:
        return False
    if not all(1 <= len(part.encode()) <= 255 for part in parts):
        return False
    inner = [part for form in forms for part in form.split("/")]
    bounded = all(part and part[0] not in ".-~ " and part[-1] not in ". " for part in inner)
    same_parts = forms[1].count("/") == name.count("/")
    return bounded and same_parts and unicodedata.normalize("NFC", name) == name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _check_features(manifest: dict[str, Any]) -> None:
    """[8.4]"""
    options, tensors = manifest["options"], manifest["tensors"]
    sides = [record["xxh3"] for record in tensors if type(record.get("xxh3")) is dict]
    names = [record["name"] for record in manifest["shards"] + manifest["files"]]
    used = {
        "rans": any("tables" in side for side in sides),
        "steps": "calibration" in manifest
        or any("rounding" in record for record in tensors)
        or bool(options.keys() & {"bits", "ratio", "calibrate", "refine"}),
        "col_scale": any("col_scale" in side for side in sides),
        "wide": any(r["scheme"] == "int8" and len(r["planes"]) == 2 for r in tensors),
        "paths": not all(map(_is_plain, names)),
        "code": any(name.endswith(".py") for name in names),
        "quantized": "quantization" in manifest["source"],
    }
    for feature, is_used in used.items():
        refuse("8.2f", is_used and feature not in manifest["required_features"])


def _check_tensors(manifest: dict[str, Any]) -> None:
    """[8.3, 10]"""
    tensors = {record["name"]: record for record in manifest["tensors"]}
    normal = {unicodedata.normalize("NFC", name) for name in tensors}
    refuse("8.3a", not len(normal) == len(tensors) == len(manifest["tensors"]))
    names = list(tensors)
    for record in manifest["tensors"]:
        if type(record.get("xxh3")) is dict:
            names += [f"{record['name']}_{side}" for side in record["xxh3"]]
    refuse("8.3b", len(set(names)) != len(names))
    for name, record in tensors.items():
        refuse("8.3c", not name or name == "__metadata__" or _has_control(name))
        refuse("10a", len(name.encode()) > 512)
        refuse("8.3c", record["dtype"] not in BITS)
        check_size(record["shape"])
        if record["scheme"] == "alias":
            target = tensors.get(record["alias_of"])
            refuse("8.3d", target is None or target["scheme"] == "alias")
            assert target is not None
            refuse("8.3d", any(target[key] != record[key] for key in ("dtype", "shape")))
            continue
        refuse("8.3e", record["shard"] >= len(manifest["shards"]))
        if record["scheme"] != "raw":
            _check_coded(record)
    stored = [record for record in tensors.values() if record["scheme"] != "alias"]
    size = sum(prod(record["shape"]) * BITS[record["dtype"]] // 8 for record in stored)
    shards = sum(record["bytes"] for record in manifest["shards"])
    refuse("10b", size > max(268435456, 100 * shards))


def _check_coded(record: dict[str, Any]) -> None:
    int8, planes, side = record["scheme"] == "int8", record["planes"], record["xxh3"]
    bits = BITS[record["dtype"]]
    refuse("8.3f", len(record["shape"]) < 2 or prod(record["shape"]) == 0)
    if int8:
        refuse("8.3g", record["dtype"] not in ("BF16", "F16", "F32") or len(planes) > 2)
    else:
        refuse("8.3g", record["dtype"] in UNCODED or len(planes) != bits // 8)
    by_row = int8 and record["channel_kind"] == "row"
    refuse("8.3h", ("scale" in side) != int8 or ("col_scale" in side and not by_row))
    refuse("8.3h", "col_group" in side and "col_scale" not in side)
    rans = any(plane["codec"] == "rans" for plane in planes)
    refuse("8.3i", ("tables" in side) != rans or ("tables_bytes" in record) != rans)
    if int8:
        last, axis = len(record["shape"]) - 1, record["channel_axis"]
        refuse("8.3j", axis > last or (not by_row and axis != last))
        newer = "col_scale" in side or "scale_dtype" in record or len(planes) == 2
        rounding = record.get("rounding")
        refuse("8.3k", (rounding is None) != ("worst_steps" not in record))
        refuse("8.3k", newer and rounding is None)
        deadzone = rounding in ("deadzone", "feedback-deadzone")
        refuse("8.3k", deadzone != ("deadzone" in record))
    refuse("8.3l", any(plane["raw_bytes"] != prod(record["shape"]) for plane in planes))


def _has_control(name: str) -> bool:
    return any(ord(char) < 32 or ord(char) == 127 for char in name)


def check_size(shape: list[int]) -> None:
    """[10]"""
    refuse("10a", len(shape) > 8 or any(dim > 2**48 for dim in shape))
    refuse("10a", prod(max(dim, 1) for dim in shape) > 2**48)


def check_header(raw: bytes, header_xxh3: str, stored: dict[str, tuple[str, Any]]) -> None:
    """[4] `stored`: name -> dtype and shape that the manifest gives, None where it gives none."""
    refuse("4a", len(raw) < 8)
    (size,) = struct.unpack_from("<Q", raw)
    refuse("4b", size > 25_000_000)
    refuse("4c", 8 + size > len(raw))
    refuse("4d", f"{xxhash.xxh3_64_intdigest(raw[: 8 + size]):016x}" != header_xxh3)
    refuse("4e", not raw[8:].startswith(b"{"))
    header = parse_json(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    refuse("4f", type(metadata) is not dict or not all(map(_text, metadata.values())))
    for name, entry in header.items():
        refuse("4g", not name or _has_control(name))
        wrong_keys = type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}
        refuse("4h", wrong_keys or entry["dtype"] not in BITS)
        refuse("4h", not _list_of(_count)(entry["shape"]))
        refuse("4h", not _list_of(_count, 2)(entry["data_offsets"]))
        check_size(entry["shape"])
        begin, end = entry["data_offsets"]
        refuse("4i", 8 * (end - begin) != prod(entry["shape"]) * BITS[entry["dtype"]])
    position = 0
    for begin, end in sorted(entry["data_offsets"] for entry in header.values()):
        refuse("4j", begin != position)
        position = end
    refuse("4k", position > len(raw) - 8 - size)
    refuse("4j", position < len(raw) - 8 - size)
    refuse("4l", header.keys() != stored.keys())
    for name, (dtype, shape) in stored.items():
        entry = header[name]
        one_row = len(entry["shape"]) == 1 if shape is None else entry["shape"] == shape
        refuse("4l", entry["dtype"] != dtype or not one_row)


def stored_tensors(manifest: dict[str, Any], shard: int) -> dict[str, tuple[str, Any]]:
    """[4] Returns dtype and shape of every tensor that the manifest places in a shard."""
    stored: dict[str, tuple[str, Any]] = {}
    for record in manifest["tensors"]:
        if record["scheme"] == "alias" or record["shard"] != shard:
            continue
        name, shape = record["name"], record["shape"]
        if record["scheme"] == "raw":
            stored[name] = (record["dtype"], shape)
            continue
        stored |= {name: ("U8", None), name + "_shape": ("I64", [len(shape)])}
        stored[name + "_chunks"] = ("U8", None)
        if "tables_bytes" in record:
            stored[name + "_tables"] = ("U8", [record["tables_bytes"]])
        if record["scheme"] == "int8":
            by_row, axis = record["channel_kind"] == "row", record["channel_axis"]
            split = axis + 1 if by_row else axis
            rows, cols = prod(shape[:split]), prod(shape[split:])
            dtype = record.get("scale_dtype", "F32")
            stored[name + "_scale"] = (dtype, [rows if by_row else cols])
            if "col_scale" in record["xxh3"]:
                stored[name + "_col_scale"] = (dtype, [cols])
            if "col_group" in record["xxh3"]:
                stored[name + "_col_group"] = ("U8", [cols])
    return stored


def check_planes(record: dict[str, Any], table: bytes) -> None:
    """[5] Codecs and sizes of a record's planes against its chunk table."""
    planes, names = record["planes"], {"raw": 0, "zstd": 1, "rans": 2}
    chunks = list(struct.iter_unpack("<IBB2sQ", table[32:]))
    for number, plane in enumerate(planes):
        own, codec = chunks[number :: len(planes)], names[plane["codec"]]
        refuse("5o", any(chunk[1] not in (0, codec) for chunk in own))
        refuse("5o", all(chunk[1] != codec for chunk in own))
        refuse("5p", sum(chunk[0] for chunk in own) != plane["stored_bytes"])


def check_window(frame: bytes, raw_bytes: int) -> None:
    """[6] Window_Size of a frame (RFC 8878, 3.1.1.1.2)."""
    descriptor = frame[4]
    window = raw_bytes
    if not descriptor & 32:
        base = 1 << (10 + (frame[5] >> 3))
        window = base + base // 8 * (frame[5] & 7)
    refuse("6c", window > 8388608)


def check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """[3k, 9a] Rules for the whole folder."""
    listed = {record["name"] for record in manifest["shards"] + manifest["files"]}
    refuse("3k", any(path.name not in listed for path in folder.glob("*.safetensors")))
    index = "model.safetensors.index.json"
    if index in listed:
        expected = {
            name: record["name"]
            for number, record in enumerate(manifest["shards"])
            for name in stored_tensors(manifest, number)
        }
        refuse("9a", parse_json((folder / index).read_bytes()).get("weight_map") != expected)
