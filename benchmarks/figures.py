"""Draws the documentation's charts from its tables: both show the same numbers.

`python -m benchmarks.figures` writes docs/figures/*.svg. It needs `pip install 'codecllm[plot]'`.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
INK, GRID = "#123456", "#abcdef"
"""Placeholder colours; the SVG's own style replaces them, for light and for dark pages."""
_STYLE = """<style>
:root { --ink: #1d2536; --grid: #d5dae3 }
@media (prefers-color-scheme: dark) { :root { --ink: #c9d1e0; --grid: #3a4356 } }
</style>"""
README_PEERS = ("Q8_0", "Q6_K-joined", "Q5_K_M", "Q4_K_M", "IQ4_XS-joined", "NF4", "HQQ-axis0")


@dataclass(frozen=True)
class Point:
    """A quantized model: its stored bits per weight and its KL divergence in nats per token."""

    name: str
    bits: float
    kl: float


@dataclass(frozen=True)
class Series:
    """Points of one kind, joined by a line where `line` is set."""

    label: str
    points: list[Point]
    colour: str
    mark: str
    line: bool = False
    named: bool = True


def main() -> None:
    """Draws all charts."""
    folder = DOCS / "figures"
    bits = _table(DOCS / "bits.md", "| | bits per weight | size |")
    rates = [row for row in bits if "--bits" in row[0] and "--refine" not in row[0]]
    plain = [row for row in bits if "int8" in row[0]]
    _draw(
        folder / "bits.svg",
        [
            Series("--bits", _points(rates, 1, 3), "#3366cc", "o", line=True, named=False),
            Series("--bits, second text", _points(rates, 1, 5), "#7a9be0", "o", True, named=False),
            Series("plain int8", _points(plain, 1, 3), "#c2571a", "s", named=False),
            Series("plain int8, second text", _points(plain, 1, 5), "#e0a07a", "s", named=False),
        ],
        "bits per weight, everything counted",
    )
    page = DOCS / "quality-peers.md"
    ours = _points(_table(page, "| container | bits |"), 1, 2)
    peers = _points(_table(page, "| peer | bits | KL | ours, bits | saved | `--refine` |"), 1, 2)
    imatrix_points = _points(_table(page, "| peer | bits | KL | same text, bits | saved |"), 1, 2)
    imatrix_points = [Point(p.name.removesuffix("-imatrix"), p.bits, p.kl) for p in imatrix_points]
    gguf = [peer for peer in peers if re.match(r"I?Q\d", peer.name)]
    other = [peer for peer in peers if peer not in gguf]
    lines = [
        Series("codecllm", _named(ours, "ours-default"), "#3366cc", "o", line=True, named=False),
        Series("codecllm --refine", _named(ours, "ours-ref"), "#1a8f5a", "o", True, named=False),
    ]
    axis = "bits per weight of the linear layers, everything counted"
    _draw(
        folder / "quality-peers.svg",
        [
            *lines,
            Series("llama.cpp", gguf, "#c2571a", "s"),
            Series("llama.cpp, importance matrix", imatrix_points, "#8a4fbf", "^"),
            Series("bitsandbytes, HQQ", other, "#b58a1f", "D"),
        ],
        axis,
        size=(9.0, 7.0),
    )
    few = [Series("llama.cpp", [p for p in gguf if p.name in README_PEERS], "#c2571a", "s")]
    few += [
        Series("bitsandbytes, HQQ", [p for p in other if p.name in README_PEERS], "#b58a1f", "D")
    ]
    _draw(folder / "quality.svg", [*lines, *few], axis)


def _table(page: Path, head: str) -> list[list[str]]:
    """Returns the cells of the table whose first line begins with `head`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def _points(rows: list[list[str]], bits: int, kl: int) -> list[Point]:
    return [Point(row[0], float(row[bits]), float(row[kl])) for row in rows]


def _named(points: list[Point], prefix: str) -> list[Point]:
    return sorted((p for p in points if p.name.startswith(prefix)), key=lambda p: p.bits)


def _draw(
    path: Path, series: list[Series], axis: str, size: tuple[float, float] = (8.0, 5.0)
) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "codecllm", "font.size": 11}
    matplotlib.rcParams |= {"font.family": "sans-serif", "text.color": INK}
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for one in series:
        x, y = [p.bits for p in one.points], [p.kl for p in one.points]
        style = f"{one.mark}-" if one.line else one.mark
        axes.plot(x, y, style, color=one.colour, label=one.label, linewidth=1.5, markersize=6)
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.08)
    axes.set_xlabel(axis, color=INK)
    axes.set_ylabel("KL(source || model) per token, nats", color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.tick_params(colors=INK, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.legend(frameon=False, labelcolor=INK)
    _label(figure, axes, series)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    _restyle(path)


def _label(figure: Any, axes: Any, series: list[Series]) -> None:
    """Names points; each label takes the first place around its point that no mark or label has."""
    figure.canvas.draw()
    every = [(axes.transData.transform((p.bits, p.kl)), p, s) for s in series for p in s.points]
    boxes = [(x - 5, y - 5, x + 5, y + 5) for (x, y), _, _ in every]
    for one in (s for s in series if s.line):
        spots = [axes.transData.transform((p.bits, p.kl)) for p in one.points]
        for (x0, y0), (x1, y1) in itertools.pairwise(spots):
            steps = [k / 12 for k in range(13)]
            spot = [(x0 + (x1 - x0) * k, y0 + (y1 - y0) * k) for k in steps]
            boxes += [(x - 2, y - 2, x + 2, y + 2) for x, y in spot]
    by_crowding = sorted(
        every, key=lambda e: -sum(math.dist(e[0], other[0]) < 40 for other in every)
    )
    for (x, y), point, one in by_crowding:
        if not one.named:
            continue
        width, height = 6.2 * len(point.name), 12
        for dx, dy in _places(width, height):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            if not any(_overlap(box, other) for other in boxes):
                break
        boxes.append(box)
        place = axes.transData.inverted().transform((x + dx, y + dy))
        far = abs(dx + width / 2) > width / 2 + 12 or abs(dy) > 20
        arrow = {"arrowstyle": "-", "color": one.colour, "lw": 0.5} if far else None
        axes.annotate(
            point.name,
            (point.bits, point.kl),
            xytext=place,
            fontsize=8,
            color=one.colour,
            arrowprops=arrow,
        )


def _places(width: float, height: float) -> list[tuple[float, float]]:
    near = [(8, -4), (-8 - width, -4), (-width / 2, 9), (-width / 2, -9 - height)]
    near += [(7, 6), (-7 - width, 6), (7, -6 - height), (-7 - width, -6 - height)]
    ring = []
    for distance in range(14, 60, 6):
        for angle in range(0, 360, 20):
            x = distance * 1.3 * math.cos(math.radians(angle))
            y = distance * math.sin(math.radians(angle))
            ring.append((x - (width if x < 0 else 0), y - height / 2))
    return near + ring


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]


def _restyle(path: Path) -> None:
    """Lets the page's colour scheme choose the colours of text, axes and grid."""
    text = path.read_text(encoding="utf-8")
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    text = re.sub(r"(<svg [^>]*>)", lambda found: found.group(1) + "\n" + _STYLE, text, count=1)
    path.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), encoding="utf-8")


if __name__ == "__main__":
    main()
