"""`attrfast.compare`: starts first, then every cell that is not there yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from attrfast.compare.comparison import Comparison
from attrfast.compare.files import Folder
from attrfast.compare.loaders import open_loaders
from attrfast.compare.pool import Done, pool
from attrfast.compare.published import Published
from attrfast.compare.records import Cell, CellKey, Failure, Start, StartKey
from attrfast.compare.settings import Data, Methods, Network, Settings, settings
from attrfast.compare.work import Work, cell_mark
from attrfast.errors import InputError
from attrfast.finetune import FineTune, FineTuneLike

METHODS = ("attribution", "taylor_guided", "taylor", "l1")
BUDGETS = (0.4, 0.15)
TRAIN = FineTune(epochs=5, optimizer="adamw", lr=3e-3, schedule="onecycle", weight_decay=0.01)


def compare(
    networks: Mapping[str, Network],
    data: Data,
    *,
    methods: Methods = METHODS,
    budgets: Sequence[float] = BUDGETS,
    seeds: Sequence[int] = (0, 1, 2),
    train: FineTuneLike = TRAIN,
    pretrained: Mapping[str, Callable[[nn.Module], Any]] | None = None,
    finetune: FineTuneLike = 1,
    final_finetune: FineTuneLike | None = None,
    filters_per_step: int | None = None,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 1,
    threads: int | None = None,
    out: str | Path = "comparison",
    resume: bool = True,
    progress: bool = True,
    published: Published | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Sets methods of pruning side by side: networks x methods x budgets x seeds, on one data set.

    Every network is trained once for every seed, and all methods start from those weights. They see the
    data in the same order and have the same fine-tuning after steps of the same size. A cell is one
    network made smaller by one method to one budget with one seed; finished cells are files under `out`,
    and a later call with the same settings goes on where an earlier one ended, however it ended.

    With the same `threads`, a comparison comes out bit for bit the same with any number of workers (on a
    GPU as far as its convolutions are deterministic).

    Args:
        networks: name -> function without arguments that builds the network.
        data: an `attrfast.data.Splits`, or three iterables (train, val, test) of `(input, label)`
            batches, or a function from the seed to either. Networks are trained, scored and fine-tuned
            on train; histories are measured on val, and what the tables report on test.
        methods: names of criteria (`attrfast.criterion_names()`), criteria of your own, and
            `"tp_magnitude"` and `"tp_group_taylor"` (Torch-Pruning's own importances and ranking),
            `"scratch"` or `"scratch:METHOD"` (the architecture that attribution, or METHOD, found,
            trained from random weights for as many epochs as all took together; Liu et al. 2019,
            "Rethinking the Value of Network Pruning"). The method whose architecture is taken is
            compared as well. Or a mapping from names of your choice to these.
        budgets: shares of the multiply-adds that may be left, each in (0, 1).
        seeds: of the first weights, the order of the data and the random numbers of a method.
        train: how the whole networks are trained: epochs (AdamW, with one rise and fall of the learning
            rate to 3e-3), an `attrfast.FineTune` or a callable `(model, step)`; 0 for networks that come
            trained.
        pretrained: network -> what loads weights into the network before it is trained. Training from
            scratch leaves it out.
        finetune, final_finetune, filters_per_step, max_batches: as of `attrfast.prune`, for all methods.
        device: run there; None: where the networks are built.
        workers: processes that work side by side. With more than 1, networks, data and criteria must be
            functions or classes of a module, and a script needs `if __name__ == "__main__":`.
        threads: torch's threads in each process; None: those that torch has, shared among the workers.
        out: folder of the cells.
        resume: False computes everything anew, in place of what is there.
        progress: show a bar with the time left when standard error is a terminal.
        published: figures to print beside ours (`from attrfast.compare import published`).
        notes: what a reader must know, for the report.

    Returns:
        Comparison: the cells, their means and spreads; `save()` writes tables and pictures. What failed
            is in `failures` and takes nothing else along.

    Raises:
        InputError: an argument is not usable, or `out` holds cells of other settings.
    """
    chosen = settings(
        networks,
        data,
        methods=methods,
        budgets=budgets,
        seeds=seeds,
        train=dataclasses.replace(TRAIN, epochs=train) if type(train) is int else train,
        finetune=finetune,
        final_finetune=final_finetune,
        filters_per_step=filters_per_step,
        max_batches=max_batches,
        device=device,
        pretrained=pretrained,
    )
    if not callable(data):
        open_loaders(data, seed=0)  # refuses what has the wrong form
    for name, count in (("workers", workers), ("threads", threads)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {count!r}")
    folder = Folder(out)
    failures: list[Failure] = []
    bar = tqdm(
        total=len(chosen.starts) + len(chosen.cells),
        desc="comparing",
        unit="cell",
        disable=None if progress else True,
        leave=False,
        smoothing=0,  # cells differ: the time left is told from the mean of all
    )
    with bar, pool(Work(chosen, folder, resume), workers, threads) as jobs:

        def note(done: Done) -> None:
            if done.error is not None:
                failures.append(Failure(done.job, done.error, done.details))
            bar.update()
            bar.set_postfix_str(f"{done.job}" + (", failed" if done.error is not None else ""))

        for done in jobs.run({key: set[StartKey]() for key in chosen.starts}):
            if done.error is not None and resume and folder.start(done.job) is not None:
                raise InputError(done.error)  # nothing failed: what is there is not of these settings
            note(done)
        lost = {failure.key for failure in failures}
        starts = {
            key: start for key in chosen.starts if key not in lost and (start := folder.start(key))
        }
        finished = _finished(chosen, folder, starts) if resume else {}
        bar.total -= len(finished) + sum(key.start in lost for key in chosen.cells)
        todo = {
            key: chosen.needs(key)
            for key in chosen.cells
            if key.start not in lost and key not in finished
        }
        for done in jobs.run(todo):
            note(done)
    lost = {failure.key for failure in failures}
    cells = dict(finished)
    for key in todo:
        cell = folder.cell(key) if key not in lost else None
        if cell is not None:
            cells[key] = cell
    for key in chosen.cells:
        if key.start in lost:
            failures.append(Failure(key, f"not begun, because it needs what failed: {key.start}"))
    return Comparison(
        networks=tuple(chosen.networks),
        methods=tuple(chosen.methods),
        budgets=chosen.budgets,
        seeds=chosen.seeds,
        starts=tuple(starts.values()),
        cells=tuple(cells[key] for key in chosen.cells if key in cells),
        failures=tuple(failures),
        folder=folder.root,
        published=published,
        notes=tuple(notes),
    )


def _finished(chosen: Settings, folder: Folder, starts: Mapping[StartKey, Start]) -> dict[CellKey, Cell]:
    """The cells that are there.

    Raises:
        InputError: one belongs to other settings.
    """
    found: dict[CellKey, Cell] = {}
    for key in chosen.cells:
        start = starts.get(key.start)
        cell = folder.cell(key) if start is not None else None
        if start is None or cell is None:
            continue
        if cell.mark != cell_mark(chosen, key, start):
            raise InputError(
                f"{folder.cell_path(key)} belongs to other settings; choose another folder, or call with "
                f"resume=False to start again"
            )
        found[key] = cell
    return found
