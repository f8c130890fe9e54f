"""The names of the package."""

from __future__ import annotations

import pytest

import codecllm.loader


def test_names_are_imported_when_they_are_used_and_others_are_none():
    for name in codecllm.loader.__all__:
        assert getattr(codecllm.loader, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'stream_weights'"):
        codecllm.loader.stream_weights  # noqa: B018
