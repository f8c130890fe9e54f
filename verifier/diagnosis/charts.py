"""Plots as inline SVG: no script, no font, no network. Colours come from the page's CSS, for light and for dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 34


@dataclass(frozen=True, slots=True)
class Series:
    """One row of values over the same places as the others.

    Attributes:
        name: for the legend.
        values: one per place; None where there is none.
        colour: number of the page's colour, from 1.
        kind: `line`, `dots` or `bars`.
    """

    name: str
    values: Sequence[float | None]
    colour: int
    kind: str = "line"


def chart(series: Sequence[Series], labels: Sequence[str], *, y: str, x: str, log: bool = False, zero: bool = False) -> str:
    """Returns an SVG plot with axes, legend and a tooltip per point.

    Args:
        series: what to draw; each has as many values as there are labels.
        labels: name of each place, for tooltips; the first and last are written below the axis.
        y: title of the vertical axis.
        x: title of the horizontal axis.
        log: whether the vertical axis is logarithmic; values that are not positive then lie on its lower end.
        zero: whether the vertical axis begins at 0.
    """
    finite = [
        value for one in series for value in one.values if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    if not finite or not labels:
        return '<p class="note">Nothing to draw.</p>'
    low, high = _range(finite, log, zero)
    parts = [*_grid(low, high, log), *_axis_labels(labels, x, y)]
    for one in series:
        parts += _drawn(one, labels, low, high, log)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} by {escape(x)}">{"".join(parts)}</svg>'
    legend = "".join(f'<span class="key"><i class="b{one.colour}"></i>{escape(one.name)}</span>' for one in series)
    return f"<figure>{svg}<figcaption>{legend}</figcaption></figure>"


def _range(values: list[float], log: bool, zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return float(low), float(max(high, low + 1))
    low = 0.0 if zero else low - 0.05 * (high - low or abs(high) or 1)
    return low, high + 0.05 * (high - low or 1)


def _grid(low: float, high: float, log: bool) -> list[str]:
    parts = []
    for tick in _ticks(low, high, log):
        place = _y(tick, low, high)
        text = f"1e{tick:.0f}" if log else f"{tick:.4g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    return parts


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        step = max(1, round((high - low) / 6))
        return [float(value) for value in range(int(low), int(high) + 1, step)]
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step_size = min((factor * size for factor in (1, 2, 5, 10)), key=lambda value: abs(value - raw))
    first = math.ceil(low / step_size)
    return [index * step_size for index in range(first, math.floor(high / step_size) + 1)]


def _axis_labels(labels: Sequence[str], x: str, y: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<text class="tick" x="{LEFT}" y="{HEIGHT - 18}">{escape(_tail(labels[0]))}</text>',
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 18}" text-anchor="end">{escape(_tail(labels[-1]))}</text>',
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>',
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
    ]


def _drawn(one: Series, labels: Sequence[str], low: float, high: float, log: bool) -> list[str]:
    places = [
        (_x(index, len(labels)), _level(value, low, log), value, label)
        for index, (value, label) in enumerate(zip(one.values, labels, strict=True))
    ]
    known = [(x, _y(level, low, high), value, label) for x, level, value, label in places if level is not None]
    parts = []
    if one.kind == "line" and len(known) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in known)
        parts.append(f'<polyline class="l{one.colour}" points="{path}"/>')
    width = max(1.0, 0.8 * (WIDTH - LEFT - RIGHT) / max(1, len(labels)))
    for x, y, value, label in known:
        title = f"<title>{escape(label)}: {escape(one.name)} {value:.5g}</title>"
        if one.kind == "bars":
            base = _y(low, low, high)
            parts.append(
                f'<rect class="b{one.colour}" x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{max(0.0, base - y):.1f}">{title}</rect>'
            )
        else:
            radius = 3 if len(labels) < 80 else 2
            parts.append(f'<circle class="b{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>')
    return parts


def _level(value: float | None, low: float, log: bool) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    if not log:
        return value
    return math.log10(value) if value > 0 else low


def _x(index: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / count


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))


def _tail(label: str) -> str:
    return label if len(label) <= 44 else "..." + label[-41:]
