"""Decodes every tensor in source order, block by block, and compares it with its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs.entropy import estimated_entropy_bits
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import ChecksumError, CodecLLMError, DecodeError, FormatError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.reference import scales_bytes
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.formats.tile_run import CODES, WIDE_CODES
from codecllm.formats.tiling import Tile
from codecllm.loader.host.decode import (
    Workspace,
    join_tiles,
    plan_jobs,
    write_tile,
)
from codecllm.verifier.checks.integrity import Progress, in_order, stored_names
from codecllm.verifier.report import Stage

Block = tuple[Tile, NDArray[Any]]


@dataclass(slots=True)
class Scan:
    """The result of decoding one tensor.

    Attributes:
        faults: one error per damaged or undecodable chunk, or one for the whole tensor.
        chunks: chunks that were decoded.
        entropy_bits: order-0 entropy of each plane's symbols, in bits, summed over the chunks.
    """

    faults: list[CodecLLMError] = field(default_factory=list)
    chunks: int = 0
    entropy_bits: list[float] = field(default_factory=list)


def check_decoding(
    container: Container, stage: Stage, workers: int, progress: Progress | None
) -> dict[str, Scan]:
    """Decodes every tensor and compares digests; returns one scan per tensor."""
    total = sum(
        record.source_bytes for record in container.manifest.tensors if record.scheme != "alias"
    )
    scans: dict[str, Scan] = {}
    bytes_done = 0
    with ThreadPoolExecutor(workers) as pool:
        for name, scan in in_order(
            pool, stored_names(container), lambda name: scan_tensor(container, name)
        ):
            scans[name] = scan
            bytes_done += container.records[name].source_bytes
            if progress is not None:
                progress(name, bytes_done, total)
            for error in scan.faults:
                stage.fail(error)
    chunks = sum(scan.chunks for scan in scans.values())
    stage.summary = (
        f"{chunks:,} chunks of {len(scans)} tensors decoded, sha256 of each tensor as recorded"
    )
    stage.facts = {"tensors": len(scans), "chunks": chunks}
    return scans


def scan_tensor(container: Container, name: str) -> Scan:
    """Decodes every chunk of a tensor and compares the digest of its elements with the record."""
    scan = Scan()
    try:
        tensor = container.tensor(name)
        digest = hashlib.sha256()
        if isinstance(tensor, PlainTensor):
            digest.update(tensor.read())
        else:
            scan.entropy_bits = [0.0] * tensor.table.planes
            for _, elements in blocks_in_source_order(tensor, scan):
                digest.update(np.ascontiguousarray(elements))
            if isinstance(tensor.record, Int8Tensor):
                assert tensor.scales is not None
                digest.update(scales_bytes(tensor))
                _check_scale_range(tensor.record, tensor.scales)
        # With a damaged chunk the digest must differ: a second finding would say nothing new.
        if not scan.faults and digest.hexdigest() != tensor.record.digest:
            error = ChecksumError(
                "decoded tensor differs from its digest",
                got=digest.hexdigest(),
                expected=tensor.record.digest,
            )
            scan.faults.append(error.located(file=tensor.file.name, tensor=name))
    except CodecLLMError as exc:
        scan.faults.append(exc)
    return scan


def blocks_in_source_order(tensor: StoredTensor, scan: Scan) -> Iterator[Block]:
    """Decodes a tensor into blocks that follow each other in row-major order of the elements.

    Args:
        tensor: the tensor.
        scan: receives faults, chunks and entropy. A block with a damaged chunk is left out.

    Yields:
        Where the block lies, and its elements [rows, cols]: codes, int8 or (wide) int16, or
        unsigned words of a lossless tensor's element size. Valid until the next step.
    """
    # Two workspaces: the decoder's scratch of the same type must not be the block that is yielded.
    workspace, output, target = Workspace(), Workspace(), _target(tensor)
    for tiles in plan_jobs(tensor):
        for part, planes in _decoded(tensor, tiles, scan, workspace):
            out = output.scratch(part.rows, part.cols, word_dtype(DTYPES[target]))
            write_tile(tensor, part, planes, out, target, workspace)
            yield part, out.view(f"i{out.itemsize}") if tensor.scales is not None else out


def _decoded(
    tensor: StoredTensor, tiles: range, scan: Scan, workspace: Workspace
) -> Iterator[tuple[Tile, list[NDArray[np.uint8]]]]:
    """Reads a run of tiles at once; yields whole parts, and adds faulty chunks to the scan."""
    planes = tensor.table.planes
    first, last = tiles.start * planes, tiles.stop * planes
    slots = tensor.read_slots(first, last, workspace.slots(tensor.slots_bytes(first, last)))
    run = tensor.decode_run(first, last, slots, first)
    for start in range(tiles.start, tiles.stop, tensor.tiles_together):
        symbols_of_planes = []
        for chunk, symbols in enumerate(islice(run, planes * tensor.tiles_together)):
            # The scan goes on after a fault: the report lists every damaged chunk.
            if isinstance(symbols, FormatError):
                scan.faults.append(symbols)
                continue
            scan.chunks += 1
            scan.entropy_bits[chunk % planes] += estimated_entropy_bits(symbols)
            symbols_of_planes.append(symbols)
        if len(symbols_of_planes) == planes * tensor.tiles_together:
            yield tensor.part(start), join_tiles(tensor, start, iter(symbols_of_planes), workspace)


def _target(tensor: StoredTensor) -> str:
    if isinstance(tensor.record, Int8Tensor):
        return WIDE_CODES if tensor.wide else CODES
    return tensor.record.dtype


def _check_scale_range(record: Int8Tensor, scales: NDArray[np.float32]) -> None:
    if not scales.size:
        return
    got, expected = np.array([scales.min(), scales.max()]), np.array(record.scale_range, np.float32)
    if (got != expected).any():
        error = DecodeError(
            "scales leave the recorded range", got=got.tolist(), expected=record.scale_range
        )
        raise error.located(tensor=record.name)
