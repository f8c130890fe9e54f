"""The diagnosis as one HTML file: verdicts, the paragraph, plots, texts and tables. Nothing is fetched, nothing is executed."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from codecllm.formats.files import write_atomically
from codecllm.verifier.diagnosis.report.charts import Series, chart
from codecllm.verifier.report import Report, Stage, Verdict

FINDINGS_SHOWN = 100

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2430; --soft: #5c6675; --line: #d9dee6; --panel: #f5f7fa;
  --c1: #2563a8; --c2: #c2571a; --c3: #3a7d44; --c4: #8a4fa3; --ok: #2e7d32; --failed: #b3261e; --skipped: #8a6d00; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181f; --ink: #e3e8ef; --soft: #9aa5b5; --line: #323b49; --panel: #1c222c;
  --c1: #6fa8e6; --c2: #f0955a; --c3: #7cc488; --c4: #c795dc; --ok: #7cc488; --failed: #ff8a80; --skipped: #e0c060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.where, .note { color: var(--soft); } .where { overflow-wrap: anywhere; }
.conclusion { border-left: 4px solid var(--tone); background: var(--panel); padding: .8rem 1rem; margin: 1rem 0;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { overflow-wrap: anywhere; min-width: 9rem; }
.ok { color: var(--ok); } .failed { color: var(--failed); font-weight: 600; } .skipped { color: var(--skipped); }
ul { margin: .3rem 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
figure { margin: .6rem 0; } svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .82rem; color: var(--soft); } .key { margin-right: 1.1rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; border-radius: 2px; }
.grid { stroke: var(--line); } .stem { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.mark { fill: var(--failed); background: var(--failed); opacity: .3; }
 .tick { fill: var(--soft); font-size: 11px; } .axis { fill: var(--soft); font-size: 12px; }
.l1 { stroke: var(--c1); } .l2 { stroke: var(--c2); } .l3 { stroke: var(--c3); } .l4 { stroke: var(--c4); }
polyline { fill: none; stroke-width: 1.8; }
.b1 { fill: var(--c1); background: var(--c1); } .b2 { fill: var(--c2); background: var(--c2); }
.b3 { fill: var(--c3); background: var(--c3); } .b4 { fill: var(--c4); background: var(--c4); }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def write_html(report: Report, path: Path) -> None:
    """Writes a diagnosis to `path`.

    Raises:
        OSError: it cannot be written; nothing half-written stays.
    """
    write_atomically(path, render_html(report).encode())


def render_html(report: Report) -> str:
    """Returns a diagnosis as one self-contained page."""
    facts = {stage.name: stage.facts for stage in report.stages}
    tone = "ok" if report.ok else "failed"
    body = [
        "<h1>Diagnosis of a container</h1>",
        f'<p class="where">{escape(report.container)}<br>manifest sha256 {escape(report.manifest_sha256 or "none")}</p>',
        f'<p class="conclusion" style="--tone: var(--{tone})">{escape(report.conclusion or "")}</p>',
        _stages(report),
        _ratio(facts.get("quantized", {})),
        _tensors(facts.get("quantized", {}), _named(report)),
        _layers(facts.get("layers", {}), _named(report)),
        _text(facts.get("text", {})),
        _versions(facts.get("round trip", {})),
    ]
    title = escape(f"codecllm diagnosis: {Path(report.container).name}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    content = f"<head>{head}{policy}<style>{_STYLE}</style></head><body>{''.join(body)}</body>"
    return f'<!doctype html><html lang="en">{content}</html>\n'


def _stages(report: Report) -> str:
    rows = "".join(_stage_row(stage) for stage in report.stages)
    return f"<h2>Stages</h2><table><tr><th>stage</th><th>verdict</th><th>what was found</th></tr>{rows}</table>"


def _stage_row(stage: Stage) -> str:
    shown = "".join(
        f"<li>{escape(str(finding.error))}</li>" for finding in stage.findings[:FINDINGS_SHOWN]
    )
    more = len(stage.findings) - FINDINGS_SHOWN
    shown += f"<li>... and {more} more (--json lists all)</li>" if more > 0 else ""
    listed = f"<ul>{shown}</ul>" if shown else ""
    word = stage.verdict.value if stage.verdict is not Verdict.FAILED else "FAILED"
    verdict = f'<td class="{stage.verdict.value}">{word}</td>'
    return f'<tr><td>{escape(stage.name)}</td>{verdict}<td class="text">{escape(stage.summary)}{listed}</td></tr>'


def _ratio(facts: dict[str, Any]) -> str:
    if "ratio" not in facts:
        return ""
    bits = facts["bits"]
    rows = "".join(
        f'<tr><td>{escape(name.replace("_", " "))}</td><td class="n">{value:.4f}</td>'
        f'<td class="n">{value / facts["bits_per_weight"]:.2%}</td></tr>'
        for name, value in bits.items()
    )
    total = f'<tr><td>in all</td><td class="n">{facts["bits_per_weight"]:.4f}</td><td class="n">100%</td></tr>'
    words = (
        f"The ratio is {facts['ratio']:.4f}x. With a perfect coder of single symbols it would be "
        f"{facts['ratio_at_entropy']:.4f}x: entropy, "
        f"scales and headers explain {facts['explained_by_entropy']:.2%} of the stored bytes. "
    )
    if facts["relative_error_per_tensor_scale"]:
        times = facts["relative_error_per_tensor_scale"] / max(facts["relative_error"], 1e-30)
        words += (
            f"One scale per tensor, packed by the same coder, would give {facts['ratio_per_tensor_scale']:.4f}x at "
            f"{times:.2f} times the error "
            f"({facts['relative_error_per_tensor_scale']:.2e} instead of {facts['relative_error']:.2e})."
        )
    head = '<tr><th>part</th><th class="n">bits per weight</th><th class="n">share</th></tr>'
    return f"<h2>Why the ratio is what it is</h2><p>{words}</p><table>{head}{rows}{total}</table>"


def _named(report: Report) -> set[str]:
    """Returns the tensors, modules and layers that findings name."""
    found = [finding for stage in report.stages for finding in stage.findings]
    names = {name for finding in found for name in (finding.error.tensor, finding.module) if name}
    names |= {f"{finding.module}.weight" for finding in found if finding.module}
    layers = {
        stage.facts["first_departure"]["layer"]
        for stage in report.stages
        if "first_departure" in stage.facts
    }
    return names | layers


def _tensors(facts: dict[str, Any], marked: set[str]) -> str:
    rows = facts.get("tensors", [])
    if not rows:
        return ""
    names = [row["name"] for row in rows]
    held, single = [row["per_channel"] for row in rows], [row.get("per_tensor") for row in rows]
    size = chart(
        [
            Series("stored, with scales", [one["bits_per_weight"] for one in held], 1, "dots", stem=1),
            Series("entropy bound of the symbols", [one["entropy_bits_per_weight"] for one in held], 3, "dots"),
            Series("one scale per tensor, stored", [one["bits_per_weight"] if one else None for one in single], 2, "dots"),
        ],
        names, y="bits per weight", x="tensor", marked=marked,
    )  # fmt: skip
    page = f"<h2>Bits per weight against the entropy bound</h2>{size}"
    if any(single):
        own = [
            one["relative_error"] if other else None
            for one, other in zip(held, single, strict=True)
        ]
        error = chart(
            [
                Series("one scale per channel", own, 1, "dots"),
                Series("one scale per tensor", [one["relative_error"] if one else None for one in single], 2, "dots"),
            ],
            names, y="relative error", x="tensor", log=True, marked=marked,
        )  # fmt: skip
        page += f"<h2>Error of the weights</h2>{error}{_histogram(facts)}{_scale_table(rows)}"
    return page + _channels(facts)


def _histogram(facts: dict[str, Any]) -> str:
    counts = facts.get("histograms", {})
    if not counts:
        return ""
    labels = [str(code) for code in range(-127, 128)]
    shares = {
        name: [value / max(1, sum(values)) for value in values] for name, values in counts.items()
    }
    drawn = chart(
        [
            Series("one scale per channel", shares["per_channel"], 1, "bars"),
            Series("one scale per tensor", shares["per_tensor"], 2, "line"),
        ],
        labels, y="share of the codes", x="code", zero=True,
    )  # fmt: skip
    return f"<h2>Histogram of the codes</h2>{drawn}"


def _scale_table(rows: list[dict[str, Any]]) -> str:
    head = "".join(
        f'<th class="n">{name}</th>'
        for name in (
            "error",
            "worst",
            "codes",
            "entropy",
            "bits/w",
            "ratio",
            "error",
            "worst",
            "codes",
            "entropy",
            "bits/w",
            "ratio",
        )
    )
    top = '<tr><th></th><th colspan="6">one scale per channel (held)</th><th colspan="6">one scale per tensor</th></tr>'
    body = ""
    for row in rows:
        if "per_tensor" in row:
            cells = [
                cell
                for which in ("per_channel", "per_tensor")
                for cell in _choice_cells(row[which])
            ]
            body += f"<tr><td>{escape(row['name'])}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
    table = f"<table>{top}<tr><th>tensor</th>{head}</tr>{body}</table>"
    return f'<details><summary>Every tensor, side by side</summary><div class="wide">{table}</div></details>'


def _choice_cells(one: dict[str, Any]) -> list[str]:
    return [
        f"{one['relative_error']:.2e}",
        f"{one['worst_error']:.2e}",
        str(one["codes_in_use"]),
        f"{one['entropy_bits_per_weight']:.3f}",
        f"{one['bits_per_weight']:.3f}",
        f"{one['ratio']:.3f}",
    ]


def _channels(facts: dict[str, Any]) -> str:
    items = ""
    for note in facts.get("channels", []):
        for kind, found in note.items():
            if kind == "not_finite":
                listed = ", ".join(f"{channel} ({count})" for channel, count in found.items())
                items += (
                    f"<li>{escape(note['name'])}: NaN or infinite weights in channel {listed}</li>"
                )
            elif kind != "name":
                pairs = ", ".join(
                    f"{c} ({s:.4g})"
                    for c, s in zip(found["channels"], found["scales"], strict=True)
                )
                items += f"<li>{escape(note['name'])}: {kind.replace('_', ' ')} scale in {found['count']} channels: {pairs}</li>"
    return f"<h2>Remarkable channels</h2><ul>{items}</ul>" if items else ""


def _layers(facts: dict[str, Any], marked: set[str]) -> str:
    rows = facts.get("layers", [])
    if not rows:
        return ""
    names = [row["name"] for row in rows]
    drawn = chart(
        [
            Series("loaded against source", [row["relative_error"] for row in rows], 1),
            Series("what quantization alone costs", [row["relative_error_of_reference"] for row in rows], 3, "dots"),
            Series("loaded against reference", [row["off_reference"] or None for row in rows], 2),
        ],
        names, y="relative error", x="layer", log=True, marked=marked,
    )  # fmt: skip
    apart = chart(
        [Series("1 - cosine, loaded against source", [max(0.0, 1 - row["cosine"]) or None for row in rows], 4)],
        names, y="1 - cosine", x="layer", log=True, marked=marked,
    )  # fmt: skip
    note = (
        '<p class="note">The reference is the model class with weights that the verifier quantized itself. Where no line '
        "'loaded against reference' is drawn, every bit is the reference's.</p>"
    )
    page = f"<h2>Outputs by layer</h2>{note}{drawn}<h2>Divergence by layer</h2>{apart}"
    steps = facts.get("bisect", [])
    if steps:
        labels = [str(row["layers"]) for row in steps]
        grown = chart(
            [Series("KL(source || mixed) per token", [row["value"] for row in steps], 1)],
            labels,
            y="KL, nats",
            x="number of layers taken from the container",
            zero=True,
        )
        page += f"<h2>Source with its first layers from the container</h2>{grown}"
    return page


def _text(facts: dict[str, Any]) -> str:
    prompts = facts.get("prompts", [])
    if not prompts:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(row["prompt"])}</td><td class="text">{escape(row["source"])}</td>'
        f'<td class="text">{escape(row["loaded"])}</td>'
        f'<td class="n">{"same" if row["first_differing_token"] is None else row["first_differing_token"]}</td></tr>'
        for row in prompts
    )
    values = [
        (f"{row['prompt'][:24]!r}, token {place}", value)
        for row in prompts
        for place, value in enumerate(row["kl"])
    ]
    drawn = chart(
        [Series("KL(source || loaded)", [value for _, value in values], 1, "dots")], [label for label, _ in values],
        y="KL, nats", x="token of the source's continuations", log=True,
    )  # fmt: skip
    head = '<tr><th>prompt</th><th>source</th><th>loaded</th><th class="n">differs from token</th></tr>'
    return f"<h2>Text</h2><table>{head}{rows}</table><h2>Divergence per token</h2>{drawn}"


def _versions(facts: dict[str, Any]) -> str:
    if "versions" not in facts:
        return ""
    ours, theirs = facts["versions"], facts["written_by"]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(ours.get(name, ''))}</td><td>{escape(theirs.get(name, ''))}</td></tr>"
        for name in sorted(ours.keys() | theirs.keys())
    )
    return f"<h2>Versions</h2><table><tr><th>library</th><th>here</th><th>writer of the container</th></tr>{rows}</table>"
