"""Plots as inline SVG: no script, no font, no network. Colours come from the page's CSS, for light and for dark."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 34
CHARACTER = 5.9
"""Width of a character of the axis labels, about: labels are left out where they would touch."""


@dataclass(frozen=True, slots=True)
class Series:
    """One row of values over the same places as the others.

    Attributes:
        name: for the legend.
        values: one per place; None where there is none.
        colour: number of the page's colour, from 1.
        kind: `line`, `dots` or `bars`.
        stem: number of another series in the same chart to whose points these hang by a thin line, or None.
    """

    name: str
    values: Sequence[float | None]
    colour: int
    kind: str = "line"
    stem: int | None = None


def chart(
    series: Sequence[Series],
    labels: Sequence[str],
    *,
    y: str,
    x: str,
    log: bool = False,
    zero: bool = False,
    marked: Collection[str] = (),
) -> str:
    """Returns an SVG plot with axes, legend and a tooltip per point.

    Args:
        series: what to draw; each has as many values as there are labels.
        labels: name of each place, for tooltips; as many as fit are written below the axis, the first and last always.
        y: title of the vertical axis.
        x: title of the horizontal axis.
        log: whether the vertical axis is logarithmic; values that are not positive then lie on its lower end.
        zero: whether the vertical axis begins at 0.
        marked: labels of the places that findings name; they are shaded.
    """
    finite = [
        value
        for one in series
        for value in one.values
        if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    if not finite or not labels:
        return '<p class="note">Nothing to draw.</p>'
    low, high = _range(finite, log, zero)
    parts = [*_marks(labels, marked), *_grid(low, high, log), *_axis_labels(labels, x, y)]
    for one in series:
        if one.stem is not None:
            parts += _stems(one, series[one.stem], low, high, log)
    for one in series:
        parts += _drawn(one, labels, low, high, log)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} by {escape(x)}">{"".join(parts)}</svg>'
    legend = "".join(
        f'<span class="key"><i class="b{one.colour}"></i>{escape(one.name)}</span>'
        for one in series
    )
    if set(marked) & set(labels):
        legend += '<span class="key"><i class="mark"></i>named by a finding</span>'
    return f"<figure>{svg}<figcaption>{legend}</figcaption></figure>"


def _range(values: list[float], log: bool, zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
        if high - low > 2:
            return float(math.floor(low)), float(math.ceil(high))
        pad = max(0.1, 0.25 - (high - low) / 2)
        return low - pad, high + pad  # whole decades would leave most of the plot empty
    low = 0.0 if zero else low - 0.05 * (high - low or abs(high) or 1)
    return low, high + 0.05 * (high - low or 1)


def _grid(low: float, high: float, log: bool) -> list[str]:
    parts = []
    for tick in _ticks(low, high, log):
        place = _y(tick, low, high)
        text = _power(tick) if log else f"{tick:.4g}"
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{text}</text>'
        )
    return parts


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        step = max(1, round((high - low) / 6))
        if high - low > 2:
            return [float(value) for value in range(int(low), int(high) + 1, step)]
        decades = range(math.floor(low), math.ceil(high) + 1)
        factors = (1, 1.5, 2, 3, 5, 7) if high - low < 0.8 else (1, 2, 5)
        values = (decade + math.log10(factor) for decade in decades for factor in factors)
        return [value for value in values if low <= value <= high]
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step_size = min((factor * size for factor in (1, 2, 5, 10)), key=lambda value: abs(value - raw))
    first = math.ceil(low / step_size)
    return [index * step_size for index in range(first, math.floor(high / step_size) + 1)]


def _power(exponent: float) -> str:
    """Returns 10^exponent as `2e-3`."""
    mantissa, _, power = f"{10**exponent:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def _axis_labels(labels: Sequence[str], x: str, y: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    last = len(labels) - 1
    parts = []
    for index in _labelled(labels):
        place, anchor = _x(index, len(labels)), "middle"
        half = len(_tail(labels[index])) * CHARACTER / 2
        if index == 0 and place - half < LEFT:
            place, anchor = float(LEFT), "start"
        elif index == last and place + half > WIDTH - RIGHT:
            place, anchor = float(WIDTH - RIGHT), "end"
        text = escape(_tail(labels[index]))
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - 18}" text-anchor="{anchor}">{text}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    return parts


def _labelled(labels: Sequence[str]) -> list[int]:
    """Returns the places whose labels are written: evenly spaced, as many as do not touch, the ends among them."""
    last = len(labels) - 1
    widest = max(len(_tail(label)) for label in labels) * CHARACTER + 14
    fitting = max(
        2, min(9, 1 + int((WIDTH - LEFT - RIGHT) / (1.5 * widest)))
    )  # those at the ends are pushed inwards by half
    if last < 1:
        return [0]
    count = min(fitting, last + 1) - 1
    return sorted({round(last * step / count) for step in range(count + 1)})


def _marks(labels: Sequence[str], marked: Collection[str]) -> list[str]:
    """Shades the places that findings name."""
    width = min(28.0, max(4.0, (WIDTH - LEFT - RIGHT) / len(labels)))
    return [
        f'<rect class="mark" x="{_x(index, len(labels)) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
        for index, label in enumerate(labels)
        if label in marked
    ]


def _stems(one: Series, other: Series, low: float, high: float, log: bool) -> list[str]:
    """Draws, at each place, a thin line from one series' point to the other's."""
    parts = []
    for index, pair in enumerate(zip(one.values, other.values, strict=True)):
        a, b = (_level(value, low, log) for value in pair)
        if a is not None and b is not None:
            x = _x(index, len(one.values))
            ends = f'y1="{_y(a, low, high):.1f}" y2="{_y(b, low, high):.1f}"'
            parts.append(f'<line class="stem" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
    return parts


def _drawn(one: Series, labels: Sequence[str], low: float, high: float, log: bool) -> list[str]:
    places = [
        (_x(index, len(labels)), _level(value, low, log), value, label)
        for index, (value, label) in enumerate(zip(one.values, labels, strict=True))
    ]
    known = [
        (x, _y(level, low, high), value, label)
        for x, level, value, label in places
        if level is not None
    ]
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
            parts.append(
                f'<circle class="b{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'
            )
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
