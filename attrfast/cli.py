"""The command `attrfast`. Reads arguments and prints; what it does is done elsewhere.

Everything heavy is imported by the command that needs it, so that `--help` and `--version` answer
at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from attrfast.commands import options
from attrfast.commands.bench import bench
from attrfast.commands.compare import compare
from attrfast.commands.prune import prune
from attrfast.commands.report import report
from attrfast.commands.score import score
from attrfast.commands.status import FAULT, INTERRUPTED, UNUSABLE, interruptible
from attrfast.errors import AttrfastError

app = typer.Typer(
    help="Structured filter pruning by fused attribution kernels.",
    no_args_is_help=True,
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


app.command()(score)
app.command()(prune)
app.command()(compare)
app.command()(report)
app.command()(bench)


@app.command()
def env(as_json: options.Json = False) -> None:
    """Print versions, the backends found, and why one is missing."""
    from attrfast.env import facts
    from attrfast.env import report as text

    typer.echo(json.dumps(facts(), indent=1) if as_json else text())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and figures.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the split.")] = 0,
    progress: options.Progress = True,
) -> None:
    """Train a small network on handwritten digits and prune it to 40% of its multiply-adds."""
    from attrfast import demo as demonstration

    with interruptible("call it again for the whole"):
        typer.echo(demonstration.run(out, seed=seed, progress=progress))


def main() -> None:
    """Runs the command; errors become one line on standard error and an exit status, see docs."""
    try:
        status = app(standalone_mode=False, prog_name="attrfast")
    except AttrfastError as error:
        status = _told(str(error), UNUSABLE)
    except (typer.Abort, KeyboardInterrupt):
        status = _told("stopped", INTERRUPTED)
    except typer.BadParameter.__mro__[2] as error:  # type: ignore[misc] # what the parser refuses
        status = _refused(error)
    except BrokenPipeError:  # the reader has read enough
        sys.stderr.close()
        status = 0
    except Exception:
        traceback.print_exc()
        status = _told("this is a fault of attrfast's, please report it", FAULT)
    sys.exit(status or 0)


def _told(text: str, status: int) -> int:
    typer.echo(f"attrfast: {' '.join(text.split())}", err=True)
    return status


def _refused(error: Exception) -> int:
    status: int = getattr(error, "exit_code", 2)
    context = getattr(error, "ctx", None)
    text: str = error.format_message()  # type: ignore[attr-defined]
    if not text or "\n" in text:  # no command was given: the help, or nothing if typer printed it itself
        typer.echo(text, nl=bool(text))
        return status
    where = "attrfast" if context is None else context.command_path
    return _told(f"{text.rstrip('.')}; see {where} --help", status)
