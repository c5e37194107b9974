"""Carries out a run: data, network, training, scores, pruning, and the figures of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from attrfast.batches import preferred_device, unpack
from attrfast.compare.loaders import measure
from attrfast.compare.records import ClassCount
from attrfast.criteria import Criterion
from attrfast.data import Splits
from attrfast.distributed import Group, together
from attrfast.engine import attribute
from attrfast.env import facts
from attrfast.errors import InputError
from attrfast.finetune import fine_tune
from attrfast.map_pictures import extreme_maps
from attrfast.names import network, pretrained
from attrfast.pruner import Callback, prune
from attrfast.result import PruneResult
from attrfast.runs.folder import Figures, RunFolder
from attrfast.runs.phases import phase
from attrfast.runs.settings import PruneSettings
from attrfast.scores import Scores

_LAYERS_SHOWN = 4


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        result: of `attrfast.prune`.
        figures: accuracy by class, time and memory.
        top1: on the test set before and after.
    """

    result: PruneResult
    figures: Figures
    top1: tuple[float, float]


def carry_out(
    settings: PruneSettings,
    folder: RunFolder,
    *,
    progress: bool = True,
    callback: Callback | None = None,
) -> Outcome:
    """Prunes as the settings say, and goes on where an earlier run in the folder stopped.

    What was trained and measured already is taken from the folder; whether it holds this run is for the
    caller to say. Several processes do it together, each with its shard of the images; the folder is the
    first one's.

    Raises:
        AttrfastError: something is not usable; see `attrfast.prune`.
        KeyboardInterrupt: after Ctrl-C; what was pruned until then is saved.
    """
    with together() as group:
        return _carried_out(settings, folder, group, progress and group.first, callback)


def _carried_out(
    settings: PruneSettings,
    folder: RunFolder,
    group: Group,
    progress: bool,
    callback: Callback | None,
) -> Outcome:
    rule = settings.check()
    figures = group.from_first("reading the run", folder.figures) or Figures(
        command=settings.command(str(folder.root)), environment=facts()
    )
    device = torch.device(preferred_device(settings.device))
    splits = settings.opener()(settings.seed)
    if not group.alone:
        splits = splits.shard(group.rank, group.size, settings.seed)
    model = built(settings.model, splits, settings.weights, settings.seed).to(device)
    folder.begin(settings.to_toml())
    start = group.from_first("reading the run", folder.start)
    if start is not None:
        model.load_state_dict(start)
    else:
        if settings.train:
            with phase("training", device, figures.phases):
                fine_tune(
                    model,
                    splits.train,
                    settings.training("train"),
                    step=0,
                    device=device,
                    seed=settings.seed,
                    bar="training" if progress else None,
                    group=group,
                )
        folder.save_start(model.state_dict())
    model.eval()
    if not figures.classes:
        with phase("testing the original", device, figures.phases):
            figures.classes = [
                {"name": row.name, "images": row.images, "before": row.right}
                for row in group.from_first("testing", lambda: _tested(model, splits, device))
            ]
        _look(model, rule, settings, splits, folder, figures, device, progress)
        folder.save_figures(figures)
    with phase("pruning", device, figures.phases):
        result = prune(
            model,
            splits.train,
            rule,
            keep_ratio=settings.keep_ratio,
            max_macs=settings.max_macs,
            max_params=settings.max_params,
            max_latency=settings.max_latency,
            latency_input=settings.latency_input,
            latency_device=settings.latency_device,
            latency_weight=settings.latency_weight,
            max_accuracy_drop=settings.max_accuracy_drop,
            filters_per_step=settings.step,
            val_loader=splits.val,
            finetune=settings.training("finetune"),
            final_finetune=settings.training("final_finetune") if settings.final_finetune else None,
            **settings.scoring,
            stop=settings.stop,
            confidence=settings.confidence,
            memory_limit=settings.memory_limit,
            device=device,
            balance=settings.balance,
            round_to=settings.round_to,
            min_filters=settings.min_filters,
            ignore=settings.ignore,
            seed=settings.seed,
            output_dir=folder.steps,
            resume=True,
            progress=progress,
            callback=callback,
        )
    if result.interrupted:
        result.save(folder.root)
        raise KeyboardInterrupt(
            f"the network as it was after step {result.history[-1].step} is saved there"
        )
    with phase("testing the pruned network", device, figures.phases):
        after = group.from_first("testing", lambda: _tested(result.model, splits, device))
    for row, count in zip(figures.classes, after, strict=True):
        row["after"] = count.right
    if folder.writes:
        result.save(folder.root)
    folder.save_figures(figures)  # last: with them, the run is done
    return Outcome(result, figures, top1(figures))


def top1(figures: Figures) -> tuple[float, float]:
    """Of all test images, before and after."""
    images = sum(row["images"] for row in figures.classes)
    before, after = (sum(row[key] for row in figures.classes) / images for key in ("before", "after"))
    return before, after


def built(name: str, splits: Splits, weights: str | None, seed: int) -> nn.Module:
    """The network of a name, its random weights by the seed, with the weights of a file if one is given.

    Raises:
        InputError: there is no such network, or the file does not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(name, splits)()
    load = pretrained(name)
    if load is not None:
        load(model)
    if weights is not None:
        _load(model, Path(weights))
    return model


def _load(model: nn.Module, file: Path) -> None:
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its unpickler met
        raise InputError(
            f"{file} can't be read as weights: {error}; give a .safetensors file, or what "
            f"torch.save(model.state_dict(), file) wrote"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{file} does not fit the network: {error}") from error


def _tested(model: nn.Module, splits: Splits, device: torch.device) -> tuple[ClassCount, ...]:
    return measure(model, splits.test, device, splits.classes).classes


def _look(
    model: nn.Module,
    rule: Criterion,
    settings: PruneSettings,
    splits: Splits,
    folder: RunFolder,
    figures: Figures,
    device: torch.device,
    progress: bool,
) -> None:
    """Scores the original, and shows extreme filters an image, for the report alone."""
    if rule.trains:
        return  # such a criterion has scores after its training alone
    with phase("scoring the original", device, figures.phases):
        scores = attribute(
            model,
            splits.train,
            rule,
            **settings.scoring,
            memory_limit=settings.memory_limit,
            device=device,
            progress=progress,
            seed=settings.seed,
        )
    if not folder.writes:
        return
    folder.save_scores(scores)
    batch = unpack(next(iter(splits.test)), device)
    image, label = batch.args[0][0], int(batch.labels[0])
    try:
        folder.save_maps(image, extreme_maps(model, scores, _spread(scores), image))
        figures.image_class = splits.classes[label]
    except InputError:
        pass  # maps of another number of dimensions have no picture


def _spread(scores: Scores) -> list[str]:
    """Some layers that can be pruned, from the first to the last."""
    names = [layer.name for layer in scores.units.layers if layer.frozen is None]
    count = min(_LAYERS_SHOWN, len(names))
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]
