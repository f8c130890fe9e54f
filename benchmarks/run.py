"""`make bench`: throughput as a ratio against a floor measured in the same run, and peak memory.

A floor is a bare loop over the same bytes with the same kernels and the same hashes
(`benchmarks/measure/floors.py`). Floor and tool take turns; a ratio is the median over the turns.
Compare ratios between machines, never seconds or GB/s.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.int8_matmul import int8_matmul
from benchmarks.measure import floors
from benchmarks.measure.rows import OUT, Row, Settings, ratio, table, turns
from benchmarks.measure.synthetic import gaussian_model
from benchmarks.peak import in_fresh_process
from benchmarks.pretrained import pretrained, resident
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.loader import stream_tensors


class Section(StrEnum):
    """Values of --only."""

    quantizer = "quantizer"
    convert = "convert"
    stream = "stream"
    pretrained = "pretrained"
    resident = "resident"
    int8_matmul = "int8_matmul"
    memory = "memory"


def main(
    only: Annotated[
        list[Section] | None, typer.Option(help="Only this section; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads of tool and floor.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Turns of floor and tool.", min=1)] = 5,
    convert_mib: Annotated[
        int, typer.Option(help="Size of the bf16 source to convert.", min=64)
    ] = 512,
    stream_gib: Annotated[
        int, typer.Option(help="Size of the bf16 source whose container is streamed.", min=1)
    ] = 2,
    keep: Annotated[bool, typer.Option(help="Keep benchmarks/out/run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the converter and the loader."""
    settings = Settings(workers, repeats, convert_mib, stream_gib)
    sections = only or list(Section)
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        rows = [row for section in sections for row in _SECTIONS[section](settings)]
    finally:
        if not keep:
            shutil.rmtree(OUT, ignore_errors=True)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        Console(width=130).print(table(rows))


def quantizer(settings: Settings) -> Iterator[Row]:
    """The int8 quantizer alone, one core, weights in memory."""
    millions = (1 << 24) / 1e6
    ours, theirs = turns(
        settings.repeats, floors.quantize_seconds, floors.whole_tensor_quantize_seconds
    )
    speed = millions / statistics.median(ours)
    against = (
        f"whole-tensor torch expressions: {millions / statistics.median(theirs):.0f} M, "
        f"ours {ratio(theirs, ours):.1f}x"
    )
    numbers = {"seconds": ours, "torch_seconds": theirs}
    yield Row(
        "int8 quantizer, one core",
        f"{speed:.0f} M weights/s",
        against,
        ">= 200 M",
        speed >= 200,
        numbers,
    )


def conversion(settings: Settings) -> Iterator[Row]:
    """Conversion against the bare loop."""
    tensors = max(1, settings.convert_mib // 64)
    source = gaussian_model(4096, 8192, tensors=tensors)
    scratch, out = OUT / "floor.bin", OUT / "converted"
    floor, tool = turns(
        settings.repeats,
        lambda: floors.convert_floor(source, scratch, settings.workers),
        lambda: convert(source, out, workers=settings.workers, force=True).seconds,
    )
    speed, share = tensors * 64 * 2**20 / statistics.median(tool) / 1e9, ratio(floor, tool)
    yield Row(
        f"convert to int8, {tensors * 64} MiB of bf16",
        f"{share:.2f} of the floor",
        f"read, quantize, zstd, hash, write, read again: {statistics.median(floor):.2f} s "
        f"({speed:.2f} GB/s converted)",
        ">= 0.6",
        share >= 0.6,
        {"seconds": tool, "floor_seconds": floor},
    )


def stream(settings: Settings) -> Iterator[Row]:
    """Container to finished tensors against the bare loop."""
    for scheme in ("int8", "lossless"):
        out = OUT / f"stream-{scheme}"
        tensors = settings.stream_gib * 8
        convert(gaussian_model(8192, 8192, tensors=tensors), out, scheme=scheme, force=True)
        floor, arithmetic, tool = turns(
            settings.repeats,
            lambda out=out: floors.load_floor(out, settings.workers),
            lambda out=out: floors.load_floor(out, settings.workers, keep=False),
            lambda out=out: _stream_seconds(out, settings.workers),
        )
        speed, share = (
            settings.stream_gib * 2**30 / statistics.median(tool) / 1e9,
            ratio(floor, tool),
        )
        yield Row(
            f"stream {scheme}, {settings.stream_gib} GiB of bf16",
            f"{share:.2f} of the floor",
            f"read, hash, zstd, bf16 in memory: {statistics.median(floor):.2f} s "
            f"({speed:.2f} GB/s of bf16 streamed); "
            f"{ratio(arithmetic, tool):.2f} of its arithmetic alone",
            ">= 0.7",
            share >= 0.7,
            {"seconds": tool, "floor_seconds": floor, "arithmetic_seconds": arithmetic},
        )
        shutil.rmtree(out)


def memory(settings: Settings) -> Iterator[Row]:
    """Peak memory of converting a small and a huge tensor, and of streaming the huge one."""
    peaks = []
    out = OUT / "memory"
    for label, rows in (("64 MiB", 4096), ("2 GiB", 131_072)):
        peaks.append(
            in_fresh_process("convert", gaussian_model(rows, 8192), out, settings.workers)["mib"]
        )
        what, peak = f"convert one tensor of {label}: peak memory", f"{peaks[-1]:.0f} MiB"
        yield Row(what, peak, "over imports", "<= 640 MiB", peaks[-1] <= 640)
    distance_mib = abs(peaks[0] - peaks[1])
    yield Row("the two apart", f"{distance_mib:.0f} MiB", "", "<= 32 MiB", distance_mib <= 32)
    figures = in_fresh_process("stream", out, settings.workers)
    over = figures["mib"] - figures["largest_mib"]
    yield Row(
        "stream the 2 GiB tensor: peak memory",
        f"{over:.0f} MiB",
        "over imports and the tensor",
        "<= 512 MiB",
        over <= 512,
    )


def _stream_seconds(container: Path, workers: int) -> float:
    start = time.perf_counter()
    with Container(container) as opened_container:
        for _ in stream_tensors(opened_container, workers=workers):
            pass
    return time.perf_counter() - start


_SECTIONS: dict[Section, Callable[[Settings], Iterator[Row]]] = {
    Section.quantizer: quantizer,
    Section.convert: conversion,
    Section.stream: stream,
    Section.pretrained: pretrained,
    Section.resident: resident,
    Section.int8_matmul: int8_matmul,
    Section.memory: memory,
}

if __name__ == "__main__":
    typer.run(main)
