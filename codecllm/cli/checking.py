"""Commands that judge: `verify`, `sign`, `compare`, `eval`, `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from codecllm.cli import options
from codecllm.cli.app import Command, app
from codecllm.cli.console import progress_bar, stdout
from codecllm.cli.json_output import output
from codecllm.cli.options import Json, Quiet, Revision, Workers
from codecllm.cli.output import print_doctor, print_evaluation, print_tasks
from codecllm.formats.arguments.inputs import read_user_text
from codecllm.formats.arguments.outputs import check_output
from codecllm.formats.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from codecllm.verifier.report import Report


@app.command(cls=Command)
def verify(
    out: options.ContainerName,
    level: options.Level = "full",
    source: options.CompareSource = None,
    require_baseline: options.RequireBaseline = False,
    baseline: options.RunBaseline = True,
    manifest_sha256: options.ManifestSha256 = None,
    signature: options.Signature = None,
    public_key: options.PublicKey = None,
    identity: options.Identity = None,
    issuer: options.Issuer = None,
    trust_config: options.TrustConfig = None,
    diagnose: options.Diagnose = False,
    html: options.HtmlReport = None,
    first_layers: options.FirstLayers = None,
    text: options.DiagnosisText = None,
    resident: options.DiagnosedResident = None,
    revision: Revision = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a container: structure, checksums, decoding, ratio, and the output of the loaded model.

    One verdict line per stage; every damaged chunk is listed. Exit code 0 only when all hold. With
    [bold]--diagnose[/bold]: round trip, quantization, loaded model, layer outputs and text are
    compared with the source; then one paragraph names the fault, its place, and the remedy.

    Example: [bold]codecllm verify out/ --source HuggingFaceTB/SmolLM2-135M-Instruct[/bold]
    """
    # Commands import late: torch takes seconds, and --help must be fast.
    from codecllm.verifier import render_report
    from codecllm.verifier import verify as run

    if diagnose:
        signing = (signature, public_key, identity, issuer, trust_config)
        if level != "full" or require_baseline or not baseline or any(signing):
            raise UsageError(
                "--diagnose runs its own stages: it takes no --level, --require-baseline, "
                "--no-baseline, --signature, or signer"
            )
        report = _diagnose(
            out,
            source,
            html,
            text,
            silent=quiet or as_json,
            first_layers=first_layers,
            resident=resident or "dense",
            revision=revision,
            manifest_sha256=manifest_sha256,
            workers=workers,
        )
        from codecllm.verifier.diagnosis import render_diagnosis

        # Raises typer.Exit: the checks below are those of a plain verification.
        _finish(report, as_json, render_diagnosis)
    # Refused, not ignored: the user expects an effect.
    if any(option is not None for option in (html, first_layers, text, resident)):
        raise UsageError("--report, --first-layers, --text and --resident go with --diagnose")
    with progress_bar("verifying", not (quiet or as_json)) as advance:
        report = run(
            out,
            level=level,
            source=source,
            require_baseline=require_baseline,
            baseline=baseline,
            workers=workers,
            expected_manifest_sha256=manifest_sha256,
            signature=signature,
            public_key=public_key,
            identity=identity,
            issuer=issuer,
            trust_config=trust_config,
            revision=revision,
            progress=advance,
        )
    _finish(report, as_json, render_report)


@app.command(cls=Command)
def sign(
    out: options.LocalContainer,
    private_key: options.PrivateKey,
    signature: options.SignatureFile = None,
    password: options.KeyPassword = None,
    as_json: Json = False,
) -> None:
    r"""Sign a container, so that others can verify who published it.

    The signature is a file of its own, beside the folder or at [bold]--signature[/bold]: a Sigstore
    bundle with the sha256 of every file. Structure and checksums are verified first. Needs
    codecllm\[sign].

    Example: [bold]codecllm sign out/ --private-key key.pem[/bold]
    """
    from codecllm.verifier.signature import sign as run

    path = run(out, private_key, signature, password=password)
    if as_json:
        output.print({"signature": str(path)})
    else:
        typer.echo(f"{path}: verify it with --signature and the public key")


def _finish(report: Report, as_json: bool, render: Callable[[Report, Console], None]) -> NoReturn:
    """Prints a report and exits with its code."""
    if as_json:
        output.print(report.to_dict())
    else:
        render(report, stdout)
    raise typer.Exit(report.exit_code)


