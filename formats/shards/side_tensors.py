"""The side tensors beside the payload of a coded tensor (SPEC.md 5).

One table for all readers and writers.

The payload of tensor `X` is stored as `X`; its description is stored as `X_scale`, `X_shape` and
so on. Header check, writer, planner, source check, loader and diagnosis all take suffix, type,
length and presence from `SIDE_TENSORS`. A new side tensor is one more row here, and its checksum
one more field of `SideChecksums`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from codecllm.formats.codecs import rans
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import (
    AliasTensor,
    CodedTensor,
    Int8Tensor,
    RawTensor,
    TensorRecord,
)
from codecllm.formats.tiling import ChannelKind, channel_matrix, last_axis_matrix

Presence = Literal["always", "optional", "never"]
"""Whether a coded tensor has a side tensor; `optional`: its manifest record says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLayout:
    """The facts of a coded tensor on which its side tensors depend.

    A manifest record and a plan both have them.

    Attributes:
        int8: whether the scheme is `int8`; `lossless` otherwise.
        rank: number of dimensions of the source's tensor.
        columns: columns of the matrix view.
        channels: output channels (int8), else 0.
        kind: whether rows or columns of the matrix are the channels (int8).
        scale_dtype: type of the scales (int8).
        rans: whether codec `rans` is used.
        tables_bytes: size of the packed `rans` tables, or None where it is not known.
    """

    int8: bool
    rank: int
    columns: int
    channels: int = 0
    kind: ChannelKind = "row"
    scale_dtype: str = "F32"
    rans: bool = False
    tables_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SideTensor:
    """One row of the table.

    Attributes:
        key: name of its checksum in the manifest (`SideChecksums`).
        title: its content, for error texts.
        dtype: element type in the shard.
        length: number of elements, or None where only the tensor itself tells. Every side tensor
            has rank 1.
        presence: whether a tensor of this layout has it.
        needs: key of a side tensor without which this one must not stand, or None.
    """

    key: str
    title: str
    dtype: Callable[[CodedLayout], str]
    length: Callable[[CodedLayout], int | None]
    presence: Callable[[CodedLayout], Presence]
    needs: str | None = None

    @property
    def suffix(self) -> str:
        """The end of its name, behind the name of the tensor."""
        return f"_{self.key}"

    def name_for(self, tensor: str) -> str:
        """Returns the name under which it is stored beside the payload of `tensor`.

        Examples:
            >>> SCALE.name_for("lm_head.weight")
            'lm_head.weight_scale'
        """
        return tensor + self.suffix

    def checksum(self, record: CodedTensor) -> str | None:
        """Returns its xxh3-64 by the manifest, or None where the tensor has none."""
        value: str | None = getattr(record.xxh3, self.key)
        return value


def _scale_dtype(layout: CodedLayout) -> str:
    return layout.scale_dtype


def _bytes_dtype(layout: CodedLayout) -> str:
    return "U8"


def _always(layout: CodedLayout) -> Presence:
    return "always"


def _with_scales(layout: CodedLayout) -> Presence:
    return "always" if layout.int8 else "never"


def _with_column_scales(layout: CodedLayout) -> Presence:
    return "optional" if layout.int8 and layout.kind == "row" else "never"


def _with_rans(layout: CodedLayout) -> Presence:
    return "always" if layout.rans else "never"


SCALE = SideTensor(
    "scale",
    "scales of the channels",
    dtype=_scale_dtype,
    length=lambda layout: layout.channels,
    presence=_with_scales,
)
COL_SCALE = SideTensor(
    "col_scale",
    "scales of the columns",
    dtype=_scale_dtype,
    length=lambda layout: layout.columns,
    presence=_with_column_scales,
)
COL_GROUP = SideTensor(
    "col_group",
    "groups of the columns",
    dtype=_bytes_dtype,
    length=lambda layout: layout.columns,
    presence=_with_column_scales,
    needs=COL_SCALE.key,
)
SHAPE = SideTensor(
    "shape",
    "dimensions",
    dtype=lambda layout: "I64",
    length=lambda layout: layout.rank,
    presence=_always,
)
CHUNKS = SideTensor(
    "chunks",
    "chunk records",
    dtype=_bytes_dtype,
    length=lambda layout: None,
    presence=_always,
)
TABLES = SideTensor(
    "tables",
    "rans tables",
    dtype=_bytes_dtype,
    length=lambda layout: layout.tables_bytes,
    presence=_with_rans,
)

SIDE_TENSORS = (SCALE, COL_SCALE, COL_GROUP, SHAPE, CHUNKS, TABLES)
"""All of them, in the order in which the writer stores them behind the payload."""

SUFFIXES = tuple(side.suffix for side in SIDE_TENSORS)


@dataclass(frozen=True, slots=True)
class StoredSide:
    """A side tensor of one tensor, as the manifest describes it.

    Attributes:
        side: its row of the table.
        name: its name in the shard.
        dtype: its element type.
        length: its number of elements, or None where only the tensor itself tells.
        checksum: its xxh3-64, 16 hex digits.
    """

    side: SideTensor
    name: str
    dtype: str
    length: int | None
    checksum: str


