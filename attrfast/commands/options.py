"""Options that several commands have, with what a shell completes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from attrfast.commands.config import read_config

_Item = TypeVar("_Item")

MODEL_HELP = (
    "A network of attrfast.models (`vgg_small`, `resnet20:0.5` at half its width), `torchvision:NAME`, "
    "`timm:NAME`, both also with `:pretrained`, or `FILE.py:FUNCTION`, which runs that file."
)
DATA_HELP = (
    "`digits[:PIXELS]`, `fashion-mnist[:DIR]`, `cifar10:DIR`, `flowers102:DIR` or `imagefolder:DIR` (with "
    "the folders train and val or test)."
)


def parts(text: str, kind: Callable[[str], _Item], option: str, wants: str) -> list[_Item]:
    """What stands between the commas."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: {wants}", param_hint=option) from None


def share_or_count(value: float | None) -> float | None:
    """A whole number above one is a count."""
    return int(value) if value is not None and value > 1 and value == int(value) else value


def _beginning(known: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in known if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    from attrfast import models

    if incomplete.startswith("torchvision:"):
        from torchvision.models import list_models

        return _beginning((f"torchvision:{name}" for name in list_models()), incomplete)
    return _beginning((*models.__all__, "torchvision:", "timm:"), incomplete)


def complete_data(incomplete: str) -> list[str]:
    from attrfast.names import KINDS

    known = (f"{kind}:" if form.endswith(":DIR") else kind for kind, form in KINDS.items())
    return _beginning(known, incomplete)


def complete_criteria(incomplete: str) -> list[str]:
    """Names with commas: the last is completed."""
    from attrfast.criteria import criterion_names

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(criterion_names(), last)]


Model = Annotated[
    str, typer.Argument(help=MODEL_HELP, autocompletion=complete_model, show_default=False)
]
Data = Annotated[str, typer.Option(help=DATA_HELP, autocompletion=complete_data)]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights to start from: a .safetensors file, or a state dict saved by torch."),
]
Classes = Annotated[
    str | None, typer.Option(help="Score these classes' images alone: labels with commas.")
]
Normalize = Annotated[str, typer.Option(help="Within each layer: `l2`, `mean`, `max` or `none`.")]
Reduction = Annotated[
    str | None,
    typer.Option(
        help="`abs_sample`, `sq_sample`, `signed_batch` or `abs_element`.",
        show_default="the criterion's",
    ),
]
Confidence = Annotated[
    float, typer.Option(min=0, max=1, help="Of `--stop confident`: that the lowest filters are settled.")
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(help="What scoring may take: `512MB`, `1.5GiB`, `25%`.", show_default="no limit"),
]
Images = Annotated[
    int | None, typer.Option(min=1, help="Use so many training images only.", show_default="all")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images in a batch.", show_default="the data set's")
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Pixels that photographs are cut to.", show_default="224")
]
LoaderWorkers = Annotated[int, typer.Option(min=0, help="Processes that decode photographs.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda where there is one")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars on a terminal.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with a table of this command's options. Options on the line override it.",
        is_eager=True,
        callback=read_config,
    ),
]


def or_none(text: str) -> str | None:
    """An option's text, None for `none`."""
    return None if text == "none" else text
