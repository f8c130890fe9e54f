"""Synthetic source models for benchmarks: Gaussian bf16 matrices, as hard to code as real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

_CACHE = Path(os.environ.get("CODECLLM_CACHE", Path.home() / ".cache" / "codecllm")) / "synthetic"
_BLOCK_ELEMENTS = 1 << 22


def gaussian_model(rows: int, cols: int, *, tensors: int = 1) -> Path:
    """Returns a cached folder of `tensors` bf16 matrices [rows, cols], N(0, 0.02), seed 0."""
    folder = _CACHE / f"gaussian-{tensors}x{rows}x{cols}"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "model.partial"
        _write(partial, rows, cols, tensors)
        os.replace(partial, folder / "model.safetensors")
    return folder


def _write(path: Path, rows: int, cols: int, tensors: int) -> None:
    size = rows * cols * 2
    header = {
        f"layers.{n}.weight": {
            "dtype": "BF16",
            "shape": [rows, cols],
            "data_offsets": [n * size, (n + 1) * size],
        }
        for n in range(tensors)
    }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, rows * cols * tensors, _BLOCK_ELEMENTS):
            count = min(_BLOCK_ELEMENTS, rows * cols * tensors - start)
            values = random.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16))
