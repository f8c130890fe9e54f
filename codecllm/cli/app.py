"""The command line itself, and the options that stand before a command."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from codecllm import FORMAT_VERSION, __version__
from codecllm.hub import check_environment

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    # `process.main` prints one line; typer would print a box before it.
    pretty_exceptions_enable=False,
    help="Model weights, entropy-coded: convert once, verify anywhere, load into transformers.",
    epilog="Exit codes: 0 fine, 1 damaged or differs, 2 usage, 3 unsupported, 4 files, network "
    "or memory, 5 unsafe, 6 unexpected.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Command(TyperCommand):
    """A command that refuses wrong variables of the Hub: behind its options, so that help works."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        check_environment()  # before it imports the libraries that read them
        return super().invoke(ctx)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"codecllm {__version__}, container format {FORMAT_VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Takes the options that stand before the command."""
