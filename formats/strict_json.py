"""A JSON reader that accepts no ambiguity: the two parsers of an attack always read the same thing.

Small texts are decoded as a whole (`parse_json_object`). Long ones are walked value by value
(`JsonWalker`): the walk stops at the first fault, and neither time nor memory goes beyond the part
that was read until then.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from codecllm.formats import limits
from codecllm.formats.errors import LimitError, SchemaError

CONFIG_BYTES = 16 << 20
"""A longer config.json is refused."""

_SPACE = re.compile(rb"[ \t\n\r]*")
_CERTAIN_DIGITS = len(str(limits.INTEGER))  # an integer of fewer digits is never too large
_FIRST_WINDOW = 2048  # most values are shorter; only longer ones pay for a longer window


def parse_json_object(
    data: bytes,
    *,
    file: str,
    max_bytes: int,
    max_depth: int = limits.JSON_DEPTH,
    as_python: bool = False,
) -> dict[str, Any]:
    """Parses UTF-8 JSON whose top level is an object; as `parse_json`.

    Raises:
        LimitError, SchemaError: as there, or the top level is not an object.
    """
    value = parse_json(
        data, file=file, max_bytes=max_bytes, max_depth=max_depth, as_python=as_python
    )
    if not isinstance(value, dict):
        raise SchemaError("top level is not an object", file=file, got=type(value).__name__)
    return value


def parse_json(
    data: bytes,
    *,
    file: str,
    max_bytes: int,
    max_depth: int = limits.JSON_DEPTH,
    as_python: bool = False,
) -> Any:
    """Parses UTF-8 JSON.

    Args:
        data: the whole text.
        file: name for error texts.
        max_bytes: refuse a longer text.
        max_depth: refuse deeper nesting; a flat object has depth 1.
        as_python: takes the keys and numbers that `json.loads` takes: `NaN`, `Infinity`, numbers of
            any size, and of a repeated key the last value. For files that transformers reads so.

    Raises:
        LimitError: too long, too deep, too many values, or an integer beyond 2^53.
        SchemaError: not UTF-8, not JSON, a repeated key at any depth, NaN, an infinity or a lone
            surrogate.
    """
    if len(data) > max_bytes:
        raise LimitError(
            "JSON text is too long", file=file, got=len(data), expected=f"at most {max_bytes} bytes"
        )
    # Counted in the bytes: in memory a value is many times as large as in the text.
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > limits.JSON_VALUES:
        raise LimitError(
            "JSON holds too many values",
            file=file,
            got=values,
            expected=f"at most {limits.JSON_VALUES} commas and opening brackets",
        )
    try:
        decoder = json.JSONDecoder() if as_python else _strict_decoder(file)
        value = decoder.decode(data.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise SchemaError(f"not UTF-8 ({exc.reason})", file=file, byte=exc.start) from exc
    except json.JSONDecodeError as exc:
        raise SchemaError(f"not JSON ({exc.msg})", file=file, byte=exc.pos) from exc
    except ValueError as exc:  # an integer of more digits than Python converts
        raise LimitError(f"number is too long ({exc})", file=file) from exc
    except RecursionError as exc:
        raise LimitError(
            "JSON is nested too deeply", file=file, expected=f"at most {max_depth} levels"
        ) from exc
    if isinstance(value, (dict, list)):
        _check_depth(value, file, max_depth)
    if b"\\u" in data:  # UTF-8 holds none otherwise
        _check_strings(value, file)
    return value


def parse_config(data: bytes) -> dict[str, Any]:
    """Parses the config.json of a model, as `parse_json_object`.

    Raises:
        LimitError: longer than 16 MiB, or beyond another limit.
        SchemaError: no JSON object.
    """
    return parse_json_object(data, file="config.json", max_bytes=CONFIG_BYTES, as_python=True)


class JsonWalker:
    """Walks a JSON text without decoding it as a whole.

    The position moves forward only. `members` and `items` step through the object or list at the
    position; in each step the caller must take the value: with `value`, `members` or `items`. All
    raise as `parse_json_object` does.

    Examples:
        >>> walker = JsonWalker(b'{"a": 1, "list": [2, 3]}', file="example.json")
        >>> for key in walker.members():
        ...     print(key, list(walker.items(9)) if key == "list" else walker.value(9))
        a 1
        list [2, 3]
        >>> walker.end()
    """

    def __init__(
        self, data: bytes, *, file: str, max_depth: int = limits.JSON_DEPTH, begin: int = 0
    ) -> None:
        """Stands at byte `begin` of `data`; `file` is the name for error texts."""
        self._data = data
        self._file = file
        self._depth = max_depth
        self._decoder = _strict_decoder(file)
        self.position = begin

    def members(self, most: int = limits.FIELDS, what: str = "fields") -> Iterator[str]:
        """Yields the keys of the object at the position, at most `most`; none may stand twice."""
        for key, _ in self.members_like(None, most, what):
            yield key

    def members_like(
        self, pattern: re.Pattern[bytes] | None, most: int = limits.FIELDS, what: str = "fields"
    ) -> Iterator[tuple[str, re.Match[bytes] | None]]:
        """Yields the keys of the object at the position, as `members`, with a match for most.

        A member that fits the pattern is taken as a whole: its match is yielded, and the caller
        must not take its value. This is many times as fast as decoding it.

        Args:
            pattern: matches a key and its value, both plain ASCII without a backslash; its first
                group is the key. It must match nothing but JSON.
            most: as in `members`.
            what: as in `members`.
        """
        earlier_keys: set[str] = set()
        for _ in self._elements(b"{", b"}", most, what):
            if self._peek() != b'"':
                raise self._not_json("a key in double quotes is missing")
            match = pattern.match(self._data, self.position) if pattern is not None else None
            if match is not None:
                self.position = match.end()
                key = match[1].decode("ascii")
            else:
                key = self.value(limits.RECORD_BYTES)
            if key in earlier_keys:
                raise SchemaError(
                    f"key {ascii(key)[:80]} stands twice in one object", file=self._file
                )
            earlier_keys.add(key)
            if match is None:
                self._expect(b":")
            yield key, match

    def items(
        self, max_bytes: int, most: int = limits.FIELDS, what: str = "items", taken: int = 0
    ) -> Iterator[Any]:
        """Yields the items of the list at the position.

        At most `most`, each of at most `max_bytes`. With `taken`, the caller has taken so many of
        them already, and the position is behind the last of these.
        """
        for _ in self._elements(b"[", b"]", most, what, taken):
            yield self.value(max_bytes)

    def value(self, max_bytes: int) -> Any:
        """Decodes the value at the position, which takes at most `max_bytes` bytes."""
        self._peek()
        for size in (min(_FIRST_WINDOW, max_bytes), max_bytes):
            window = self._data[self.position : self.position + size]
            whole = self.position + size >= len(self._data)
            try:
                return self._decode(window, whole)
            except UnicodeDecodeError as exc:
                at = self.position + exc.start
                raise SchemaError(f"not UTF-8 ({exc.reason})", file=self._file, byte=at) from exc
            except RecursionError as exc:
                raise self._too_deep() from exc
            except json.JSONDecodeError as exc:
                if whole:
                    raise self._not_json(exc.msg, exc.pos) from exc
                problem = exc.msg
        raise LimitError(
            f"value is too long, or not JSON ({problem})",
            file=self._file,
            byte=self.position,
            expected=f"at most {max_bytes} bytes",
        )

    def stands_at(self, character: bytes) -> bool:
        """Whether the value at the position begins with an ASCII character."""
        return self._peek() == character

    def end(self) -> None:
        """Refuses anything but space behind the position."""
        if self._peek():
            raise self._not_json("Extra data")

    def _decode(self, window: bytes, whole: bool) -> Any:
        text, _ = codecs.utf_8_decode(window, "strict", whole)
        value, length = self._decoder.raw_decode(text)
        size = length if window.isascii() else len(text[:length].encode("utf-8", "surrogatepass"))
        value_bytes = window[:size]
        # A number that the window cuts is still a number: only a longer window shows its end.
        if type(value) in (int, float) and size == len(window) and not whole:
            raise json.JSONDecodeError("number goes on behind the limit", text, 0)
        if value_bytes.count(b"[") + value_bytes.count(b"{") > self._depth:
            _check_depth(value, self._file, self._depth)
        if b"\\u" in value_bytes:
            _check_strings(value, self._file)
        self.position += size
        return value

    def _elements(
        self, opening: bytes, closing: bytes, most: int, what: str, taken: int = 0
    ) -> Iterator[int]:
        """Yields numbers of elements; the caller takes each, commas and brackets are taken here."""
        if not taken:
            self._expect(opening)
        self._depth -= 1
        if self._depth < 0:
            raise self._too_deep()
        number = taken
        if taken and self._peek() == b",":
            self.position += 1
        elif taken:
            self._expect(closing)
            self._depth += 1
            return
        while self._peek() != closing or number:
            if number >= most:
                raise LimitError(
                    f"too many {what}",
                    file=self._file,
                    byte=self.position,
                    expected=f"at most {most}",
                )
            yield number
            number += 1
            if self._peek() != b",":
                break
            self.position += 1
        self._expect(closing)
        self._depth += 1

    def _peek(self) -> bytes:
        """Moves to the next byte that is no space and returns it, nothing at the end."""
        byte = self._data[self.position : self.position + 1]
        # Most texts have no space between their parts, and a match costs as much as a short value.
        if byte > b" ":
            return byte
        match = _SPACE.match(self._data, self.position)
        assert match is not None
        self.position = match.end()
        return self._data[self.position : self.position + 1]

    def _expect(self, character: bytes) -> None:
        if self._peek() != character:
            raise self._not_json(f"Expecting {character.decode()!r}")
        self.position += 1

    def _not_json(self, problem: str, ahead: int = 0) -> SchemaError:
        return SchemaError(f"not JSON ({problem})", file=self._file, byte=self.position + ahead)

    def _too_deep(self) -> LimitError:
        return LimitError(
            "JSON is nested too deeply",
            file=self._file,
            expected=f"at most {limits.JSON_DEPTH} levels",
        )


def _strict_decoder(file: str) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=partial(_unique, file),
        parse_constant=partial(_refuse_constant, file),
        parse_int=partial(_bounded_int, file),
        parse_float=partial(_finite_float, file),
    )


def _unique(file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((key, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise SchemaError(f"key {ascii(key)[:80]} stands twice in one object", file=file)
    return result


def _refuse_constant(file: str, name: str) -> NoReturn:
    raise SchemaError(f"{name} is not a JSON number", file=file)


def _bounded_int(file: str, digits: str) -> int:
    if len(digits) < _CERTAIN_DIGITS:
        return int(digits)
    # Long digits are refused before `int`, whose time grows with their square.
    if len(digits) > 17 or abs(value := int(digits)) > limits.INTEGER:
        raise LimitError(
            "integer is too large", file=file, got=digits[:40], expected="at most 2^53 in magnitude"
        )
    return value


def _finite_float(file: str, digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise SchemaError("number is not finite", file=file, got=digits[:40])
    return value


def _check_depth(root: Any, file: str, max_depth: int) -> None:
    """Refuses depth beyond the limit, level by level."""
    level, depth = [root], 1
    while level:
        if depth > max_depth:
            raise LimitError(
                "JSON is nested too deeply", file=file, expected=f"at most {max_depth} levels"
            )
        parts = [value.values() if isinstance(value, dict) else value for value in level]
        level, depth = (
            [item for part in parts for item in part if isinstance(item, (dict, list))],
            depth + 1,
        )


def _check_strings(root: Any, file: str) -> None:
    """Refuses lone surrogates, without recursion."""
    stack: list[Any] = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value)
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif (
            isinstance(value, str)
            and not value.isascii()
            and any(0xD800 <= ord(char) < 0xE000 for char in value)
        ):
            raise SchemaError("string holds a lone surrogate", file=file, got=ascii(value)[:60])
