"""Spread a model over several devices, and tell which of its parameters are offloaded."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import (
    extract_submodules_state_dict,
    get_balanced_memory,
    offload_state_dict,
)

from codecllm.formats.errors import UsageError, foreign_errors_as, one_line, shown
from codecllm.formats.files import as_path
from codecllm.loader.places import known_device

AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that transformers works out from the free memory."""


def spreads(device_map: Any) -> bool:
    """Whether a device map may put a model onto more than one place, or onto the disk."""
    if isinstance(device_map, str):
        return device_map in AUTOMATIC_MAPS
    return isinstance(device_map, dict) and (
        len(set(device_map.values())) > 1 or _uses_disk(device_map)
    )


def check_device_map(device_map: Any) -> None:
    """Refuses a device map that names a device which is not here, before anything is read.

    Args:
        device_map: None, one of `AUTOMATIC_MAPS`, a device (see `places.known_device`), or a dict
            of names of modules and such devices or "disk".

    Raises:
        UsageError: it is none of these, or names the meta device, where tensors have no values.
        UnsupportedEnvironmentError: this machine has no such device.
    """
    if device_map is None:
        # A context or a default of torch takes the place of the argument.
        device_map = torch.get_default_device()
    if isinstance(device_map, str) and device_map in AUTOMATIC_MAPS:
        return
    if not isinstance(device_map, dict):
        known_device(device_map)
        return
    if not device_map or not all(isinstance(name, str) for name in device_map):
        raise UsageError(
            "a device map has names of modules", got=shown(device_map), expected="{'': 'cpu'}"
        )
    for place in device_map.values():
        if not (isinstance(place, str) and place == "disk"):
            known_device(place)


def refuse_without_folder(device_map: Any, offload_folder: Any) -> None:
    """Refuses a device map that names the disk where no folder is given.

    Raises:
        UsageError: there is none, or it is no path.
    """
    if isinstance(device_map, dict) and _uses_disk(device_map) and offload_folder is None:
        raise UsageError(
            "the device map puts weights on the disk, which needs a folder for them",
            got="offload_folder=None",
            expected="offload_folder='a folder'",
        )
    if isinstance(device_map, dict) and _uses_disk(device_map):
        as_path(offload_folder, "offload_folder")


def _uses_disk(device_map: dict[str, Any]) -> bool:
    return "disk" in device_map.values()


def spread(model: Any, device_map: Any, max_memory: Any = None, offload_folder: Any = None) -> None:
    """Spreads a complete model on the CPU over devices, as transformers does during a load.

    Buffers are offloaded too. On the disk lie decoded values.

    Raises:
        UsageError: weights go to the disk, and there is no folder for them; or accelerate does not
            take `max_memory` or the map.
    """
    if isinstance(device_map, str):
        limits = {
            "max_memory": max_memory,
            "no_split_module_classes": list(model._no_split_modules or []),
        }
        try:
            # As transformers does: "sequential" fills one device before the next.
            if device_map != "sequential":
                limits["max_memory"] = get_balanced_memory(
                    model, low_zero=device_map == "balanced_low_0", **limits
                )
            device_map = infer_auto_device_map(model, **limits)
        except (ValueError, TypeError, AttributeError) as exc:
            raise UsageError(
                f"accelerate takes no such max_memory: {one_line(exc)}", got=repr(max_memory)[:200]
            ) from exc
    if device_map.get("") == "disk":  # accelerate would write nothing of the module ""
        parts = [*model.named_children(), *model.named_parameters(recurse=False)]
        device_map = {name: "disk" for name, _ in parts}
    refuse_without_folder(device_map, offload_folder)
    on_disk = [name for name, place in device_map.items() if place == "disk"]
    # Names of no module, or not of all of them, and a folder that is none.
    with foreign_errors_as(UsageError, f"accelerate takes no such map: {shown(device_map)}"):
        if on_disk:
            # It writes nothing into a folder that it has used before, for another model maybe.
            values = extract_submodules_state_dict(model.state_dict(), on_disk)
            offload_state_dict(offload_folder, values)
        options = {"offload_dir": offload_folder, "offload_buffers": True}
        dispatch_model(model, device_map=device_map, **options)


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
