"""The paths that one function may take: numpy, and the native core with each set of its kernels."""

from __future__ import annotations

import pytest

from codecllm.formats.codecs import native

PATHS = ("numpy", *(native.core.kernels() if native.core is not None else ()))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Lets the test take one path; returns its name."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "core", None)
        yield request.param
        return
    before = native.core.in_use()
    native.core.use(request.param)
    yield request.param
    native.core.use(before)


@pytest.fixture
def core(path):
    """Returns the native core; skips the path without it."""
    if native.core is None:
        pytest.skip("this path has no native core")
    return native.core
