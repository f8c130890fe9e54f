"""Options of the test run."""

from __future__ import annotations

import hypothesis
import pytest

hypothesis.settings.register_profile("default", max_examples=200, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--update-golden`."""
    parser.addoption("--update-golden", action="store_true", help="write the golden containers of a new format version")
