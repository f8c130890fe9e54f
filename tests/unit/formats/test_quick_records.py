"""Records that are read many at once are those that are read one by one, and so are the errors."""

from __future__ import annotations

import random

import pytest

from codecllm.formats import limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import FormatError
from codecllm.formats.manifest import quick_records as quick
from codecllm.formats.manifest import reading
from codecllm.formats.manifest.manifest import pack_manifest
from codecllm.formats.manifest.reading import parse_manifest
from tests.unit.formats.test_manifest import _coded, _manifest, _raw

COUNT = 40


@pytest.fixture(scope="module")
def text():
    """The bytes of a manifest before its seal."""
    records = [_raw(name=f"n{number}") for number in range(COUNT)]
    records += [_coded("lossless", name=f"l{number}") for number in range(COUNT)]
    records += [
        _coded("int8", name=f"q{number}", planes=1, worst_error=1.5e-07 * number)
        for number in range(COUNT)
    ]
    data = pack_manifest(_manifest(*records))
    return data[: data.rindex(b'"manifest_sha256"')]


def _seal(text):
    return text + b'"manifest_sha256":"%s"}\n' % sha256_hex(text).encode()


def _outcome(text):
    try:
        return parse_manifest(_seal(text))
    except FormatError as exc:
        return type(exc), str(exc)


def _one_by_one(text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reading, "quick_records", lambda data, begin, most: ([], begin))
        return _outcome(text)


def test_all_records_of_our_writer_are_read_together(text, monkeypatch):
    monkeypatch.setattr(quick, "_BATCH_BYTES", 1000)
    begin = text.index(b'"tensors":[') + len(b'"tensors":')
    records, behind = quick.quick_records(_seal(text), begin, limits.TENSORS)
    assert len(records) == 3 * COUNT
    assert text[behind : behind + 2] == b"\n]"
    assert _outcome(text).tensors == records == _one_by_one(text, monkeypatch).tensors


def test_no_more_records_are_taken_than_allowed(text, monkeypatch):
    begin = text.index(b'"tensors":[') + len(b'"tensors":')
    monkeypatch.setattr(quick, "_BATCH_BYTES", 1)
    records, behind = quick.quick_records(text, begin, 3)
    assert len(records) == 3
    assert text[behind : behind + 2] == b",\n"


EDITS = {
    "a key twice": (b'"name":"l7"', b'"name":"l7","name":"l7"'),
    "a key of a plane twice": (b'"codec":"raw"', b'"codec":"raw","codec":"raw"'),
    "null": (b'"name":"l7"', b'"fallback":null,"name":"l7"'),
    "a large integer": (b'"shard":0', b'"shard":9007199254740993'),
    "a large dimension": (b'"shape":[4,6]', b'"shape":[4,90071992547409930]'),
    "a float without end": (b'"worst_error":', b'"worst_error":1e400,"x":'),
    "a large integer as a float": (b'"worst_error":', b'"worst_error":90071992547409930,"x":'),
    "not a number": (b'"shard":0', b'"shard":NaN'),
    "an unknown codec": (b'"codec":"raw"', b'"codec":"new"'),
    "an unknown scheme": (b'"scheme":"lossless"', b'"scheme":"new"'),
    "an unknown key": (b'"name":"l7"', b'"name":"l7","new":1'),
    "spaces": (b'"name":"l7",', b'"name" : "l7" , '),
    "an escape": (b'"name":"l7"', b'"name":"\\u006c7"'),
    "a lone surrogate": (b'"name":"l7"', b'"name":"\\ud800"'),
    "a quote": (b'"name":"l7"', b'"name":"\\":"'),
    "a comma too many": (b'},\n{"name":"l7"', b'},,\n{"name":"l7"'),
    "no comma": (b'},\n{"name":"l7"', b'}\n{"name":"l7"'),
    "two records a line": (b'},\n{"name":"l7"', b'},{"name":"l7"'),
    "a line in a record": (b'"name":"l7",', b'"name":"l7",\n'),
    "a list in the list": (b'{"name":"l7"', b'[]},{"name":"l7"'),
    "no UTF-8": (b'"name":"l7"', b'"name":"l\xff"'),
    "a name of two": (b'"name":"l7"', b'"name":"l8"'),
    "an end too early": (b'},\n{"name":"l7"', b'}\n],\n"x_more":[\n{"name":"l7"'),
    "a long record": (b'"name":"l7"', b'"name":"' + b"l" * (limits.RECORD_BYTES + 9) + b'"'),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("batch_bytes", [1, 1000, 1 << 20])
def test_edited_records_have_the_outcome_of_single_ones(text, monkeypatch, edit, batch_bytes):
    monkeypatch.setattr(quick, "_BATCH_BYTES", batch_bytes)
    old, new = EDITS[edit]
    assert old in text
    edited = text.replace(old, new, 1)
    assert _outcome(edited) == _one_by_one(edited, monkeypatch)


def test_bytes_changed_at_random_have_the_outcome_of_single_ones(text, monkeypatch):
    monkeypatch.setattr(quick, "_BATCH_BYTES", 1000)
    rng = random.Random(4)
    begin = text.index(b'"tensors":[')
    for _ in range(150):
        edited = bytearray(text)
        at = rng.randrange(begin, len(text))
        edited[at : at + rng.randrange(2)] = rng.choice([b"", b",", b'"', b"0", b"}", b"]", b"\n"])
        assert _outcome(bytes(edited)) == _one_by_one(bytes(edited), monkeypatch)
