"""One tiny container per test run, copied for each case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from codecllm.verifier import verify
from tests import tampering
from tests.malformed.builders import make_container
from tests.malformed.measure import measured


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test whose bad input costs more than a second of CPU time or 64 MiB.

    `many_inputs` marks tests that read hundreds of inputs, `long_input` those that measure by the
    size of theirs.
    """
    marks = ("many_inputs", "long_input")
    if any(item.get_closest_marker(mark) for mark in marks):
        return (yield)
    with measured() as cost:
        result = yield
    cost.check()
    return result


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undamaged container; never changed."""
    return make_container(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="session", autouse=True)
def _imported(pristine: Path) -> None:
    """Imports everything that a verification needs: it takes seconds, once, which no test pays."""
    verify(pristine)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return tampering.copy_of(pristine, tmp_path / "container")
