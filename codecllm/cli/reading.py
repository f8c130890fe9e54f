"""Commands that look into a container and use it: `info`, `generate`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from codecllm.cli.app import app
from codecllm.cli.console import stderr, stdout
from codecllm.cli.options import ContainerName, Json, ResidentName, Revision, Workers
from codecllm.text import visible


@app.command()
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
        typer.echo(json.dumps(facts, indent=1))
    else:
        render(facts, stdout)


@app.command()
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
    typer.echo(json.dumps({"prompt": prompt, "text": text}) if as_json else visible(text))
