"""Devices that a calibration can run on, and arithmetic there that repeats bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.formats.machine import available_memory

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """Returns a device by the name that a user gives: `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        UnsupportedEnvironmentError: this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return CPU
    number = device.index or 0
    if number >= count:
        raise UnsupportedEnvironmentError(
            "no such device here", got=name, expected=f"one of {count} CUDA devices, or cpu"
        )
    return torch.device(device.type, number)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can be allocated on a device."""
    if device.type == "cpu":
        return available_memory()
    # Memory that torch keeps for itself is free too.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Has torch give the same bits at every run on the same device, inside the block."""
    if device.type == "cpu":
        yield
        return
    # cuBLAS reads it when it takes its first memory.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Only a warning where an operation has no such algorithm: a model may contain any.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        # The fused kernels for attention add gradients in any order.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
