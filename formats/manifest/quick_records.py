"""Records of tensors as our writer writes them, many by one call.

What is taken here passes the checks of `reading` record by record, with the same result: tests
compare the two. Anything else is left to them, and they say what is wrong.
"""

from __future__ import annotations

import re

from pydantic import TypeAdapter, ValidationError

from codecllm.formats import limits
from codecllm.formats.codecs import CODEC_IDS
from codecllm.formats.manifest.records import (
    AliasTensor,
    Int8Tensor,
    LosslessTensor,
    PlaneRecord,
    RawTensor,
    Record,
    TensorRecord,
)

_RECORDS = TypeAdapter(list[TensorRecord])
_PLANE_KEYS = len(PlaneRecord.model_fields)

_LONG_INTEGER = re.compile(rb"[:,\[]-?[0-9]{%d}" % len(str(limits.INTEGER)))
"""The beginning of an integer that may be too large, wherever one may stand."""

_BATCH_BYTES = 64 << 10
"""Bytes that one call reads: a fault costs so many at most, which are then read once more."""


def quick_records(data: bytes, begin: int, most: int) -> tuple[list[Record], int]:
    """Reads the first records of a list of tensors, up to one that has to be read by itself.

    Args:
        data: a manifest.
        begin: where the list begins, at its bracket.
        most: take no more records.

    Returns:
        The records, and where the last of them ends; `begin` where there is none.
    """
    records: list[Record] = []
    behind = begin
    close = data.find(b"\n]", begin)
    if data[begin : begin + 2] != b"[\n" or close < begin + 2:
        return records, behind
    start = begin + 2
    while start < close:
        end = data.find(b"\n", min(start + _BATCH_BYTES, close))
        is_last = end == close
        text = data[start : end if is_last else end - 1]
        batch = _batch(text) if is_last or data[end - 1 : end] == b"," else None
        if batch is None or len(records) + len(batch) > most:
            break
        records += batch
        behind = start + len(text)
        start = end + 1
    return records, behind


def _batch(text: bytes) -> list[Record] | None:
    """Returns the records of some lines, or None where they are not certainly sound."""
    # A backslash may hide a quote, and null stands where a key should be absent.
    if (
        b"\\" in text
        or b"null" in text
        or _LONG_INTEGER.search(text)
        or max(map(len, text.split(b"\n"))) > limits.RECORD_BYTES
    ):
        return None
    try:
        records: list[Record] = list(_RECORDS.validate_json(b"[" + text + b"]"))
    except ValidationError:
        return None
    # A key that stands twice in an object is read once.
    if text.count(b'":') != sum(map(_keys, records)) or not all(map(_has_known_codecs, records)):
        return None
    return records


def _keys(record: Record) -> int:
    """Returns how many keys a record has, with those of the objects in it."""
    count = len(record.model_fields_set)
    if isinstance(record, LosslessTensor | Int8Tensor):
        count += _PLANE_KEYS * len(record.planes) + len(record.xxh3.model_fields_set)
    return count


def _has_known_codecs(record: Record) -> bool:
    if isinstance(record, RawTensor | AliasTensor):
        return True
    assert isinstance(record, LosslessTensor | Int8Tensor)
    return all(plane.codec in CODEC_IDS for plane in record.planes)
