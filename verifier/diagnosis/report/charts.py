"""Plots of the report: the place of each mark of an SVG drawing, which `chart.jinja` draws."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 34

CHARACTER = 5.9
"""Width of a character of the axis labels, about: labels are left out where they would touch."""

_MAX_LABEL = 44
_MAX_LABELS = 9
_INNER_WIDTH = WIDTH - LEFT - RIGHT


@dataclass(frozen=True, slots=True)
class Series:
    """One row of values over the same places as the others.

    Attributes:
        name: for the legend.
        values: one per place; None where there is none.
        colour: number of the page's colour, from 1.
        kind: `line`, `dots` or `bars`.
        stem: number of another series in the same chart to whose points these hang by a thin line,
            or None.
    """

    name: str
    values: Sequence[float | None]
    colour: int
    kind: str = "line"
    stem: int | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A label of an axis: its text, and its middle or end in pixels."""

    text: str
    at: float


@dataclass(frozen=True, slots=True)
class Point:
    """A value of a series: its place in pixels and the text of its tooltip."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class DrawnSeries:
    """A series with the places of its points.

    Attributes:
        name: for the legend.
        colour: number of the page's colour.
        kind: `line`, `dots` or `bars`.
        points: the values that can be drawn.
        radius: of a dot, in pixels.
        width: of a bar, in pixels.
    """

    name: str
    colour: int
    kind: str
    points: list[Point]
    radius: int
    width: float


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing; all places are pixels of a canvas of WIDTH x HEIGHT.

    Attributes:
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        marks: left end and width of the shaded places.
        ticks: of the vertical axis.
        labels: below the horizontal axis, each with its middle.
        stems: x, y and y of the thin lines between points.
        series: the drawn series.
    """

    x_title: str
    y_title: str
    marks: list[tuple[float, float]]
    ticks: list[Text]
    labels: list[Text]
    stems: list[tuple[float, float, float]]
    series: list[DrawnSeries]


