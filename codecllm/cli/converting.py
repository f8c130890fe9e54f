"""Commands that make something: `convert`, `export`, `push`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codecllm.cli import options
from codecllm.cli.app import Command, app
from codecllm.cli.console import progress_bar, stderr, stdout
from codecllm.cli.json_output import output
from codecllm.cli.options import Json, Quiet, Revision, Workers, parse_size
from codecllm.cli.output import conversion_facts, print_conversion, print_estimate, print_push

if TYPE_CHECKING:
    from codecllm.publishing import PushReport


@app.command(cls=Command)
def convert(
    model: options.SourceName,
    out: options.OutFolder,
    scheme: options.Scheme = "int8",
    codec: options.Codec = "zstd",
    bits: options.Bits = None,
    ratio: options.Ratio = None,
    quality: options.Quality = None,
    code_bits: options.CodeBits = None,
    calibrate: options.Calibrate = None,
    refine: options.Refine = False,
    device: options.Device = "cpu",
    column_scales: options.ColumnScales = True,
    include: options.Include = None,
    exclude: options.Exclude = None,
    non_finite: options.NonFinite = "error",
    chunk_kib: options.ChunkKib = 128,
    max_shard_size: options.MaxShardSize = "5GB",
    workers: Workers = None,
    baseline: options.ConvertBaseline = None,
    revision: Revision = None,
    force: options.Force = False,
    with_code: options.WithCode = False,
    dry_run: options.DryRun = False,
    push_to: options.PushTo = None,
    private: options.PushPrivate = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model into a container.

    Every float matrix of 65,536 weights or more becomes int8 with one scale per output channel,
    then entropy-coded; routers, positional embeddings, norms and biases keep every bit. With
    [bold]--scheme lossless[/bold] everything does.

    Plain int8 takes about 7 bits a weight. [bold]--bits 5[/bold] (or --ratio, or --quality) makes
    steps wider until the container has that rate, and spends the bits where the model is sensitive:
    its gradients on a short text decide how fine each row, column and tensor is. No data of yours
    is needed. [bold]--refine[/bold] gets more out of the same bits, for a conversion that takes
    longer; of large models [bold]--device cuda[/bold] makes it minutes.

    Example: [bold]codecllm convert HuggingFaceTB/SmolLM2-135M-Instruct out/ --bits 5[/bold]
    """
    from codecllm import api
    from codecllm.converter import ConvertOptions
    from codecllm.converter.options import requested_rate
    from codecllm.hub import check_login

    if push_to is not None and not dry_run:
        # Before the conversion: without a token its result could not be pushed.
        check_login(push_to)
    convert_options = ConvertOptions(
        scheme=scheme,
        codec=codec,
        rate=requested_rate(bits, ratio, quality, code_bits, calibrate, refine, column_scales),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        non_finite=non_finite,
        chunk_kib=chunk_kib,
        max_shard_bytes=parse_size(max_shard_size),
        workers=workers,
        force=force,
        with_code=with_code,
        device=device,
    )
    access, silent = api.HubAccess(revision), quiet or as_json
    if dry_run:
        print_estimate(
            api.predict(model, convert_options, access, on_stage=_teller(silent)), as_json
        )
        return
    with progress_bar("converting", not silent) as advance:
        conversion = api.run_conversion(
            model,
            out,
            convert_options,
            access,
            baseline=baseline,
            progress=advance,
            on_stage=_teller(silent),
        )
    if push_to is None:
        print_conversion(conversion, as_json)
        return
    if not as_json:
        print_conversion(conversion, as_json)
    # The conversion is reported before: a push that fails must not hide it.
    push_report = _push(out, push_to, silent, private=private, workers=workers)
    if as_json:
        output.print({**conversion_facts(conversion), "push": push_report.to_dict()})
    else:
        print_push(push_report)


@app.command(cls=Command)
def export(
    container: Annotated[
        str, typer.Argument(metavar="CONTAINER", help="Container: a folder or a Hub id.")
    ],
    out: options.OutFolder,
    format: Annotated[
        options.FormatName,
        typer.Option(
            help="safetensors: a plain model in the source's dtypes. compressed-tensors: linear "
            "layers keep codes and scales (pack-quantized). gguf: refused, Q8_0 cannot hold the "
            "scales."
        ),
    ] = "safetensors",
    width: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=8,
            help="Bits of a code, for compressed-tensors. Default: the fewest that hold all codes.",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="No weight file is longer.")] = "5GB",
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model that others read.

    By default plain safetensors, bit-identical from lossless, dequantized from int8.

    With [bold]--format compressed-tensors[/bold] linear layers keep codes of 2 to 8 bits and one
    scale per output channel, in the layout that transformers (with compressed-tensors installed)
    and vLLM know; embeddings and all else are written plainly. Scales of columns do not fit: make
    containers with --bits by [bold]convert --no-column-scales[/bold] for it.

    Example: [bold]codecllm export out/ packed/ --format compressed-tensors[/bold]
    """
    from codecllm import api

    with progress_bar("exporting", not (quiet or as_json)) as advance:
        report = api.export(
            container,
            out,
            format=format,
            width=width,
            revision=revision,
            workers=workers,
            max_shard_bytes=parse_size(max_shard_size),
            progress=advance,
        )
    if as_json:
        facts = {
            "out": str(report.out),
            "shards": report.shards,
            "tensor_bytes": report.tensor_bytes,
            "notes": list(report.notes),
        }
        output.print(facts)
    else:
        for note in report.notes:
            stdout.print(note, markup=False)
        stdout.print(
            f"wrote {report.tensor_bytes:,} bytes of tensors in {len(report.shards)} files to "
            f"{report.out}",
            markup=False,
        )


@app.command(cls=Command)
def push(
    out: options.LocalContainer,
    repo: Annotated[
        str,
        typer.Argument(metavar="USER/NAME", help="Hub repository; made where it does not exist."),
    ],
    private: options.Private = False,
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
        options.LevelName, typer.Option(help="How far to verify before anything is sent.")
    ] = "full",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Verify a container, write its model card and upload it to the Hub.

    A container that does not verify is not pushed. An upload that was interrupted goes on when the
    command is given again. The card repeats the licence of the base model; a base that is gated or
    not freely licensed is warned of. Log in with [bold]hf auth login[/bold] or set HF_TOKEN.

    Example: [bold]codecllm push out/ user/SmolLM2-135M-Instruct-codecllm-int8 --private[/bold]
    """
    push_report = _push(
        out,
        repo,
        quiet or as_json,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        base_model=base_model,
        level=level,
        workers=workers,
    )
    if as_json:
        output.print(push_report.to_dict())
    else:
        print_push(push_report)


def _push(
    out: Path,
    repo: str,
    silent: bool,
    *,
    private: bool,
    workers: int | None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    level: options.LevelName = "full",
) -> PushReport:
    """Pushes a container, with a progress bar unless `silent`."""
    from codecllm.publishing import push as run

    with progress_bar("verifying", not silent) as advance:
        return run(
            out,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            base_model=base_model,
            level=level,
            workers=workers,
            progress=advance,
            on_stage=_teller(silent),
        )


def _teller(silent: bool) -> Callable[[str], None] | None:
    """Returns a function that prints the sentence of a stage on stderr.

    None where nothing is to be printed.
    """
    return None if silent else lambda text: stderr.print(text, markup=False)
