"""Devices by the names that users give them, and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError, shown
from codecllm.formats.machine import available_memory

CPU = torch.device("cpu")
_NAMES = "cpu, cuda or cuda:N"


def device_of(name: str) -> torch.device:
    """Returns a device by the name that a user gives: `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        UsageError: it is no name of a device, or one of a kind that models are not measured on.
        UnsupportedEnvironmentError: this machine has no such device.
    """
    if isinstance(name, str) and name == "auto":
        name = "cuda" if _count("cuda") else "cpu"
    device = known_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError("no device for this", got=shown(name), expected=_NAMES)
    return CPU if device.type == "cpu" else torch.device("cuda", device.index or 0)


def known_device(place: Any) -> torch.device:
    """Returns a device of this machine that can hold a model's weights.

    Args:
        place: a name, a `torch.device`, or the number of a GPU.

    Raises:
        UsageError: it is none of these, or the meta device, where tensors have no values.
        UnsupportedEnvironmentError: this machine has no such device.
    """
    try:
        if isinstance(place, bool) or not isinstance(place, str | int | torch.device):
            raise TypeError("torch takes bytes and booleans, transformers does not")
        arguments = (_gpu_kind(), place) if isinstance(place, int) else (place,)
        device = torch.device(*arguments)
    except (RuntimeError, TypeError, ValueError, OverflowError) as exc:
        raise UsageError("no such kind of device", got=shown(place), expected=_NAMES) from exc
    if device.type == "meta":
        raise UsageError("a model has no weights there", got=shown(place), expected=_NAMES)
    if device.type != "cpu" and (device.index or 0) >= _count(device.type):
        raise UnsupportedEnvironmentError(
            "no such device here", got=shown(place), expected=" or ".join(_present())
        )
    return device


def _present() -> list[str]:
    """Returns the names of the devices of this machine."""
    kinds = ("cuda", "xpu", "mps")
    return ["cpu", *(f"{kind}:{number}" for kind in kinds for number in range(_count(kind)))]


def _gpu_kind() -> str:
    return "xpu" if not _count("cuda") and _count("xpu") else "cuda"


def _count(kind: str) -> int:
    """Returns how many devices of a kind there are; 0 where torch was built without it."""
    module = getattr(torch, kind, None)
    if kind == "cuda" and not torch.cuda.is_available():
        return 0  # a driver that is too old still counts its devices
    return int(getattr(module, "device_count", int)())


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
