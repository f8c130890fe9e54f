"""The JSON parser takes strict JSON within its limits, and names the place of each fault."""

from __future__ import annotations

import json

import pytest

from codecllm.formats import limits
from codecllm.formats.errors import LimitError, SchemaError
from codecllm.formats.strict_json import parse_json_object


def _parse(text, **options):
    data = text if isinstance(text, bytes) else text.encode()
    return parse_json_object(data, file="f.json", **{"max_bytes": 1 << 20, **options})


def test_values_come_back():
    text = (
        ' {"a": [1, -2, 3.5, true, false, null], "b": {"c": "\\u00e9 \\ud83d\\ude00"},'
        ' "": 9007199254740992}\n'
    )
    assert _parse(text) == {"a": [1, -2, 3.5, True, False, None], "b": {"c": "é 😀"}, "": 2**53}


FLAWS = {
    "empty": (b"", SchemaError, "not JSON"),
    "not an object": (b"[]", SchemaError, "not an object"),
    "a string": (b'"a"', SchemaError, "not an object"),
    "two values": (b"{} {}", SchemaError, "not JSON"),
    "trailing comma": (b'{"a": 1,}', SchemaError, "not JSON"),
    "comment": (b"{} // x", SchemaError, "not JSON"),
    "single quotes": (b"{'a': 1}", SchemaError, "not JSON"),
    "leading zero": (b'{"a": 01}', SchemaError, "not JSON"),
    "leading plus": (b'{"a": +1}', SchemaError, "not JSON"),
    "hexadecimal": (b'{"a": 0x1}', SchemaError, "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", SchemaError, "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', SchemaError, "not UTF-8"),
    "overlong UTF-8": (b'{"a": "\xc0\xaf"}', SchemaError, "not UTF-8"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', SchemaError, "not UTF-8"),
    "raw control character": (b'{"a": "\n"}', SchemaError, "not JSON"),
    "duplicate key": (b'{"a": 1, "a": 1}', SchemaError, "'a' stands twice"),
    "duplicate key by escape": (b'{"a": 1, "\\u0061": 1}', SchemaError, "'a' stands twice"),
    "duplicate key deep inside": (
        b'{"a": [{"b": {"c": 1, "c": 2}}]}',
        SchemaError,
        "'c' stands twice",
    ),
    "NaN": (b'{"a": NaN}', SchemaError, "NaN"),
    "Infinity": (b'{"a": Infinity}', SchemaError, "Infinity"),
    "-Infinity": (b'{"a": -Infinity}', SchemaError, "-Infinity"),
    "1e400": (b'{"a": 1e400}', SchemaError, "not finite"),
    "-1e400": (b'{"a": -1e400}', SchemaError, "not finite"),
    "2^53 + 1": (b'{"a": 9007199254740993}', LimitError, "too large"),
    "-(2^53 + 1)": (b'{"a": -9007199254740993}', LimitError, "too large"),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", LimitError, "too large"),
    "lone surrogate in a value": (b'{"a": "\\ud800"}', SchemaError, "surrogate"),
    "lone surrogate in a key": (b'{"\\udfff": 1}', SchemaError, "surrogate"),
    "surrogates in the wrong order": (b'{"a": ["\\ude00\\ud83d"]}', SchemaError, "surrogate"),
    "depth 17": (b'{"a":' + b"[" * 16 + b"]" * 16 + b"}", LimitError, "too deeply"),
    "depth 100000": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", LimitError, "too deeply"),
    "unclosed and deep": (b'{"a":' * 50_000, LimitError, "too deeply"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(name):
    data, expected, words = FLAWS[name]
    with pytest.raises(expected, match=words.replace("+", r"\+")) as caught:
        _parse(data)
    assert type(caught.value) is expected
    assert caught.value.file == "f.json"
    assert "\n" not in str(caught.value)


AS_PYTHON = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "2^53 + 1", "-(2^53 + 1)")
AS_PYTHON += ("duplicate key", "duplicate key by escape", "duplicate key deep inside")


@pytest.mark.parametrize("name", FLAWS)
def test_files_of_transformers_are_read_as_python_reads_them(name):
    data, expected, _ = FLAWS[name]
    if name in AS_PYTHON:
        assert repr(_parse(data, as_python=True)) == repr(json.loads(data))
        return
    with pytest.raises(LimitError if name == "5000 digits" else expected):
        _parse(data, as_python=True)


def test_place_of_a_fault_is_named():
    with pytest.raises(SchemaError) as caught:
        _parse(b'{"a": ;}')
    assert caught.value.byte == 6
    with pytest.raises(SchemaError) as caught:
        _parse(b'{"a": "\xff"}')
    assert caught.value.byte == 7


def test_limits_are_the_last_that_passes():
    assert _parse(b'{"a":' + b"[" * 15 + b"]" * 15 + b"}")["a"]
    assert limits.JSON_DEPTH == 16
    assert _parse(b'{"a": -9007199254740992}') == {"a": -(2**53)}
    assert _parse(b"{}", max_bytes=2) == {}
    with pytest.raises(LimitError, match="too long"):
        _parse(b"{}", max_bytes=1)
    with pytest.raises(LimitError, match="at most 1 levels"):
        _parse('{"a": {}}', max_depth=1)
