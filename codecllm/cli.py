"""The command line. Every command prints one clear line on failure and returns the exit code of the error's class.

Exit codes: 0 fine, 1 damaged or differs, 2 usage, 3 unsupported version or environment, 4 files or network, 5 unsafe.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from codecllm import FORMAT_VERSION, __version__
from codecllm.formats.errors import CodecLLMError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Model weights, entropy-coded: convert once, verify anywhere, load into transformers.",
    epilog="Exit codes: 0 fine, 1 damaged or differs, 2 usage, 3 unsupported, 4 files or network, 5 unsafe.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


class SchemeName(StrEnum):
    """Values of --scheme."""

    int8 = "int8"
    lossless = "lossless"


class NonFiniteName(StrEnum):
    """Values of --non-finite."""

    error = "error"
    lossless = "lossless"


class LevelName(StrEnum):
    """Values of --level."""

    structure = "structure"
    checksums = "checksums"
    full = "full"


class ResidentName(StrEnum):
    """Values of --resident."""

    dense = "dense"
    int8 = "int8"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, where the model is a Hub id.")]
Workers = Annotated[int | None, typer.Option(help="Threads. Default: one per core. Never changes a byte.", min=1)]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"codecllm {__version__}, container format {FORMAT_VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Takes the options that stand before the command."""


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Hub id (user/name) or local folder with safetensors weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    scheme: Annotated[
        SchemeName, typer.Option(help="int8: one scale per output channel. lossless: every bit.")
    ] = SchemeName.int8,
    include: Annotated[list[str] | None, typer.Option(help="Quantize tensors matching this glob too. May be repeated.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Do not quantize tensors matching this glob. May be repeated.")
    ] = None,
    non_finite: Annotated[
        NonFiniteName, typer.Option(help="NaN or infinite weights under int8: stop, or keep such tensors lossless.")
    ] = NonFiniteName.error,
    max_shard_size: Annotated[str, typer.Option(help="No shard is longer: bytes, or with kB, MB, GB, KiB, MiB, GiB.")] = "5GB",
    workers: Workers = None,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Run the source and the converted model on fixed prompts and record both. Default: if under 10 minutes.",
        ),
    ] = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option(help="Replace a container that is in the way.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Predict sizes per tensor and in all; write nothing.")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Convert a model into a container.

    Every float matrix of 65,536 weights or more becomes int8 with one scale per output channel, then entropy-coded; routers,
    positional embeddings, norms and biases keep every bit. With [bold]--scheme lossless[/bold] everything does.

    Example: [bold]codecllm convert HuggingFaceTB/SmolLM2-135M-Instruct out/[/bold]
    """
    from codecllm import api
    from codecllm.converter import ConvertOptions, estimate
    from codecllm.hub import resolve

    options: dict[str, Any] = {
        "scheme": scheme.value,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "non_finite": non_finite.value,
        "max_shard_bytes": parse_size(max_shard_size),
        "workers": workers,
        "force": force,
    }
    if dry_run:
        _print_estimate(estimate(resolve(model, revision=revision, kind="source").folder, ConvertOptions(**options)), as_json)
        return
    with _progress("converting", not (quiet or as_json)) as advance:
        done = api.convert(
            model,
            out,
            revision=revision,
            baseline=baseline,
            progress=advance,
            on_stage=None if quiet or as_json else lambda text: _err.print(text),
            **options,
        )
    _print_conversion(done, as_json)


@app.command()
def verify(
    out: Annotated[str, typer.Argument(help="Container: a folder or a Hub id.")],
    level: Annotated[
        LevelName,
        typer.Option(
            help="structure: names, sizes, headers. checksums: every byte. full: decode all and run the baseline too."
        ),
    ] = LevelName.full,
    source: Annotated[str | None, typer.Option(help="Compare every decoded tensor with this model (folder or Hub id).")] = None,
    require_baseline: Annotated[bool, typer.Option(help="Fail where no baseline is recorded.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="Run the recorded prompts (level full).")] = True,
    manifest_sha256: Annotated[
        str | None, typer.Option(help="Accept only the manifest with this sha256: pins every byte.")
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option("--diagnose", help="Say why the output is wrong: stage by stage, then one paragraph. Needs the source."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--report", help="Write the diagnosis as one HTML file with plots.", metavar="FILE")
    ] = None,
    first_layers: Annotated[
        int | None,
        typer.Option(help="Diagnose with only the first N layers from the container, the others from the source.", min=0),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file for the diagnosis' perplexity instead of the built-in one.")
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
            raise UsageError("--diagnose runs its own stages: it takes no --level, --require-baseline or --no-baseline")
        options = {"first_layers": first_layers, "revision": revision, "expected_manifest_sha256": manifest_sha256}
        _diagnose(out, source, html, text, {**options, "workers": workers}, as_json, quiet)
    if html is not None or first_layers is not None or text is not None:
        raise UsageError("--report, --first-layers and --text go with --diagnose")
    with _progress("verifying", not (quiet or as_json)) as advance:
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
        render_report(report, _out)
    raise typer.Exit(report.exit_code)


def _diagnose(
    out: str, source: str | None, html: Path | None, text: Path | None, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Runs a diagnosis, writes and prints its report, and exits with its code."""
    from codecllm.verifier.diagnosis import diagnose, render_diagnosis, write_html

    words = None if text is None else text.read_text(encoding="utf-8", errors="replace")
    with _progress("diagnosing", not (quiet or as_json)) as advance:
        report = diagnose(out, source, text=words, progress=advance, **options)
    if html is not None:
        write_html(report, html)
    if as_json:
        typer.echo(report.to_json())
    else:
        render_diagnosis(report, _out)
    raise typer.Exit(report.exit_code)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Container or plain model: a folder or a Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare with it.")],
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run both and compare logits and text.")] = True,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare two containers or models: every tensor, then logits, then text.

    Exit code 0 when they are the same model bit for bit, 1 when anything differs.

    Example: [bold]codecllm compare out-int8/ out-lossless/[/bold]
    """
    from codecllm.verifier.model_comparison import compare_models, render_comparison

    with _progress("comparing", not (quiet or as_json)) as advance:
        found = compare_models(a, b, run=run, workers=workers, progress=advance)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        render_comparison(found, _out)
    raise typer.Exit(0 if found["same"] else 1)


@app.command()
def info(
    out: Annotated[str, typer.Argument(help="Container: a folder or a Hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a container holds: per tensor scheme, codec, sizes, bits per weight, entropy bound, worst error."""
    from codecllm.hub import resolve
    from codecllm.info import describe, render

    facts = describe(resolve(out, revision=revision).folder)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        render(facts, _out)


