"""Options of the test run."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    # Without a GPU Triton's kernels run under its interpreter; it asks when a kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("default", max_examples=200, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--update-golden`."""
    parser.addoption("--update-golden", action="store_true", help="write the golden containers of a new format version")
