"""`from_pretrained` of a real model beside plain transformers and other tools, per residency.

Every figure is from a process of its own; imports are not counted, and times are taken with free
memory that was in use just before: pages that a virtual machine's host has to supply first cost
every loader the same, and at times more than the load. The weights are SmolLM2-135M-Instruct with
synthetic low bits (demo/models.py), so that lossless coders meet the entropy of a model trained in
bf16.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure.rows import OUT, Row, Settings, ratio
from benchmarks.others import peers
from benchmarks.peak import in_fresh_process
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.stored_tensor import StoredTensor
from demo.models import smollm2_realistic

_WAYS = (
    ("lossless", "dense"),
    ("int8", "dense"),
    ("int8", "int8"),
    ("lossless", "compressed"),
    ("int8", "compressed"),
)


def pretrained(settings: Settings) -> Iterator[Row]:
    """Time and memory of loading, all ways taking turns."""
    source = smollm2_realistic()
    containers = _containers(source)
    works: dict[str, tuple[object, ...]] = {"plain": ("load_plain", source)}
    works |= {
        f"{scheme} floor": ("load_floor", folder, settings.workers)
        for scheme, folder in containers.items()
    }
    works["floor of one"] = ("load_floor", containers["lossless"], 1)
    for scheme, resident in _WAYS:
        works[f"{scheme}, {resident}"] = ("load", containers[scheme], resident, settings.workers)
        if resident == "dense":
            works[f"{scheme}, cold"] = ("load_cold", containers[scheme], resident, settings.workers)
    sizes = {name: peers.MAKERS[name](source, OUT / name) for name in peers.installed()}
    works |= {name: ("load_peer", name, source, OUT / name) for name in sizes}
    peaks: dict[str, dict[str, float]] = {}
    for name, (work, *arguments) in works.items():  # warms the page cache up as well
        peaks[name] = in_fresh_process("load_peak" if work == "load" else work, *arguments)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for _ in range(settings.repeats):
        for name, work in works.items():
            figures[name].append(in_fresh_process(*work))
    seconds = {
        name: [figure["seconds"] for figure in turn_figures]
        for name, turn_figures in figures.items()
    }
    for scheme, resident in _WAYS:
        name = f"{scheme}, {resident}"
        times = 1 / ratio(seconds["plain"], seconds[name])
        goal, goal_met = ("<= 1.5x", times <= 1.5) if name == "lossless, dense" else ("", None)
        against = (
            f"plain transformers, every page touched: {statistics.median(seconds['plain']):.2f} s"
        )
        numbers = {"seconds": seconds[name], "plain_seconds": seconds["plain"]}
        yield Row(
            f"from_pretrained SmolLM2 {name}",
            f"{times:.2f}x its time",
            against,
            goal,
            goal_met,
            numbers,
        )
        if resident == "dense":
            cold = f"{1 / ratio(seconds['plain'], seconds[f'{scheme}, cold']):.2f}x its time"
            numbers = {"seconds": seconds[f"{scheme}, cold"]}
            yield Row(
                "  in free memory as the machine has it",
                cold,
                "plain transformers, as above",
                "",
                None,
                numbers,
            )
            yield _beside_floor(name, seconds[name], seconds["plain"], seconds[f"{scheme} floor"])
        extra, against = (
            peaks[name]["mib"],
            f"over imports and model ({peaks[name]['model_mib']:.0f} MiB)",
        )
        yield Row(
            "  peak memory", f"{extra:.0f} MiB", against, "<= 512 MiB", extra <= 512, {"mib": extra}
        )
    gain = ratio(seconds["floor of one"], seconds["lossless floor"])
    against = "the same loop in one thread: what the cores of this machine give together"
    yield Row(
        f"bare decoding loop, lossless, {settings.workers} threads",
        f"{gain:.2f}x as fast",
        against,
        "",
        None,
    )
    for name, size in sizes.items():
        times = ratio(seconds[name], seconds["lossless, dense"])
        against = (
            f"{name}: {statistics.median(seconds[name]):.2f} s, "
            f"{size / _stored(containers['lossless']):.4f} of our bytes"
        )
        numbers = {"seconds": seconds["lossless, dense"], f"{name}_seconds": seconds[name]}
        yield Row(
            f"lossless, dense: speed beside {name}",
            f"{times:.1f}x",
            against,
            "> 1x",
            times > 1,
            numbers,
        )
    for name in sorted(peers.MAKERS.keys() - sizes.keys()):
        yield Row(
            f"lossless, dense: speed beside {name}",
            "not measured",
            f"{name} is not installed",
            "> 1x",
            None,
        )
    _clean()


def resident(settings: Settings) -> Iterator[Row]:
    """Tokens per second and peak memory of each residency, from load to the last token."""
    source = smollm2_realistic()
    containers = _containers(source)
    works: dict[str, tuple[object, ...]] = {
        f"{scheme}, {how}": ("generate", containers[scheme], how, settings.workers)
        for scheme, how in _WAYS
    }
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for _ in range(settings.repeats):
        for name, work in works.items():
            figures[name].append(in_fresh_process(*work))
    seconds = {
        name: [figure["seconds_per_token"] for figure in turn_figures]
        for name, turn_figures in figures.items()
    }
    for scheme, how in _WAYS[2:]:
        name, dense = f"{scheme}, {how}", f"{scheme}, dense"
        faster = ratio(seconds[dense], seconds[name])
        goal, goal_met = (">= 1x", faster >= 1) if how == "int8" else ("", None)
        against = f"dense bf16: {1 / statistics.median(seconds[dense]):.1f} tokens/s"
        if how == "compressed":
            share = statistics.median(figure["decoding_share"] for figure in figures[name])
            against += f"; {share:.0%} of the time decodes"
        numbers = {"seconds_per_token": seconds[name], "dense_seconds_per_token": seconds[dense]}
        yield Row(f"tokens/s, SmolLM2 {name}", f"{faster:.2f}x", against, goal, goal_met, numbers)
        peak = max(figure["mib"] for figure in figures[name])
        bound = _memory_bound(containers[scheme], how)
        yield Row(
            "  peak memory, load to last token",
            f"{peak:.0f} MiB",
            "over imports",
            f"<= {bound:.0f} MiB",
            peak <= bound,
        )
    _clean()


def _beside_floor(name: str, ours: list[float], plain: list[float], floor: list[float]) -> Row:
    """Compares with plain loading plus the bare decoding loop, as if nothing overlapped."""
    whole = [a + b for a, b in zip(plain, floor, strict=True)]
    against = (
        f"plain {statistics.median(plain):.2f} s + bare decoding loop "
        f"{statistics.median(floor):.2f} s, one after the other"
    )
    return Row(
        "  beside its floor",
        f"{1 / ratio(whole, ours):.2f}x",
        against,
        "",
        None,
        {"seconds": ours, "floor_seconds": floor},
    )


def _memory_bound(container: Path, how: str) -> float:
    """Returns 1.15 x (resident bytes + the largest decoded layer) + 256 MiB, in MiB."""
    with Container(container) as opened_container:
        tensors = [
            opened_container.tensor(record.name)
            for record in opened_container.manifest.tensors
            if record.scheme != "alias"
        ]
        coded_tensors = [tensor for tensor in tensors if isinstance(tensor, StoredTensor)]
        plain = sum(
            tensor.record.source_bytes for tensor in tensors if not isinstance(tensor, StoredTensor)
        )
        if how == "int8":
            stays = sum(
                t.record.elements if t.record.scheme == "int8" else t.record.source_bytes
                for t in coded_tensors
            )
            return (1.15 * stays + plain) / 2**20 + 256
        stored_bytes = _stored(container)
        return (
            1.15
            * (stored_bytes + max(tensor.record.source_bytes for tensor in coded_tensors))
            / 2**20
            + 256
        )


def _stored(container: Path) -> int:
    with Container(container) as opened_container:
        return sum(record.bytes for record in opened_container.manifest.shards)


def _containers(source: Path) -> dict[str, Path]:
    for scheme in ("int8", "lossless"):
        convert(source, OUT / f"smollm2-{scheme}", scheme=scheme, force=True)
    return {scheme: OUT / f"smollm2-{scheme}" for scheme in ("int8", "lossless")}


def _clean() -> None:
    for path in OUT.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
