"""`attrfast report`: the page of a run. Exit status: 0, written; 1, the folder holds no run; 2, as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attrfast.commands import options


def report(
    run: Annotated[Path, typer.Argument(help="Folder of `attrfast prune`, or of `result.save`.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="report.html in RUN")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write the page of a run: one HTML file that needs no network, and pictures beside it."""
    from attrfast.reports import report as write

    page = write(run, out)
    pictures = sorted(page.with_suffix("").glob("*.png"))
    if as_json:
        tree = {"report": str(page), "pictures": [str(path) for path in pictures]}
        typer.echo(json.dumps(tree, indent=1))
    else:
        typer.echo("\n".join(str(path) for path in (page, *pictures)))
    if show:
        typer.launch(str(page))
