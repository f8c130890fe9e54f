"""On which device a model will lie, and whether a decoder works there."""

from __future__ import annotations

from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader.device.codecs import Decoder
from codecllm.loader.device.streams import ACCELERATORS, is_accelerator

AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` by which transformers itself spreads a model."""

_SPARE_BYTES = 2 << 30
"""Free memory of a device, besides a model and a quarter of its size, by which it has plenty."""


def concrete(device: torch.device) -> torch.device:
    """Returns a device with its index."""
    if is_accelerator(device) and ":" not in str(device):
        return torch.device(device.type, getattr(torch, device.type).current_device())
    return device


def has_device() -> bool:
    """Whether torch finds an accelerator here."""
    return any(getattr(torch, kind).is_available() for kind in ACCELERATORS if hasattr(torch, kind))


def sole_device(device_map: Any, needed_bytes: int, max_memory: Any = None) -> torch.device | None:
    """Returns the one accelerator onto which a device map certainly puts the whole model, or None.

    Args:
        device_map: as transformers takes it. The automatic ones count where there is one device and
            it has plenty of room.
        needed_bytes: bytes of the model.
        max_memory: as transformers takes it: with limits of the caller an automatic map may put
            parts elsewhere.
    """
    if isinstance(device_map, str) and device_map in AUTOMATIC_MAPS:
        if max_memory is not None or torch.cuda.device_count() != 1:
            return None
        free_bytes, _ = torch.cuda.mem_get_info(0)
        # Near the limit transformers may offload layers, which must then not be decoded there.
        has_plenty = free_bytes > needed_bytes + needed_bytes // 4 + _SPARE_BYTES
        return torch.device("cuda", 0) if has_plenty else None
    if isinstance(device_map, dict):
        places = {str(place) for place in device_map.values()}
        device_map = next(iter(device_map.values())) if len(places) == 1 else None
    try:
        arguments = ("cuda", device_map) if isinstance(device_map, int) else (device_map,)
        device = torch.device(*arguments)
    except (RuntimeError, TypeError):  # None, or "disk"
        return None
    usable = is_accelerator(device) and getattr(torch, device.type).is_available()
    return concrete(device) if usable else None


def refuse_without_device(decoder: Decoder, resident: str, device_map: Any) -> None:
    """Refuses arguments that need a GPU where the model is not put on one.

    Raises:
        UsageError: `decoder` is "nvcomp" or "triton" or `resident` is "packed", and `device_map` is
            None or the CPU.
        UnsupportedEnvironmentError: there is no GPU.
    """
    if decoder in ("nvcomp", "triton"):
        subject, use = f"decoder {decoder!r}", "decodes"
    elif resident == "packed":
        subject, use = "resident='packed'", "multiplies"
    else:
        return
    if not has_device():
        raise UnsupportedEnvironmentError(f"{subject} does not work here: torch finds no GPU")
    if device_map is None or str(device_map) == "cpu":
        raise UsageError(
            f"{subject} {use} on a GPU",
            got=f"device_map={device_map!r}",
            expected='for example "cuda"',
        )
