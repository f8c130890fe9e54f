"""Compares every kernel with its reference: random data, all codes, golden containers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.device.machine import Machine, Row
from codecllm.formats.codecs import CODEC_IDS, CODECS
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.lossless import split_planes, word_dtype
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tiling import Grid
from codecllm.loader.device.finish import finish_bands, side_arrays, to_device
from codecllm.loader.kernels.assemble import assemble_lossless, can_assemble
from codecllm.loader.kernels.dequantize import dequantize_int8, untile_codes
from codecllm.loader.kernels.int8_linear import Panels, Rows, Tiles, Way, int8_linear
from codecllm.loader.kernels.rans import decode_rans, describe_chunks, expand_tables

_GOLDEN = Path("tests/golden")
_GRIDS = (
    Grid(7, 33, 2, 10),
    Grid(300, 17, 64, 5),
    Grid(64, 4096, 32, 4096),
    Grid(40, 5000, 8, 1250),
    Grid(1, 70000, 1, 70000),
)
_SMALL_ELEMENTS = 3000
_WAYS: tuple[tuple[Way, int], ...] = (
    (Rows(4), 1),
    (Rows(2), 1),
    (Tiles(32, 16, 64, 4, 3), 5),
    (Tiles(64, 64, 64, 4, 3), 70),
    (Tiles(32, 16, 64, 4, 3, 4), 9),
    (Tiles(64, 64, 64, 4, 3, 8), 64),
    (Panels(1 << 20), 70),
)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def in_tiles(matrix: NDArray[np.generic], grid: Grid, device: torch.device) -> torch.Tensor:
    """Returns a matrix of one-byte elements, tile after tile: uint8 [rows * cols] on the device."""
    parts = [
        matrix[t.row : t.row + t.rows, t.col : t.col + t.cols].reshape(-1).view(np.uint8)
        for t in grid
    ]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().view(torch.uint8).numpy().tobytes()


def _same(tensor: torch.Tensor, wanted: NDArray[np.generic] | bytes) -> bool:
    return _bytes_of(tensor) == (wanted if isinstance(wanted, bytes) else wanted.tobytes())


def _assembled(machine: Machine, grid: Grid, name: str, rng: np.random.Generator) -> bool:
    dtype = DTYPES[name]
    words = np.frombuffer(rng.bytes(grid.rows * grid.cols * dtype.itemsize), word_dtype(dtype))
    if name == "BF16" and len(words) > 1 << 16:
        words = words.copy()
        words[: 1 << 16] = np.arange(1 << 16)
    planes = [
        in_tiles(plane.reshape(grid.rows, grid.cols), grid, machine.device)
        for plane in split_planes(words, dtype)
    ]
    out = torch.zeros(grid.rows, grid.cols, dtype=_WORDS[dtype.itemsize], device=machine.device)
    assemble_lossless(planes, grid, dtype, out)
    return _same(out, words)


def _dequantized(
    machine: Machine, grid: Grid, name: str, rng: np.random.Generator, wide: bool, moved: bool
) -> bool:
    """Compares one setting with numpy: float32 products, rounded once."""
    low = rng.integers(-127, 128, (grid.rows, grid.cols)).astype(np.int8)
    high = rng.integers(-127, 128, low.shape).astype(np.int8)
    rows = np.exp(rng.uniform(-87, 70, grid.rows)).astype(np.float32)
    cols = np.exp(rng.uniform(-3, 3, grid.cols)).astype(np.float32) if moved or wide else None
    order = rng.permutation(grid.cols).astype(np.int32) if moved else None
    codes = low.astype(np.float32) + (np.float32(8) * high if wide else 0)
    with np.errstate(over="ignore"):
        steps = rows[:, None] if cols is None else rows[:, None] * cols[None]
        expected = bits_from_float32(codes.astype(np.float32) * steps, name)
    stored_planes = [
        in_tiles(part if order is None else part[:, order], grid, machine.device)
        for part in (low, high)
    ]
    device_planes = [
        None if part is None else torch.from_numpy(part).to(machine.device)
        for part in (rows, cols, order)
    ]
    out = torch.zeros(grid.rows, grid.cols, dtype=_DTYPES[name], device=machine.device)
    low_bits = (
        torch.full((len(grid),), 3, dtype=torch.int32, device=machine.device) if wide else None
    )
    dequantize_int8(
        stored_planes[0],
        stored_planes[1] if wide else None,
        low_bits,
        grid,
        *device_planes,
        "row",
        out,
    )
    codes_out = torch.zeros(grid.rows, grid.cols, dtype=torch.int8, device=machine.device)
    untile_codes(stored_planes[0], grid, codes_out, device_planes[2])
    return _same(out, expected) and _same(codes_out, low)


def _product_error(
    machine: Machine, way, tokens: int, rows: int, cols: int, dtype: torch.dtype
) -> float:  # type: ignore[no-untyped-def]
    inputs = torch.randn(tokens, cols, device=machine.device).to(dtype)
    codes = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device=machine.device)
    scale = torch.rand(rows, device=machine.device) * 1e-2 + 1e-4
    bias = torch.randn(rows, device=machine.device).to(dtype)
    exact = inputs.double() @ (codes.double() * scale.double()[:, None]).T + bias.double()
    product = int8_linear(inputs, codes, scale, bias, way).double()
    return float((product - exact).norm() / exact.norm())


def _symbols(machine: Machine, tensor: StoredTensor) -> list[torch.Tensor]:
    """Decodes the planes of a stored tensor: `rans` by the kernel, others on the host."""
    grid, table = tensor.table.grid, tensor.table
    planes = [torch.empty(grid.rows * grid.cols, dtype=torch.uint8) for _ in range(table.planes)]
    payload = tensor.read_slots(
        0, len(table.records), bytearray(tensor.slots_bytes(0, len(table.records)))
    )
    blob = np.frombuffer(bytes(payload) + bytes(-len(payload) % 16), np.uint8)
    rans_chunks: list[list[tuple[int, int, int, int, int]]] = [[] for _ in planes]
    places = np.concatenate([[0], np.cumsum([tile.symbols for tile in grid])])
    tables = []
    for chunk, record in enumerate(table.records):
        tile, plane = divmod(chunk, table.planes)
        symbols = grid.tile(tile).symbols
        chunk_bytes = tensor.stored_chunk(chunk, payload, 0)
        if int(record["codec"]) == CODEC_IDS["rans"]:
            assert tensor.tables is not None
            slot = tensor.slots_bytes(0, chunk)
            rans_chunks[plane].append(
                (slot, len(chunk_bytes), symbols, int(places[tile]), len(tables))
            )
            tables.append(tensor.tables.table(tile, plane))
        else:
            chunk_symbols = CODECS[int(record["codec"])].decode(chunk_bytes, symbols)
            planes[plane][int(places[tile]) : int(places[tile]) + symbols] = torch.from_numpy(
                np.frombuffer(chunk_symbols, np.uint8).copy()
            )
    device_planes = [plane.to(machine.device) for plane in planes]
    for arena, fields in zip(device_planes, rans_chunks, strict=True):
        if fields:
            chunks = describe_chunks(
                *(np.array(column, np.int64) for column in zip(*fields, strict=True))
            ).to(machine.device)
            faults = torch.full((len(fields),), -1, dtype=torch.int32, device=machine.device)
            stored_there = torch.from_numpy(blob.copy()).to(machine.device)
            decode_rans(stored_there, chunks, expand_tables(tables, machine.device), arena, faults)
            if bool(faults.any()):
                raise RuntimeError(f"{tensor.record.name}: fault {faults.tolist()}")
    return device_planes


def _golden_tensor(machine: Machine, container: Container, name: str) -> bool | None:
    tensor = container.tensor(name)
    if not isinstance(tensor, StoredTensor) or tensor.record.dtype == "BOOL":
        return None
    grid, planes = tensor.table.grid, _symbols(machine, tensor)
    if isinstance(tensor.record, Int8Tensor):
        out = torch.zeros(
            grid.rows, grid.cols, dtype=_DTYPES[tensor.record.dtype], device=machine.device
        )
        sides = to_device(side_arrays(tensor, (0, grid.rows)), machine.device)
        finish_bands(tensor, (0, grid.rows), planes, sides, out)
    else:
        dtype = DTYPES[tensor.record.dtype]
        assert can_assemble(dtype)
        out = torch.zeros(grid.rows, grid.cols, dtype=_WORDS[dtype.itemsize], device=machine.device)
        assemble_lossless(planes, grid, dtype, out)
    return _same(out, read_tensor_bytes(container, name))


def checks(machine: Machine) -> Iterator[Row]:
    """One row per kernel and setting; the value says whether all bits were the reference's."""
    rng = np.random.default_rng(int(np.random.default_rng().integers(1 << 30)))
    grids = _GRIDS if not machine.small else _GRIDS[:2]
    for name in ("BF16", "F16", "F32", "F64", "I8"):
        sound = all(_assembled(machine, grid, name, rng) for grid in grids)
        yield Row(f"assemble {name}", sound, note=f"same bits, {len(grids)} grids")
    for name in _DTYPES:
        for wide, with_columns in ((False, False), (True, False), (False, True), (True, True)):
            what = f"dequantize to {name}{', wide' * wide}{', columns moved' * with_columns}"
            sound = all(
                _dequantized(machine, grid, name, rng, wide, with_columns) for grid in grids
            )
            yield Row(what, sound, note=f"same bits, {len(grids)} grids")
    shapes = ((4096, 4096), (1000, 528), (33, 64)) if not machine.small else ((33, 64),)
    for dtype, most in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        for way, tokens in _WAYS:
            error = max(_product_error(machine, way, tokens, *shape, dtype) for shape in shapes)
            yield Row(
                f"{way} in {dtype}",
                error < most,
                note=f"relative error {error:.1e}, at most {most:.0e}",
            )
    for folder in sorted(path.parent for path in _GOLDEN.glob("v*/*/codecllm.json")):
        with Container(folder) as container:
            records = [
                record
                for record in container.manifest.tensors
                if record.scheme in ("lossless", "int8")
            ]
            names = [
                record.name
                for record in records
                if not machine.small or record.elements < _SMALL_ELEMENTS
            ]
            verdicts = [_golden_tensor(machine, container, name) for name in names]
            tensor_verdicts = [good for good in verdicts if good is not None]
            if tensor_verdicts:
                yield Row(
                    f"golden {folder.parent.name}/{folder.name}",
                    all(tensor_verdicts),
                    note=f"same bits, {len(tensor_verdicts)} tensors",
                )
