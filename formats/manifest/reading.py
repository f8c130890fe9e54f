"""Reading a manifest, record by record.

Each record is checked before the next one is decoded: the work is bounded by the valid records.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from codecllm.formats import FORMAT_VERSION, limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.codecs import CODEC_IDS
from codecllm.formats.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
    UnsupportedVersionError,
)
from codecllm.formats.files import describe_foreign
from codecllm.formats.manifest.manifest import (
    KNOWN_FEATURES,
    MANIFEST_NAME,
    Manifest,
)
from codecllm.formats.manifest.quick_records import quick_records
from codecllm.formats.manifest.records import FileRecord, Record, ShardRecord, TensorRecord
from codecllm.formats.schemes import SCHEMES
from codecllm.formats.strict_json import JsonWalker

_SEAL = re.compile(rb'"manifest_sha256":"([0-9a-f]{64})"}\n')
_SEAL_BYTES = len('"manifest_sha256":"') + 64 + len('"}\n')
_SCHEMES = frozenset({*SCHEMES, "alias"})
_HEAD = ("format", "format_version", "required_features")
# Name of a list -> the schema of its records, and the most records that it may have.
_LISTS: dict[str, tuple[TypeAdapter[Any], int]] = {
    "shards": (TypeAdapter(ShardRecord), limits.SHARDS),
    "files": (TypeAdapter(FileRecord), limits.FILES),
    "tensors": (TypeAdapter(TensorRecord), limits.TENSORS),
}


def parse_manifest(data: bytes) -> Manifest:
    """Validates a manifest completely.

    Records are decoded and checked one after another, up to the first that is wrong.

    Raises:
        NotAContainerError: the bytes are no manifest.
        UnsupportedVersionError: another major version, or an unknown required feature, scheme or
            codec.
        ChecksumError: the seal does not fit the bytes.
        SchemaError, LimitError, UnsafePathError: see SPEC.md 8 and 10.
    """
    if len(data) > limits.MANIFEST_BYTES:
        raise LimitError(
            "manifest is too long",
            file=MANIFEST_NAME,
            got=len(data),
            expected=limits.MANIFEST_BYTES,
        )
    if not data.startswith(b"{"):
        looks_like = describe_foreign(data[:64]) or "not JSON"
        raise NotAContainerError(f"this is {looks_like}, not a manifest", file=MANIFEST_NAME)
    # First: in a damaged text any other fault would be misleading.
    _check_seal(data)
    fields = _read_fields(data)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as exc:
        raise _first_error(exc) from exc


def _read_fields(data: bytes) -> dict[str, Any]:
    """Returns the manifest's fields by name; the lists hold validated records.

    The version must be known before a record is: lists that stand before it are walked twice.
    """
    walker = JsonWalker(data, file=MANIFEST_NAME)
    fields: dict[str, Any] = {}
    postponed_lists: dict[str, int] = {}
    room = limits.FIELD_BYTES
    for key in walker.members():
        begin = walker.position
        if key in _LISTS:
            if all(name in fields for name in _HEAD):
                fields[key] = _records(walker, key, data)
            else:
                postponed_lists[key] = begin
                for _ in walker.items(limits.RECORD_BYTES, _LISTS[key][1], key):
                    pass
            continue
        value = walker.value(room)
        # One allowance for all fields: many small ones cost as much as a large one.
        room -= walker.position - begin
        if not key.startswith("x_") and key != "manifest_sha256":
            fields[key] = value
        # As early as possible: records of a newer format may look malformed.
        if key in _HEAD and all(name in fields for name in _HEAD):
            _check_head(fields)
    walker.end()
    _check_head(fields)
    for key, begin in postponed_lists.items():
        inner = JsonWalker(data, file=MANIFEST_NAME, max_depth=limits.JSON_DEPTH - 1, begin=begin)
        fields[key] = _records(inner, key, data)
    for key in fields.keys() - _LISTS.keys() - {"source"}:
        _refuse_null(fields[key], key)
    return fields


def _records(walker: JsonWalker, key: str, data: bytes) -> list[Record]:
    """Returns the records of the list at the position of the walker, each checked."""
    adapter, most = _LISTS[key]
    records: list[Record] = []
    if key == "tensors" and walker.stands_at(b"["):
        records, behind = quick_records(data, walker.position, most)
        walker.position = behind
    taken = len(records)
    rest = walker.items(limits.RECORD_BYTES, most, key, taken)
    for number, item in enumerate(rest, taken):
        if key == "tensors":
            _check_known(item)
        _refuse_null(item, f"{key}.{number}")
        try:
            records.append(adapter.validate_python(item))
        except ValidationError as exc:
            raise _first_error(exc, f"{key}.{number}") from exc
    return records


def _holds_null(value: Any) -> bool:
    """Whether a value, or one of an object in it, is null."""
    return value is None or (type(value) is dict and any(map(_holds_null, value.values())))


def _refuse_null(value: Any, place: str) -> None:
    """Refuses null, which the schema would take for an optional key that is absent.

    Raises:
        SchemaError: the value, or one of an object in it, is null.
    """
    if not _holds_null(value):
        return
    while value is not None:
        key, value = next(pair for pair in value.items() if _holds_null(pair[1]))
        place = f"{place}.{key}"
    raise SchemaError(f"field {place} is null", file=MANIFEST_NAME)


def _check_seal(data: bytes) -> None:
    seal = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None:
        raise TruncatedError(
            "manifest does not end in its seal", file=MANIFEST_NAME, got=ascii(data[-40:])
        )
    digest = sha256_hex(memoryview(data)[:-_SEAL_BYTES])
    if digest != seal[1].decode():
        raise ChecksumError(
            "manifest differs from its seal",
            file=MANIFEST_NAME,
            got=digest,
            expected=seal[1].decode(),
        )


def _check_head(fields: dict[str, Any]) -> None:
    """Refuses a newer format, by name, before the strict schema sees it."""
    if fields.get("format") != "codecllm":
        raise NotAContainerError("field 'format' is not 'codecllm'", file=MANIFEST_NAME)
    version = fields.get("format_version")
    ours = FORMAT_VERSION.split(".")[0]
    # A minor version only adds; required features name the additions that matter.
    if not isinstance(version, str) or version.split(".")[0] != ours:
        got = ascii(version)[:40]
        raise UnsupportedVersionError(
            "format version", file=MANIFEST_NAME, got=got, expected=f"{ours}.x"
        )
    features = fields.get("required_features")
    for name in features if isinstance(features, list) else []:
        if isinstance(name, str) and name not in KNOWN_FEATURES:
            raise UnsupportedVersionError(
                f"unknown required feature {ascii(name)[:80]}", file=MANIFEST_NAME
            )


def _check_known(record: Any) -> None:
    """Refuses a tensor's record whose scheme or codec is unknown, by its name."""
    if not isinstance(record, dict):
        return
    tensor = str(record.get("name"))
    scheme = record.get("scheme")
    if isinstance(scheme, str) and scheme not in _SCHEMES:
        raise UnsupportedVersionError(
            f"unknown scheme {ascii(scheme)[:80]}", file=MANIFEST_NAME, tensor=tensor
        )
    planes = record.get("planes")
    for plane in planes if isinstance(planes, list) else []:
        codec = plane.get("codec") if isinstance(plane, dict) else None
        if isinstance(codec, str) and codec not in CODEC_IDS:
            raise UnsupportedVersionError(
                f"unknown codec {ascii(codec)[:80]}", file=MANIFEST_NAME, tensor=tensor
            )


def _first_error(exc: ValidationError, within: str = "") -> FormatError:
    """Returns the first error of a record, or of the fields beside the lists."""
    first = exc.errors(include_url=False)[0]
    place = ".".join(part for part in (within, *map(str, first["loc"])) if part)
    got = ascii(first.get("input"))[:80]
    return SchemaError(f"field {place}: {first['msg']}"[:300], file=MANIFEST_NAME, got=got)
