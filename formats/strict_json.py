"""A JSON reader that accepts no ambiguity: the two parsers of an attack always read the same thing."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from codecllm.formats import limits
from codecllm.formats.errors import LimitError, SchemaError


def parse_json_object(
    data: bytes, *, file: str, max_bytes: int, max_depth: int = limits.JSON_DEPTH
) -> dict[str, Any]:
    """Parses UTF-8 JSON whose top level is an object.

    Args:
        data: the whole text.
        file: name for error texts.
        max_bytes: refuse a longer text.
        max_depth: refuse deeper nesting; a flat object has depth 1.

    Raises:
        LimitError: too long, too deep, or an integer beyond 2^53.
        SchemaError: not UTF-8, not JSON, a repeated key at any depth, NaN or an infinity, or not an object.
    """
    if len(data) > max_bytes:
        raise LimitError(
            "JSON text is too long", file=file, got=len(data), expected=f"at most {max_bytes} bytes"
        )
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, file),
            parse_constant=lambda name: _refuse_constant(name, file),
            parse_int=lambda digits: _bounded_int(digits, file),
            parse_float=lambda digits: _finite_float(digits, file),
        )
    except UnicodeDecodeError as exc:
        raise SchemaError(f"not UTF-8 ({exc.reason})", file=file, byte=exc.start) from exc
    except json.JSONDecodeError as exc:
        raise SchemaError(f"not JSON ({exc.msg})", file=file, byte=exc.pos) from exc
    except RecursionError as exc:
        raise LimitError(
            "JSON is nested too deeply", file=file, expected=f"at most {max_depth} levels"
        ) from exc
    if not isinstance(value, dict):
        raise SchemaError("top level is not an object", file=file, got=type(value).__name__)
    _check_depth(value, file, max_depth)
    if b"\\u" in data:  # UTF-8 holds none otherwise
        _check_strings(value, file)
    return value


def _unique(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise SchemaError(f"key {key!r} stands twice in one object", file=file)
            seen.add(key)
    return result


def _refuse_constant(name: str, file: str) -> NoReturn:
    raise SchemaError(f"{name} is not a JSON number", file=file)


def _bounded_int(digits: str, file: str) -> int:
    if len(digits) > 17 or abs(value := int(digits)) > limits.INTEGER:
        raise LimitError(
            "integer is too large", file=file, got=digits[:40], expected="at most 2^53 in magnitude"
        )
    return value


def _finite_float(digits: str, file: str) -> float:
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
