"""The command `attrfast`. Reads arguments and prints; what it does is done elsewhere.

Everything heavy is imported by the command that needs it, so that `--help` and `--version` answer
at once.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from attrfast.compare.command import compare
from attrfast.errors import AttrfastError

app = typer.Typer(
    help="Structured filter pruning by fused attribution kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attrfast {metadata.version('attrfast')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Structured filter pruning by fused attribution kernels."""


@app.command()
def env() -> None:
    """Print versions, the backends found, and why one is missing."""
    from attrfast.env import report

    typer.echo(report())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and figures.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the split.")] = 0,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Train a small network on handwritten digits and prune it to 40% of its multiply-adds."""
    from attrfast import demo as demonstration

    typer.echo(demonstration.run(out, seed=seed, progress=progress))


app.command()(compare)


def main() -> None:
    """Runs the command; attrfast's own errors become one line and exit status 1."""
    try:
        app()
    except AttrfastError as error:
        typer.echo(f"attrfast: {error}", err=True)
        sys.exit(1)
