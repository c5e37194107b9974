"""The exit statuses of all commands, and how a command says that it was stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

DONE, UNUSABLE, USAGE, PARTLY, FAULT, INTERRUPTED = 0, 1, 2, 3, 70, 130


@contextlib.contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Turns Ctrl-C inside into one line and exit status 130."""
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo("; ".join(["attrfast: stopped", advice, *map(str, stop.args)]), err=True)
        raise typer.Exit(INTERRUPTED) from None
