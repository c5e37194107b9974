"""`attrfast compare`: reads arguments, prints the tables and where everything was written.

Exit status: 0, every cell is there; 1, the arguments or the data are not usable; 2, the command line is
not; 3, some cells failed (the tables show the rest, and the failures by name); 130, stopped by Ctrl-C
(the same command goes on).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from attrfast.commands import options
from attrfast.commands.status import PARTLY, interruptible


def compare(
    networks: Annotated[
        list[str] | None,
        typer.Argument(
            help=options.MODEL_HELP,
            autocompletion=options.complete_model,
            show_default="vgg_small",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=options.DATA_HELP,
            autocompletion=options.complete_data,
            show_default="digits",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Criteria, `tp_magnitude`, `tp_group_taylor`, `scratch` or `scratch:METHOD`, with commas.",
            show_default="attribution,taylor_guided,taylor,l1",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Shares of the multiply-adds left, with commas.", show_default="0.4,0.15"),
    ] = None,
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Of training before pruning.", show_default="5")
    ] = None,
    finetune: Annotated[
        int | None, typer.Option(min=0, help="Epochs after every step.", show_default="1")
    ] = None,
    final_finetune: Annotated[int, typer.Option(min=0, help="Epochs after the last step.")] = 0,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Filters removed in a step.", show_default="a sixteenth of all"),
    ] = None,
    score_batches: Annotated[
        int | None, typer.Option(min=1, help="Batches scored in a step.", show_default="all")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Train on so many images only.", show_default="all")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda where there is one")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each process.", show_default="shared out")
    ] = None,
    loader_workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode photographs, for each worker.")
    ] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the cells, tables and pictures.")] = Path(
        "comparison"
    ),
    resume: Annotated[bool, typer.Option(help="Keep the cells that are there.")] = True,
    recipe: Annotated[
        str | None,
        typer.Option(help="A published setting, see --list-recipes; needs --data. Options override it."),
    ] = None,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Print the recipes and what they cost.")
    ] = False,
    config: options.Config = None,
    as_json: options.Json = False,
    progress: options.Progress = True,
) -> None:
    """Compare methods: networks x methods x budgets x seeds on one data set, on the same footing.

    Every finished cell is a file in --out; the same command goes on where an earlier one stopped.
    """
    from attrfast.compare.recipes import RECIPES

    if list_recipes:
        for known in RECIPES.values():
            typer.echo(f"{known.name}: {known.about}\n    --data {known.data}:DIR\n    {known.cost()}")
        return
    chosen_budgets = (
        options.parts(budgets, float, "--budgets", "numbers with commas") if budgets else None
    )
    chosen_seeds = options.parts(seeds, int, "--seeds", "whole numbers with commas")
    chosen_methods = options.parts(methods, str, "--methods", "names with commas") if methods else None
    with interruptible("the same command goes on with what is left"):
        failures = _run(
            networks,
            data=data,
            methods=chosen_methods,
            budgets=chosen_budgets,
            seeds=chosen_seeds,
            epochs=epochs,
            finetune=finetune,
            final_finetune=final_finetune,
            step=step,
            score_batches=score_batches,
            images=images,
            device=device,
            workers=workers,
            threads=threads,
            loader_workers=loader_workers,
            out=out,
            resume=resume,
            recipe=recipe,
            as_json=as_json,
            progress=progress,
        )
    if failures:
        typer.echo(f"attrfast: {failures} cells or starts failed; see Failed above", err=True)
        raise typer.Exit(PARTLY)


def _run(
    networks: list[str] | None,
    *,
    data: str | None,
    methods: list[str] | None,
    budgets: list[float] | None,
    seeds: list[int],
    epochs: int | None,
    finetune: int | None,
    final_finetune: int,
    step: int | None,
    score_batches: int | None,
    images: int | None,
    device: str | None,
    workers: int,
    threads: int | None,
    loader_workers: int,
    out: Path,
    resume: bool,
    recipe: str | None,
    as_json: bool,
    progress: bool,
) -> int:
    """Compares and prints; returns how much failed."""
    from attrfast import names
    from attrfast.batches import preferred_device
    from attrfast.compare import recipes, run
    from attrfast.compare.published import published
    from attrfast.errors import InputError
    from attrfast.finetune import FineTune

    setting = None if recipe is None else recipes.recipe(recipe)
    if setting is not None and (data is None or data.partition(":")[0] != setting.data):
        raise InputError(f"the recipe {recipe} needs --data {setting.data}:DIR, got {data!r}")
    train = run.TRAIN if setting is None else setting.train
    tuning = FineTune() if setting is None else setting.finetune
    if finetune is not None:
        tuning = replace(tuning, epochs=finetune)
    opener = names.NamedData(data or "digits", images, loader_workers)
    splits = opener(seeds[0] if seeds else 0)
    wanted = networks or ([setting.network] if setting else ["vgg_small"])
    loads = {name: names.pretrained(name) for name in wanted}
    notes = [f"Data: {opener.name}, {splits.num_classes} classes, images {splits.image_shape}."]
    if images is not None:
        notes.append(f"Trained, scored and fine-tuned on {images} training images only.")
    if setting is not None:
        notes.append(f"Recipe {setting.name}: {setting.about}. {setting.cost()}.")
    place = preferred_device(device)
    comparison = run.compare(
        {name: names.network(name, splits) for name in wanted},
        opener,
        methods=methods or (setting.methods if setting else run.METHODS),
        budgets=budgets or (setting.budgets if setting else run.BUDGETS),
        seeds=seeds,
        train=train if epochs is None else replace(train, epochs=epochs),
        pretrained={name: load for name, load in loads.items() if load is not None},
        finetune=tuning,
        final_finetune=replace(tuning, epochs=final_finetune) if final_finetune else None,
        filters_per_step=step,
        max_batches=score_batches,
        device=place,
        workers=workers,
        threads=threads,
        out=out,
        resume=resume,
        progress=progress,
        published=None if setting is None else published(setting.name),
        notes=notes,
    )
    files = comparison.save()
    if as_json:
        typer.echo((out / "comparison.json").read_text().rstrip())
    else:
        typer.echo(comparison.summary())
        typer.echo("\n".join(str(path) for path in files))
    return len(comparison.failures)
