"""Commands that judge: `verify`, `compare`, `eval`, `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from codecllm.cli.app import app
from codecllm.cli.console import progress_bar, stdout
from codecllm.cli.options import (
    EvalDtypeName,
    Json,
    LevelName,
    ResidentName,
    Revision,
    Workers,
    read_text,
)
from codecllm.formats.errors import UsageError


@app.command()
def verify(
    out: Annotated[str, typer.Argument(help="Container: a folder or a Hub id.")],
    level: Annotated[
        LevelName,
        typer.Option(
            help="structure: names, sizes, headers. checksums: every byte. full: decode all and run the baseline too."
        ),
    ] = LevelName.full,
    source: Annotated[
        str | None,
        typer.Option(help="Compare every decoded tensor with this model (folder or Hub id)."),
    ] = None,
    require_baseline: Annotated[
        bool, typer.Option(help="Fail where no baseline is recorded.")
    ] = False,
    baseline: Annotated[
        bool,
        typer.Option("--baseline/--no-baseline", help="Run the recorded prompts (level full)."),
    ] = True,
    manifest_sha256: Annotated[
        str | None, typer.Option(help="Accept only the manifest with this sha256: pins every byte.")
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose",
            help="Say why the output is wrong: stage by stage, then one paragraph. Needs the source.",
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write the diagnosis as one HTML file with plots.", metavar="FILE"
        ),
    ] = None,
    first_layers: Annotated[
        int | None,
        typer.Option(
            help="Diagnose with only the first N layers from the container, the others from the source.",
            min=0,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file for the diagnosis' perplexity instead of the built-in one."),
    ] = None,
    resident: Annotated[
        ResidentName | None,
        typer.Option(
            help="Diagnose the model that runs with its weights kept so (default dense); weights are compared in all."
        ),
    ] = None,
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Check a container: structure, checksums, decoding, ratio, and the output of the loaded model.

    One verdict line per stage; every damaged chunk is listed. Exit code 0 only when all hold. With [bold]--diagnose[/bold]:
    round trip, quantization, loaded model, layer outputs and text against the source, and what is wrong, where, and what to do.

    Example: [bold]codecllm verify out/ --source HuggingFaceTB/SmolLM2-135M-Instruct[/bold]
    """
    from codecllm.verifier import render_report
    from codecllm.verifier import verify as run

    if diagnose:
        if level is not LevelName.full or require_baseline or not baseline:
            raise UsageError(
                "--diagnose runs its own stages: it takes no --level, --require-baseline or --no-baseline"
            )
        kept = ResidentName.dense if resident is None else resident
        options = {
            "first_layers": first_layers,
            "revision": revision,
            "expected_manifest_sha256": manifest_sha256,
        }
        _diagnose(
            out,
            source,
            html,
            text,
            {**options, "resident": kept.value, "workers": workers},
            as_json,
            quiet,
        )
    if any(option is not None for option in (html, first_layers, text, resident)):
        raise UsageError("--report, --first-layers, --text and --resident go with --diagnose")
    with progress_bar("verifying", not (quiet or as_json)) as advance:
        report = run(
            out,
            level=level.value,
            source=source,
            require_baseline=require_baseline,
            baseline=baseline,
            workers=workers,
            expected_manifest_sha256=manifest_sha256,
            revision=revision,
            progress=advance,
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        render_report(report, stdout)
    raise typer.Exit(report.exit_code)


def _diagnose(
    out: str,
    source: str | None,
    html: Path | None,
    text: Path | None,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Runs a diagnosis, writes and prints its report, and exits with its code."""
    from codecllm.verifier.diagnosis import diagnose, render_diagnosis, write_html

    words = None if text is None else read_text(text)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise UsageError("--report names a file in a folder that exists", file=str(html))
    with progress_bar("diagnosing", not (quiet or as_json)) as advance:
        report = diagnose(out, source, text=words, progress=advance, **options)
    if html is not None:
        write_html(report, html)
    if as_json:
        typer.echo(report.to_json())
    else:
        render_diagnosis(report, stdout)
    raise typer.Exit(report.exit_code)


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="Container or plain model: a folder or a Hub id.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare with it.")],
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run both and compare logits and text.")
    ] = True,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare two containers or models: every tensor, then logits, then text.

    Exit code 0 when they are the same model bit for bit, 1 when anything differs.

    Example: [bold]codecllm compare out-int8/ out-lossless/[/bold]
    """
    from codecllm.verifier.model_comparison import compare_models, render_comparison

    with progress_bar("comparing", not (quiet or as_json)) as advance:
        found = compare_models(a, b, run=run, workers=workers, progress=advance)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        render_comparison(found, stdout)
    raise typer.Exit(0 if found["same"] else 1)


@app.command("eval")
def evaluate(
    base: Annotated[
        str,
        typer.Argument(
            help="The model that the others are compared with: folder, Hub id or container."
        ),
    ],
    candidates: Annotated[
        list[str], typer.Argument(help="Containers, folders, Hub ids or GGUF files.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to read. Default: a built-in one of some 2,000 tokens."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How much of the text at most.", min=2)] = 2048,
    window: Annotated[int, typer.Option(help="Tokens that a model sees at once.", min=2)] = 512,
    dtype: Annotated[
        EvalDtypeName, typer.Option(help="In which all models compute.")
    ] = EvalDtypeName.float32,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw KL against bits (png, svg or pdf; needs codecllm[plot])."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Measure how far models are from their base: KL divergence per token, top-1 agreement, perplexity, beside their bits.

    All compute in the same dtype, so that only their weights differ. Bits count all stored for weights, headers too.

    Example: [bold]codecllm eval HuggingFaceTB/SmolLM2-135M-Instruct out/ other-Q4_K_M.gguf --plot kl.png[/bold]
    """
    import torch

    from codecllm.verifier.evaluation import evaluate as run
    from codecllm.verifier.evaluation.plot import check_plot, draw

    if plot is not None:
        check_plot(plot)
    content = None if text is None else read_text(text)
    with progress_bar("evaluating", not (quiet or as_json), unit="tokens") as advance:
        result = run(
            base,
            list(candidates),
            text=content,
            max_tokens=tokens,
            window=window,
            dtype=getattr(torch, dtype.value),
            workers=workers,
            progress=advance,
        )
    if plot is not None:
        draw(result, plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print_evaluation(result)


def _print_evaluation(result: Any) -> None:
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
        table.add_row(score.name, *bits, *kl, f"{score.top1:.2%}", f"{score.perplexity:.3f}")
    stdout.print(table)
    stdout.print(
        f"\nbase {result.base}: {result.base_bits_per_weight:.3f} bits per weight, perplexity {result.base_perplexity:.3f}; "
        f"{result.tokens} tokens, computed in {result.dtype}; KL in nats per token"
    )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, which decoders work on this machine and why others do not, and test each of them.

    Every decoder decodes a small model that is made here, and its bits are compared with the slow reference's. A decoder that
    is not installed, or has no device, is no fault; one that gives other bits is, and the exit code is 1.

    Example: [bold]codecllm doctor[/bold]
    """
    from codecllm.doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print_examination(found)
    if not found.ok:
        raise typer.Exit(1)


def _print_examination(found: Any) -> None:
    for name, installed in found.versions.items():
        stdout.print(f"{name:<24}{installed or 'not installed'}")
    for name, facts in found.devices.items():
        stdout.print(f"{name:<24}{facts}")
    stdout.print()
    colours = {"works": "green", "absent": "yellow", "wrong": "red"}
    for finding in found.findings:
        state = f"[{colours[finding.state]}]{finding.state:<8}[/]"
        stdout.print(f"{state}{finding.device + ': ' + finding.decoder:<24}", end="")
        stdout.print(finding.detail, markup=False)
