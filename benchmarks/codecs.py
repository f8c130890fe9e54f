"""`python -m benchmarks.codecs`: size and speed of `rans` and `zstd`, against order-0 entropy.

Symbols are Gaussian codes as `int8` makes them, at entropies from 1.5 to 7.5 bits, and the byte
planes of MiniLM in bf16. Groups of about a million symbols share a `rans` table, as the converter
forms them; tables, states and the padding of slots are counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from codecllm.converter.encode.planes import split_tiles
from codecllm.converter.source.source import SourceModel
from codecllm.formats.codecs import CODEC_IDS, CODECS, rans
from codecllm.formats.codecs.entropy import entropy_bits
from codecllm.formats.codecs.rans_fit import fit_table
from codecllm.formats.codecs.rans_table import pack_table
from codecllm.formats.shards.chunk_table import slot_bytes
from demo import models

ENTROPIES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5)
CHUNKS = (1 << 16, 1 << 17)
GROUP_SYMBOLS = 1 << 20
SIZE_BYTES = 2  # what X_tables spends on a table beside the table itself


@dataclass(frozen=True, slots=True)
class Row:
    """Results for one kind of symbols and one chunk size, in bits a symbol and MB/s of symbols.

    Attributes:
        symbols: name of the coded symbols.
        chunk_kib: symbols of a chunk / 1024.
        group_entropy: order-0 entropy of the symbols that share a table, averaged over groups.
        chunk_entropy: order-0 entropy of single chunks, averaged: the limit of a table per chunk
            without its cost.
        rans, zstd: stored bits.
        precision: of the tables, the largest.
        rans_encode, rans_decode, zstd_encode, zstd_decode: one thread.
    """

    symbols: str
    chunk_kib: int
    group_entropy: float
    chunk_entropy: float
    rans: float
    zstd: float
    precision: int
    rans_encode: float
    rans_decode: float
    zstd_encode: float
    zstd_decode: float


def gaussian_codes(bits: float, count: int) -> NDArray[np.uint8]:
    """Returns int8 codes (uint8 [count]) of rounded N(0, s); s makes their entropy about `bits`."""
    rng = np.random.default_rng(round(100 * bits))
    values = rng.standard_normal(count, dtype=np.float32)
    low, high = 0.1, 127.0
    for _ in range(40):
        sigma = (low * high) ** 0.5
        low, high = (sigma, high) if _rounded_entropy(sigma) < bits else (low, sigma)
    return np.clip(np.rint(values * sigma), -127, 127).astype(np.int8).view(np.uint8)


def _rounded_entropy(sigma: float) -> float:
    """Entropy in bits of N(0, sigma) rounded to integers and clipped to [-127, 127]."""
    grid = np.arange(-127 * 64, 127 * 64 + 64) / 64 - 0.5 + 1 / 128
    density = np.exp(-0.5 * (grid / sigma) ** 2).reshape(-1, 64).sum(axis=1)
    chance = density / density.sum()
    chance = chance[chance > 0]
    return float(-(chance * np.log2(chance)).sum())


def minilm_planes() -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yields both byte planes of MiniLM's bf16 matrices, one after another."""
    with SourceModel(models.minilm_bf16()) as model:
        matrices = [
            tensor
            for tensor in model.tensors.values()
            if tensor.dtype.name == "BF16" and len(tensor.shape) == 2
        ]
        planes: list[list[NDArray[np.uint8]]] = [[], []]
        for tensor in matrices:
            words = np.frombuffer(tensor.read_bytes(0, tensor.entry.bytes), np.uint16)
            symbols = np.empty(words.nbytes, np.uint8)
            split = split_tiles(words, tensor.dtype, words.size, symbols).reshape(2, -1)
            for plane, part in zip(planes, split, strict=True):
                plane.append(part)
    for name, parts in zip(
        ("MiniLM bf16 exponent", "MiniLM bf16 sign, mantissa"), planes, strict=True
    ):
        yield name, np.concatenate(parts)


