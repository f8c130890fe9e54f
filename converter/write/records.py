"""The manifest's records of stored tensors, and the side tensors from which steps follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.shards.side_tensors import COL_GROUP, COL_SCALE, SCALE


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor:
    """A coded tensor after its last block.

    The facts that its manifest record repeats, but for the digest.

    Attributes:
        plan: its plan, with `wide` as it came out.
        chunks: its chunk records, RECORD [tiles * planes].
        entropy_bits: float64 [planes or more]: estimate of each plane's entropy.
        scales: float32 [channels] (int8), or None.
        worst_error: largest absolute error of a weight (int8).
        worst_steps: the same in steps (int8 with chosen parameters).
    """

    plan: TensorPlan
    chunks: NDArray[Any]
    entropy_bits: NDArray[np.float64]
    scales: NDArray[np.float32] | None = None
    worst_error: float = 0.0
    worst_steps: float = 0.0

    def digested_scales(self) -> list[NDArray[np.float32]]:
        """Returns the scales that the digest covers behind the codes, little-endian float32."""
        params = self.plan.params
        if self.scales is None:
            return []
        if params is None or params.col_scale is None:
            return [self.scales.astype("<f4")]
        return [self.scales.astype("<f4"), params.col_scale.astype("<f4")]

    def scale_sides(self) -> dict[str, NDArray[Any]]:
        """Returns the side tensors from which steps follow, by key, as unsigned words.

        None for a lossless tensor.
        """
        if self.scales is None:
            return {}
        params = self.plan.params
        if params is None:
            return {SCALE.key: _as_stored(self.scales, "F32")}
        dtype = params.scale_dtype
        sides: dict[str, NDArray[Any]] = {SCALE.key: _as_stored(self.scales, dtype)}
        if params.col_scale is not None:
            sides[COL_SCALE.key] = _as_stored(params.col_scale, dtype)
        if params.col_groups is not None:
            sides[COL_GROUP.key] = params.col_groups
        return sides


def coded_record(
    tensor: EncodedTensor,
    shard: int,
    checksums: SideChecksums,
    tables_bytes: int | None,
    digest: str,
) -> LosslessTensor | Int8Tensor:
    """Returns the record of a coded tensor.

    Args:
        tensor: its facts.
        shard: number of its shard.
        checksums: of all its side tensors.
        tables_bytes: size of its `rans` tables, or None.
        digest: sha256 of the decoded tensor, 64 hex digits.
    """
    if tensor.scales is None:
        return _lossless_record(tensor, shard, checksums, tables_bytes, digest)
    return _int8_record(tensor, tensor.scales, shard, checksums, tables_bytes, digest)


def _lossless_record(
    tensor: EncodedTensor,
    shard: int,
    checksums: SideChecksums,
    tables_bytes: int | None,
    digest: str,
) -> LosslessTensor:
    plan = tensor.plan
    return LosslessTensor(
        scheme="lossless",
        name=plan.source.name,
        dtype=plan.source.dtype.name,
        shape=list(plan.source.shape),
        shard=shard,
        tile=[plan.grid.tile_rows, plan.grid.tile_cols],
        planes=_plane_records(tensor),
        tables_bytes=tables_bytes,
        digest=digest,
        xxh3=checksums,
        fallback=plan.fallback,
    )


def _int8_record(
    tensor: EncodedTensor,
    scales: NDArray[np.float32],
    shard: int,
    checksums: SideChecksums,
    tables_bytes: int | None,
    digest: str,
) -> Int8Tensor:
    plan, params = tensor.plan, tensor.plan.params
    scale_dtype: Literal["BF16"] | None = None
    rounding = deadzone = worst_steps = None
    if params is not None:
        scale_dtype = "BF16" if params.scale_dtype == "BF16" else None
        rounding = params.rounding
        deadzone = _short(params.deadzone) if params.deadzone else None
        worst_steps = _short(tensor.worst_steps)
    return Int8Tensor(
        scheme="int8",
        name=plan.source.name,
        dtype=plan.source.dtype.name,
        shape=list(plan.source.shape),
        shard=shard,
        channel_axis=plan.axis,
        channel_kind=plan.kind,
        tile=[plan.grid.tile_rows, plan.grid.tile_cols],
        planes=_plane_records(tensor),
        tables_bytes=tables_bytes,
        scale_dtype=scale_dtype,
        scale_range=[_short(scales.min()), _short(scales.max())],
        worst_error=_short(tensor.worst_error),
        rounding=rounding,
        deadzone=deadzone,
        worst_steps=worst_steps,
        digest=digest,
        xxh3=checksums,
    )


def raw_record(plan: TensorPlan, shard: int, digest: str, checksum: str) -> RawTensor:
    """Returns the record of a tensor that is stored as it is, in shard `shard`.

    Sha256 and XXH3-64 of its bytes.
    """
    source = plan.source
    return RawTensor(
        name=source.name,
        dtype=source.dtype.name,
        shape=list(source.shape),
        scheme="raw",
        shard=shard,
        digest=digest,
        xxh3=checksum,
        fallback=plan.fallback,
    )


def _as_stored(scales: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    bits = bits_from_float32(scales, dtype)
    return bits.astype(bits.dtype.newbyteorder("<"))


def _plane_records(tensor: EncodedTensor) -> list[PlaneRecord]:
    by_plane = tensor.chunks.reshape(len(tensor.plan.grid), -1)
    return [
        PlaneRecord(
            # `raw` has id 0: the largest id is that of the plane's codec, if a chunk uses it.
            codec=CODEC_NAMES[int(by_plane["codec"][:, plane].max())],
            raw_bytes=tensor.plan.source.entry.elements,
            stored_bytes=int(by_plane["stored_bytes"][:, plane].sum(dtype=np.int64)),
            entropy_bits=round(float(tensor.entropy_bits[plane])),
        )
        for plane in range(by_plane.shape[1])
    ]


def _short(value: Any) -> float:
    """A float32 as the float64 with the shortest decimal form: manifests are read by people too."""
    return float(str(np.float32(value)))
