"""Tensors cut into pieces that one thread reads, pieces gathered into batches for one copy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from codecllm.formats.container import Container
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.formats.tile_run import CODES, WIDE_CODES
from codecllm.loader.device.chunks import WORDS_PER_CHUNK, chunks_of, plane_bytes
from codecllm.loader.device.codecs import DeviceCodecs
from codecllm.loader.device.finish import finishes_on_device, side_arrays
from codecllm.loader.engine import Part, Request
from codecllm.loader.promise import Promise
from codecllm.loader.torch_tensors import DTYPE_NAMES, torch_dtype

PIECE_SYMBOLS = 8 << 20
"""Symbols of a piece: one read of 5 to 8 MiB, its checksums, and one kernel to finish it."""

SLOT_BYTES = 64 << 20
"""Bytes of a batch in pinned memory, unless a single band of tiles is larger."""

ARENA_BYTES = 128 << 20
"""Bytes of a batch's decoded symbols, likewise: decoders want a thousand chunks at once."""

ALIGNMENT = 256
"""Alignment of pieces in pinned and device memory: any element type and any vector load."""


@dataclass(slots=True, eq=False)
class Order:
    """A request on its way to the device.

    Attributes:
        request: the request.
        promise: receives the tensor, or the error.
        out: the tensor on the device, from its allocation until it is handed out.
        hasher: state of the checksum of a plainly stored tensor, which covers all its pieces.
    """

    request: Request
    promise: Promise[torch.Tensor] = field(default_factory=Promise)
    out: torch.Tensor | None = None
    hasher: Any = None

    def __post_init__(self) -> None:
        self.out = self.request.out


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Part of a tensor that one thread reads and one kernel or copy finishes.

    Attributes:
        order: the tensor.
        source: where it is stored.
        shape: dimensions of the whole tensor on the device.
        dtype: its dtype there.
        staged: dtype of the elements in the pinned buffer; None where stored chunks lie there, to
            be decoded on the device.
        bands: bands of tiles of a coded tensor; elements of a plain one.
        host_bytes: bytes of the piece in the pinned buffer.
        arena_bytes: bytes of its symbols on the device.
        ends: whether it is the tensor's last.
    """

    order: Order
    source: PlainTensor | StoredTensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    staged: torch.dtype | None
    bands: range
    host_bytes: int
    arena_bytes: int
    ends: bool


@dataclass(slots=True, eq=False)
class Batch:
    """Pieces that travel together.

    Attributes:
        pieces: each with where it lies in the pinned buffer and in the arena.
        host_bytes: their bytes in the pinned buffer.
        arena_bytes: their bytes in the arena.
        chunks: how many chunks are decoded on the device.
    """

    pieces: list[tuple[Piece, int, int]] = field(default_factory=list)
    host_bytes: int = 0
    arena_bytes: int = 0
    chunks: int = 0

    def takes(self, piece: Piece) -> bool:
        """Whether a piece fits; an empty batch takes any."""
        return not self.pieces or (
            self.bytes_with(piece) <= SLOT_BYTES
            and self.arena_bytes + piece.arena_bytes <= ARENA_BYTES
        )

    def add(self, piece: Piece) -> None:
        """Adds a piece behind the others."""
        self.pieces.append((piece, self.host_bytes, self.arena_bytes))
        self.host_bytes += aligned(piece.host_bytes)
        self.arena_bytes += aligned(piece.arena_bytes)
        self.chunks += _chunks(piece)

    @property
    def slot_bytes(self) -> int:
        """Bytes in the pinned buffer, the description of the chunks behind the pieces included."""
        return self.host_bytes + 8 * WORDS_PER_CHUNK * self.chunks

    def bytes_with(self, piece: Piece) -> int:
        """`slot_bytes` once a piece is added."""
        return self.slot_bytes + aligned(piece.host_bytes) + 8 * WORDS_PER_CHUNK * _chunks(piece)


def aligned(size: int) -> int:
    """Rounds a size up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def cut(order: Order, container: Container, codecs: DeviceCodecs) -> Iterator[Piece]:
    """Opens a tensor and cuts it into pieces.

    Raises:
        FormatError: its side data are damaged.
        UnsupportedEnvironmentError: torch lacks its dtype.
    """
    request = order.request
    source = container.tensor(request.name)
    source_dtype = torch_dtype(source.record.dtype, request.name)
    if isinstance(source, PlainTensor):
        yield from _plain_pieces(order, source, source_dtype)
    elif request.part == "payload":
        # A payload stays coded on the device: its chunks are checked and copied as they are.
        shape = (int(source.table.offsets[-1]),)
        for bands in _runs_of_bands(source):
            first, last = chunks_of(source, bands)
            size = source.slots_bytes(first, last)
            yield Piece(
                order,
                source,
                shape,
                torch.uint8,
                torch.uint8,
                bands,
                size,
                0,
                _ends(source, bands),
            )
    else:
        yield from _coded_pieces(order, source, source_dtype, codecs)


