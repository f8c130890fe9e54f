"""Products with int8 weights against dense bf16 layers, by number of tokens and by way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from benchmarks.device.machine import Machine, Row
from codecllm.loader.kernels.int8_linear import Panels, Rows, Tiles, Way, choose_way, int8_linear

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
_TOKENS = (1, 8, 64, 2048)
_COLD_BYTES = 160 << 20
_TRIED: dict[int, tuple[Way, ...]] = {
    1: (Rows(4), Rows(2), Rows(1)),
    8: (
        Tiles(32, 16, 256, 4, 4),
        Tiles(32, 16, 256, 4, 4, 4),
        Tiles(64, 16, 128, 4, 5, 4),
        Tiles(32, 16, 256, 4, 4, 8),
        Tiles(64, 16, 128, 4, 5, 8),
    ),
    64: (
        Tiles(64, 64, 128, 4, 4),
        Tiles(64, 64, 128, 4, 4, 4),
        Tiles(64, 64, 128, 4, 4, 8),
        Tiles(64, 64, 64, 4, 5, 4),
        Tiles(128, 64, 128, 8, 3, 4),
    ),
    2048: (*(Panels(mib << 20) for mib in (32, 48, 128)),),
}


def _weights(
    machine: Machine, rows: int, cols: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns (codes, scale, dense) in so many copies that no cache holds them."""
    copies = max(2, -(-machine.size(_COLD_BYTES, 1) // (rows * cols)))
    weights = []
    for _ in range(min(copies, 40)):
        codes = (
            torch.randn(rows, cols, device=machine.device)
            .mul_(33)
            .round_()
            .clamp_(-127, 127)
            .to(torch.int8)
        )
        scale = torch.rand(rows, device=machine.device) * 1e-3 + 1e-4
        weights.append((codes, scale, (codes * scale[:, None]).to(torch.bfloat16)))
    return weights


def _measure(machine: Machine, weights: list, inputs: torch.Tensor, way: Way | None) -> float:
    if way is None:
        return machine.seconds(
            [lambda dense=dense: functional.linear(inputs, dense) for _, _, dense in weights]
        )
    return machine.seconds(
        [
            lambda c=codes, s=scale: int8_linear(inputs, c, s, None, way)
            for codes, scale, _ in weights
        ]
    )


def products(machine: Machine) -> Iterator[Row]:
    """Speed of the chosen way against a dense layer, for each shape and number of tokens."""
    yield from _products(machine, lambda tokens, rows, cols: (choose_way(tokens, rows, cols),))


def tuning(machine: Machine) -> Iterator[Row]:
    """All ways that are worth a try; `choose_way` follows from their times."""
    yield from _products(machine, lambda tokens, rows, cols: _TRIED[tokens])


def _products(machine: Machine, ways) -> Iterator[Row]:  # type: ignore[no-untyped-def]
    shapes = _SHAPES if not machine.small else ((48, 64),)
    for rows, cols in shapes:
        weights = _weights(machine, rows, cols)
        for tokens in _TOKENS if not machine.small else (1, 8):
            inputs = torch.randn(tokens, cols, device=machine.device).to(torch.bfloat16)
            dense = _measure(machine, weights, inputs, None)
            moved_bytes = rows * cols + 2 * tokens * (rows + cols)
            for way in ways(tokens, rows, cols):
                try:
                    ours = _measure(machine, weights, inputs, way)
                except Exception as exc:  # a way that this device cannot take is a result
                    yield Row(
                        f"int8 {rows} x {cols}, {tokens} tokens, {way}",
                        0.0,
                        "x",
                        f"failed: {exc!r}"[:200],
                    )
                    continue
                rate = 2e-12 * tokens * rows * cols / ours
                speed = (
                    f"{moved_bytes / ours / 1e9:.0f} GB/s"
                    if tokens <= 64
                    else f"{rate:.0f} TFLOP/s"
                )
                numbers = {"seconds": ours, "dense_seconds": dense, "way": str(way)}
                note = f"{ours * 1e6:.1f} us, {speed}; dense {dense * 1e6:.1f} us"
                yield Row(
                    f"int8 {rows} x {cols}, {tokens} tokens, {way}",
                    dense / ours,
                    "x",
                    note,
                    numbers,
                )
        del weights