def _diagnose(
    out: str,
    source: str | None,
    html: Path | None,
    text: Path | None,
    *,
    silent: bool,
    first_layers: int | None,
    resident: options.ResidentName,
    revision: str | None,
    manifest_sha256: str | None,
    workers: int | None,
) -> Report:
    """Runs a diagnosis and writes its HTML report."""
    from codecllm.verifier.diagnosis import diagnose, write_html

    # Checked first: a wrong path must not fail behind minutes of work.
    words = None if text is None else read_user_text(text)
    if html is not None:
        check_output(html, "--report", (out, source, text))
    with progress_bar("diagnosing", not silent) as advance:
        report = diagnose(
            out,
            source,
            text=words,
            first_layers=first_layers,
            resident=resident,
            revision=revision,
            expected_manifest_sha256=manifest_sha256,
            workers=workers,
            progress=advance,
        )
    if html is not None:
        write_html(report, html)
    return report


@app.command(cls=Command)
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
    quiet: Quiet = False,
) -> None:
    """Compare two containers or models: every tensor and side file, then logits, then text.

    Exit code 0 when they are the same model bit for bit, 1 when anything differs: a weight, or what
    a file says that transformers may read (config, generation settings, tokenizer, code).

    Example: [bold]codecllm compare out-int8/ out-lossless/[/bold]
    """
    from codecllm.verifier.comparison_rendering import render_comparison
    from codecllm.verifier.model_comparison import compare_models

    with progress_bar("comparing", not (quiet or as_json)) as advance:
        comparison = compare_models(a, b, run=run, workers=workers, progress=advance)
    if as_json:
        output.print(comparison)
    else:
        render_comparison(comparison, stdout)
    # As with `cmp` and `diff`.
    raise typer.Exit(0 if comparison["same"] else 1)


@app.command("eval", cls=Command)
def evaluate(
    base: Annotated[
        str,
        typer.Argument(
            help="The model that the others are compared with: folder, Hub id or container."
        ),
    ],
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Containers, folders, Hub ids or GGUF files.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to read. Default: a built-in one of some 2,000 tokens."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How much of the text at most.", min=2)] = 2048,
    window: Annotated[int, typer.Option(help="Tokens that a model sees at once.", min=2)] = 512,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.yaml[,...]",
            help="Tasks of lm-evaluation-harness in place of a text, by name or as YAML files "
            r"(needs codecllm\[eval]). A file may run code that it names.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="With --tasks: examples of each task at most.", min=1)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="With --tasks: sequences that a model reads at once.", min=1)
    ] = 8,
    dtype: Annotated[
        options.EvalDtypeName, typer.Option(help="In which all models compute.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where all models run.")
    ] = "cpu",
    plot: Annotated[
        Path | None,
        typer.Option(help=r"Draw KL against bits (png, svg or pdf; needs codecllm\[plot])."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far models are from their base.

    KL divergence per token, top-1 agreement, perplexity, beside their bits. With --tasks: accuracy
    and its standard error, and the share of answers that are the base's.

    All compute in the same dtype, so that only their weights differ. Bits count all stored for
    weights, headers too.

    Example: [bold]codecllm eval HuggingFaceTB/SmolLM2-135M-Instruct out/ other-Q4_K_M.gguf --plot
    kl.png[/bold]
    """
    import torch

    others: list[str | Path] = list(candidates or ())
    models: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device, "workers": workers}
    silent = quiet or as_json
    if tasks is not None:
        if text is not None or plot is not None:
            raise UsageError("--tasks takes no --text and draws no --plot")
        from codecllm.verifier.evaluation.tasks import evaluate_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        with progress_bar("evaluating", not silent, unit="models") as advance:
            answers = evaluate_tasks(
                base,
                others,
                names,
                limit=limit,
                batch_size=batch_size,
                progress=advance,
                **models,
            )
        if as_json:
            output.print(answers.to_dict())
        else:
            print_tasks(answers)
        return
    if limit is not None:
        raise UsageError("--limit is of --tasks; --tokens limits a text")
    from codecllm.verifier.evaluation import evaluate as run
    from codecllm.verifier.evaluation.plot import check_plot, draw

    if plot is not None:
        # Before the evaluation: without matplotlib its result would be lost.
        check_plot(plot, (base, *others, text))
    content = None if text is None else read_user_text(text)
    with progress_bar("evaluating", not silent, unit="tokens") as advance:
        result = run(
            base,
            others,
            text=content,
            max_tokens=tokens,
            window=window,
            progress=advance,
            **models,
        )
    if plot is not None:
        draw(result, plot)
    if as_json:
        output.print(result.to_dict())
    else:
        print_evaluation(result)


@app.command(cls=Command)
def doctor(as_json: Json = False) -> None:
    """Show installed packages and test every decoder of this machine.

    Every decoder decodes a small model that is made here, and its bits are compared with the slow
    reference's. A decoder that is not installed, or has no device, is no fault; one that gives
    other bits is, and the exit code is 1.

    Example: [bold]codecllm doctor[/bold]
    """
    from codecllm.doctor import examine

    report = examine()
    if as_json:
        output.print(report.to_dict())
    else:
        print_doctor(report)
    if not report.ok:
        raise typer.Exit(1)
