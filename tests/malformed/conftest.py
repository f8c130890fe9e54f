"""One tiny container per test run, copied for each case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tampering
from tests.malformed.builders import make_container


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undamaged container; never changed."""
    return make_container(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return tampering.copy_of(pristine, tmp_path / "container")
