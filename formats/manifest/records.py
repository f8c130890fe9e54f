"""Records of the manifest: the entries of its lists, one per file, shard and tensor (SPEC.md 8)."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from codecllm.formats import limits
from codecllm.formats.dtypes import DTYPES

NEAREST = "nearest"
"""The rounding under which every element is as near to its source as its step allows."""

DEADZONE = "deadzone"
"""The rounding that prefers the smaller of two codes that are nearly as near."""

FEEDBACK, FEEDBACK_DEADZONE = "feedback", "feedback-deadzone"
"""Roundings whose codes make up for the errors of other codes of their row.

The second one has a deadzone.
"""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0, le=limits.INTEGER)]
Shape = list[Annotated[int, Field(ge=0)]]  # its limits: check_shape


class Record(BaseModel):
    """Base of all records: no value is converted, no key ignored, no field changed later."""

    # strict: pydantic would turn "1" into 1. frozen: threads share the records.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class FileRecord(Record):
    """A file of the folder: name, size in bytes, sha256 of its content."""

    name: str
    bytes: Count
    sha256: Sha256


class ShardRecord(FileRecord):
    """A safetensors file.

    `header_xxh3` covers length prefix and header, so that a reader can check them alone.
    """

    header_xxh3: Xxh3


class PlaneRecord(Record):
    """One plane of a coded tensor, over all its chunks.

    `codec` is the one that at least one chunk uses, or `raw`. `stored_bytes` counts without
    padding. `entropy_bits` is the writer's estimate of the order-0 entropy of the chunks' symbols,
    in bits, summed (informative).
    """

    codec: str
    raw_bytes: Count
    stored_bytes: Count
    entropy_bits: Count


class SideChecksums(Record):
    """xxh3-64 of the side tensors as stored.

    `scale` and `col_` for `int8` only, `tables` where a chunk uses codec `rans`.
    """

    shape: Xxh3
    chunks: Xxh3
    scale: Xxh3 | None = None
    col_scale: Xxh3 | None = None
    col_group: Xxh3 | None = None
    tables: Xxh3 | None = None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of the side tensors that there are."""
        return tuple([key for key in _SIDE_KEYS if getattr(self, key) is not None])


_SIDE_KEYS = tuple(SideChecksums.model_fields)


class _Tensor(Record):
    name: str
    dtype: str
    shape: Shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def source_bytes(self) -> int:
        """Size of the tensor in the source."""
        return self.elements * DTYPES[self.dtype].bits // 8


class RawTensor(_Tensor):
    """A tensor stored plainly. `fallback` says why, where the scheme asked for was another."""

    scheme: Literal["raw"]
    shard: Count
    digest: Sha256
    xxh3: Xxh3
    fallback: str | None = None


class LosslessTensor(_Tensor):
    """A tensor stored as byte planes.

    `digest` is the sha256 of the source's bytes, `tables_bytes` the size of `X_tables`.
    """

    scheme: Literal["lossless"]
    shard: Count
    tile: Annotated[
        list[Annotated[int, Field(ge=1, le=2**32 - 1)]], Field(min_length=2, max_length=2)
    ]
    planes: Annotated[list[PlaneRecord], Field(min_length=1, max_length=limits.PLANES)]
    tables_bytes: Count | None = None
    digest: Sha256
    xxh3: SideChecksums
    fallback: str | None = None


class Int8Tensor(_Tensor):
    """A quantized tensor.

    `digest` is the sha256 of the codes in source order followed by the float32 scales.

    `tables_bytes` is the size of `X_tables`, where a chunk uses codec `rans`. `scale_dtype`, the
    type of the stored scales, is absent where it is F32. `rounding` and `worst_steps`, the largest
    |w - code * step| in steps, are absent where scales follow from the largest weights and codes
    are the nearest ones. `deadzone`, in steps, is there where `rounding` names one.
    """

    scheme: Literal["int8"]
    shard: Count
    channel_axis: Annotated[int, Field(ge=0, lt=limits.RANK)]
    channel_kind: Literal["row", "column"]
    tile: Annotated[
        list[Annotated[int, Field(ge=1, le=2**32 - 1)]], Field(min_length=2, max_length=2)
    ]
    planes: Annotated[list[PlaneRecord], Field(min_length=1, max_length=2)]
    tables_bytes: Count | None = None
    scale_dtype: Literal["BF16"] | None = None
    scale_range: Annotated[list[float], Field(min_length=2, max_length=2)]
    worst_error: Annotated[float, Field(ge=0)]
    rounding: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] | None = None
    deadzone: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    worst_steps: Annotated[float, Field(ge=0)] | None = None
    digest: Sha256
    xxh3: SideChecksums

    @property
    def wide(self) -> bool:
        """Whether codes have 16 bits, in two planes."""
        return len(self.planes) == 2


class AliasTensor(_Tensor):
    """A tensor whose bytes are those of another one (tied weights), stored once."""

    scheme: Literal["alias"]
    alias_of: str


TensorRecord = Annotated[
    RawTensor | LosslessTensor | Int8Tensor | AliasTensor, Field(discriminator="scheme")
]
CodedTensor = LosslessTensor | Int8Tensor
StoredRecord = RawTensor | LosslessTensor | Int8Tensor
"""A record of a tensor that has bytes of its own: no alias."""


class Source(Record):
    """Where the weights came from.

    `repo` and `commit` are null for a local folder; no local path is recorded.

    `quantization` names the method of another library under which the tensors are quantized; absent
    where they are not.
    """

    repo: str | None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    tensor_bytes: Count
    quantization: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] | None = None


class Options(Record):
    """Options of the conversion; the same source and writer then give the same bytes.

    `codec` is absent where it is `zstd`, the only one of format 1.0. `bits` (per weight) or
    `ratio`, `calibrate` and `refine` name the way in which steps were chosen, if
    they were.
    """

    scheme: Literal["int8", "lossless"]
    codec: Literal["rans"] | None = None
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    ratio: Annotated[float, Field(gt=0)] | None = None
    calibrate: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    refine: bool | None = None
    include: list[str]
    exclude: list[str]
    non_finite: Literal["error", "lossless"]
    max_shard_bytes: Count


class Calibration(Record):
    """The text whose activations chose the steps.

    Its kind, its number of tokens and the sha256 of their ids as int64.

    `seed` is absent where nothing was drawn at random. `sha256` covers the ids, little-endian,
    sequence by sequence.
    """

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    tokens: Count
    seed: Count | None = None
    sha256: Sha256
