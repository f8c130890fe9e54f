"""`make bench`: throughput as a ratio against a floor measured in the same run, and peak memory.

A floor is a bare loop over the same bytes with the same kernels and the same hashes (`benchmarks/floors.py`). Floor and tool
take turns; a ratio is the median over the turns. Ratios are what to compare between machines; seconds and GB/s are not.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import floors
from benchmarks.peak import in_fresh_process
from benchmarks.synthetic import gaussian_model
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.loader import stream_tensors

OUT = Path("benchmarks/out")


class Section(StrEnum):
    """Values of --only."""

    quantizer = "quantizer"
    convert = "convert"
    stream = "stream"
    pretrained = "pretrained"
    memory = "memory"


@dataclass(frozen=True, slots=True)
class Row:
    """One result: what, the figure with its unit, what it was measured against, the goal, and whether it is met."""

    what: str
    figure: str
    against: str
    goal: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure."""

    workers: int
    repeats: int
    convert_mib: int
    stream_gib: int


def main(
    only: Annotated[list[Section] | None, typer.Option(help="Only this section; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(help="Threads of tool and floor.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Turns of floor and tool.", min=1)] = 5,
    convert_mib: Annotated[int, typer.Option(help="Size of the bf16 source to convert.", min=64)] = 512,
    stream_gib: Annotated[int, typer.Option(help="Size of the bf16 source whose container is streamed.", min=1)] = 2,
    keep: Annotated[bool, typer.Option(help="Keep benchmarks/out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the converter and the loader."""
    settings = Settings(workers, repeats, convert_mib, stream_gib)
    chosen = only or list(Section)
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        rows = [row for section in chosen for row in _SECTIONS[section](settings)]
    finally:
        if not keep:
            shutil.rmtree(OUT, ignore_errors=True)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        Console(width=130).print(_table(rows))


def quantizer(settings: Settings) -> Iterator[Row]:
    """The int8 quantizer alone, one core, weights in memory."""
    millions = (1 << 24) / 1e6
    ours, theirs = _turns(settings.repeats, floors.quantize_seconds, floors.whole_tensor_quantize_seconds)
    speed = millions / statistics.median(ours)
    against = f"whole-tensor torch expressions: {millions / statistics.median(theirs):.0f} M, ours {_ratio(theirs, ours):.1f}x"
    yield Row("int8 quantizer, one core", f"{speed:.0f} M weights/s", against, ">= 200 M", speed >= 200)


def conversion(settings: Settings) -> Iterator[Row]:
    """Conversion against the bare loop."""
    tensors = max(1, settings.convert_mib // 64)
    source = gaussian_model(4096, 8192, tensors=tensors)
    scratch, out = OUT / "floor.bin", OUT / "converted"
    floor, tool = _turns(
        settings.repeats,
        lambda: floors.convert_floor(source, scratch, settings.workers),
        lambda: convert(source, out, workers=settings.workers, force=True).seconds,
    )
    speed, ratio = tensors * 64 * 2**20 / statistics.median(tool) / 1e9, _ratio(floor, tool)
    yield Row(
        f"convert to int8, {tensors * 64} MiB of bf16",
        f"{ratio:.2f} of the floor",
        f"read, quantize, zstd, hash, write, read again: {statistics.median(floor):.2f} s ({speed:.2f} GB/s converted)",
        ">= 0.6",
        ratio >= 0.6,
    )


def stream(settings: Settings) -> Iterator[Row]:
    """Container to finished tensors against the bare loop."""
    for scheme in ("int8", "lossless"):
        out = OUT / f"stream-{scheme}"
        tensors = settings.stream_gib * 8
        convert(gaussian_model(8192, 8192, tensors=tensors), out, scheme=scheme, force=True)
        floor, arithmetic, tool = _turns(
            settings.repeats,
            lambda out=out: floors.load_floor(out, settings.workers),
            lambda out=out: floors.load_floor(out, settings.workers, keep=False),
            lambda out=out: _stream_seconds(out, settings.workers),
        )
        speed, ratio = settings.stream_gib * 2**30 / statistics.median(tool) / 1e9, _ratio(floor, tool)
        yield Row(
            f"stream {scheme}, {settings.stream_gib} GiB of bf16",
            f"{ratio:.2f} of the floor",
            f"read, hash, zstd, bf16 in memory: {statistics.median(floor):.2f} s ({speed:.2f} GB/s of bf16 streamed); "
            f"{_ratio(arithmetic, tool):.2f} of its arithmetic alone",
            ">= 0.7",
            ratio >= 0.7,
        )
        shutil.rmtree(out)


def pretrained(settings: Settings) -> Iterator[Row]:
    """`from_pretrained` of SmolLM2, imports excluded, beside plain transformers."""
    from demo.models import smollm2

    source = smollm2()
    plain = statistics.median(in_fresh_process("load_plain", source)["seconds"] for _ in range(3))
    for scheme, residents in (("int8", ("dense", "int8")), ("lossless", ("dense",))):
        out = OUT / f"smollm2-{scheme}"
        convert(source, out, scheme=scheme, force=True)
        for resident in residents:
            figures = [in_fresh_process("load", out, resident, settings.workers) for _ in range(3)]
            seconds = statistics.median(figure["seconds"] for figure in figures)
            memory = max(figure["mib"] for figure in figures)
            against = f"plain transformers, weights touched: {plain:.2f} s ({seconds / plain:.1f}x its time)"
            what = f"from_pretrained SmolLM2 {scheme}, {resident}"
            yield Row(what, f"{seconds:.2f} s", against, "reported", None)
            model_mib = figures[0]["model_mib"]
            against = f"over imports and model ({model_mib:.0f} MiB)"
            yield Row(f"{what}: peak memory", f"{memory:.0f} MiB", against, "<= 512 MiB", memory <= 512)
        shutil.rmtree(out)


def memory(settings: Settings) -> Iterator[Row]:
    """Peak memory of converting a small and a huge tensor, and of streaming the huge one."""
    peaks = []
    out = OUT / "memory"
    for label, rows in (("64 MiB", 4096), ("2 GiB", 131_072)):
        peaks.append(in_fresh_process("convert", gaussian_model(rows, 8192), out, settings.workers)["mib"])
        what, peak = f"convert one tensor of {label}: peak memory", f"{peaks[-1]:.0f} MiB"
        yield Row(what, peak, "over imports", "<= 640 MiB", peaks[-1] <= 640)
    apart = abs(peaks[0] - peaks[1])
    yield Row("the two apart", f"{apart:.0f} MiB", "", "<= 32 MiB", apart <= 32)
    figures = in_fresh_process("stream", out, settings.workers)
    over = figures["mib"] - figures["largest_mib"]
    yield Row(
        "stream the 2 GiB tensor: peak memory", f"{over:.0f} MiB", "over imports and the tensor", "<= 512 MiB", over <= 512
    )


def _turns(repeats: int, *works: Callable[[], float]) -> list[list[float]]:
    """Runs the works in turns, once to warm up and then `repeats` times; returns the seconds of each work, by turn."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for taken, work in zip(seconds, works, strict=True):
            taken.append(work())
    return seconds


def _ratio(floor: list[float], tool: list[float]) -> float:
    """Returns the median over the turns of floor / tool."""
    return statistics.median(a / b for a, b in zip(floor, tool, strict=True))


def _stream_seconds(container: Path, workers: int) -> float:
    started = time.perf_counter()
    with Container(container) as opened:
        for _ in stream_tensors(opened, workers=workers):
            pass
    return time.perf_counter() - started


def _table(rows: list[Row]) -> Table:
    table = Table(title="Measured against floors of the same run")
    for name in ("what", "figure", "measured against", "goal", ""):
        table.add_column(name)
    for row in rows:
        mark = "" if row.met is None else "met" if row.met else "MISSED"
        table.add_row(row.what, row.figure, row.against, row.goal, mark)
    return table


_SECTIONS: dict[Section, Callable[[Settings], Iterator[Row]]] = {
    Section.quantizer: quantizer,
    Section.convert: conversion,
    Section.stream: stream,
    Section.pretrained: pretrained,
    Section.memory: memory,
}

if __name__ == "__main__":
    typer.run(main)
