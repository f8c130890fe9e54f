"""Signals for the tests of the engines."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture
def ctrl_c():
    """Lets SIGINT raise KeyboardInterrupt: processes in a shell's background ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
