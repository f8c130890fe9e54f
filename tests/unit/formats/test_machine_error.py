"""Which errors of other libraries are the machine's."""

from __future__ import annotations

import errno

import pytest

from codecllm.formats.errors import (
    ModelMismatchError,
    SchemaError,
    foreign_errors_as,
    machine_error,
)


class OutOfMemoryError(RuntimeError):
    """Named as that of torch."""


@pytest.mark.parametrize(
    "exc", [MemoryError(), OSError(errno.ENOSPC, "full"), OutOfMemoryError("CUDA out of memory")]
)
def test_errors_that_say_it_stay(exc):
    assert machine_error(exc) is exc


@pytest.mark.parametrize(
    "exc",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"),
        RuntimeError("can't start new thread"),
        ImportError("x.so: failed to map segment from shared object"),
    ],
)
def test_errors_that_mean_it_become_one(exc):
    assert isinstance(machine_error(exc), MemoryError)
    assert str(machine_error(exc)) == str(exc)


@pytest.mark.parametrize(
    "exc",
    [
        OSError("no file named config.json"),
        FileNotFoundError(errno.ENOENT, "config.json"),
        RuntimeError("size mismatch"),
        ValueError("can't allocate memory"),
    ],
)
def test_other_errors_are_not_the_machines(exc):
    assert machine_error(exc) is None


def test_errors_of_others_become_one_line_of_ours():
    as_ours = foreign_errors_as(SchemaError, "no config", file="config.json", limit=3)
    with pytest.raises(SchemaError) as got, as_ours:
        raise ValueError("a\n  bcd")
    assert str(got.value) == "config.json: no config: ValueError: a b"
    assert isinstance(got.value.__cause__, ValueError)


def test_our_errors_and_those_of_the_machine_pass():
    for error in (ModelMismatchError("it does not fit"), MemoryError("full")):
        with pytest.raises(type(error)) as got, foreign_errors_as(SchemaError, "no config"):
            raise error
        assert got.value is error
