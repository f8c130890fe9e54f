"""Checks of arguments: one error that names the argument, what was given and what is expected.

An argument of one name means the same in every function, so that `ARGUMENTS` has one check for it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from codecllm.formats.errors import UsageError, shown
from codecllm.formats.files import as_path
from codecllm.formats.machine import MAX_WORKERS

Check = Callable[[Any, str], Any]
"""Takes a value and the name of its argument, and returns the value; a number of another library as
Python's own. Raises UsageError where it is none for that argument.
"""

MAX_JSON_INTEGER = 2**53
"""The largest integer that a manifest may hold (SPEC.md, rule 8.1d)."""


MAX_COUNT = 2**31 - 1
"""The largest number of tokens or texts: libraries keep such numbers in 32 bits."""


def refusal(value: object, name: str, expected: str) -> UsageError:
    """Returns the error for a value that is none of the argument of that name."""
    return UsageError(f"not a value of {name}", got=shown(value), expected=expected)


def _kind(expected: str, is_right: Callable[[Any], bool]) -> Check:
    def check(value: Any, name: str) -> Any:
        if not is_right(value):
            raise refusal(value, name, expected)
        return value

    return check


def integer(low: int, high: int | None = None) -> Check:
    """Returns a check for integers from `low` to `high`, both included; a bool is none.

    Integers of numpy pass, as the `int` of the same value: sums of theirs would overflow.
    """
    expected = f"a whole number of {low} or more" if high is None else f"{low} to {high}"

    def check(value: Any, name: str) -> int:
        # Not whatever has `__index__`: a tensor of one bool has it too.
        if not isinstance(value, bool) and isinstance(value, Integral):
            whole = operator.index(value)
            if low <= whole and (high is None or whole <= high):
                return whole
        raise refusal(value, name, expected)

    return check


def number(expected: str, is_right: Callable[[float], bool]) -> Check:
    """Returns a check for finite numbers for which `is_right`; a bool is none.

    Numbers of numpy pass, as the `int` or `float` of the same value.

    Args:
        expected: the range in words.
        is_right: whether a number lies in it.
    """

    def check(value: Any, name: str) -> int | float:
        if not isinstance(value, bool) and isinstance(value, Real):
            try:
                own = operator.index(value) if isinstance(value, Integral) else float(value)
                if math.isfinite(own) and is_right(own):
                    return own
            except OverflowError:  # an integer beyond all floats
                pass
        raise refusal(value, name, expected)

    return check


def choice(names: Iterable[str]) -> Check:
    """Returns a check for one of these names."""
    known = tuple(names)
    return _kind(", ".join(known), lambda value: isinstance(value, str) and value in known)


def instance(kind: type) -> Check:
    """Returns a check for objects of a class."""
    return _kind(f"of type {kind.__name__}", lambda value: isinstance(value, kind))


def sequence(element: Check) -> Check:
    """Returns a check for lists and tuples whose elements pass `element`.

    A string is none: it would count as a list of single letters.
    """

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, list | tuple):
            raise refusal(value, name, "a list")
        for one in value:
            element(one, name)
        return value

    return check


def optional(check: Check) -> Check:
    """Returns a check for None, or what `check` takes."""
    return lambda value, name: None if value is None else check(value, name)


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8, or a lone surrogate
        return False


text = _kind("text that is UTF-8", _is_text)
flag = _kind("True or False", lambda value: isinstance(value, bool))
function = _kind("a function", callable)


def path(value: Any, name: str) -> Any:
    """Returns a path as it was given, text or path."""
    as_path(value, name)
    return value


ARGUMENTS: dict[str, Check] = {
    "base": path,
    "base_model": optional(text),
    "baseline": optional(flag),
    "cache_dir": optional(path),
    "candidates": sequence(path),
    "create_pr": flag,
    "expected_manifest_sha256": optional(text),
    "force": flag,
    "identity": optional(text),
    "issuer": optional(text),
    "manifest_sha256": optional(text),
    "max_shard_bytes": integer(1, MAX_JSON_INTEGER),
    "message": optional(text),
    "on_stage": optional(function),
    "password": optional(text),
    "private": flag,
    "progress": optional(function),
    "prompt": text,
    "public_key": optional(path),
    "require_baseline": flag,
    "required": flag,
    "revision": optional(text),
    "run": flag,
    "signature": optional(path),
    "source": optional(path),
    "text": optional(text),
    "token": optional(
        _kind("text, True or False", lambda value: isinstance(value, bool) or _is_text(value))
    ),
    "trust_config": optional(path),
    "trust_remote_code": flag,
    "with_code": flag,
    "workers": optional(integer(1, MAX_WORKERS)),
}
"""The check of each argument whose meaning is one in all functions."""


def check_arguments(**arguments: object) -> None:
    """Checks arguments by their names.

    Args:
        arguments: name -> value; each name has a check in `ARGUMENTS`.

    Raises:
        UsageError: one is of a wrong type or out of range.
    """
    for name, value in arguments.items():
        ARGUMENTS[name](value, name)


def check_fields(record: object, checks: Mapping[str, Check], *names: str) -> None:
    """Checks fields of a frozen dataclass, and keeps what the checks return.

    Args:
        record: the dataclass's object, in its `__post_init__`.
        checks: name of a field -> its check.
        names: fields whose checks are in `ARGUMENTS`.

    Raises:
        UsageError: one is of a wrong type or out of range.
    """
    for name, check in {**checks, **{name: ARGUMENTS[name] for name in names}}.items():
        object.__setattr__(record, name, check(getattr(record, name), name))
