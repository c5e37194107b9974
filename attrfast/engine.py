"""Runs batches through a model and owns the score matrix. Must not know what pruning is.

Every pass leaves the model bit-identical: parameters, buffers, training flags, `requires_grad`, `.grad`,
hooks and the global random state.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from attrfast.batches import Batch, check_iterable, resolve_device, unpack
from attrfast.channels import Discovery, discover
from attrfast.criteria import REDUCTIONS, Criterion, OwnPass, Reduction, get_criterion
from attrfast.diagnosis import first_nonfinite
from attrfast.errors import InputError, ModelError, NumericalError
from attrfast.matrix import RowsError
from attrfast.objective import Objective
from attrfast.scores import NORMALIZATIONS, Scores, normalized
from attrfast.tiers import Runner
from attrfast.trace import preserved
from attrfast.units import Units

log = logging.getLogger(__name__)


class Pass:
    """Importance of every unit, added up batch by batch.

    Args:
        model: left bit-identical.
        found: the model's units, and its recorded forward pass.
        criterion: what is differentiated, and by which rule.
        reduction: how S of many samples becomes one number a unit.
        loss_fn: the user's loss, for criteria that measure one.
        amp_dtype: run the forward pass under autocast in this dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Discovery,
        criterion: Criterion,
        reduction: Reduction,
        *,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        amp_dtype: torch.dtype | None = None,
        device: torch.device,
    ) -> None:
        self.model, self.units, self.device = model, found.units, device
        self.criterion, self.reduction, self.amp_dtype = criterion, reduction, amp_dtype
        self.objective = Objective(criterion, loss_fn)
        self.runner = Runner(model, found, guided=criterion.guided, absolute=reduction.absolute)
        # What is not finite is looked for where that makes nobody wait for a GPU; there, once at the end.
        self.watchful = device.type == "cpu"
        self.total = torch.zeros(len(found.units), dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, batch: Batch) -> None:
        """Scores one batch of samples, on the model's device."""
        try:
            matrix = self._matrix(batch)
        except RowsError as error:
            if batch.samples == 1:
                raise
            log.debug("%s: samples are scored one by one", error)
            matrix = torch.cat([self._matrix(part) for part in batch.split(1)])
        self.total += self.reduction.partial(matrix)
        self.samples += batch.samples

    def _matrix(self, batch: Batch) -> torch.Tensor:
        def forward() -> Any:
            return _forward(self.model, self.amp_dtype, batch)

        def objective(output: Any) -> torch.Tensor:
            total = self.objective(output, batch)
            if self.watchful and not bool(torch.isfinite(total)):
                self._explain(forward, batch, f"the objective of {self.criterion.name!r} is {total:g}")
            return total

        # Small gradients vanish in fp16; S is divided by the same power of two, so nothing else changes.
        scale = 1024.0 if self.amp_dtype == torch.float16 else 1.0
        with torch.enable_grad():
            matrix = self.runner.run(forward, objective, batch.samples, scale)
        if self.watchful and not bool(torch.isfinite(matrix.sum())):
            self._explain(forward, batch, self._bad_columns(matrix))
        return matrix

    def _bad_columns(self, matrix: torch.Tensor) -> str:
        bad = torch.nonzero(~torch.isfinite(matrix).all(0)).flatten()
        if not len(bad):
            return "the score matrix overflows"
        # Gradients run from the output down, so the trouble starts at the last of the layers.
        name = self.units.layers[int(self.units.layer_of[bad.cpu()].max())].name
        return f"the gradient at the filters of {name} is not finite"

    def _explain(self, forward: Callable[[], Any], batch: Batch, what: str) -> None:
        place = first_nonfinite(self.model, forward, batch.raw)
        where = f"; NaN or infinity first appears in {place}" if place else ""
        raise NumericalError(
            f"{what} in the batch after {self.samples} samples{where}. Check the data and the weights "
            f"there, or leave out amp_dtype"
        )

    def importance(self) -> torch.Tensor:
        """(U,) on the CPU.

        Raises:
            NumericalError: a score is not finite.
        """
        raw = self.reduction.finish(self.total, self.samples).cpu()
        if not bool(torch.isfinite(raw).all()):
            raise NumericalError(
                f"{self._bad_columns(raw[None])} in one of the batches. Check the data and the weights, "
                f"or leave out amp_dtype"
            )
        return raw.to(torch.float64)


