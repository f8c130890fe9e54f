"""nvCOMP's binding: declarations, and the message without the library; tests/gpu decodes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader.device import nvcomp
from codecllm.loader.device.nvcomp import (
    Alignments,
    DecompressOptions,
    Nvcomp,
    Properties,
    find_library,
    open_nvcomp,
)


def test_structures_have_the_sizes_and_places_of_the_headers():
    assert ctypes.sizeof(DecompressOptions) == 64
    assert (DecompressOptions.backend.offset, DecompressOptions.reserved.offset) == (0, 4)
    assert bytes(DecompressOptions()) == bytes(64)
    assert ctypes.sizeof(Alignments) == 24
    assert ctypes.sizeof(Properties) == 8


def test_a_missing_library_is_one_line():
    with pytest.raises(
        UnsupportedEnvironmentError, match=r"^libnvcomp.so.6: nvCOMP cannot be loaded: "
    ):
        Nvcomp(Path("/nowhere/libnvcomp.so.6"))


def test_a_library_without_the_functions_is_refused():
    with pytest.raises(
        UnsupportedEnvironmentError, match=r"nvCOMP cannot be loaded: .*nvcompGetProperties"
    ):
        Nvcomp(Path("libc.so.6"))


def test_a_package_of_another_version_is_named(tmp_path, monkeypatch):
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvcomp.so.5").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(nvcomp, "find_spec", lambda name: spec)
    with pytest.raises(
        UnsupportedEnvironmentError,
        match=r"another version, got libnvcomp.so.5, expected libnvcomp.so.6",
    ):
        find_library()


def test_the_cpu_has_no_nvcomp():
    with pytest.raises(UnsupportedEnvironmentError, match="nvCOMP needs an NVIDIA GPU"):
        open_nvcomp(torch.device("cpu"))


def test_the_installed_library_is_the_declared_one():
    try:
        path = find_library()
    except UnsupportedEnvironmentError as exc:
        pytest.skip(str(exc))
    library = Nvcomp(path)
    assert library.version.startswith("6.")
    assert library.temp_bytes(1000, 65536, 1000 * 65536) > 1000 * 65536
    assert "12" in library.explain(12)
