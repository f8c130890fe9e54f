"""How convert and CPU load scale with workers, each beside its floor measured in the same run.

    python -m benchmarks.scaling                                  # 0.2 GB of source, a minute
    python -m benchmarks.scaling --hidden 4096 --layers 9 --workers 1,2,4,8,16   # 4 GB, 16 cores
    python -m benchmarks.scaling --work convert --codecs zstd --repeat 1

The floor of a conversion is a bare loop in as many threads: read, quantize or split, pack, sha256
of the digest's bytes, xxh3 of every slot, write, and sha256 of each shard, by the thread that wrote
its last byte. The floor of a load reads every run of tiles, checks, decodes and places it. Both use
the kernels of the program, which work without the interpreter's lock; nothing is ordered or
reported, and digests are not bound to the order of a tensor's runs.

CPU is the processor time in seconds a GB of source, of the program and of its floor: where both
grow with the workers, these share cores; where the program's grows alone, they wait for each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.synthetic import layered_model
from codecllm.converter import convert
from codecllm.converter.encode.blocks import Block, runs_of
from codecllm.converter.encode.buffers import Buffers
from codecllm.converter.encode.encoding import encode_block
from codecllm.converter.options import ConvertOptions
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.source import SourceModel
from codecllm.formats.checksums import sha256_of_descriptor
from codecllm.formats.codecs import native
from codecllm.formats.container import Container
from codecllm.formats.machine import cores
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tile_run import decode_run
from codecllm.loader.stream import stream_tensors

SHARD_BYTES = 250_000_000
"""Bytes of a shard: the sha256 of one file is one thread's work, several run side by side."""

RUN_SYMBOLS = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: GB of bf16 source a second, the best of the repetitions.

    And the least processor time, in seconds a GB, of the program and of its floor.
    """

    scheme: str
    codec: str
    work: str
    workers: int
    speed: float
    floor: float
    cpu: float
    floor_cpu: float


def run_in_threads(workers: int, items: Iterable[Any], work: Callable[[Any], None]) -> None:
    """Runs `work` on all items in threads that take the next one as they become free."""
    source, lock, failures = iter(items), threading.Lock(), []

    def loop() -> None:
        try:
            while not failures:
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=loop) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class _FloorShard:
    """A file of a floor: blocks are written in any order, the last one's thread hashes it."""

    def __init__(self, path: Path, plans: list[TensorPlan]) -> None:
        self.items = [(self, plan, block) for plan in plans for block in runs_of(plan)]
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._lock = threading.Lock()
        self._end, self._left = 0, len(self.items)

    def write(self, data: Any) -> None:
        """Writes a block behind those that others write meanwhile."""
        with self._lock:
            offset = self._end
            self._end += len(data)
        os.pwrite(self._descriptor, data, offset)
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            sha256_of_descriptor(self._descriptor)
            os.close(self._descriptor)


def convert_floor(source: Path, scratch: Path, scheme: str, codec: str, workers: int) -> float:
    """Returns the seconds of the bare loop of a conversion."""
    buffers = Buffers()
    start = time.perf_counter()
    options = ConvertOptions(
        scheme=scheme,  # type: ignore[arg-type]
        codec=codec,  # type: ignore[arg-type]
        max_shard_bytes=SHARD_BYTES,
    )
    with SourceModel(source) as model:
        shards = [
            _FloorShard(scratch / f"floor-{number}", plans)
            for number, plans in enumerate(plan_conversion(model, options).shards)
        ]

        def one(item: tuple[_FloorShard, TensorPlan, Block]) -> None:
            shard, plan, block = item
            encoded_block = encode_block(plan, block, None, buffers)
            hashlib.sha256(encoded_block.digested)
            assert encoded_block.chunks is not None
            assert encoded_block.memory is not None
            shard.write(encoded_block.chunks.slots)
            buffers.give(encoded_block.memory)
            if encoded_block.chunks.memory is not None:
                buffers.give(encoded_block.chunks.memory)

        run_in_threads(workers, (item for shard in shards for item in shard.items), one)
    return time.perf_counter() - start


def load_floor(folder: Path, workers: int) -> float:
    """Returns the seconds of the bare loop of a load."""
    memory = threading.local()
    with Container(folder) as container:
        start = time.perf_counter()
        tensors = [container.tensor(name) for name in container.records]

        def one(item: tuple[StoredTensor, range, Any]) -> None:
            tensor, tiles, out = item
            planes = tensor.table.planes
            first, last = tiles.start * planes, tiles.stop * planes
            size = tensor.slots_bytes(first, last)
            if getattr(memory, "size", 0) < size:
                memory.size, memory.data = size, bytearray(size)
            slots = tensor.read_slots(first, last, memory.data)
            decode_run(tensor, tiles, out, "BF16", slots)

        run_in_threads(workers, _runs(tensors), one)
        return time.perf_counter() - start