def _forward(model: nn.Module, amp_dtype: torch.dtype | None, batch: Batch) -> Any:
    """The model's output, under autocast in `amp_dtype` where there is one."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=amp_dtype, enabled=amp_dtype is not None):
        return batch.feed(model)


def attribute(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: str | Criterion = "taylor",
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    normalize: str | None = "l2",
    reduction: str | None = None,
    max_batches: int | None = None,
    microbatch: int | None = None,
    device: str | torch.device | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
    seed: int = 0,
    units: Units | Discovery | None = None,
) -> Scores:
    """Scores every filter of a model by how much it contributes, in one pass over the data.

    Args:
        model: any module; it comes back bit-identical.
        loader: iterable of `(input, label)` batches; inputs (N, ...), labels (N,) int64.
        criterion: a name (`attrfast.criterion_names()`) or an `attrfast.Criterion`.
        loss_fn: `loss_fn(output, batch)` in place of the cross-entropy, for criteria that measure a
            loss: one value a sample (N,), or their sum or mean.
        normalize: within each layer: `"l2"` (the paper's), `"mean"`, `"max"` or None.
        reduction: `"abs_sample"`, `"sq_sample"`, `"signed_batch"` or `"abs_element"`; None takes the
            criterion's own.
        max_batches: read no more batches than this.
        microbatch: run at most this many samples at once. The scores do not depend on it.
        device: run there (on a copy, if the model is elsewhere); None: where the model is.
        amp_dtype: `torch.bfloat16` or `torch.float16` runs the forward pass under autocast.
        progress: show a bar when standard error is a terminal.
        seed: of what a criterion draws at random (`random`, `iba`).
        units: the model's units, if they are known from an earlier call; with the pass that they were
            found in (`attrfast.channels.discover`), no other is recorded.

    Returns:
        Scores: one value a filter, by the names of the convolutions.

    Raises:
        InputError: an argument, a batch or a label is not usable.
        ModelError: the model cannot be scored.
        NumericalError: an activation, the objective or a gradient is not finite.
        BackendError: the device does not exist here.
    """
    rule, how = check_options(
        criterion,
        normalize=normalize,
        reduction=reduction,
        max_batches=max_batches,
        microbatch=microbatch,
    )
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides every call
    place = resolve_device(model, device)
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "the model was made under torch.inference_mode(), where tensors can't take part in gradients; "
            "make or load it outside, or pass copy.deepcopy(model) made outside"
        )
    if any(p.device != place for p in model.parameters()):
        model = copy.deepcopy(model).to(place)
    raw: torch.Tensor | None = None
    samples = 0
    # Whatever region the caller is in: gradients are recorded, and amp_dtype alone says what is autocast.
    with (
        preserved(model),
        torch.inference_mode(False),
        torch.autocast(place.type, enabled=False),
    ):
        model.eval()
        running: Pass | OwnPass | None = None
        for batch in _batches(loader, place, max_batches, progress and rule.needs_data):
            if running is None:
                found = _discover(model, batch, units)
                if not rule.needs_data:
                    break
                running = rule.own_pass(
                    model,
                    found,
                    objective=Objective(rule, loss_fn),
                    forward=functools.partial(_forward, model, amp_dtype),
                    seed=seed,
                    progress=progress,
                ) or Pass(model, found, rule, how, loss_fn=loss_fn, amp_dtype=amp_dtype, device=place)
            for part in batch.split(microbatch or batch.samples):
                running.add(part)
        if running is None:
            raw = rule.from_weights(model, found.units, seed).to(torch.float64)
        else:
            raw, samples = running.importance(), running.samples
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    importance = normalized(raw, found.units, normalize).to(torch.float64 if wide else torch.float32)
    return Scores(
        units=found.units,
        importance=importance,
        raw=raw,
        samples=samples,
        criterion=rule.name,
        reduction=how.name if isinstance(running, Pass) else None,
        normalize=normalize,
    )


def check_options(
    criterion: str | Criterion,
    *,
    normalize: str | None,
    reduction: str | None,
    max_batches: int | None,
    microbatch: int | None,
) -> tuple[Criterion, Reduction]:
    """The criterion and the reduction that `attribute` would use.

    Raises:
        InputError: an argument is not usable.
    """
    rule = get_criterion(criterion)
    how = REDUCTIONS.get(reduction or rule.reduction)
    if how is None:
        raise InputError(f"unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")
    if normalize not in NORMALIZATIONS:
        raise InputError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
    for name, value in (("max_batches", max_batches), ("microbatch", microbatch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    return rule, how


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
    seen = 0
    bar = tqdm(loader, desc="scoring", total=limit, leave=False, disable=None if progress else True)
    for raw in bar:
        yield unpack(raw, device)
        seen += 1
        if seen == limit:
            break
    if seen == 0:
        raise InputError(
            "the loader gave no batch; pass a non-empty iterable of (input, label) batches (a generator "
            "can be read only once)"
        )
