"""Commands that look into a container and use it: `info`, `generate`, `bench`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import typer

from codecllm.cli.app import Command, app
from codecllm.cli.console import stderr, stdout
from codecllm.cli.json_output import output
from codecllm.cli.options import ContainerName, Json, ResidentName, Revision, Workers
from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.text import visible


@app.command(cls=Command)
def info(
    out: ContainerName,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show the content of a container.

    Per tensor scheme, codec, sizes, bits per weight, entropy bound, worst error.

    Of a container on the Hub only the manifest and the shards' headers are read, by range requests;
    no weights are downloaded.
    """
    from codecllm.info import describe_name, render

    facts = describe_name(out, revision=revision)
    if as_json:
        output.print(facts)
    else:
        render(facts, stdout)


@app.command(cls=Command)
def generate(
    out: ContainerName,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 32,
    resident: Annotated[
        Literal["auto", ResidentName],
        typer.Option(
            help="auto: dense if it fits, else int8 or compressed. dense: plain weights in memory. "
            "int8: codes stay in memory, half the size. compressed: weights stay as stored and are "
            "decoded when used, smallest and slowest."
        ),
    ] = "auto",
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
        resident=resident,
        revision=revision,
        workers=workers,
        progress=stderr.is_terminal and not as_json,
    )
    # A model may write escape sequences; JSON escapes them itself.
    if as_json:
        output.print({"prompt": prompt, "text": text})
    else:
        typer.echo(visible(text))


@app.command(cls=Command)
def bench(
    out: ContainerName,
    resident: Annotated[
        list[str] | None,
        typer.Option(help="A residency to measure; may be given several times. Default: all."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Measure this model too, as transformers loads it: a folder or Hub id."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, cuda:1.")] = "cpu",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 32,
    batch: Annotated[int, typer.Option(help="Texts at a time.", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch. Default: torch's own choice.", min=1)
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure load, memory and speed of a container's residencies on this machine.

    Each residency loads and generates in a process of its own; medians of three runs.

    Example: [bold]codecllm bench out/ --source MODEL[/bold]
    """
    from codecllm.bench import BenchOptions, bench

    options = BenchOptions(
        source=source,
        device=device,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        threads=threads,
        revision=revision,
    )
    if resident:
        options = replace(options, residents=tuple(resident))
    elif device == "cpu":
        options = replace(options, residents=tuple(r for r in options.residents if r != "packed"))
    rows = list(bench(out, options, lambda text: stderr.print(text, markup=False)))
    nothing = all(row.error is not None for row in rows)
    if not as_json:
        _print_bench(rows)
    elif not nothing:
        output.print({"rows": [row.to_dict() for row in rows]})
    if nothing:
        raise UnsupportedEnvironmentError("nothing could be measured", got=rows[0].error)


def _print_bench(rows: list[Any]) -> None:
    """Prints one line for each measured model; speed also relative to the first one."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weights")
    for name in ("load s", "MiB", "peak MiB", "first token s", "tokens/s", "x", "same text"):
        table.add_column(name, justify="right")
    measured = [row for row in rows if row.error is None]
    for row in measured:
        table.add_row(
            row.name,
            f"{row.load_seconds:.2f}",
            f"{row.weights_bytes / 2**20:.0f}",
            f"{row.peak_bytes / 2**20:.0f}",
            f"{row.first_token_seconds:.3f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_second / measured[0].tokens_per_second:.2f}",
            "yes" if row.same_tokens else "no",
        )
    stdout.print(table)
    for row in rows:
        if row.error is not None:
            stdout.print(f"{row.name}: {row.error}", markup=False)
