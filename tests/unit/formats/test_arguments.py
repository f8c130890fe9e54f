"""Arguments: what each check takes and refuses, and the one error that names them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from codecllm.formats.arguments.check import (
    check_arguments,
    check_fields,
    choice,
    flag,
    integer,
    number,
    optional,
    sequence,
    text,
)
from codecllm.formats.errors import UsageError
from codecllm.formats.machine import MAX_WORKERS


class Unprintable:
    """An object whose text cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


WHOLE = integer(2, 8)
REAL = number("more than 1", lambda value: value > 1)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        *((WHOLE, value) for value in (2, 8)),
        *((integer(2), value) for value in (2, 10**400)),
        *((REAL, value) for value in (2, 1.5)),
        *((text, value) for value in ("", "ü", "x" * 10**6)),
        *((optional(text), value) for value in (None, "a")),
        *((choice(["a", "b"]), value) for value in ("a", "b")),
        *((sequence(WHOLE), value) for value in ([], (), [2, 8])),
    ],
)
def test_what_fits(check, value):
    assert check(value, "x") is value


@pytest.mark.parametrize(
    ("check", "value", "own"),
    [
        *((WHOLE, kind(8), 8) for kind in (np.int8, np.uint16, np.int32, np.int64, np.uint64)),
        *((REAL, kind(2), 2) for kind in (np.int8, np.uint64)),
        *((REAL, kind(2.5), 2.5) for kind in (np.float16, np.float32, np.float64, Fraction)),
        (optional(WHOLE), np.int64(3), 3),
    ],
)
def test_numbers_of_other_libraries_become_our_own(check, value, own):
    """Their sums would overflow, and JSON has none of them."""
    taken = check(value, "x")
    assert taken == own and type(taken) is type(own)


def test_fields_keep_what_their_checks_return():
    @dataclass(frozen=True, slots=True)
    class Options:
        size: int
        workers: int | None

        def __post_init__(self) -> None:
            check_fields(self, {"size": WHOLE}, "workers")

    options = Options(np.int8(8), np.int16(2))
    assert (type(options.size), type(options.workers)) == (int, int)
    for size, workers in ((9, 1), (8, 0)):
        with pytest.raises(UsageError, match="not a value of"):
            Options(size, workers)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        *((WHOLE, value) for value in (1, 9, True, 4.0, "4", None, np.int8(9))),
        *((WHOLE, value) for value in (np.bool_(True), np.float64(4), np.array([4]))),
        *((REAL, value) for value in (np.bool_(True), np.float32("nan"), np.int8(1))),
        *((REAL, value) for value in (1, float("nan"), float("inf"), 10**400, True, "2", None)),
        *((text, value) for value in (b"a", None, 5, "\ud800", "a\udcff")),
        *((flag, value) for value in (0, 1, None, "yes")),
        *((choice(["a", "b"]), value) for value in ("", "ab", ["a"], None)),
        *((sequence(WHOLE), value) for value in ("22", [2, 9], {2}, None, iter([2]))),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_argument_and_value(check, value):
    with pytest.raises(UsageError, match=r"^not a value of x, got .+, expected .+$"):
        check(value, "x")


def test_a_value_without_a_text_is_named_by_its_type():
    for value in (10**5000, Unprintable()):
        with pytest.raises(UsageError, match=f"got a value of type {type(value).__name__}, exp"):
            WHOLE(value, "x")


@pytest.mark.parametrize("workers", [0, -1, MAX_WORKERS + 1, 10**400, 1.5, "2", True])
def test_no_number_of_workers(workers):
    with pytest.raises(UsageError, match="not a value of workers"):
        check_arguments(workers=workers)


@pytest.mark.parametrize("workers", [1, MAX_WORKERS, None, np.int16(2)])
def test_a_number_of_workers(workers):
    check_arguments(workers=workers)


def test_an_argument_without_a_check_is_a_fault_of_ours():
    with pytest.raises(KeyError):
        check_arguments(wrokers=1)
