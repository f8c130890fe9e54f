"""The job of a piece: read it into pinned memory, compare checksums, decode it if needed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.codecs.zstd import HEAD_BYTES, are_alike, are_plain, check_frame
from codecllm.formats.errors import DecodeError, TruncatedError
from codecllm.formats.limits import SLOT_ALIGNMENT
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.loader.device.chunks import chunks_of
from codecllm.loader.device.codecs import ZSTD_ID
from codecllm.loader.device.finish import side_arrays
from codecllm.loader.device.plan import Piece, aligned, band_rows, target_name
from codecllm.loader.host.decode import Workspace, read_tiles, write_tile
from codecllm.loader.torch_tensors import words_of


@torch.no_grad()
def read_piece(piece: Piece, buffer: torch.Tensor, workspace: Workspace) -> None:
    """Fills `buffer` (uint8 [piece.host_bytes], on the host) with a piece for the device.

    A plain tensor's checksum covers it as a whole and is compared by the caller.

    Raises:
        FormatError: the piece is damaged. Nothing of it may be used.
    """
    source = piece.source
    if isinstance(source, PlainTensor):
        if piece.bands:
            begin = source.offset + piece.bands.start * buffer.numel() // len(piece.bands)
            source.file.read_into(begin, memoryview(buffer.numpy()))
    elif decodes_on_host(piece):
        _decode(source, piece, buffer, workspace)
    else:
        _read_slots(source, piece, buffer.numpy())


def decodes_on_host(piece: Piece) -> bool:
    """Whether `read_piece` decodes a piece, besides reading and checking it."""
    return (
        isinstance(piece.source, StoredTensor)
        and piece.staged is not None
        and piece.order.request.part != "payload"
    )


def _read_slots(source: StoredTensor, piece: Piece, buffer: NDArray[np.uint8]) -> None:
    """Reads the slots of a piece's chunks, verifies each, and puts side data behind them."""
    first, last = chunks_of(source, piece.bands)
    size = source.slots_bytes(first, last)
    slots = buffer[:size]
    try:
        source.file.read_into(source.offset + int(source.table.offsets[first]), memoryview(slots))
    except TruncatedError as exc:
        raise exc.located(tensor=source.record.name, chunk=first) from None
    # Before the frames are looked at: accidents never reach a decoder, here or on the device.
    source.check_chunks(first, last, slots)
    _check_frames(source, first, last, slots)
    if piece.staged is None:
        place = aligned(size)
        for side in side_arrays(source, band_rows(source, piece.bands)):
            buffer[place : place + side.nbytes].view(side.dtype)[:] = side
            place += aligned(side.nbytes)


def _check_frames(source: StoredTensor, first: int, last: int, slots: NDArray[np.uint8]) -> None:
    """Checks the header of every zstd frame: the device's decoder trusts it."""
    table = source.table
    zstd_chunks = first + np.flatnonzero(table.records["codec"][first:last] == ZSTD_ID)
    if not len(zstd_chunks):
        return
    blocks = (table.offsets[zstd_chunks] - table.offsets[first]) // SLOT_ALIGNMENT
    heads = slots.reshape(-1, SLOT_ALIGNMENT)[blocks, :HEAD_BYTES]  # a slot has one block or more
    raw_bytes = table.raw_bytes[zstd_chunks]
    # Frames of one writer have equal headers, so most batches need one header parsed, or none.
    suspect = (
        zstd_chunks[:1]
        if are_alike(heads, raw_bytes)
        else zstd_chunks[~are_plain(heads, raw_bytes)]
    )
    for chunk in suspect.tolist():
        record, base = table.chunks[chunk], table.chunks[first].begin
        try:
            check_frame(slots[record.begin - base :][: record.stored_bytes], record.raw_bytes)
        except DecodeError as exc:
            raise exc.located(**source.place(chunk)) from None


def _decode(source: StoredTensor, piece: Piece, buffer: torch.Tensor, workspace: Workspace) -> None:
    """Decodes a piece on the CPU, to its elements in the order of the source."""
    assert piece.staged is not None
    grid = source.table.grid
    row, rows = band_rows(source, piece.bands)
    words = words_of(buffer.view(piece.staged), rows, grid.cols)
    target = target_name(source, piece.order.request.part, piece.staged)
    tiles = range(piece.bands.start * grid.across, piece.bands.stop * grid.across)
    for tile, planes in read_tiles(source, tiles, workspace):
        place = words[tile.row - row : tile.row - row + tile.rows, tile.col : tile.col + tile.cols]
        write_tile(source, tile, planes, place, target, workspace)
