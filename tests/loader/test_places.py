"""Devices by the names that users give them, on a machine with two CUDA devices and with none."""

from __future__ import annotations

import pytest
import torch

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader.places import device_of, free_memory


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
    with pytest.raises(UnsupportedEnvironmentError, match="one of 0 CUDA devices"):
        device_of("cuda")
    with pytest.raises(UsageError, match="no such kind of device"):
        device_of("a card")
