"""The manifest's records of stored tensors, and the side tensors that say what a code is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.formats.codecs import CODEC_NAMES
from codecllm.formats.manifest.records import (
    Int8Tensor,
    LosslessTensor,
    PlaneRecord,
    RawTensor,
    SideChecksums,
)
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.shards.side_tensors import COL_GROUP, COL_SCALE, SCALE


def scale_sides(plan: TensorPlan, scales: NDArray[np.float32] | None) -> dict[str, NDArray[Any]]:
    """Returns the side tensors from which steps follow, by key, as unsigned words; none for a lossless tensor.

    Args:
        plan: the tensor's; its steps decide the type of the scales.
        scales: float32 [channels], or None.
    """
    if scales is None:
        return {}
    if plan.params is None:
        return {SCALE.key: _as_stored(scales, "F32")}
    dtype = plan.params.scale_dtype
    sides: dict[str, NDArray[Any]] = {SCALE.key: _as_stored(scales, dtype)}
    if plan.params.col_scale is not None:
        sides[COL_SCALE.key] = _as_stored(plan.params.col_scale, dtype)
        if plan.params.col_groups is not None:
            sides[COL_GROUP.key] = plan.params.col_groups
    return sides


def coded_record(
    plan: TensorPlan,
    number: int,
    chunks: NDArray[Any],
    entropy: NDArray[np.float64],
    sides: dict[str, NDArray[Any]],
    checksums: SideChecksums,
    tables_bytes: int | None,
    worst: list[float],
    digest: str,
) -> LosslessTensor | Int8Tensor:
    """Returns the record of a coded tensor.

    Args:
        plan: the tensor's.
        number: of its shard.
        chunks: its chunks' records, RECORD [tiles * planes].
        entropy: bits of each plane.
        sides: `scale_sides`.
        checksums: of all side tensors.
        tables_bytes: size of its `rans` tables, or None.
        worst: largest error, and largest error in steps.
        digest: sha256.
    """
    source, grid = plan.source, plan.grid
    common: dict[str, Any] = {
        "name": source.name,
        "dtype": source.dtype.name,
        "shape": list(source.shape),
        "shard": number,
        "tile": [grid.tile_rows, grid.tile_cols],
        "planes": _plane_records(chunks.reshape(len(grid), -1), source.entry.elements, entropy),
        "tables_bytes": tables_bytes,
        "digest": digest,
        "xxh3": checksums,
    }
    if plan.scheme == "lossless":
        return LosslessTensor(scheme="lossless", fallback=plan.fallback, **common)
    scale_dtype = "F32" if plan.params is None else plan.params.scale_dtype
    stored_scales = float32_from_bits(sides[SCALE.key], scale_dtype)
    return Int8Tensor(
        scheme="int8",
        channel_axis=plan.axis,
        channel_kind=plan.kind,
        scale_dtype="BF16" if scale_dtype == "BF16" else None,
        scale_range=[_short(stored_scales.min()), _short(stored_scales.max())],
        worst_error=_short(worst[0]),
        rounding=None if plan.params is None else plan.params.rounding,
        deadzone=_short(plan.params.deadzone)
        if plan.params is not None and plan.params.deadzone
        else None,
        worst_steps=None if plan.params is None else _short(worst[1]),
        **common,
    )


def raw_record(plan: TensorPlan, number: int, digest: str, checksum: str) -> RawTensor:
    """Returns the record of a tensor that is stored as it is, in shard `number`: sha256 and XXH3-64 of its bytes."""
    source = plan.source
    return RawTensor(
        name=source.name,
        dtype=source.dtype.name,
        shape=list(source.shape),
        scheme="raw",
        shard=number,
        digest=digest,
        xxh3=checksum,
        fallback=plan.fallback,
    )


def _as_stored(scales: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    bits = bits_from_float32(scales, dtype)
    return bits.astype(bits.dtype.newbyteorder("<"))


def _plane_records(
    records: NDArray[Any], elements: int, entropy: NDArray[np.float64]
) -> list[PlaneRecord]:
    return [
        PlaneRecord(
            codec=CODEC_NAMES[int(records["codec"][:, plane].max())],
            raw_bytes=elements,
            stored_bytes=int(records["stored_bytes"][:, plane].sum(dtype=np.int64)),
            entropy_bits=round(float(entropy[plane])),
        )
        for plane in range(records.shape[1])
    ]


def _short(value: Any) -> float:
    """A float32 as the float64 with the shortest decimal form: manifests are read by people too."""
    return float(str(np.float32(value)))
