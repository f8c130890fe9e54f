"""Devices by the names that users give them, on a machine with two CUDA devices and with none."""

from __future__ import annotations

import pytest
import torch

from codecllm.bench import BenchOptions, bench
from codecllm.converter import ConvertOptions
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.placement import AUTOMATIC_MAPS, check_device_map
from codecllm.loader.places import CPU, device_of, free_memory


@pytest.fixture
def two_devices(monkeypatch):
    """As if torch found two; nothing is sent to them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)


def test_devices_of_a_machine_that_has_them(two_devices):
    for name, place in {"auto": ("cuda", 0), "cuda": ("cuda", 0), "cuda:1": ("cuda", 1)}.items():
        assert device_of(name) == torch.device(*place)
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(UnsupportedEnvironmentError, match="no such device here"):
        device_of("cuda:2")


def test_memory_that_torch_keeps_is_free(two_devices):
    assert free_memory(torch.device("cuda", 0)) == 1000 + 300 - 100


def test_devices_of_a_machine_without_any():
    assert device_of("auto") == torch.device("cpu")
    assert free_memory(torch.device("cpu")) > 1 << 20
    with pytest.raises(UnsupportedEnvironmentError, match=r"here, got 'cuda', expected cpu$"):
        device_of("cuda")
    with pytest.raises(UsageError, match="no such kind of device"):
        device_of("a card")


MPS, META = torch.device("mps"), torch.device("meta")
NOT_HERE = ("cuda", "cuda:9", "mps", "xpu:1", 0, 9, torch.device("cuda", 1), MPS, "hpu")
NO_DEVICES = ("a card", "", b"cpu", True, -1, 10**30, 3.5, ["cpu"], ("cpu",), "meta", META)


@pytest.mark.parametrize("place", NOT_HERE, ids=repr)
def test_a_device_map_onto_a_device_that_is_not_here(place, tmp_path):
    for device_map in (place, {"": place}, {"model": "cpu", "lm_head": place}):
        with pytest.raises(UnsupportedEnvironmentError, match=r"no such device here, .* cpu$"):
            from_pretrained(tmp_path / "nothing is read", device_map=device_map)


@pytest.mark.parametrize("place", NO_DEVICES, ids=repr)
def test_a_device_map_onto_what_is_no_device(place, tmp_path):
    for device_map in (place, {"": place}, {"model": "cpu", "lm_head": place}):
        with pytest.raises(UsageError, match=r"cuda or cuda:N$"):
            from_pretrained(tmp_path / "nothing is read", device_map=device_map)


@pytest.mark.parametrize("device_map", [{}, {1: "cpu"}, {"": None}, {"": "auto"}], ids=repr)
def test_a_dict_that_is_no_device_map(device_map, tmp_path):
    with pytest.raises(UsageError):
        from_pretrained(tmp_path / "nothing is read", device_map=device_map)


def test_a_load_inside_a_context_of_the_meta_device(tmp_path):
    with torch.device("meta"), pytest.raises(UsageError, match="no weights there"):
        from_pretrained(tmp_path / "nothing is read")


def test_devices_that_are_here_go_through(two_devices):
    for device_map in (None, *AUTOMATIC_MAPS, "cpu", CPU, 1, "cuda", {"": 0, "lm_head": "disk"}):
        check_device_map(device_map)
    with pytest.raises(UnsupportedEnvironmentError, match="expected cpu or cuda:0 or cuda:1"):
        check_device_map({"": 2})


@pytest.mark.parametrize("device", [3, None, b"cpu", "mps", "meta", "cuda:x", "xpu"], ids=repr)
def test_a_device_of_a_conversion_or_a_measurement(device):
    with pytest.raises(UsageError, match="no such device"):
        ConvertOptions(device=device)
    with pytest.raises((UsageError, UnsupportedEnvironmentError)):
        device_of(device)
    with pytest.raises((UsageError, UnsupportedEnvironmentError)):
        next(bench("nothing is read", BenchOptions(device=device)))
