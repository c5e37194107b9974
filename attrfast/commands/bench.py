"""`attrfast bench`: the kernels, and one scoring pass of a network, timed on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from attrfast.commands import options
from attrfast.commands.status import interruptible


def bench(
    model: options.Model = "vgg_small",
    shape: Annotated[
        str, typer.Option(help="Channels, height and width of an image, with commas.")
    ] = "3,32,32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="How often each is timed, in turns.")] = 7,
    criterion: Annotated[
        str,
        typer.Option(help="What the pass scores by.", autocompletion=options.complete_criteria),
    ] = "attribution",
    device: options.Device = None,
    seed: options.Seed = 0,
    config: options.Config = None,
    as_json: options.Json = False,
    progress: options.Progress = True,
) -> None:
    """Time the kernels of every backend, and a scoring pass beside a bare training step.

    Images and weights are random. The benchmarks of the checkout compare with other packages as well.
    """
    import torch

    from attrfast.batches import preferred_device
    from attrfast.benchmark import benchmark
    from attrfast.errors import InputError

    sizes = options.parts(shape, int, "--shape", "whole numbers with commas")
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"--shape must be channels,height,width, got {shape!r}")
    place = torch.device(preferred_device(device))
    with interruptible("nothing was measured to the end"):
        found = benchmark(
            model,
            (sizes[0], sizes[1], sizes[2]),
            batch_size=batch_size,
            rounds=rounds,
            criterion=criterion,
            device=place,
            seed=seed,
            progress=progress,
        )
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.summary())
