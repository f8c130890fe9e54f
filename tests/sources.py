"""Synthetic source models: any dtype, any shape, one file or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter

Tensors = dict[str, tuple[str, np.ndarray]]
"""Name -> (dtype of the container, array whose bytes are the data)."""


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounds float32 down to bf16 bits (uint16)."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_source(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """Writes a model of one file."""
    folder.mkdir(parents=True)
    _write_file(folder / "model.safetensors", tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded_source(folder: Path, shards: list[Tensors]) -> Path:
    """Writes a model of several files and their index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _write_file(path: Path, tensors: Tensors) -> None:
    plan = [
        PlannedTensor(name, DTYPES[dtype], data.shape, data.nbytes)
        for name, (dtype, data) in tensors.items()
    ]
    writer = ShardWriter(path, plan, {"format": "pt"})
    for name, (dtype, data) in tensors.items():
        writer.add(name, dtype, data.shape, np.ascontiguousarray(data).tobytes())
    writer.finish()
