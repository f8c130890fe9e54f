"""Limits of the machine: copies from pinned memory and within the device, one large product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.device.machine import Machine, Row


def copies(machine: Machine) -> Iterator[Row]:
    """Measures the two bandwidths and the rate that everything else is compared with."""
    size = machine.size(1 << 30, 1 << 20)
    device = machine.device
    device_bytes = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    other = torch.empty_like(device_bytes)
    host_bytes = torch.empty(size, dtype=torch.uint8, pin_memory=not machine.rehearses)
    seconds = machine.seconds([lambda: other.copy_(device_bytes, non_blocking=True)])
    yield Row("copy within the device", 2 * size / seconds / 1e9, "GB/s", "bytes read and written")
    seconds = machine.seconds([lambda: device_bytes.copy_(host_bytes, non_blocking=True)])
    yield Row("copy from pinned memory", size / seconds / 1e9, "GB/s", "")
    side = machine.size(8192, 64)
    left_matrix, right_matrix = (
        torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    seconds = machine.seconds([lambda: left_matrix @ right_matrix])
    yield Row(f"bf16 product {side}^3", 2 * side**3 / seconds / 1e12, "TFLOP/s", "")
