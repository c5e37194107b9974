"""`attrfast prune`: a run from data to pruned network, in a folder, that can be stopped and goes on.

Exit status: 0, done; 1, the arguments, the data or the folder are not usable; 2, the command line is not; 3,
done, but a target was not reached; 130, stopped by Ctrl-C (`--resume` goes on).

Processes that torchrun starts work together; the first writes and tells. One that is started again goes on.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attrfast.commands import options
from attrfast.commands.config import tables
from attrfast.commands.status import PARTLY, interruptible
from attrfast.errors import InputError

_Share = Annotated[
    float | None,
    typer.Option(help="Stop at this share of the original's, or at this count (above 1)."),
]


def prune(
    ctx: typer.Context,
    model: options.Model,
    data: options.Data = "digits",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("run"),
    weights: options.Weights = None,
    train: Annotated[int, typer.Option(min=0, help="Epochs of training before pruning.")] = 0,
    criterion: Annotated[
        str, typer.Option(help="What filters are ranked by.", autocompletion=options.complete_criteria)
    ] = "attribution",
    keep_ratio: Annotated[float | None, typer.Option(help="Stop at this share of the filters.")] = None,
    max_macs: _Share = None,
    max_params: _Share = None,
    max_latency: Annotated[
        str | None,
        typer.Option(help="Stop at this share of the measured latency (`0.5x`), or time (`12ms`)."),
    ] = None,
    latency_input: Annotated[
        int | None,
        typer.Option(min=1, help="Images in a pass that is timed.", show_default="one"),
    ] = None,
    latency_device: Annotated[
        str | None, typer.Option(help="Time there.", show_default="as --device")
    ] = None,
    latency_weight: Annotated[
        float,
        typer.Option(min=0, max=10, help="1: rank by importance per millisecond; 0: by importance."),
    ] = 0.0,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Stop before top-1 has fallen by more (0.01 is one point).")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Filters removed in a step.", show_default="a sixteenth of all"),
    ] = None,
    finetune: Annotated[int, typer.Option(min=0, help="Epochs after every step.")] = 1,
    final_finetune: Annotated[int, typer.Option(min=0, help="Epochs after the last step.")] = 0,
    classes: options.Classes = None,
    balance: Annotated[
        str | None, typer.Option(help="`worst_class`: rank by the class that needs a filter most.")
    ] = None,
    normalize: options.Normalize = "l2",
    reduction: options.Reduction = None,
    score_batches: Annotated[
        int | None, typer.Option(min=1, help="Batches scored in a step.", show_default="all")
    ] = None,
    stop: Annotated[
        str,
        typer.Option(
            help="Score `confident` (until the lowest filters are settled), `none` (everything) or `auto`."
        ),
    ] = "auto",
    confidence: options.Confidence = 0.95,
    memory_limit: options.MemoryLimit = None,
    round_to: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 1,
    min_filters: Annotated[int, typer.Option(min=1, help="Filters that every layer keeps.")] = 1,
    ignore: Annotated[
        str | None, typer.Option(help="Modules that are left whole: names or patterns, with commas.")
    ] = None,
    images: options.Images = None,
    batch_size: options.BatchSize = None,
    image_size: options.ImageSize = None,
    loader_workers: options.LoaderWorkers = 2,
    device: options.Device = None,
    seed: options.Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard's event files.", show_default=False)
    ] = None,
    config: options.Config = None,
    as_json: options.Json = False,
    progress: options.Progress = True,
) -> None:
    """Make a network smaller: train it if asked, prune, fine-tune, test, save and report.

    Everything is kept in --out; a run that was stopped goes on with --resume.
    """
    import torch

    from attrfast.batches import preferred_device
    from attrfast.distributed import launched, restarted
    from attrfast.runs import PruneSettings, RunFolder

    settings = PruneSettings(
        model=model,
        data=data,
        weights=None if weights is None else str(weights),
        train=train,
        criterion=criterion,
        keep_ratio=keep_ratio,
        max_macs=options.share_or_count(max_macs),
        max_params=options.share_or_count(max_params),
        max_latency=max_latency,
        latency_input=latency_input,
        latency_device=latency_device,
        latency_weight=latency_weight,
        max_accuracy_drop=max_accuracy_drop,
        step=step,
        finetune=finetune,
        final_finetune=final_finetune,
        classes=None if classes is None else tuple(_labels(classes)),
        balance=balance,
        normalize=options.or_none(normalize),
        reduction=reduction,
        score_batches=score_batches,
        stop=options.or_none(stop),
        confidence=confidence,
        memory_limit=memory_limit,
        round_to=round_to,
        min_filters=min_filters,
        ignore=tuple(options.parts(ignore or "", str, "--ignore", "names with commas")),
        images=images,
        batch_size=batch_size,
        image_size=image_size,
        loader_workers=loader_workers,
        device=device,
        seed=seed,
        tables=tables(ctx),
    )
    with (
        interruptible(f"the same command with --resume goes on in {out}"),
        launched(torch.device(preferred_device(device))) as group,
    ):
        folder = RunFolder(out, writes=group.first)
        goes_on = resume or restarted()
        group.from_first("reading the run", lambda: _require_own(folder, settings.to_toml(), goes_on))
        code = _carry_out(
            settings, folder, report=report, tensorboard=tensorboard, as_json=as_json, progress=progress
        )
    if code:
        raise typer.Exit(code)


def _labels(text: str) -> list[int]:
    return options.parts(text, int, "--classes", "labels with commas")


def _require_own(folder: Any, settings: str, resume: bool) -> None:
    """Refuses a folder that holds something else."""
    import tomllib

    from attrfast.runs.settings import ELSEWHERE

    held = folder.settings_text()
    if held is None:
        if folder.root.is_file() or (folder.root.is_dir() and any(folder.root.iterdir())):
            raise InputError(f"{folder.root} holds something that is no run; give another --out")
        return
    if not resume:
        raise InputError(
            f"{folder.root} holds a run already; go on with it by --resume, or give another --out"
        )
    try:
        before, now = (tomllib.loads(text)["prune"] for text in (held, settings))
    except (ValueError, KeyError) as error:
        raise InputError(f"the settings in {folder.root} can't be read: {error}") from error
    differ = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key not in ELSEWHERE
    )
    if differ:
        name = differ[0]
        raise InputError(
            f"{folder.root} holds a run with other settings ({name.replace('_', '-')} is "
            f"{before.get(name, 'not set')} there, and {now.get(name, 'not set')} here); give the same, "
            f"or another --out"
        )


def _carry_out(
    settings: Any,
    folder: Any,
    *,
    report: bool,
    tensorboard: Path | None,
    as_json: bool,
    progress: bool,
) -> int:
    from attrfast.reports import report as write_report
    from attrfast.runs import carry_out

    with contextlib.ExitStack() as stack:
        board = None
        if tensorboard is not None and folder.writes:
            from attrfast.tensorboard import TensorBoard

            board = stack.enter_context(TensorBoard(tensorboard))
        outcome = carry_out(settings, folder, progress=progress, callback=board)
        if board is not None:
            board(outcome.result.history[0], None)
    result, (before, after) = outcome.result, outcome.top1
    missed = result.stopped.startswith("nothing more")
    if not folder.writes:  # another process tells
        return PARTLY if missed else 0
    page = write_report(folder.root) if report else None
    if as_json:
        first, last = result.history[0], result.history[-1]
        tree = {
            "run": str(folder.root),
            "report": None if page is None else str(page),
            "stopped": result.stopped,
            "reached": not missed,
            "steps": len(result.history) - 1,
            "top1": {"before": before, "after": after},
            **{
                key: {"before": getattr(first, key), "after": getattr(last, key)}
                for key in ("macs", "params", "filters")
            },
            "phases": [vars(row) for row in outcome.figures.phases],
        }
        typer.echo(json.dumps(tree, indent=1))
    else:
        typer.echo(result.summary())
        typer.echo(f"\ntop-1 on the test images: {before:.2%} before, {after:.2%} after")
        typer.echo(f"run: {folder.root}" + ("" if page is None else f"\nreport: {page}"))
    if missed:
        typer.echo(f"attrfast: {result.stopped}, and a target is not reached", err=True)
    return PARTLY if missed else 0
