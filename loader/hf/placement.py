"""Spread a model over several devices, and tell which of its parameters are offloaded."""

from __future__ import annotations

from typing import Any

from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers works out from the free memory."""


def spreads(device_map: Any) -> bool:
    """Whether a device map may put a model onto more than one place."""
    if isinstance(device_map, str):
        return device_map in AUTOMATIC_MAPS
    return isinstance(device_map, dict) and len(set(device_map.values())) > 1


def spread(model: Any, device_map: Any, max_memory: Any = None, offload_folder: Any = None) -> None:
    """Spreads a complete model on the CPU over devices, as transformers does during a load.

    Buffers are offloaded too.
    """
    if isinstance(device_map, str):
        limits = {
            "max_memory": max_memory,
            "no_split_module_classes": list(model._no_split_modules or []),
        }
        # As transformers does: "sequential" fills one device before the next.
        if device_map != "sequential":
            limits["max_memory"] = get_balanced_memory(
                model, low_zero=device_map == "balanced_low_0", **limits
            )
        device_map = infer_auto_device_map(model, **limits)
    dispatch_model(model, device_map=device_map, offload_dir=offload_folder, offload_buffers=True)


def is_offloaded(model: Any, name: str) -> bool:
    """Whether a parameter lies elsewhere (CPU, disk) until its module, or one around it, runs."""
    owner = name.rpartition(".")[0]
    # accelerate may put the hook on a parent, which then moves all modules inside.
    module_name = owner
    while True:
        hook: Any = getattr(model.get_submodule(module_name), "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            offloads = getattr(part, "offload", False) and part.weights_map is not None
            if offloads and (module_name == owner or part.place_submodules):
                return True
        if not module_name:
            return False
        module_name = module_name.rpartition(".")[0]