def layout_of(record: CodedTensor) -> CodedLayout:
    """Returns the facts of a manifest record on which its side tensors depend."""
    return replace(
        _layout(*_facts(record)), rans=_uses_rans(record), tables_bytes=record.tables_bytes
    )


def _facts(record: CodedTensor) -> tuple[tuple[int, ...], int | None, ChannelKind, str]:
    """Returns shape, channel axis (None: lossless) and kind, and type of the scales."""
    if not isinstance(record, Int8Tensor):
        return tuple(record.shape), None, "row", "F32"
    # Manifests name the type only where it is not F32.
    scale_dtype = record.scale_dtype or "F32"
    return tuple(record.shape), record.channel_axis, record.channel_kind, scale_dtype


@lru_cache(maxsize=256)  # a model has many tensors of few layouts
def _layout(
    shape: tuple[int, ...], axis: int | None, kind: ChannelKind, scale_dtype: str
) -> CodedLayout:
    """Returns the facts that do not depend on the codec."""
    rank = len(shape)
    if axis is None:
        return CodedLayout(int8=False, rank=rank, columns=last_axis_matrix(shape)[1])
    rows, columns = channel_matrix(shape, axis, kind)
    channels = rows if kind == "row" else columns
    return CodedLayout(
        int8=True,
        rank=rank,
        columns=columns,
        channels=channels,
        kind=kind,
        scale_dtype=scale_dtype,
    )


def _uses_rans(record: CodedTensor) -> bool:
    return rans.NAME in [plane.codec for plane in record.planes]


def side_tensors(record: TensorRecord) -> list[StoredSide]:
    """Returns the side tensors of a record, in the order of the table.

    None for a plain tensor or an alias.
    """
    if isinstance(record, RawTensor | AliasTensor):
        return []
    layout = layout_of(record)
    sides = []
    for side in SIDE_TENSORS:
        checksum = side.checksum(record)
        if checksum is not None:
            name = side.name_for(record.name)
            sides.append(StoredSide(side, name, side.dtype(layout), side.length(layout), checksum))
    return sides


def side_types(record: CodedTensor) -> list[tuple[str, str, tuple[int] | None]]:
    """Returns suffix, element type and shape of each of a tensor's side tensors.

    As `side_tensors` has them; the shape is None where only the tensor itself tells.
    """
    types = _types(record.xxh3.keys, *_facts(record))
    if record.tables_bytes is None:
        return types
    return [
        (suffix, dtype, (record.tables_bytes,) if suffix == TABLES.suffix else shape)
        for suffix, dtype, shape in types
    ]


@lru_cache(maxsize=256)
def _types(
    stored_keys: tuple[str, ...],
    shape: tuple[int, ...],
    axis: int | None,
    kind: ChannelKind,
    scale_dtype: str,
) -> list[tuple[str, str, tuple[int] | None]]:
    layout = _layout(shape, axis, kind, scale_dtype)
    types = []
    for side in SIDE_TENSORS:
        if side.key in stored_keys:
            length = side.length(layout)
            types.append((side.suffix, side.dtype(layout), None if length is None else (length,)))
    return types


def side_names(record: TensorRecord) -> list[str]:
    """Returns the names under which a tensor's side tensors are stored."""
    if isinstance(record, RawTensor | AliasTensor):
        return []
    return [record.name + suffix for suffix in _suffixes(record.xxh3.keys)]


@lru_cache(maxsize=64)
def _suffixes(stored_keys: tuple[str, ...]) -> list[str]:
    return [side.suffix for side in SIDE_TENSORS if side.key in stored_keys]


def misplaced_side(record: CodedTensor) -> SideTensor | None:
    """Returns the first side tensor that a record has and must not have, or lacks and must have.

    None if all is right.
    """
    kind = record.channel_kind if isinstance(record, Int8Tensor) else None
    return _misplaced(kind, _uses_rans(record), record.xxh3.keys)


@lru_cache(maxsize=64)  # a model has many tensors of few layouts
def _misplaced(
    kind: ChannelKind | None, uses_rans: bool, stored_keys: tuple[str, ...]
) -> SideTensor | None:
    """As `misplaced_side`, by the facts on which presence depends; `kind` is None for lossless."""
    layout = CodedLayout(
        int8=kind is not None, rank=0, columns=0, kind=kind or "row", rans=uses_rans
    )
    for side in SIDE_TENSORS:
        is_stored = side.key in stored_keys
        presence = side.presence(layout)
        # Without its partner a side tensor has no meaning.
        if side.needs is not None and side.needs not in stored_keys:
            presence = "never"
        if presence != "optional" and is_stored != (presence == "always"):
            return side
    return None


def scale_bytes(record: Int8Tensor) -> int:
    """Returns the bytes that the scales and the groups of columns take."""
    sizes = (
        (stored_side.length or 0) * DTYPES[stored_side.dtype].itemsize
        for stored_side in side_tensors(record)
        if stored_side.side in (SCALE, COL_SCALE, COL_GROUP)
    )
    return sum(sizes)