def _runs(tensors: list[Any]) -> Iterator[tuple[StoredTensor, range, Any]]:
    for tensor in tensors:
        if not isinstance(tensor, StoredTensor):
            continue
        grid = tensor.table.grid
        out = np.empty((grid.rows, grid.cols), np.uint16)
        tile = min(grid.tile_rows, grid.rows) * min(grid.tile_cols, grid.cols)
        step = max(1, RUN_SYMBOLS // tile // grid.across) * grid.across
        for first in range(0, len(grid), step):
            yield tensor, range(first, min(first + step, len(grid))), out


def load_seconds(folder: Path, workers: int) -> float:
    """Returns the seconds until every tensor is decoded and kept."""
    with Container(folder) as container:
        start = time.perf_counter()
        tensors = [tensor for _, tensor in stream_tensors(container, workers=workers)]
        seconds = time.perf_counter() - start
    assert tensors
    return seconds


def convert_seconds(source: Path, out: Path, scheme: str, codec: str, workers: int) -> float:
    """Returns the seconds of a conversion into a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    convert(
        source,
        out,
        scheme=scheme,  # type: ignore[arg-type]
        codec=codec,  # type: ignore[arg-type]
        workers=workers,
        max_shard_bytes=SHARD_BYTES,
    )
    return time.perf_counter() - start


def _timed(work: Callable[[], float]) -> tuple[float, float]:
    """Returns the seconds that `work` returns, and the processor time that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def measure(
    source: Path,
    scratch: Path,
    schemes: list[str],
    codecs: list[str],
    work: list[str],
    workers: list[int],
    repeat: int,
) -> Iterator[Row]:
    """Yields the rows; a measurement and its floor alternate."""
    gigabytes = (source / "model.safetensors").stat().st_size / 1e9
    for scheme in schemes:
        for codec in codecs:
            out = scratch / f"{scheme}-{codec}"
            for kind in work:
                for count in workers:
                    if kind == "load" and not out.exists():
                        convert_seconds(source, out, scheme, codec, max(workers))
                    best = [
                        _once(kind, source, scratch, out, scheme, codec, count)
                        for _ in range(repeat)
                    ]
                    seconds, cpu, floor, floor_cpu = map(min, zip(*best, strict=True))
                    yield Row(
                        scheme,
                        codec,
                        kind,
                        count,
                        gigabytes / seconds,
                        gigabytes / floor,
                        cpu / gigabytes,
                        floor_cpu / gigabytes,
                    )
            shutil.rmtree(out, ignore_errors=True)


def _once(
    kind: str, source: Path, scratch: Path, out: Path, scheme: str, codec: str, workers: int
) -> tuple[float, float, float, float]:
    """Returns seconds and processor time of a conversion or a load, and those of its floor."""
    if kind == "load":
        done = _timed(lambda: load_seconds(out, workers))
        return *done, *_timed(lambda: load_floor(out, workers))
    done = _timed(lambda: convert_seconds(source, out, scheme, codec, workers))
    return *done, *_timed(lambda: convert_floor(source, scratch, scheme, codec, workers))


def print_row(row: Row) -> None:
    """Prints a line of the table."""
    share = row.speed / row.floor
    print(
        f"{row.work:8} {row.scheme:9} {row.codec:5} {row.workers:8} {row.speed:8.2f} "
        f"{row.floor:8.2f} {share:8.2f} {row.cpu:8.2f} {row.floor_cpu:8.2f}",
        flush=True,
    )


def plot(rows: list[Row], path: Path) -> None:
    """Draws speed and floor over workers, one panel for each scheme and work."""
    from matplotlib.figure import Figure

    panels = sorted({(row.work, row.scheme) for row in rows})
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (work, scheme) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for number, codec in enumerate(sorted({row.codec for row in rows})):
            tool_speeds = [
                row for row in rows if (row.work, row.scheme, row.codec) == (work, scheme, codec)
            ]
            counts = [row.workers for row in tool_speeds]
            axes.plot(counts, [row.speed for row in tool_speeds], f"C{number}o-", label=codec)
            axes.plot(
                counts, [row.floor for row in tool_speeds], f"C{number}:", label=f"{codec}, floor"
            )
        axes.set(title=f"{work}, {scheme}", xlabel="workers", ylabel="GB/s of bf16", ylim=(0, None))
        axes.legend(fontsize=7)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model (8B: 4096)")
    parser.add_argument(
        "--layers", type=int, default=8, help="its layers; 8B-shaped ones have 436 MB"
    )
    parser.add_argument(
        "--workers", help="numbers of workers, by commas; default 1, 2, 4, ... cores"
    )
    parser.add_argument("--schemes", default="int8,lossless")
    parser.add_argument("--codecs", default="zstd,rans")
    parser.add_argument("--work", default="convert,load")
    parser.add_argument(
        "--repeat", type=int, default=3, help="repetitions, of which the best counts"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for what is written (default: temporary)"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="file for a plot (.svg, .png)")
    options = parser.parse_args(arguments)
    workers = [1 << step for step in range(cores().bit_length())]
    if options.workers:
        workers = [int(count) for count in options.workers.split(",")]
    source = layered_model(options.hidden, options.layers)
    print(f"{cores()} cores, {native.describe()}, source {source}")
    print("work     scheme    codec  workers     GB/s    floor    share CPU s/GB    floor")
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for row in measure(
            source,
            Path(scratch),
            options.schemes.split(","),
            options.codecs.split(","),
            options.work.split(","),
            workers,
            options.repeat,
        ):
            print_row(row)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
