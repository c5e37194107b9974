"""Runs batches through a model, and makes scores of what was measured. Must not know what pruning is.

Every pass leaves the model bit-identical: parameters, buffers, training flags, `requires_grad`, `.grad`,
hooks and the global random state.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import nn
from tqdm import tqdm

from attrfast.batches import Batch, check_iterable, resolve_device, unpack
from attrfast.channels import Discovery, discover
from attrfast.checkpoint import fingerprint
from attrfast.criteria import (
    MEAN,
    REDUCTIONS,
    ActivationCriterion,
    Criterion,
    Reduction,
    get_criterion,
    has_own_pass,
)
from attrfast.distributed import together
from attrfast.errors import InputError, ModelError
from attrfast.passes import Pass
from attrfast.pooling import pool
from attrfast.portions import parse_memory
from attrfast.scores import NORMALIZATIONS, Scores, normalized
from attrfast.stopping import Stop, check_stop, part_read
from attrfast.stopping_together import StopTogether
from attrfast.trace import ordinary_region, preserved
from attrfast.units import Units

CriterionLike = str | Criterion | type[Criterion]


@overload
def attribute(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: CriterionLike = ...,
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = ...,
    normalize: str | None = ...,
    reduction: str | None = ...,
    max_batches: int | None = ...,
    microbatch: int | None = ...,
    memory_limit: str | float | None = ...,
    device: str | torch.device | None = ...,
    amp_dtype: torch.dtype | None = ...,
    by_class: bool = ...,
    classes: Sequence[int] | None = ...,
    progress: bool = ...,
    seed: int = ...,
    units: Units | Discovery | None = ...,
    stop: str | None = ...,
    confidence: float = ...,
    lowest: int | None = ...,
    distributed: bool = ...,
) -> Scores: ...


@overload
def attribute(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: list[Any] | tuple[Any, ...],
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = ...,
    normalize: str | None = ...,
    reduction: str | None = ...,
    max_batches: int | None = ...,
    microbatch: int | None = ...,
    memory_limit: str | float | None = ...,
    device: str | torch.device | None = ...,
    amp_dtype: torch.dtype | None = ...,
    by_class: bool = ...,
    classes: Sequence[int] | None = ...,
    progress: bool = ...,
    seed: int = ...,
    units: Units | Discovery | None = ...,
    stop: str | None = ...,
    confidence: float = ...,
    lowest: int | None = ...,
    distributed: bool = ...,
) -> dict[str, Scores]: ...


def attribute(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: CriterionLike | list[Any] | tuple[Any, ...] = "taylor",
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    normalize: str | None = "l2",
    reduction: str | None = None,
    max_batches: int | None = None,
    microbatch: int | None = None,
    memory_limit: str | float | None = None,
    device: str | torch.device | None = None,
    amp_dtype: torch.dtype | None = None,
    by_class: bool = False,
    classes: Sequence[int] | None = None,
    progress: bool = True,
    seed: int = 0,
    units: Units | Discovery | None = None,
    stop: str | None = None,
    confidence: float = 0.95,
    lowest: int | None = None,
    distributed: bool = True,
) -> Scores | dict[str, Scores]:
    """Scores every filter of a model by how much it contributes, in one pass over the data.

    Args:
        model: any module; it comes back bit-identical.
        loader: iterable of `(input, label)` batches; inputs (N, ...), labels (N,) int64.
        criterion: a name (`attrfast.criterion_names()`) or an `attrfast.Criterion`; or a list of them,
            which together read the data once, and share forward and backward passes where they can.
        loss_fn: `loss_fn(output, batch)` in place of the cross-entropy, for criteria that measure a
            loss: one value a sample (N,), or their sum or mean.
        normalize: within each layer: `"l2"` (the paper's), `"mean"`, `"max"` or None.
        reduction: `"abs_sample"`, `"sq_sample"`, `"signed_batch"` or `"abs_element"`, for criteria that
            read gradients; None takes the criterion's own.
        max_batches: read no more batches than this.
        microbatch: run at most this many samples at once. The scores do not depend on it. Where memory is
            full, what did not fit runs again in halves, and a sample that does not fit in segments of a
            pass.
        memory_limit: what a pass may take over what is taken before it: `"512MB"`, `"1.5GiB"`, bytes, or a
            share of the device's memory (0.25 or `"25%"`). As many samples run at once as fit, by the sizes
            of the model's tensors at first and then by what is measured: torch's allocator on CUDA, on a
            CPU the process's resident memory where Linux tells it. None: no limit.
        device: run there (on a copy, if the model is elsewhere); None: where the model is.
        amp_dtype: `torch.bfloat16` or `torch.float16` runs the forward pass under autocast.
        by_class: score the samples of every labelled class on their own as well (`Scores.by_class`).
        classes: score the samples with these labels alone.
        progress: show a bar when standard error is a terminal.
        seed: of what a criterion draws at random (`random`, `iba`).
        units: the model's units, if they are known from an earlier call; with the pass that they were
            found in (`attrfast.channels.discover`), no other is recorded.
        stop: None reads everything. `"confident"` reads until the lowest filters are settled: until the rest
            of the loader would exchange at most 2% of them on average, and at the `confidence` at most 15%.
            The batches must come in random order. Several processes end together. See
            `attrfast.confidence.Looks` for the test, and `Scores.undecided`.
        confidence: of `stop="confident"`, above 0 and at most 0.999.
        lowest: of `stop="confident"`: how many filters will go; None: a sixteenth of all.
        distributed: where `torch.distributed` has a default group, score together with its other
            processes: each reads its own loader, a shard of the data (none, perhaps; `max_batches` counts
            its own), and all get the scores of the whole. See docs/distributed.md.

    Returns:
        Scores: one value a filter, by the names of the convolutions. For a list of criteria, a dict with
        the scores of each, by its name: what each gives alone.

    Raises:
        InputError: an argument, a batch or a label is not usable.
        ModelError: the model cannot be scored.
        NumericalError: an activation, the objective or a gradient is not finite.
        BackendError: the device does not exist here.
        OutOfMemoryError: memory does not hold the pass of one sample.
        DistributedError: another process failed, died, did not come in time, or scores something else.
    """
    asked = criterion if isinstance(criterion, (list, tuple)) else (criterion,)
    chosen = [
        check_options(
            one,
            normalize=normalize,
            reduction=reduction,
            max_batches=max_batches,
            microbatch=microbatch,
            by_class=by_class,
            classes=classes,
        )
        for one in asked
    ]
    names = _distinct([rule for rule, _ in chosen])
    check_stop(stop, confidence, lowest)
    measured = [(rule, how) for rule, how in chosen if rule.needs_data]
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides every call
    place = resolve_device(model, device)
    bytes_allowed = parse_memory(memory_limit, place)
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "the model was made under torch.inference_mode(), where tensors can't take part in gradients; "
            "make or load it outside, or pass copy.deepcopy(model) made outside"
        )
    if any(p.device != place for p in model.parameters()):
        model = copy.deepcopy(model).to(place)
    running: Pass | None = None
    early: Stop | None = None
    found: Discovery | None = None
    with together(distributed) as group, preserved(model), ordinary_region(place):
        several = None
        if stop is not None and measured and not group.alone:
            several = StopTogether(group)
        model.eval()
        for read, batch in enumerate(
            _batches(loader, place, max_batches, progress and bool(measured) and group.first), start=1
        ):
            if running is None:
                found = _discover(model, batch, units)
                if not measured:
                    break
                running = Pass(
                    model,
                    found,
                    measured,
                    loss_fn=loss_fn,
                    amp_dtype=amp_dtype,
                    device=place,
                    by_class=by_class,
                    classes=classes or (),
                    microbatch=microbatch,
                    memory_limit=bytes_allowed,
                    seed=seed,
                    progress=progress and group.first,
                )
                if not group.alone:
                    running.check_adds_up()
                if stop is not None:
                    early = Stop(running, normalize, confidence, lowest, seed)
            wanted = batch if classes is None else batch.of_classes(classes)
            if wanted is not None:
                running.add(wanted)
            if early is None:
                continue
            part = part_read(read, loader, max_batches)
            if early.after(batch, part) if several is None else several.after(early, batch, part):
                break
        else:
            if several is not None:
                several.finish(early)
        mark = ""
        if not group.alone:
            rules = [(rule, how.name) for rule, how in chosen]
            scored = [rules, loss_fn, normalize, amp_dtype, by_class, classes, seed]
            mark = fingerprint(model, {"scored": scored})
        holders = pool(running, None if found is None else found.units, group, mark)
        if running is not None and running.samples == 0:
            raise InputError(f"the loader holds no sample of the classes {list(classes or ())}")
        found_out = iter(running.results() if running is not None else ())
        doubts = iter(early.undecided()) if early is not None else itertools.repeat(None)
        results: dict[str, Scores] = {}
        if found is None:  # this process had no data
            results = group.from_rank("scores", holders[0], None)
            return results if asked is criterion else results[names[0]]
        wide = any(p.dtype == torch.float64 for p in model.parameters())
        for name, (rule, how) in zip(names, chosen, strict=True):
            if rule.needs_data:
                raw, table = next(found_out)
            else:
                raw, table = rule.from_weights(model, found.units, seed).to(torch.float64), None
            results[name] = Scores(
                units=found.units,
                importance=_comparable(raw, found.units, normalize, wide),
                raw=raw,
                samples=running.samples if running and rule.needs_data else 0,
                criterion=rule.name,
                reduction=how.name if rule.needs_data and how is not MEAN else None,
                normalize=normalize,
                by_class=None if table is None else _comparable(table, found.units, normalize, wide),
                class_samples=running.class_samples if running else None,
                undecided=next(doubts) if rule.needs_data else None,
            )
        if len(holders) < group.size:
            group.from_rank("scores", holders[0], results)
    return results if asked is criterion else results[names[0]]


def check_options(
    criterion: CriterionLike,
    *,
    normalize: str | None,
    reduction: str | None,
    max_batches: int | None,
    microbatch: int | None,
    by_class: bool = False,
    classes: Sequence[int] | None = None,
) -> tuple[Criterion, Reduction]:
    """The criterion and the reduction that `attribute` would use.

    Raises:
        InputError: an argument is not usable.
    """
    rule = get_criterion(criterion)
    how = REDUCTIONS.get(reduction or rule.reduction)
    if how is None:
        raise InputError(f"unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")
    if isinstance(rule, ActivationCriterion) or has_own_pass(rule):
        how = MEAN
    elif rule.own_reduction and how.name != rule.reduction:
        raise InputError(
            f"the criterion {rule.name!r} is defined with the reduction {rule.reduction!r} alone, got "
            f"{reduction!r}; leave reduction out"
        )
    if normalize not in NORMALIZATIONS:
        raise InputError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
    for name, value in (("max_batches", max_batches), ("microbatch", microbatch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not rule.needs_data and (by_class or classes is not None):
        raise InputError(
            f"the criterion {rule.name!r} is not measured on samples, so it knows no classes; choose one "
            f"that is, for instance 'taylor'"
        )
    if classes is not None and not _are_classes(classes):
        raise InputError(
            f"classes must be a list of one class number or more (0, 1, ...), got {classes!r}"
        )
    return rule, how


def _are_classes(classes: object) -> bool:
    return (
        isinstance(classes, Sequence)
        and not isinstance(classes, str)
        and len(classes) > 0
        and all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in classes)
    )


def _distinct(rules: Sequence[Criterion]) -> list[str]:
    names = [rule.name or type(rule).__name__ for rule in rules]
    if not names:
        raise InputError("the list of criteria is empty; give at least one, for instance ['taylor']")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"the criterion {twice!r} is given twice; results go by name, so name each once (register a "
            f"subclass under another name for the same criterion with other options)"
        )
    return names


def _comparable(raw: torch.Tensor, units: Units, normalize: str | None, wide: bool) -> torch.Tensor:
    """Normalised, (U,) or (K, U), in the dtype of results."""
    return normalized(raw, units, normalize).to(torch.float64 if wide else torch.float32)


def _discover(model: nn.Module, batch: Batch, units: Units | Discovery | None) -> Discovery:
    if isinstance(units, Discovery):
        return units
    example = next(iter(batch.split(min(2, batch.samples))))
    found = discover(model, example.args, example.kwargs)
    return found if units is None else dataclasses.replace(found, units=units)


def _batches(
    loader: Iterable[Any], device: torch.device, limit: int | None, progress: bool
) -> Iterator[Batch]:
    check_iterable(loader)
    bar = tqdm(loader, desc="scoring", total=limit, leave=False, disable=None if progress else True)
    for seen, raw in enumerate(bar, 1):
        yield unpack(raw, device)
        if seen == limit:
            break
