"""The command line. Every command prints one clear line on failure and returns the exit code of the error's class.

Exit codes: 0 fine, 1 damaged or differs, 2 usage, 3 unsupported version or environment, 4 files or network, 5 unsafe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

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


class CodecName(StrEnum):
    """Values of --codec."""

    zstd = "zstd"
    rans = "rans"


class QualityName(StrEnum):
    """Values of --quality."""

    high = "high"
    balanced = "balanced"
    small = "small"


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
    compressed = "compressed"


class EvalDtypeName(StrEnum):
    """Values of eval's --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class FormatName(StrEnum):
    """Values of --format."""

    safetensors = "safetensors"
    compressed_tensors = "compressed-tensors"
    gguf = "gguf"


_RATE = "Rate: how many bits a weight may take"

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
    codec: Annotated[
        CodecName, typer.Option(help="zstd: fast everywhere. rans: smaller, made for GPUs, slow to decode on a CPU.")
    ] = CodecName.zstd,
    bits: Annotated[
        float | None,
        typer.Option(help="Bits per quantized weight, everything counted: any number from 2 to 8.", rich_help_panel=_RATE),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Instead of --bits: source bytes / stored bytes.", rich_help_panel=_RATE)
    ] = None,
    quality: Annotated[
        QualityName | None,
        typer.Option(help="Instead of --bits: high is 6 bits, balanced 5, small 4.", rich_help_panel=_RATE),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="self|random|none|FILE",
            help="What the model is watched on, to learn where errors hurt: a short text that it writes itself (default), "
            "random tokens, nothing, or the start of a text file.",
            rich_help_panel=_RATE,
        ),
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Quantize tensors matching this glob too. May be repeated.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Do not quantize tensors matching this glob. May be repeated.")
    ] = None,
    non_finite: Annotated[
        NonFiniteName, typer.Option(help="NaN or infinite weights under int8: stop, or keep such tensors lossless.")
    ] = NonFiniteName.error,
    chunk_kib: Annotated[
        int,
        typer.Option(min=4, max=1024, help="KiB of symbols in a chunk; small ones suit GPUs and cost some size."),
    ] = 128,
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
    push_to: Annotated[
        str | None, typer.Option("--push", metavar="USER/NAME", help="Then verify it and upload it to this Hub repository.")
    ] = None,
    private: Annotated[bool, typer.Option(help="With --push: a private repository.")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Convert a model into a container.

    Every float matrix of 65,536 weights or more becomes int8 with one scale per output channel, then entropy-coded; routers,
    positional embeddings, norms and biases keep every bit. With [bold]--scheme lossless[/bold] everything does.

    Plain int8 takes about 7 bits a weight. [bold]--bits 5[/bold] (or --ratio, or --quality) makes steps wider until the
    container has that rate, and spends the bits where the model is sensitive: it writes a short text, and the gradients on it
    decide how fine each row, column and tensor is. No data of yours is needed.

    Example: [bold]codecllm convert HuggingFaceTB/SmolLM2-135M-Instruct out/ --bits 5[/bold]
    """
    from codecllm import api
    from codecllm.converter import ConvertOptions, estimate
    from codecllm.hub import check_login, resolve
    from codecllm.quality import chosen_steps

    if push_to is not None and not dry_run:
        check_login(push_to)
    options: dict[str, Any] = {
        "scheme": scheme.value,
        "codec": codec.value,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "non_finite": non_finite.value,
        "chunk_kib": chunk_kib,
        "max_shard_bytes": parse_size(max_shard_size),
        "workers": workers,
        "force": force,
    }
    rate: dict[str, Any] = {
        "bits": bits,
        "ratio": ratio,
        "quality": None if quality is None else quality.value,
        "calibrate": calibrate,
    }
    on_stage = None if quiet or as_json else lambda text: _err.print(text, markup=False)
    if dry_run:
        folder = resolve(model, revision=revision, kind="source").folder
        steps, notes = chosen_steps(folder, options, on_stage=on_stage, **rate)
        predicted = estimate(folder, ConvertOptions(**options, **steps))
        predicted.warnings.extend(notes)
        _print_estimate(predicted, as_json)
        return
    with _progress("converting", not (quiet or as_json)) as advance:
        done = api.convert(
            model,
            out,
            revision=revision,
            baseline=baseline,
            progress=advance,
            on_stage=on_stage,
            **rate,
            **options,
        )
    if push_to is None:
        _print_conversion(done, as_json)
        return
    if not as_json:
        _print_conversion(done, as_json)
    published = _push(out, push_to, as_json, quiet, private=private, workers=workers)
    if as_json:
        typer.echo(json.dumps({**_conversion_facts(done), "push": published.to_dict()}))
    else:
        _print_push(published)


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="Container: a local folder.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Hub repository; made where it does not exist.")],
    private: Annotated[bool, typer.Option(help="Make it private; stop where it exists and is public.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made where it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request against main.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="First line of the commit.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the source, where it was converted from a local folder.")
    ] = None,
    level: Annotated[LevelName, typer.Option(help="How far to verify before anything is sent.")] = LevelName.full,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Verify a container, write its model card and upload it to the Hub.

    What does not verify is not pushed. An upload that was interrupted goes on when the command is given again. The card repeats
    the licence of the base model; a base that is gated or not freely licensed is warned of. Log in with
    [bold]hf auth login[/bold] or set HF_TOKEN.

    Example: [bold]codecllm push out/ user/SmolLM2-135M-Instruct-codecllm-int8 --private[/bold]
    """
    published = _push(
        out,
        repo,
        as_json,
        quiet,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        base_model=base_model,
        level=level.value,
        workers=workers,
    )
    if as_json:
        typer.echo(json.dumps(published.to_dict()))
    else:
        _print_push(published)


def _push(out: Path, repo: str, as_json: bool, quiet: bool, **options: Any) -> Any:
    """Pushes with a progress bar; returns the `PushReport`."""
    from codecllm.publishing import push as run

    silent = quiet or as_json
    with _progress("verifying", not silent) as advance:
        on_stage = None if silent else lambda text: _err.print(text, markup=False)
        return run(out, repo, progress=advance, on_stage=on_stage, **options)


def _print_push(published: Any) -> None:
    _print_warnings(published.warnings)
    upload = published.upload
    where = f"pull request {upload.pull_request}" if upload.pull_request else f"{upload.url} ({upload.revision})"
    _out.print(f"pushed {published.files} files to {where}, commit {upload.commit}", markup=False)
    _out.print(f"manifest sha256 {published.manifest_sha256}", markup=False)


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
            raise UsageError("--diagnose runs its own stages: it takes no --level, --require-baseline or --no-baseline")
        kept = ResidentName.dense if resident is None else resident
        options = {"first_layers": first_layers, "revision": revision, "expected_manifest_sha256": manifest_sha256}
        _diagnose(out, source, html, text, {**options, "resident": kept.value, "workers": workers}, as_json, quiet)
    if any(option is not None for option in (html, first_layers, text, resident)):
        raise UsageError("--report, --first-layers, --text and --resident go with --diagnose")
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

    words = None if text is None else _read_text(text)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise UsageError("--report names a file in a folder that exists", file=str(html))
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
    """Show what a container holds: per tensor scheme, codec, sizes, bits per weight, entropy bound, worst error.

    Of a container on the Hub only the manifest and the shards' headers are read, by range requests; no weights are downloaded.
    """
    from codecllm.info import describe_name, render

    facts = describe_name(out, revision=revision)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        render(facts, _out)


@app.command()
def export(
    container: Annotated[str, typer.Argument(metavar="CONTAINER", help="Container: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    format: Annotated[
        FormatName,
        typer.Option(
            help="safetensors: a plain model in the source's dtypes. compressed-tensors: int8 weights stay int8 "
            "(pack-quantized). gguf: refused, Q8_0 cannot hold the scales."
        ),
    ] = FormatName.safetensors,
    max_shard_size: Annotated[str, typer.Option(help="No weight file is longer.")] = "5GB",
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write a model that others read: by default plain safetensors, bit-identical from lossless, dequantized from int8.

    With [bold]--format compressed-tensors[/bold] the int8 weights of linear layers keep codes and scales, in the layout that
    transformers (with compressed-tensors installed) and vLLM know; embeddings and all else are written plainly.

    Example: [bold]codecllm export out/ packed/ --format compressed-tensors[/bold]
    """
    from codecllm import api

    with _progress("exporting", not (quiet or as_json)) as advance:
        report = api.export(
            container,
            out,
            format=format.value,
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
        ResidentName,
        typer.Option(
            help="dense: plain weights in memory. int8: codes stay in memory, half the size. "
            "compressed: weights stay as stored and are decoded when used, smallest and slowest."
        ),
    ] = ResidentName.dense,
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Load a container and print how the model continues a prompt (greedy).

    Example: [bold]codecllm generate out/ "The capital of France is"[/bold]
    """
    from codecllm.generation import generate as run

    text = run(
        out,
        prompt,
        max_new_tokens=max_new_tokens,
        resident=resident.value,
        revision=revision,
        workers=workers,
        progress=_err.is_terminal and not as_json,
    )
    typer.echo(json.dumps({"prompt": prompt, "text": text}) if as_json else text)


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


@app.command("eval")
def evaluate(
    base: Annotated[str, typer.Argument(help="The model that the others are compared with: folder, Hub id or container.")],
    candidates: Annotated[list[str], typer.Argument(help="Containers, folders, Hub ids or GGUF files.")],
    text: Annotated[Path | None, typer.Option(help="Text to read. Default: a built-in one of some 2,000 tokens.")] = None,
    tokens: Annotated[int, typer.Option(help="How much of the text at most.", min=2)] = 2048,
    window: Annotated[int, typer.Option(help="Tokens that a model sees at once.", min=2)] = 512,
    dtype: Annotated[EvalDtypeName, typer.Option(help="In which all models compute.")] = EvalDtypeName.float32,
    plot: Annotated[Path | None, typer.Option(help="Draw KL against bits (png, svg or pdf; needs codecllm[plot]).")] = None,
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
    content = None if text is None else _read_text(text)
    with _progress("evaluating", not (quiet or as_json), unit="tokens") as advance:
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
def _progress(verb: str, shown: bool, unit: str = "bytes") -> Iterator[Any]:
    """Yields a callback (name, done, total) that draws a bar on a terminal's stderr and does nothing elsewhere."""
    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn(verb), BarColumn(), *counts, TimeRemainingColumn(), TextColumn("{task.fields[tensor]}"))
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"the text is not UTF-8 ({exc.reason})", file=str(path)) from exc


def _print_evaluation(result: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("candidate", "bits/weight", "in layers", "mean KL", "99th percentile", "top-1", "perplexity"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for score in result.scores:
        bits = (f"{score.bits_per_weight:.3f}", f"{score.layer_bits_per_weight:.3f}")
        kl = (f"{score.mean_kl:.3e}", f"{score.kl_99:.3e}")
        table.add_row(score.name, *bits, *kl, f"{score.top1:.2%}", f"{score.perplexity:.3f}")
    _out.print(table)
    _out.print(
        f"\nbase {result.base}: {result.base_bits_per_weight:.3f} bits per weight, perplexity {result.base_perplexity:.3f}; "
        f"{result.tokens} tokens, computed in {result.dtype}; KL in nats per token"
    )


def _conversion_facts(done: Any) -> dict[str, Any]:
    report = done.report
    return {
        "out": str(report.out),
        "scheme": report.manifest.options.scheme,
        "codec": report.manifest.options.codec or "zstd",
        "source_bytes": report.manifest.source.tensor_bytes,
        "container_bytes": report.stored_bytes,
        "ratio": report.ratio,
        "weights": report.weights,
        "bits_per_weight": report.bits_per_weight,
        "quantized_bits_per_weight": report.quantized_bits_per_weight,
        "seconds": report.seconds,
        "manifest_sha256": done.manifest_sha256,
        "warnings": report.warnings,
        "baseline": None if done.baseline is None else done.baseline.to_dict(),
    }


def _print_examination(found: Any) -> None:
    for name, installed in found.versions.items():
        _out.print(f"{name:<24}{installed or 'not installed'}")
    for name, facts in found.devices.items():
        _out.print(f"{name:<24}{facts}")
    _out.print()
    colours = {"works": "green", "absent": "yellow", "wrong": "red"}
    for finding in found.findings:
        state = f"[{colours[finding.state]}]{finding.state:<8}[/]"
        _out.print(f"{state}{finding.device + ': ' + finding.decoder:<24}", end="")
        _out.print(finding.detail, markup=False)


def _print_conversion(done: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_conversion_facts(done)))
        return
    report = done.report
    _print_warnings(report.warnings)
    _out.print(
        f"{report.out}: {report.manifest.source.tensor_bytes:,} bytes -> {report.stored_bytes:,} bytes "
        f"in {report.seconds:.1f} s, "
        f"ratio {report.ratio:.3f}x, {report.bits_per_weight:.3f} bits per weight"
        f" ({report.quantized_bits_per_weight:.3f} of the quantized ones)"
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
    if not sys.stderr.isatty() or {"--json", "--quiet", "-q"} & set(sys.argv[1:]):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported, which is later
    try:
        app()
    except _StopError as exc:
        _fail(_stopped(exc), 128 + exc.number)
    except (CodecLLMError, OSError, MemoryError) as exc:
        if debug:
            raise
        message = str(exc) if isinstance(exc, CodecLLMError) else f"{type(exc).__name__}: {exc}"
        _fail(message, exc.exit_code if isinstance(exc, CodecLLMError) else 4, exc)
    except Exception as exc:
        if debug:
            raise
        stop = _stop_behind(exc)
        if stop is not None:
            _fail(_stopped(stop), 128 + stop.number)
        reason = " ".join(str(exc).split())[:300]
        _fail(f"unexpected {type(exc).__name__}: {reason} (codecllm --debug ... shows where)", 1, exc)


class _StopError(BaseException):
    """SIGINT or SIGTERM arrived: unwinds through every context manager, so that everything cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> None:
    raise _StopError(number)


def _stopped(stop: _StopError) -> str:
    return f"stopped by {signal.Signals(stop.number).name}; nothing half-written was left"


def _stop_behind(exc: BaseException | None) -> _StopError | None:
    """Returns the signal during whose unwinding `exc` was raised: one that arrives inside a lock's own code upsets the lock."""
    while exc is not None and not isinstance(exc, _StopError):
        exc = exc.__context__
    return exc


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