def _coded_pieces(
    order: Order, source: StoredTensor, own: torch.dtype, codecs: DeviceCodecs
) -> Iterator[Piece]:
    request, record, grid = order.request, source.record, source.table.grid
    wants_codes = request.part == "codes"
    dtype = codes_dtype(source) if wants_codes else request.dtype or own
    # No kernel writes codes of 16 bits.
    on_device = decodes_on_device(source, codecs) and not (wants_codes and source.wide)
    staged_dtype = None if on_device else host_dtype(source, request.part, dtype)
    for bands in _runs_of_bands(source):
        symbols = band_rows(source, bands)[1] * grid.cols
        ends = _ends(source, bands)
        shape = tuple(record.shape)
        if staged_dtype is not None:
            yield Piece(
                order,
                source,
                shape,
                dtype,
                staged_dtype,
                bands,
                symbols * staged_dtype.itemsize,
                0,
                ends,
            )
            continue
        # Scales travel behind the chunks, so that one copy brings all that a kernel needs.
        stored_bytes = aligned(source.slots_bytes(*chunks_of(source, bands)))
        arena = source.table.planes * plane_bytes(symbols)
        sides = sum(aligned(side.nbytes) for side in side_arrays(source, band_rows(source, bands)))
        yield Piece(order, source, shape, dtype, None, bands, stored_bytes + sides, arena, ends)


def _plain_pieces(order: Order, source: PlainTensor, own: torch.dtype) -> Iterator[Piece]:
    shape = tuple(source.record.shape)
    elements, dtype = math.prod(shape), order.request.dtype or own
    step = max(1, PIECE_SYMBOLS // own.itemsize)
    # A tensor without elements is one empty piece, which ends its order.
    for first in range(0, max(1, elements), step):
        run = range(first, min(first + step, elements))
        yield Piece(
            order,
            source,
            shape,
            dtype,
            own,
            run,
            len(run) * own.itemsize,
            0,
            run.stop == elements,
        )


def decodes_on_device(source: StoredTensor, codecs: DeviceCodecs) -> bool:
    """Whether a tensor's chunks are decoded, and its elements made, on the device."""
    # By the chunks and not the manifest: a chunk may be raw where coding saves nothing.
    stored_codecs = set(source.table.records["codec"].tolist())
    return (
        codecs.kernels
        and all(map(codecs.decodes, stored_codecs))
        and finishes_on_device(source.record)
    )


def host_dtype(source: StoredTensor, part: Part, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the CPU writes elements that will become `dtype`."""
    if not isinstance(source.record, Int8Tensor):
        return torch_dtype(source.record.dtype, source.record.name)
    if part == "codes":
        return codes_dtype(source)
    return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float32


def target_name(source: StoredTensor, part: Part, staged: torch.dtype) -> str:
    """Returns the target of `decode.write_tile` by which the CPU writes `staged`."""
    if not isinstance(source.record, Int8Tensor):
        return source.record.dtype
    if part == "codes":
        return WIDE_CODES if source.wide else CODES
    return DTYPE_NAMES[staged]


def codes_dtype(source: StoredTensor) -> torch.dtype:
    """Returns the dtype of an `int8` tensor's codes: int8, or int16 where they are wide."""
    return torch.int16 if source.wide else torch.int8


def band_rows(source: StoredTensor, bands: range) -> tuple[int, int]:
    """Returns the first row of bands of tiles and how many rows they have."""
    grid = source.table.grid
    first = bands.start * grid.tile_rows
    return first, min(grid.rows, bands.stop * grid.tile_rows) - first


def _runs_of_bands(source: StoredTensor) -> Iterator[range]:
    """Cuts a tensor into runs of bands of about PIECE_SYMBOLS symbols, at least one band.

    A tensor without elements has one empty run.
    """
    grid = source.table.grid
    # Whole bands are whole rows, which lie together in the final tensor.
    step = max(
        1, PIECE_SYMBOLS // max(1, source.table.planes * min(grid.tile_rows, grid.rows) * grid.cols)
    )
    for first in range(0, max(1, grid.down), step):
        yield range(first, min(first + step, grid.down))


def _ends(source: StoredTensor, bands: range) -> bool:
    return bands.stop == source.table.grid.down


def _chunks(piece: Piece) -> int:
    if piece.staged is not None or not isinstance(piece.source, StoredTensor):
        return 0
    first, last = chunks_of(piece.source, piece.bands)
    return last - first
