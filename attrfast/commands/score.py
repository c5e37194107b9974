"""`attrfast score`: how important every filter of a network is. Exit status: as of every command.

Processes that torchrun starts work together; the first writes and tells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attrfast.commands import options
from attrfast.commands.status import interruptible
from attrfast.errors import InputError


def score(
    model: options.Model,
    data: options.Data = "digits",
    weights: options.Weights = None,
    criterion: Annotated[
        str,
        typer.Option(help="Criteria, with commas.", autocompletion=options.complete_criteria),
    ] = "attribution",
    normalize: options.Normalize = "l2",
    reduction: options.Reduction = None,
    max_batches: Annotated[
        int | None, typer.Option(min=1, help="Score so many batches.", show_default="all")
    ] = None,
    stop: Annotated[
        str,
        typer.Option(
            help="`confident`: score until the lowest sixteenth of the filters is settled; `none`: everything."
        ),
    ] = "none",
    confidence: options.Confidence = 0.95,
    memory_limit: options.MemoryLimit = None,
    classes: options.Classes = None,
    lowest: Annotated[int, typer.Option(min=0, help="Lowest filters to name in a layer.")] = 5,
    images: options.Images = None,
    batch_size: options.BatchSize = None,
    image_size: options.ImageSize = None,
    loader_workers: options.LoaderWorkers = 2,
    device: options.Device = None,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write all scores: a .json or .safetensors file.")
    ] = None,
    config: options.Config = None,
    as_json: options.Json = False,
    progress: options.Progress = True,
) -> None:
    """Score every filter of a network by the training images of a data set."""
    import torch

    from attrfast.batches import preferred_device
    from attrfast.distributed import launched
    from attrfast.engine import attribute, check_options
    from attrfast.names import NamedData
    from attrfast.portions import parse_memory
    from attrfast.runs.folder import scores_as_json
    from attrfast.runs.work import built
    from attrfast.stopping import check_stop

    if out is not None and out.suffix not in (".json", ".safetensors"):
        raise InputError(f"--out must end in .json or .safetensors, got {out}")
    rules = options.parts(criterion, str, "--criterion", "names with commas")
    chosen = None
    if classes is not None:
        chosen = options.parts(classes, int, "--classes", "labels with commas")
    settings: dict[str, Any] = {
        "normalize": options.or_none(normalize),
        "reduction": reduction,
        "max_batches": max_batches,
        "classes": chosen,
    }
    for rule in rules:
        check_options(rule, **settings, microbatch=None, by_class=False)
    place = preferred_device(device)
    parse_memory(memory_limit, torch.device(place))
    settings |= {
        "stop": options.or_none(stop),
        "confidence": confidence,
        "memory_limit": memory_limit,
    }
    check_stop(settings["stop"], confidence, None)
    with interruptible("nothing was written"), launched(torch.device(place)) as group:
        splits = NamedData(data, images, loader_workers, batch_size, image_size)(seed)
        network = built(model, splits, None if weights is None else str(weights), seed)
        loader = splits.train if group.alone else splits.shard(group.rank, group.size, seed).train
        found = attribute(
            network.eval(), loader, rules, device=place, progress=progress, seed=seed, **settings
        )
    if not group.first:  # another process tells
        return
    if out is not None:
        _write(out, found)
    if as_json:
        tree = {name: scores_as_json(scores) for name, scores in found.items()}
        typer.echo(json.dumps({"model": model, "data": data, "criteria": tree}))
        return
    typer.echo("\n\n".join(_table(scores, lowest) for scores in found.values()))
    if out is not None:
        typer.echo(f"scores: {out}")


def _table(scores: Any, lowest: int) -> str:
    from rich import box
    from rich.table import Table

    from attrfast.plain_text import as_text

    seen = f"{scores.samples:,} images" if scores.samples else "weights alone"
    if scores.undecided is not None:
        seen += f", {int(scores.units.size[scores.undecided].sum())} filters undecided"
    table = Table(title=f"{scores.criterion}: {seen}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("convolution", overflow="fold")
    for name in ("filters", "least", "median", "most"):
        table.add_column(name, justify="right")
    if lowest:
        table.add_column("lowest filters", overflow="fold")
    frozen = {conv for layer in scores.units.layers if layer.frozen for conv in layer.convs}
    for name, values in scores.items():
        order = values.argsort()[:lowest].tolist()
        figures = (values.min(), values.median(), values.max())
        row = [name + (" (stays whole)" if name in frozen else ""), str(len(values))]
        row += [f"{float(value):.3g}" for value in figures]
        table.add_row(*row, *([", ".join(map(str, order))] if lowest else []))
    return as_text(table, width=112)


def _write(out: Path, found: Any) -> None:
    from safetensors.torch import save_file

    from attrfast.files import replace_file
    from attrfast.runs.folder import scores_as_json

    if out.suffix == ".json":
        text = json.dumps({name: scores_as_json(scores) for name, scores in found.items()}) + "\n"
        write: Any = lambda path: path.write_text(text)  # noqa: E731
    else:
        tensors = {f"{name}/{conv}": s[conv].clone() for name, s in found.items() for conv in s}
        write = lambda path: save_file(tensors, path)  # noqa: E731
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, write)
    except OSError as error:
        raise InputError(f"{out} can't be written: {error}; give another file") from error
