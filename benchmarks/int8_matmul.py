"""Products with int8 weights on the CPU beside dense bf16 linear layers of the same shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from benchmarks.rows import Row, Settings, ratio, turns
from codecllm.loader.int8_matmul import can_pack, dequantize_rows, int8_linear

_SHAPES = ((4096, 4096), (1536, 576))
_TOKENS = (1, 8, 64, 512)


def int8_matmul(settings: Settings) -> Iterator[Row]:
    """One row per shape and number of tokens."""
    generator = torch.Generator().manual_seed(0)
    for rows, cols in _SHAPES:
        codes = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=generator)
        scale = torch.rand(rows, generator=generator) * 0.01 + 1e-4
        weight = dequantize_rows(codes, scale, torch.bfloat16)
        for tokens in _TOKENS:
            inputs = torch.randn(tokens, cols, generator=generator).to(torch.bfloat16)
            dense, ours = turns(
                settings.repeats,
                lambda inputs=inputs, weight=weight: _seconds(lambda: functional.linear(inputs, weight)),
                lambda inputs=inputs, codes=codes, scale=scale: _seconds(lambda: int8_linear(inputs, codes, scale, None)),
            )
            kernel = "packed" if can_pack(inputs, codes) else "dequantized"
            what = f"int8 product {rows} x {cols}, {tokens} tokens ({kernel})"
            measured = {"seconds": ours, "dense_seconds": dense}
            yield Row(what, f"{ratio(dense, ours):.2f}x", "speed of a dense bf16 layer", "", None, measured)


def _seconds(work: Callable[[], object], least: float = 0.05) -> float:
    """Returns the mean seconds of a call, repeated for at least `least` seconds."""
    calls, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < least:
        work()
        calls += 1
    return taken / calls
