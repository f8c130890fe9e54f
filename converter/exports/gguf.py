"""Refuses the export to GGUF: its only comparable type cannot hold the scales of a container."""

from __future__ import annotations

import numpy as np

from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.stored_tensor import StoredTensor

_WAY_ROUND = (
    "export --format safetensors, and let llama.cpp's convert_hf_to_gguf.py quantize the "
    "result as you wish"
)


def refuse(container: Container) -> None:
    """Raises the UsageError that says why, with this container's own figures.

    Q8_0 (gguf's `quants.py`, ggml's `block_q8_0`) keeps one float16 scale for each 32 weights of a
    row. The codes of a channel could be laid out so, but its float32 scale cannot: rounding it to
    float16 changes every weight of the channel, and below 2**-14 float16 also loses precision step
    by step. A file made so would claim to be the container's model and be another.
    """
    if container.manifest.options.scheme != "int8":
        raise UsageError(f"GGUF's Q8_0 is not {container.manifest.options.scheme}: {_WAY_ROUND}")
    if any(
        isinstance(record, Int8Tensor) and record.xxh3.col_scale is not None
        for record in container.manifest.tensors
    ):
        raise UsageError(
            "GGUF's Q8_0 has one scale for 32 weights of a row, and this container has scales for "
            "their columns too: "
            f"{_WAY_ROUND}"
        )
    scales = _all_scales(container)
    if not scales.size:
        raise UsageError(f"the container holds no int8 tensor: {_WAY_ROUND}")
    # A scale beyond float16 becomes infinite, which counts as changed.
    with np.errstate(over="ignore"):
        error = np.abs(scales.astype(np.float16).astype(np.float64) / scales.astype(np.float64) - 1)
    changed_count = int(np.count_nonzero(error))
    if not changed_count:
        raise UsageError(
            f"codecllm writes no GGUF, though float16 could hold these scales; {_WAY_ROUND}"
        )
    raise UsageError(
        "GGUF's Q8_0 keeps its scales as float16, which cannot hold the float32 scales of this "
        "container: "
        f"{changed_count:,} of {scales.size:,} would change, "
        f"by up to {error.max():.2e} of their value, "
        "and with them the weights of "
        f"their channels; {_WAY_ROUND}"
    )


def _all_scales(container: Container) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    parts = []
    for record in container.manifest.tensors:
        if isinstance(record, Int8Tensor):
            tensor = container.tensor(record.name)
            assert isinstance(tensor, StoredTensor) and tensor.scales is not None
            parts.append(tensor.scales)
    return np.concatenate(parts) if parts else np.empty(0, np.float32)
