"""Plots of the report: axes have names, labels do not touch, marks stand at the findings."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from codecllm.verifier.diagnosis.report.charts import (
    CHARACTER,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Series,
    plot,
)
from codecllm.verifier.diagnosis.report.html_report import render_figure


def _drawn(*series, labels, **options):
    """Returns the root of the drawing and the caption below it."""
    page = render_figure(plot(series, labels, y="y", x="x", **options))
    svg, caption = re.search(
        r"<figure>(<svg.*</svg>)(<figcaption>.*</figcaption>)</figure>", page, re.DOTALL
    ).groups()
    return ElementTree.fromstring(svg), caption


def _texts(root, *, below):
    ticks = [one for one in root.iter("text") if one.get("class") == "tick"]
    return [one for one in ticks if (float(one.get("y")) > HEIGHT - 20) == below]


def _span(text):
    """Returns the left and right end of a label."""
    x, width = float(text.get("x")), len(text.text) * CHARACTER
    left = x - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
    return left, left + width


@pytest.mark.parametrize("count", [1, 2, 3, 15, 211])
@pytest.mark.parametrize(
    "name", ["{}", "model.layers.{}", "model.layers.{}.self_attn.q_proj.weight"]
)
def test_labels_below_the_axis_do_not_touch(count, name):
    labels = [name.format(index) for index in range(count)]
    root, _ = _drawn(Series("a", [1.0 + index for index in range(count)], 1), labels=labels)
    texts = _texts(root, below=True)
    assert [texts[0].text, texts[-1].text] == [labels[0], labels[-1]]
    spans = [_span(text) for text in texts]
    assert all(right < left for (_, right), (left, _) in pairwise(spans))
    assert spans[-1][1] <= WIDTH - RIGHT + 1 or count == 1
    assert spans[0][0] >= LEFT - 1


def test_names_that_are_too_long_are_cut_in_front():
    root, _ = _drawn(Series("a", [1.0, 2.0], 1), labels=["m" * 50 + ".weight", "b"])
    assert _texts(root, below=True)[0].text == "..." + "m" * 34 + ".weight"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([5.5e-3, 1.6e-2], ["5e-3", "7e-3", "1e-2", "1.5e-2", "2e-2"]),
        ([2e-6, 1.0], ["1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "1e0"]),
        ([1e-3, 2e-2], ["1e-3", "2e-3", "5e-3", "1e-2", "2e-2"]),
    ],
)
def test_logarithmic_axes_have_ticks_in_every_range(values, ticks):
    root, _ = _drawn(Series("a", values, 1, "dots"), labels=["a", "b"], log=True)
    found = [text.text for text in _texts(root, below=False)]
    assert found == ticks
    heights = [float(one.get("cy")) for one in root.iter("circle")]
    assert heights[0] > heights[1]
    assert max(heights) - min(heights) > HEIGHT / 3  # the values fill the plot


def test_equal_values_and_none():
    root, _ = _drawn(Series("a", [0.5, 0.5, None], 1), labels=["a", "b", "c"], log=True)
    assert len(list(root.iter("circle"))) == 2
    assert len(_texts(root, below=False)) > 1
    assert plot([Series("a", [None, float("nan")], 1)], ["a", "b"], y="y", x="x") is None
    assert "Nothing to draw" in render_figure(None)


def test_names_are_escaped():
    series = Series("<b>&", [1.0, 2.0], 1)
    page = render_figure(plot([series], ["<i>", "b"], y="<y>", x="x"))
    assert not re.search("<b>|<i>|<y>", page)
    assert "&lt;b&gt;&amp;" in page


def test_places_that_findings_name_are_shaded():
    series = (Series("a", [1.0, 2.0, 3.0], 1, stem=1), Series("b", [0.5, None, 2.0], 2))
    root, caption = _drawn(*series, labels=["a", "b", "c"], marked={"b", "elsewhere"})
    (mark,) = [one for one in root.iter("rect") if one.get("class") == "mark"]
    middle = [float(one.get("cx")) for one in root.iter("circle")][1]
    assert float(mark.get("x")) < middle < float(mark.get("x")) + float(mark.get("width"))
    assert "named by a finding" in caption
    assert len([one for one in root.iter("line") if one.get("class") == "stem"]) == 2
    assert (
        "named by a finding" not in _drawn(*series, labels=["a", "b", "c"], marked={"elsewhere"})[1]
    )
