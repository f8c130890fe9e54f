"""Products with int8 weights on the CPU in each way that torch has, beside dense bf16 layers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from benchmarks.measure.rows import Row, Settings, ratio, turns
from codecllm.loader.resident.int8_matmul import can_pack, dequantize_rows, exact, packed

_SHAPES = ((4096, 4096), (1536, 576))
_TOKENS = (1, 8, 64, 512)

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, None], torch.Tensor]


def int8_matmul(settings: Settings) -> Iterator[Row]:
    """One row per shape, number of tokens and way; marked is the one that `int8_product` takes."""
    generator = torch.Generator().manual_seed(0)
    for rows, cols in _SHAPES:
        codes = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=generator)
        scale = torch.rand(rows, generator=generator) * 0.01 + 1e-4
        weight = dequantize_rows(codes, scale, torch.bfloat16)
        for tokens in _TOKENS:
            inputs = torch.randn(tokens, cols, generator=generator).to(torch.bfloat16)
            ways = _ways(inputs, codes)
            dense, *ours = turns(
                settings.repeats,
                lambda inputs=inputs, weight=weight: _seconds(
                    lambda: functional.linear(inputs, weight)
                ),
                *(
                    lambda way=way, inputs=inputs, codes=codes, scale=scale: _seconds(
                        lambda: way(inputs, codes, scale, None)
                    )
                    for way in ways.values()
                ),
            )
            for name, seconds in zip(ways, ours, strict=True):
                is_default = name == ("packed" if can_pack(inputs, codes) else "dequantized")
                what = f"int8 product {rows} x {cols}, {tokens} tokens: {name}" + (
                    ", taken" if is_default else ""
                )
                numbers = {"seconds": seconds, "dense_seconds": dense}
                yield Row(
                    what,
                    f"{ratio(dense, seconds):.2f}x",
                    "speed of a dense bf16 layer",
                    "",
                    None,
                    numbers,
                )


def _ways(inputs: torch.Tensor, codes: torch.Tensor) -> dict[str, Product]:
    """Returns the functions that can multiply these; compiling needs a C++ compiler."""
    ways: dict[str, Product] = {"dequantized": exact}
    if can_pack(inputs, codes):
        ways["packed"] = packed
    if shutil.which("g++") or shutil.which("clang++"):
        ways["dequantized, compiled"] = torch.compile(_dequantized, dynamic=False)
    return ways


def _dequantized(
    inputs: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: None
) -> torch.Tensor:
    """`exact` in one expression, for the compiler to fuse."""
    return functional.linear(
        inputs, (codes.to(torch.float32) * scale[:, None]).to(inputs.dtype), bias
    )


@torch.inference_mode()
def _seconds(work: Callable[[], object], least: float = 0.05) -> float:
    """Returns the mean seconds of a call, repeated for at least `least` seconds."""
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < least:
        work()
        calls += 1
    return elapsed / calls