@app.command()
def export(
    container: Annotated[str, typer.Argument(metavar="CONTAINER", help="Container: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    max_shard_size: Annotated[str, typer.Option(help="No weight file is longer.")] = "5GB",
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write the plain safetensors model back: bit-identical tensors from lossless, dequantized ones from int8."""
    from codecllm import api

    with _progress("exporting", not (quiet or as_json)) as advance:
        report = api.export(
            container,
            out,
            revision=revision,
            workers=workers,
            max_shard_bytes=parse_size(max_shard_size),
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps({"out": str(report.out), "shards": report.shards, "tensor_bytes": report.tensor_bytes}))
    else:
        _out.print(f"wrote {report.tensor_bytes:,} bytes of tensors in {len(report.shards)} files to {report.out}")


@app.command()
def generate(
    out: Annotated[str, typer.Argument(help="Container: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 32,
    resident: Annotated[
        ResidentName, typer.Option(help="dense: plain weights in memory. int8: codes stay in memory, half the size.")
    ] = ResidentName.dense,
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Load a container and print how the model continues a prompt (greedy).

    Example: [bold]codecllm generate out/ "The capital of France is"[/bold]
    """
    from codecllm.generation import generate as run

    text = run(out, prompt, max_new_tokens=max_new_tokens, resident=resident.value, revision=revision, workers=workers)
    typer.echo(json.dumps({"prompt": prompt, "text": text}) if as_json else text)


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as `5GB`, `512MiB` or `1000000`.

    Raises:
        UsageError: not a positive size.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("abgikmABGIKM")
    unit = text.strip()[len(number) :].lower()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as exc:
        raise UsageError("not a size", got=text, expected="for example 5GB or 512MiB") from exc
    if size < 1:
        raise UsageError("size must be positive", got=text)
    return size


@contextmanager
def _progress(verb: str, shown: bool) -> Iterator[Any]:
    """Yields a callback (name, done, total) that draws a bar on a terminal's stderr and does nothing elsewhere."""
    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}"),
    )
    with Progress(*columns, console=_err, transient=True, disable=not (shown and _err.is_terminal)) as bar:
        task = bar.add_task(verb, total=None, tensor="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, tensor=name)

        yield advance


def _print_estimate(predicted: Any, as_json: bool) -> None:
    if as_json:
        rows = [{name: getattr(t, name) for name in t.__slots__} for t in predicted.tensors]
        totals = {"source_bytes": predicted.source_bytes, "stored_bytes": predicted.stored_bytes}
        typer.echo(json.dumps({**totals, "tensors": rows, "warnings": predicted.warnings}))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "dtype", "scheme", "source", "predicted", "note"):
        table.add_column(column, justify="right" if column in ("source", "predicted") else "left")
    for row in predicted.tensors:
        sizes = (f"{row.source_bytes:,}", f"{row.stored_bytes:,}")
        table.add_row(row.name, row.dtype, row.scheme, *sizes, row.note or "")
    _out.print(table)
    _print_warnings(predicted.warnings)
    ratio = predicted.source_bytes / max(1, predicted.stored_bytes)
    _out.print(
        f"\n{predicted.source_bytes:,} bytes -> about {predicted.stored_bytes:,} bytes ({ratio:.2f}x); nothing was written"
    )


def _print_conversion(done: Any, as_json: bool) -> None:
    report = done.report
    if as_json:
        facts = {
            "out": str(report.out),
            "scheme": report.manifest.options.scheme,
            "source_bytes": report.manifest.source.tensor_bytes,
            "container_bytes": report.stored_bytes,
            "ratio": report.ratio,
            "weights": report.weights,
            "bits_per_weight": report.bits_per_weight,
            "seconds": report.seconds,
            "manifest_sha256": done.manifest_sha256,
            "warnings": report.warnings,
            "baseline": None if done.baseline is None else done.baseline.to_dict(),
        }
        typer.echo(json.dumps(facts))
        return
    _print_warnings(report.warnings)
    _out.print(
        f"{report.out}: {report.manifest.source.tensor_bytes:,} bytes -> {report.stored_bytes:,} bytes "
        f"in {report.seconds:.1f} s, "
        f"ratio {report.ratio:.3f}x, {report.bits_per_weight:.3f} bits per weight"
    )
    if done.baseline is not None:
        _out.print(done.baseline.summary())
    _out.print(f"manifest sha256 {done.manifest_sha256}")


def _print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        _err.print(f"warning: {warning}", style="yellow", markup=False)


def main() -> None:
    """Runs the command line and exits with its code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    debug = "--debug" in sys.argv[1:2]
    try:
        app()
    except _StopError as exc:
        _fail(f"stopped by {signal.Signals(exc.number).name}; nothing half-written was left", 128 + exc.number)
    except (CodecLLMError, OSError, MemoryError) as exc:
        if debug:
            raise
        message = str(exc) if isinstance(exc, CodecLLMError) else f"{type(exc).__name__}: {exc}"
        _fail(message, exc.exit_code if isinstance(exc, CodecLLMError) else 4, exc)
    except Exception as exc:
        if debug:
            raise
        reason = " ".join(str(exc).split())[:300]
        _fail(f"unexpected {type(exc).__name__}: {reason} (codecllm --debug ... shows where)", 1, exc)


class _StopError(BaseException):
    """SIGINT or SIGTERM arrived: unwinds through every context manager, so that everything cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> None:
    raise _StopError(number)


def _fail(message: str, code: int, error: BaseException | None = None) -> None:
    """Prints one line (with --json one object on stdout) and exits."""
    if "--json" in sys.argv[1:]:
        facts: dict[str, Any] = {"error": type(error).__name__ if error else "Interrupted", "message": message}
        for name in ("file", "tensor", "chunk", "byte", "expected", "got"):
            value = getattr(error, name, None)
            if value is not None:
                facts[name] = value if isinstance(value, (int, str)) else str(value)
        typer.echo(json.dumps({**facts, "exit_code": code}))
    else:
        _err.print(f"error: {message}", style="red", markup=False)
    sys.exit(code)
