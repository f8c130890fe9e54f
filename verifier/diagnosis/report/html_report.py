"""The diagnosis as one HTML file, which fetches and executes nothing.

This module chooses the figures; `report.html.jinja` and `chart.jinja` hold the page. Jinja escapes
all that they insert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from codecllm.formats.arguments.outputs import check_output
from codecllm.formats.files import as_path, write_atomically
from codecllm.verifier.diagnosis.report import charts
from codecllm.verifier.diagnosis.report.charts import Plot, Series, plot
from codecllm.verifier.report import Report

# A page with a row for every damaged chunk of a large model does not open in a browser.
FINDINGS_SHOWN = 100

_CANVAS = {
    name: getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")
}
_REFERENCE_NOTE = (
    "The reference is the model class with weights that the verifier quantized itself. Where no "
    "line 'loaded against reference' is drawn, every bit is the reference's."
)


class Section(NamedTuple):
    """A plot of the page: its heading, a note above it or an empty string, and the drawing."""

    title: str
    note: str
    plot: Plot | None


def write_html(report: Report, path: Path) -> None:
    """Writes a diagnosis to `path`.

    Raises:
        UsageError: the file would lie in a container, or replace what is no regular file.
        OSError: it cannot be written; nothing half-written stays.
    """
    path = as_path(path, "report")
    check_output(path, "report")
    write_atomically(path, render_html(report).encode())


def render_html(report: Report) -> str:
    """Returns a diagnosis as one self-contained page."""
    facts = {stage.name: stage.facts for stage in report.stages}
    quantization, layers = facts.get("quantized", {}), facts.get("layers", {})
    prompts = facts.get("text", {}).get("prompts", [])
    names_in_findings = _named(report)
    page = _environment().get_template("report.html.jinja")
    return page.render(
        report=report,
        name=Path(report.container).name,
        findings_shown=FINDINGS_SHOWN,
        canvas=_CANVAS,
        ratio=quantization if "ratio" in quantization else None,
        weight_plots=_weight_plots(quantization, names_in_findings),
        compared=[row for row in quantization.get("tensors", []) if "per_tensor" in row],
        channels=_channel_lines(quantization),
        layer_plots=_layer_plots(layers, names_in_findings),
        prompts=prompts,
        token_plot=_token_plot(prompts),
        versions=_versions(facts.get("round trip", {})),
    )


def render_figure(drawing: Plot | None) -> str:
    """Returns one plot as an HTML figure."""
    macros: Any = _environment().get_template("chart.jinja").module
    return str(macros.figure(drawing, _CANVAS))


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Names of tensors and texts of models come from files that a stranger may have made.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _named(report: Report) -> set[str]:
    """Returns the tensors, modules and layers that findings name."""
    names: set[str] = set()
    for stage in report.stages:
        for finding in stage.findings:
            if finding.error.tensor:
                names.add(finding.error.tensor)
            if finding.module:
                names |= {finding.module, f"{finding.module}.weight"}
        if "first_departure" in stage.facts:
            names.add(stage.facts["first_departure"]["layer"])
    return names


def _weight_plots(facts: dict[str, Any], marked: set[str]) -> list[Section]:
    rows = facts.get("tensors", [])
    if not rows:
        return []
    names = [row["name"] for row in rows]
    stored_choices = [row["per_channel"] for row in rows]
    single_scale_choices = [row.get("per_tensor") for row in rows]
    bits = plot(
        [
            Series(
                "stored, with scales", _column(stored_choices, "bits_per_weight"), 1, "dots", stem=1
            ),
            Series(
                "entropy bound of the symbols",
                _column(stored_choices, "entropy_bits_per_weight"),
                3,
                "dots",
            ),
            Series(
                "one scale per tensor, stored",
                _column(single_scale_choices, "bits_per_weight"),
                2,
                "dots",
            ),
        ],
        names,
        y="bits per weight",
        x="tensor",
        marked=marked,
    )
    sections = [Section("Bits per weight against the entropy bound", "", bits)]
    # Lossless tensors have no codes, so one scale for all of them means nothing.
    if not any(single_scale_choices):
        return sections
    with_partner = [
        choice if other else None
        for choice, other in zip(stored_choices, single_scale_choices, strict=True)
    ]
    errors = plot(
        [
            Series("one scale per channel", _column(with_partner, "relative_error"), 1, "dots"),
            Series(
                "one scale per tensor", _column(single_scale_choices, "relative_error"), 2, "dots"
            ),
        ],
        names,
        y="relative error",
        x="tensor",
        log=True,
        marked=marked,
    )
    sections.append(Section("Error of the weights", "", errors))
    counts = facts.get("histograms", {})
    if counts:
        sections.append(Section("Histogram of the codes", "", _histogram(counts)))
    return sections


def _column(rows: list[dict[str, Any] | None], key: str) -> list[float | None]:
    return [None if row is None else row[key] for row in rows]


def _histogram(counts: dict[str, list[int]]) -> Plot | None:
    shares = {name: [count / max(1, sum(row)) for count in row] for name, row in counts.items()}
    return plot(
        [
            Series("one scale per channel", shares["per_channel"], 1, "bars"),
            Series("one scale per tensor", shares["per_tensor"], 2, "line"),
        ],
        [str(code) for code in range(-127, 128)],
        y="share of the codes",
        x="code",
        zero=True,
    )


def _channel_lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for note in facts.get("channels", []):
        for kind, channels in note.items():
            if kind == "not_finite":
                channel_texts = ", ".join(
                    f"{channel} ({count})" for channel, count in channels.items()
                )
                lines.append(f"{note['name']}: NaN or infinite weights in channel {channel_texts}")
            elif kind != "name":
                pairs = zip(channels["channels"], channels["scales"], strict=True)
                channel_texts = ", ".join(f"{channel} ({scale:.4g})" for channel, scale in pairs)
                subject = f"{kind.replace('_', ' ')} scale in {channels['count']} channels"
                lines.append(f"{note['name']}: {subject}: {channel_texts}")
    return lines


def _layer_plots(facts: dict[str, Any], marked: set[str]) -> list[Section]:
    rows = facts.get("layers", [])
    if not rows:
        return []
    names = [row["name"] for row in rows]
    of_reference = [row["relative_error_of_reference"] for row in rows]
    errors = plot(
        [
            Series("loaded against source", [row["relative_error"] for row in rows], 1),
            Series("the cost of quantization alone", of_reference, 3, "dots"),
            # A logarithmic axis has no 0: equal outputs are left out, as the note says.
            Series("loaded against reference", [row["off_reference"] or None for row in rows], 2),
        ],
        names,
        y="relative error",
        x="layer",
        log=True,
        marked=marked,
    )
    # A cosine near 1 shows nothing on any scale; its distance from 1 does, once rounding has not
    # made it negative.
    angles = [max(0.0, 1 - row["cosine"]) or None for row in rows]
    divergence = plot(
        [Series("1 - cosine, loaded against source", angles, 4)],
        names,
        y="1 - cosine",
        x="layer",
        log=True,
        marked=marked,
    )
    sections = [
        Section("Outputs by layer", _REFERENCE_NOTE, errors),
        Section("Divergence by layer", "", divergence),
    ]
    steps = facts.get("bisect", [])
    if steps:
        mixed_plot = plot(
            [Series("KL(source || mixed) per token", [step["value"] for step in steps], 1)],
            [str(step["layers"]) for step in steps],
            y="KL, nats",
            x="number of layers taken from the container",
            zero=True,
        )
        sections.append(Section("Source with its first layers from the container", "", mixed_plot))
    return sections


def _token_plot(prompts: list[dict[str, Any]]) -> Plot | None:
    labels, values = [], []
    for row in prompts:
        for place, value in enumerate(row["kl"]):
            labels.append(f"{row['prompt'][:24]!r}, token {place}")
            values.append(value)
    return plot(
        [Series("KL(source || loaded)", values, 1, "dots")],
        labels,
        y="KL, nats",
        x="token of the source's continuations",
        log=True,
    )


def _versions(facts: dict[str, Any]) -> list[tuple[str, str, str]] | None:
    """Returns library, version here and version of the writer; None where they are not known."""
    if "versions" not in facts:
        return None
    local_versions, writer_versions = facts["versions"], facts["written_by"]
    names = sorted(local_versions.keys() | writer_versions.keys())
    return [(name, local_versions.get(name, ""), writer_versions.get(name, "")) for name in names]