def plot(
    series: Sequence[Series],
    labels: Sequence[str],
    *,
    y: str,
    x: str,
    log: bool = False,
    zero: bool = False,
    marked: Collection[str] = (),
) -> Plot | None:
    """Places series on a canvas with axes, a legend and a tooltip per point.

    Args:
        series: the series to draw; each has as many values as there are labels.
        labels: name of each place, for tooltips; as many as fit are written below the axis, the
            first and last always.
        y: title of the vertical axis.
        x: title of the horizontal axis.
        log: whether the vertical axis is logarithmic; values that are not positive then lie on its
            lower end.
        zero: whether the vertical axis begins at 0.
        marked: labels of the places that findings name; they are shaded.

    Returns:
        The drawing, or None where there is nothing to draw.
    """
    drawable = [
        value
        for one in series
        for value in one.values
        if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    if not drawable or not labels:
        return None
    scale = _Scale.over(drawable, log, zero)
    return Plot(
        x_title=x,
        y_title=y,
        marks=_marks(labels, marked),
        ticks=[Text(scale.describe(tick), scale.place(tick)) for tick in scale.ticks()],
        labels=_axis_labels(labels),
        stems=[
            stem
            for one in series
            if one.stem is not None
            for stem in _stems(one, series[one.stem], scale)
        ],
        series=[_drawn(one, labels, scale) for one in series],
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """The vertical axis, from `low` to `high`: exponents of 10 where it is logarithmic."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool, zero: bool) -> _Scale:
        """Returns an axis on which all values have room."""
        low, high = min(values), max(values)
        if not log:
            low = 0.0 if zero else low - 0.05 * (high - low or abs(high) or 1)
            return cls(low, high + 0.05 * (high - low or 1), log)
        low, high = math.log10(low), math.log10(high)
        if high - low > 2:
            return cls(float(math.floor(low)), float(math.ceil(high)), log)
        # Whole decades would leave most of the plot empty.
        margin = max(0.1, 0.25 - (high - low) / 2)
        return cls(low - margin, high + margin, log)

    def level(self, value: float | None) -> float | None:
        """Returns a value in units of the axis; None where it cannot be drawn."""
        if value is None or not math.isfinite(value):
            return None
        if not self.log:
            return value
        return math.log10(value) if value > 0 else self.low

    def place(self, level: float) -> float:
        """Returns the height of a level on the canvas."""
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (level - self.low) / (self.high - self.low))

    def describe(self, level: float) -> str:
        """Returns the text of a tick: `2e-3` where the axis is logarithmic."""
        if not self.log:
            return f"{level:.4g}"
        mantissa, _, power = f"{10**level:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"

    def ticks(self) -> list[float]:
        """Returns the levels that get a line and a text."""
        return self._log_ticks() if self.log else self._linear_ticks()

    def _log_ticks(self) -> list[float]:
        extent = self.high - self.low
        if extent > 2:
            step = max(1, round(extent / 6))
            return [float(power) for power in range(int(self.low), int(self.high) + 1, step)]
        # Within one decade its powers alone would give one tick or none.
        factors = (1, 1.5, 2, 3, 5, 7) if extent < 0.8 else (1, 2, 5)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        levels = [decade + math.log10(factor) for decade in decades for factor in factors]
        return [level for level in levels if self.low <= level <= self.high]

    def _linear_ticks(self) -> list[float]:
        ideal = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(ideal))
        step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - ideal))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [index * step for index in range(first, last + 1)]


def _axis_labels(labels: Sequence[str]) -> list[Text]:
    """Returns the labels below the axis.

    Evenly spaced, as many as do not touch, moved inwards at the ends.
    """
    texts = [_shortened(label) for label in labels]
    axis_labels = []
    for index in _labelled(texts):
        half = len(texts[index]) * CHARACTER / 2
        middle = min(max(_x(index, len(texts)), LEFT + half), WIDTH - RIGHT - half)
        axis_labels.append(Text(texts[index], middle))
    return axis_labels


def _labelled(texts: Sequence[str]) -> list[int]:
    """Returns the places whose labels are written, the first and the last among them."""
    last = len(texts) - 1
    if last < 1:
        return [0]
    widest = max(map(len, texts)) * CHARACTER + 14
    # The labels at the ends are moved inwards by half of their width, so each takes up to 1.5
    # widths.
    fitting = max(2, min(_MAX_LABELS, 1 + int(_INNER_WIDTH / (1.5 * widest))))
    steps = min(fitting - 1, last)
    return sorted({round(last * step / steps) for step in range(steps + 1)})


def _shortened(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else "..." + label[3 - _MAX_LABEL :]


def _marks(labels: Sequence[str], marked: Collection[str]) -> list[tuple[float, float]]:
    # At least 4 pixels: among a thousand tensors the mark of one must stay visible.
    width = min(28.0, max(4.0, _INNER_WIDTH / len(labels)))
    return [
        (_x(index, len(labels)) - width / 2, width)
        for index, label in enumerate(labels)
        if label in marked
    ]


def _stems(one: Series, other: Series, scale: _Scale) -> list[tuple[float, float, float]]:
    """Returns, at each place, a line from the point of one series to that of the other."""
    stems = []
    for index, (value, end) in enumerate(zip(one.values, other.values, strict=True)):
        level, end_level = scale.level(value), scale.level(end)
        if level is not None and end_level is not None:
            x = _x(index, len(one.values))
            stems.append((x, scale.place(level), scale.place(end_level)))
    return stems


def _drawn(one: Series, labels: Sequence[str], scale: _Scale) -> DrawnSeries:
    points = []
    for index, (value, label) in enumerate(zip(one.values, labels, strict=True)):
        level = scale.level(value)
        if level is not None:
            title = f"{label}: {one.name} {value:.5g}"
            points.append(Point(_x(index, len(labels)), scale.place(level), title))
    return DrawnSeries(
        name=one.name,
        colour=one.colour,
        kind=one.kind,
        points=points,
        # Smaller dots where they would touch.
        radius=3 if len(labels) < 80 else 2,
        width=max(1.0, 0.8 * _INNER_WIDTH / len(labels)),
    )


def _x(index: int, count: int) -> float:
    return LEFT + _INNER_WIDTH * (index + 0.5) / count
