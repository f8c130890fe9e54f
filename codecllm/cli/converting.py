"""Commands that make something: `convert`, `export`, `push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from codecllm.cli.app import app
from codecllm.cli.console import print_warnings, progress_bar, stderr, stdout
from codecllm.cli.options import (
    CodecName,
    FormatName,
    Json,
    LevelName,
    NonFiniteName,
    QualityName,
    Revision,
    SchemeName,
    Workers,
    parse_size,
)

MAX_NAMES = 6
"""Most names of files that a line of text holds."""

RATE_PANEL = "Rate: how many bits a weight may take"


@app.command()
def convert(
    model: Annotated[
        str, typer.Argument(help="Hub id (user/name) or local folder with safetensors weights.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    scheme: Annotated[
        SchemeName, typer.Option(help="int8: one scale per output channel. lossless: every bit.")
    ] = SchemeName.int8,
    codec: Annotated[
        CodecName,
        typer.Option(
            help="zstd: fast everywhere. rans: smaller, made for GPUs, slow to decode on a CPU."
        ),
    ] = CodecName.zstd,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per quantized weight, everything counted: any number from 2 to 8.",
            rich_help_panel=RATE_PANEL,
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Instead of --bits: source bytes / stored bytes.", rich_help_panel=RATE_PANEL
        ),
    ] = None,
    quality: Annotated[
        QualityName | None,
        typer.Option(
            help="Instead of --bits: high is 6 bits, balanced 5, small 4.",
            rich_help_panel=RATE_PANEL,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="self|random|none|FILE",
            help="What the model is watched on, to learn where errors hurt: a short text that it writes itself (default), "
            "random tokens, nothing, or the start of a text file.",
            rich_help_panel=RATE_PANEL,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Let each column of a linear layer make up for the rounding of those before it: 0.1 bit a weight less at "
            "equal quality. The model writes a text four times as long, and calibrating takes four times as long. Needs a "
            "calibration, and room for a temporary file: 4 bytes for each pair of a layer's inputs.",
            rich_help_panel=RATE_PANEL,
        ),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Quantize tensors matching this glob too. May be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Do not quantize tensors matching this glob. May be repeated."),
    ] = None,
    non_finite: Annotated[
        NonFiniteName,
        typer.Option(
            help="NaN or infinite weights under int8: stop, or keep such tensors lossless."
        ),
    ] = NonFiniteName.error,
    chunk_kib: Annotated[
        int,
        typer.Option(
            min=4,
            max=1024,
            help="KiB of symbols in a chunk; small ones suit GPUs and cost some size.",
        ),
    ] = 128,
    max_shard_size: Annotated[
        str, typer.Option(help="No shard is longer: bytes, or with kB, MB, GB, KiB, MiB, GiB.")
    ] = "5GB",
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
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code",
            help="Copy the repository's Python files too (auto_map). They run only where a loading call says "
            "trust_remote_code=True.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Predict sizes per tensor and in all; write nothing.")
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="USER/NAME",
            help="Then verify it and upload it to this Hub repository.",
        ),
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
    decide how fine each row, column and tensor is. No data of yours is needed. [bold]--refine[/bold] gets more out of the same
    bits, for a conversion that takes minutes longer.

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
        "with_code": with_code,
    }
    rate: dict[str, Any] = {
        "bits": bits,
        "ratio": ratio,
        "quality": None if quality is None else quality.value,
        "calibrate": calibrate,
        "refine": refine,
    }
    on_stage = None if quiet or as_json else lambda text: stderr.print(text, markup=False)
    if dry_run:
        folder = resolve(model, revision=revision, kind="source").folder
        steps, notes = chosen_steps(folder, options, on_stage=on_stage, **rate)
        predicted = estimate(folder, ConvertOptions(**options, **steps))
        predicted.warnings.extend(notes)
        _print_estimate(predicted, as_json)
        return
    with progress_bar("converting", not (quiet or as_json)) as advance:
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
def export(
    container: Annotated[
        str, typer.Argument(metavar="CONTAINER", help="Container: a folder or a Hub id.")
    ],
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

    with progress_bar("exporting", not (quiet or as_json)) as advance:
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
        typer.echo(
            json.dumps(
                {
                    "out": str(report.out),
                    "shards": report.shards,
                    "tensor_bytes": report.tensor_bytes,
                }
            )
        )
    else:
        stdout.print(
            f"wrote {report.tensor_bytes:,} bytes of tensors in {len(report.shards)} files to {report.out}"
        )


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="Container: a local folder.")],
    repo: Annotated[
        str,
        typer.Argument(metavar="USER/NAME", help="Hub repository; made where it does not exist."),
    ],
    private: Annotated[
        bool, typer.Option(help="Make it private; stop where it exists and is public.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; made where it does not exist.")
    ] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request against main.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="First line of the commit.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the source, where it was converted from a local folder."),
    ] = None,
    level: Annotated[
        LevelName, typer.Option(help="How far to verify before anything is sent.")
    ] = LevelName.full,
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
    with progress_bar("verifying", not silent) as advance:
        on_stage = None if silent else lambda text: stderr.print(text, markup=False)
        return run(out, repo, progress=advance, on_stage=on_stage, **options)


def _print_push(published: Any) -> None:
    print_warnings(published.warnings)
    upload = published.upload
    where = (
        f"pull request {upload.pull_request}"
        if upload.pull_request
        else f"{upload.url} ({upload.revision})"
    )
    stdout.print(f"pushed {published.files} files to {where}, commit {upload.commit}", markup=False)
    stdout.print(f"manifest sha256 {published.manifest_sha256}", markup=False)


def _print_estimate(predicted: Any, as_json: bool) -> None:
    if as_json:
        rows = [{name: getattr(t, name) for name in t.__slots__} for t in predicted.tensors]
        totals = {"source_bytes": predicted.source_bytes, "stored_bytes": predicted.stored_bytes}
        facts = {**totals, "tensors": rows, **_file_facts(predicted)}
        typer.echo(json.dumps({**facts, "warnings": predicted.warnings}))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "dtype", "scheme", "source", "predicted", "note"):
        table.add_column(column, justify="right" if column in ("source", "predicted") else "left")
    for row in predicted.tensors:
        sizes = (f"{row.source_bytes:,}", f"{row.stored_bytes:,}")
        table.add_row(row.name, row.dtype, row.scheme, *sizes, row.note or "")
    stdout.print(table)
    print_warnings(predicted.warnings)
    _print_files(predicted)
    ratio = predicted.source_bytes / max(1, predicted.stored_bytes)
    stdout.print(
        f"\n{predicted.source_bytes:,} bytes -> about {predicted.stored_bytes:,} bytes ({ratio:.2f}x); nothing was written"
    )


def _conversion_facts(done: Any) -> dict[str, Any]:
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


def _file_facts(report: Any) -> dict[str, Any]:
    left = [{"name": one.name, "reason": one.reason} for one in report.left]
    return {"taken": report.taken, "left": left}


def _print_files(report: Any) -> None:
    """Says which files were taken as the model's weights and which are not in the container."""
    stdout.print(f"took {report.taken}", markup=False)
    for line in _describe_left(report.left):
        stdout.print(line, markup=False)


def _describe_left(left: list[Any]) -> list[str]:
    """Returns a line for each reason why files are not in the container; --json names every file."""
    names: dict[str, list[str]] = {}
    for one in left:
        names.setdefault(one.reason, []).append(one.name)
    lines = []
    for reason, group in names.items():
        rest = len(group) - MAX_NAMES
        more = f" and {rest} more (--json names all)" if rest > 0 else ""
        lines.append(f"left {', '.join(group[:MAX_NAMES])}{more}: {reason}")
    return lines


def _print_conversion(done: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_conversion_facts(done)))
        return
    report = done.report
    print_warnings(report.warnings)
    _print_files(report)
    stdout.print(
        f"{report.out}: {report.manifest.source.tensor_bytes:,} bytes -> {report.stored_bytes:,} bytes "
        f"in {report.seconds:.1f} s, "
        f"ratio {report.ratio:.3f}x, {report.bits_per_weight:.3f} bits per weight"
        f" ({report.quantized_bits_per_weight:.3f} of the quantized ones)"
    )
    if done.baseline is not None:
        stdout.print(done.baseline.summary())
    stdout.print(f"manifest sha256 {done.manifest_sha256}")
