"""Where a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the calling thread's current one.

    Triton launches on the current device, on its current stream, wherever the tensors lie. With the
    memory of another one the kernel fails, or, where the two devices see each other's memory, runs
    at the same time as the work that it has to wait for.
    """
    device = tensor.device
    if device.type == "cpu":
        return nullcontext()
    module = getattr(torch, device.type)
    if module.current_device() == device.index:
        return nullcontext()
    context: AbstractContextManager[object] = module.device(device)
    return context


def current_stream(device: torch.device) -> int:
    """Returns the handle of the calling thread's current stream of a CUDA device.

    The object that torch's public function makes costs 2 us, as much as a launch.
    """
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle
