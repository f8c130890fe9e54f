"""Speed of the kernels that make elements from symbols, beside a copy within the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.device.machine import Machine, Row
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.tiling import Grid, default_grid
from codecllm.loader.kernels.assemble import assemble_lossless
from codecllm.loader.kernels.dequantize import dequantize_int8, untile_codes

_SHAPES = ((14336, 4096), (4096, 14336))
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def elements(machine: Machine) -> Iterator[Row]:
    """GB/s of symbols read and elements written, for matrices larger than the caches."""
    for rows, cols in _SHAPES if not machine.small else ((20, 256),):
        planes = [
            torch.randint(0, 256, (rows * cols,), dtype=torch.uint8, device=machine.device)
            for _ in range(4)
        ]
        row_scale, col_scale = (
            torch.rand(size, device=machine.device) + 0.5 for size in (rows, cols)
        )
        order = torch.randperm(cols, device=machine.device).to(torch.int32)
        whole = default_grid(rows, cols)
        narrow = Grid(rows, cols, min(rows, 512), max(1, cols // 16))
        for name, dtype in _DTYPES.items():
            out = torch.empty(rows, cols, dtype=dtype, device=machine.device)
            used_planes = planes[: DTYPES[name].planes]

            def dequantize(
                high, grid, col_scale, order, out=out, low=planes[0], row_scale=row_scale
            ) -> None:  # type: ignore[no-untyped-def]
                low_bits = (
                    None
                    if high is None
                    else torch.full((len(grid),), 3, dtype=torch.int32, device=high.device)
                )
                dequantize_int8(low, high, low_bits, grid, row_scale, col_scale, order, "row", out)

            cases: list[tuple[str, int, Callable[[], None]]] = [
                (
                    f"assemble {name}",
                    len(used_planes),
                    partial(assemble_lossless, used_planes, whole, DTYPES[name], out),
                ),
                (f"dequantize to {name}", 1, partial(dequantize, None, whole, None, None)),
                (
                    f"dequantize to {name}, column scales",
                    1,
                    partial(dequantize, None, narrow, col_scale, None),
                ),
                (
                    f"dequantize to {name}, columns moved",
                    1,
                    partial(dequantize, None, narrow, col_scale, order),
                ),
                (
                    f"dequantize to {name}, wide",
                    2,
                    partial(dequantize, planes[1], whole, col_scale, None),
                ),
            ]
            if name == "BF16":
                codes = torch.empty(rows, cols, dtype=torch.int8, device=machine.device)
                cases.append(("codes", 1, partial(untile_codes, planes[0], narrow, codes)))
            for what, read, work in cases:
                seconds = machine.seconds([work])
                element_bytes = 1 if what == "codes" else out.element_size()
                rate = rows * cols * (read + element_bytes) / seconds / 1e9
                yield Row(
                    f"{what}, {rows} x {cols}",
                    rate,
                    "GB/s",
                    f"{rows * cols / seconds / 1e9:.0f}e9 elements/s",
                )
