"""Speed of the native core a core, by kernels: rANS both ways, checksums, and whole runs of tiles.

    python -m benchmarks.native_core

CPU time of one thread, best of nine; symbols are 16 chunks of 128 Ki of a Gaussian's rounded
values.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure.synthetic import layered_model
from codecllm.converter import convert
from codecllm.formats.codecs import native
from codecllm.formats.codecs.entropy import symbol_counts
from codecllm.formats.codecs.rans_fit import fit_table
from codecllm.formats.container import Container
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tile_run import decode_run

CHUNK, CHUNKS = 1 << 17, 16
RUN_SYMBOLS = 1 << 20


def megabytes_a_second(work: Callable[[], None], size: int) -> float:
    """Returns MB of CPU time a second, the best of nine."""
    best = math.inf
    for _ in range(9):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return size / best / 1e6


def gaussian_symbols(bits: float) -> NDArray[np.uint8]:
    """Returns uint8 [CHUNKS, CHUNK] symbols of about that entropy."""
    sigma = 2**bits / math.sqrt(2 * math.pi * math.e)
    codes = np.random.default_rng(0).normal(0, sigma, (CHUNKS, CHUNK)).round().clip(-127, 127)
    return codes.astype(np.int8).view(np.uint8)


def encode_all(symbols: NDArray[np.uint8], frequencies: NDArray[np.uint16], precision: int) -> None:
    """Encodes every chunk, uint8 [CHUNKS, CHUNK]."""
    for chunk in symbols:
        native.core.rans_encode(chunk, frequencies, precision)


def decode_all(stored: list[bytes], frequencies: NDArray[np.uint16], precision: int) -> None:
    """Decodes every chunk into the same memory."""
    out = np.empty(CHUNK, np.uint8)
    for chunk in stored:
        assert native.core.rans_decode(chunk, frequencies, precision, out)


def check_all(slot: NDArray[np.uint8], times: int) -> None:
    """Hashes a slot some times."""
    for _ in range(times):
        native.core.xxh3(slot)


def print_kernels(kernels: str) -> None:
    """Prints the speeds with one set of kernels."""
    core = native.core
    assert core is not None
    core.use(kernels)
    for bits in (7.1, 4.0, 2.6):
        symbols = gaussian_symbols(bits)
        table = fit_table(symbol_counts(symbols.reshape(-1)))
        frequencies = table.frequencies.astype(np.uint16)
        payloads = [core.rans_encode(chunk, frequencies, table.precision) for chunk in symbols]
        encode = partial(encode_all, symbols, frequencies, table.precision)
        decode = partial(decode_all, payloads, frequencies, table.precision)
        print(
            f"{kernels:9} rans {bits} bits, precision {table.precision}: "
            f"encode {megabytes_a_second(encode, symbols.size):5.0f} MB/s, "
            f"decode {megabytes_a_second(decode, symbols.size):5.0f} MB/s",
            flush=True,
        )
    slot = gaussian_symbols(7.1).reshape(-1)[:CHUNK]
    speed = megabytes_a_second(partial(check_all, slot, 64), 64 * CHUNK)
    print(f"{kernels:9} xxh3 of slots: {speed / 1000:.1f} GB/s", flush=True)


def print_runs() -> None:
    """Prints the speed of whole runs of tiles, from slots in memory to bf16 weights."""
    source = layered_model(1024, 1)
    for scheme in ("int8", "lossless"):
        for codec in ("zstd", "rans"):
            with tempfile.TemporaryDirectory() as folder:
                convert(source, Path(folder) / "out", scheme=scheme, codec=codec)
                with Container(Path(folder) / "out") as container:
                    tensor = container.tensor("model.layers.0.mlp.up_proj.weight")
                    assert isinstance(tensor, StoredTensor)
                    speed = _run_speed(tensor)
            print(f"{'':9} run, {scheme}, {codec}: {speed / 1000:.2f} GB/s of bf16", flush=True)


def _run_speed(tensor: StoredTensor) -> float:
    grid, planes = tensor.table.grid, tensor.table.planes
    out = np.empty((grid.rows, grid.cols), np.uint16)
    step = RUN_SYMBOLS // (grid.tile_rows * grid.tile_cols)
    runs = []
    for first in range(0, len(grid), step):
        tiles = range(first, min(first + step, len(grid)))
        size = tensor.slots_bytes(tiles.start * planes, tiles.stop * planes)
        slots = tensor.read_slots(tiles.start * planes, tiles.stop * planes, bytearray(size))
        runs.append((tiles, slots))

    def decode() -> None:
        for tiles, slots in runs:
            decode_run(tensor, tiles, out, "BF16", slots)

    return megabytes_a_second(decode, out.nbytes)


def main() -> None:
    """Prints the speeds of every set of kernels that this machine can run."""
    if native.core is None:
        raise SystemExit(f"native core: {native.describe()}")
    for kernels in reversed(native.core.kernels()):
        print_kernels(kernels)
        print_runs()


if __name__ == "__main__":
    main()
