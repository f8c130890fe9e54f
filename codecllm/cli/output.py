"""Prints the results of commands: as text for people, or as one JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from codecllm.cli.console import print_warnings, stdout
from codecllm.cli.json_output import output

if TYPE_CHECKING:
    from codecllm.api import Converted
    from codecllm.converter.rate.estimate import Estimate
    from codecllm.converter.report import ConversionReport
    from codecllm.converter.source.selection import LeftFile
    from codecllm.doctor import DoctorReport
    from codecllm.publishing import PushReport
    from codecllm.verifier.evaluation.evaluate import Evaluation
    from codecllm.verifier.evaluation.tasks import TaskEvaluation

MAX_NAMES = 6
"""Most names of files that a line of text holds."""


def print_push(published: PushReport) -> None:
    """Prints where a container was published."""
    print_warnings(published.warnings)
    upload = published.upload
    where = (
        f"pull request {upload.pull_request}"
        if upload.pull_request
        else f"{upload.url} ({upload.revision})"
    )
    stdout.print(f"pushed {published.files} files to {where}, commit {upload.commit}", markup=False)
    stdout.print(f"manifest sha256 {published.manifest_sha256}", markup=False)


def print_estimate(predicted: Estimate, as_json: bool) -> None:
    """Prints predicted sizes: a table of tensors and the totals."""
    if as_json:
        # The keys are the fields of the class, so that a new one cannot be forgotten.
        rows = [{name: getattr(t, name) for name in t.__slots__} for t in predicted.tensors]
        totals = {"source_bytes": predicted.source_bytes, "stored_bytes": predicted.stored_bytes}
        facts = {**totals, "tensors": rows, **_file_facts(predicted)}
        output.print({**facts, "warnings": predicted.warnings})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "dtype", "scheme", "source", "predicted", "note"):
        table.add_column(column, justify="right" if column in ("source", "predicted") else "left")
    for row in predicted.tensors:
        sizes = (f"{row.source_bytes:,}", f"{row.stored_bytes:,}")
        cells = (row.name, row.dtype, row.scheme, *sizes, row.note or "")
        # Names of tensors come from others: their brackets are no markup.
        table.add_row(*map(escape, cells))
    stdout.print(table)
    print_warnings(predicted.warnings)
    _print_files(predicted)
    ratio = predicted.source_bytes / max(1, predicted.stored_bytes)
    stdout.print(
        f"\n{predicted.source_bytes:,} bytes -> about {predicted.stored_bytes:,} bytes "
        f"({ratio:.2f}x); nothing was written"
    )


def conversion_facts(done: Converted) -> dict[str, Any]:
    """Returns the result of a conversion as JSON values."""
    report = done.report
    return {
        "out": str(report.out),
        "scheme": report.manifest.options.scheme,
        "codec": report.manifest.options.codec or "zstd",
        "refine": bool(report.manifest.options.refine),
        "source_bytes": report.manifest.source.tensor_bytes,
        "container_bytes": report.stored_bytes,
        "ratio": report.ratio,
        "weights": report.weights,
        "bits_per_weight": report.bits_per_weight,
        "quantized_bits_per_weight": report.quantized_bits_per_weight,
        "seconds": report.seconds,
        "manifest_sha256": done.manifest_sha256,
        **_file_facts(report),
        "warnings": report.warnings,
        "baseline": None if done.baseline is None else done.baseline.to_dict(),
    }


def print_conversion(done: Converted, as_json: bool) -> None:
    """Prints sizes, ratio and the manifest to pin."""
    if as_json:
        output.print(conversion_facts(done))
        return
    report = done.report
    print_warnings(report.warnings)
    _print_files(report)
    stdout.print(
        f"{report.out}: {report.manifest.source.tensor_bytes:,} bytes -> {report.stored_bytes:,} "
        "bytes "
        f"in {report.seconds:.1f} s, "
        f"ratio {report.ratio:.3f}x, {report.bits_per_weight:.3f} bits per weight"
        f" ({report.quantized_bits_per_weight:.3f} of the quantized ones)",
        markup=False,
    )
    if done.baseline is not None:
        stdout.print(done.baseline.summary())
    stdout.print(f"manifest sha256 {done.manifest_sha256}")


def _file_facts(report: ConversionReport | Estimate) -> dict[str, Any]:
    left_files = [{"name": file.name, "reason": file.reason} for file in report.left]
    return {"taken": report.taken, "left": left_files}


def _print_files(report: ConversionReport | Estimate) -> None:
    """Says which files were taken as the model's weights and which are not in the container."""
    stdout.print(f"took {report.taken}", markup=False)
    for line in _describe_left(report.left):
        stdout.print(line, markup=False)


def _describe_left(left: list[LeftFile]) -> list[str]:
    """Returns a line for each reason why files are not in the container.

    --json names every file.
    """
    names: dict[str, list[str]] = {}
    for file in left:
        names.setdefault(file.reason, []).append(file.name)
    lines = []
    for reason, group in names.items():
        # A repository may leave hundreds of files behind.
        rest = len(group) - MAX_NAMES
        more = f" and {rest} more (--json names all)" if rest > 0 else ""
        lines.append(f"left {', '.join(group[:MAX_NAMES])}{more}: {reason}")
    return lines


def print_evaluation(result: Evaluation) -> None:
    """Prints one row per candidate and the figures of the base."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "candidate",
        "bits/weight",
        "in layers",
        "mean KL",
        "99th percentile",
        "top-1",
        "perplexity",
    ):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for score in result.scores:
        bits = (f"{score.bits_per_weight:.3f}", f"{score.layer_bits_per_weight:.3f}")
        kl = (f"{score.mean_kl:.3e}", f"{score.kl_99:.3e}")
        table.add_row(
            escape(score.name), *bits, *kl, f"{score.top1:.2%}", f"{score.perplexity:.3f}"
        )
    stdout.print(table)
    stdout.print(
        f"\nbase {result.base}: {result.base_bits_per_weight:.3f} bits per weight, perplexity "
        f"{result.base_perplexity:.3f}; "
        f"{result.tokens} tokens, computed in {result.dtype}; KL in nats per token",
        markup=False,
    )


def print_tasks(result: TaskEvaluation) -> None:
    """Prints one row per task, metric and model; the base comes first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    words = ("task", "metric", "model")
    for column in (*words, "bits/weight", "value", "std. error", "same answers", "examples"):
        table.add_column(column, justify="left" if column in words else "right")
    for score in result.scores:
        error, same = (
            "" if value is None else form.format(value)
            for form, value in (("{:.4f}", score.stderr), ("{:.1%}", score.agreement))
        )
        names = map(escape, (score.task, score.metric, score.model))
        bits, value = f"{score.bits_per_weight:.3f}", f"{score.value:.4f}"
        table.add_row(*names, bits, value, error, same, str(score.examples))
    stdout.print(table)
    stdout.print(
        f"\nsame answers as {result.base}, right or wrong; computed in {result.dtype} on "
        f"{result.device}",
        markup=False,
    )


def print_doctor(report: DoctorReport) -> None:
    """Prints versions, devices and the state of each decoder."""
    for name, installed_version in report.versions.items():
        stdout.print(f"{name:<24}{installed_version or 'not installed'}")
    for name, facts in report.devices.items():
        stdout.print(f"{name:<24}{facts}")
    stdout.print()
    colours = {"works": "green", "absent": "yellow", "wrong": "red"}
    for finding in report.findings:
        state = f"[{colours[finding.state]}]{finding.state:<8}[/]"
        stdout.print(f"{state}{finding.device + ': ' + finding.decoder:<24}", end="")
        stdout.print(finding.detail, markup=False)
