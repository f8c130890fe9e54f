"""Devices by the names that users give them, and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.formats.machine import available_memory

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """Returns a device by the name that a user gives: `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        UsageError: it is no name of a device.
        UnsupportedEnvironmentError: this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(
            "no such kind of device", got=repr(name), expected="auto, cpu, cuda or cuda:N"
        ) from exc
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
def usual_settings(device: torch.device) -> Iterator[None]:
    """Has torch compute in the block as in a new process, whatever the caller has set.

    The caller's inference mode, autocast, default dtype and default device come back behind it.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