def measure(name: str, symbols: NDArray[np.uint8], chunk: int) -> Row:
    """Codes symbols (uint8 [n]) in chunks, checks the decoded ones; returns sizes and speeds."""
    groups = [
        symbols[start : start + GROUP_SYMBOLS] for start in range(0, len(symbols), GROUP_SYMBOLS)
    ]
    tables = [fit_table(np.bincount(group, minlength=256)) for group in groups]
    raw_chunks = [
        rans.Uncoded(group[start : start + chunk], table)
        for group, table in zip(groups, tables, strict=True)
        for start in range(0, len(group), chunk)
    ]
    encoded_chunks, encode_s = _timed(lambda: rans.encode_chunks(raw_chunks))
    coded_chunks = [
        rans.Coded(data, len(part.symbols), part.table)
        for data, part in zip(encoded_chunks, raw_chunks, strict=True)
    ]
    decoded_chunks, decode_s = _timed(lambda: rans.decode_chunks(coded_chunks))
    zstd = CODECS[CODEC_IDS["zstd"]]
    frames, zstd_encode_s = _timed(lambda: [zstd.encode(part.symbols) for part in raw_chunks])
    plain, zstd_decode_s = _timed(
        lambda: [
            zstd.decode(frame, len(part.symbols))
            for frame, part in zip(frames, raw_chunks, strict=True)
        ]
    )
    for got, frame, part in zip(decoded_chunks, plain, raw_chunks, strict=True):
        if (
            isinstance(got, Exception)
            or not np.array_equal(got, part.symbols)
            or bytes(frame) != part.symbols.tobytes()
        ):
            raise RuntimeError(f"{name}: a chunk did not come back")
    table_bytes = sum(len(pack_table(table)) + SIZE_BYTES for table in tables)
    speeds = [
        len(symbols) / seconds / 1e6
        for seconds in (encode_s, decode_s, zstd_encode_s, zstd_decode_s)
    ]
    return Row(
        name,
        chunk >> 10,
        sum(entropy_bits(group) for group in groups) / len(symbols),
        sum(entropy_bits(part.symbols) for part in raw_chunks) / len(symbols),
        8 * (sum(slot_bytes(len(data)) for data in encoded_chunks) + table_bytes) / len(symbols),
        8 * sum(slot_bytes(len(frame)) for frame in frames) / len(symbols),
        max(table.precision for table in tables),
        *speeds,
    )


def _timed(work):  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main(
    mib: Annotated[int, typer.Option(help="Gaussian symbols per entropy, in MiB.", min=1)] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list instead of a table.")
    ] = False,
) -> None:
    """Measures all kinds of symbols at both chunk sizes."""
    kinds = [(f"Gaussian int8, {bits} bits", gaussian_codes(bits, mib << 20)) for bits in ENTROPIES]
    rows = [
        measure(name, symbols, chunk)
        for name, symbols in (*kinds, *minilm_planes())
        for chunk in CHUNKS
    ]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "symbols",
        "KiB",
        "entropy",
        "rans",
        "over",
        "zstd",
        "over",
        "bits",
        "rans enc, dec",
        "zstd enc, dec",
    ):
        table.add_column(column, justify="left" if column == "symbols" else "right")
    for row in rows:
        over, zstd_over = (f"{value - row.group_entropy:+.3f}" for value in (row.rans, row.zstd))
        speeds = (
            f"{row.rans_encode:.0f}, {row.rans_decode:.0f}",
            f"{row.zstd_encode:.0f}, {row.zstd_decode:.0f}",
        )
        sizes = (
            f"{row.group_entropy:.3f}",
            f"{row.rans:.3f}",
            over,
            f"{row.zstd:.3f}",
            zstd_over,
            str(row.precision),
        )
        table.add_row(row.symbols, str(row.chunk_kib), *sizes, *speeds)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
