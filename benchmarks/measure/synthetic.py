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


def layered_model(hidden: int, layers: int) -> Path:
    """Returns a folder with the matrices of `layers` Llama layers; made once and cached.

    Shapes are those of an 8B model where `hidden` is 4096: bf16, N(0, 0.02), 13 * hidden**2 weights
    a layer. The weights of 32 MiB of N(0, 1) repeat, which no codec here notices.
    """
    folder = _CACHE / f"layers-{layers}x{hidden}"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "model.partial"
        _write_layers(partial, hidden, layers)
        os.replace(partial, folder / "model.safetensors")
    return folder


def _layer_shapes(hidden: int) -> dict[str, tuple[int, int]]:
    inner, keys = 7 * hidden // 2, hidden // 4
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _write_layers(path: Path, hidden: int, layers: int) -> None:
    header: dict[str, dict[str, object]] = {}
    position = 0
    for layer in range(layers):
        for name, (rows, cols) in _layer_shapes(hidden).items():
            size = 2 * rows * cols
            header[f"model.layers.{layer}.{name}.weight"] = {
                "dtype": "BF16",
                "shape": [rows, cols],
                "data_offsets": [position, position + size],
            }
            position += size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    random = np.random.default_rng(0)
    values = random.standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    words = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    block = memoryview(np.concatenate([words, words])).cast("B")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while position > 0:
            # Parts begin at random places, so that equal rows of two tensors do not meet.
            start = 2 * int(random.integers(1 << 24))
            count = min(position, len(block) // 2)
            file.write(block[start : start + count])
            position -= count
