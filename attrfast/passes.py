"""Adds up what several criteria measure, batch by batch, with as few runs of the model as they need.

Criteria that differ in their reduction alone share a score matrix; those whose gradients go back by the same
rule share a forward pass, and each objective takes one backward pass through it; those that read feature maps
watch a forward pass that runs anyway. Must not know about loaders or normalisation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attrfast.batches import Batch, check_labels, main_output
from attrfast.channels import Discovery
from attrfast.confidence import Groups
from attrfast.criteria import ActivationCriterion, Criterion, OwnPass, Reduction, same_objective
from attrfast.diagnosis import first_nonfinite
from attrfast.errors import InputError, ModelError, NumericalError
from attrfast.following import PlanMismatchError
from attrfast.graph import Plan, bytes_per_sample
from attrfast.map_statistics import MapMode, Source, Statistic, channels_in, find_places
from attrfast.matrix import RowsError
from attrfast.objective import LossFunction, Objective
from attrfast.portions import Limit, Portions
from attrfast.tiers import Runner
from attrfast.trace import trace

log = logging.getLogger(__name__)


class Tally:
    """What one criterion has measured so far.

    Args:
        criterion, reduction: whose, and how S of many samples becomes one number a unit.
        units: U.

    Attributes:
        total: (U,) float64, the sum over samples.
        by_class: (K, U) float64, the sum over the samples of each class; None if it was not asked for.
        groups: sums over groups of samples; None where they are not kept.
    """

    def __init__(
        self, criterion: Criterion, reduction: Reduction, units: int, device: torch.device
    ) -> None:
        self.criterion, self.reduction = criterion, reduction
        self.total = torch.zeros(units, dtype=torch.float64, device=device)
        self.by_class: torch.Tensor | None = None
        self.groups: Groups | None = None

    def add(self, values: torch.Tensor, labels: torch.Tensor | None, classes: int) -> None:
        """Adds the values (n, U) of some samples; with labels (n,), to their classes as well."""
        self.total += values.sum(0)
        if self.groups is not None:
            self.groups.add(values)
        if labels is not None:
            if self.by_class is None:
                self.by_class = self.total.new_zeros(classes, len(self.total))
            self.by_class.index_add_(0, labels, values.to(torch.float64))


@dataclass
class _Measured:
    """An objective, and the tallies (by position) that its S goes into."""

    objective: Objective
    tallies: list[int]


@dataclass
class _Run:
    """One run of the model: objectives whose gradients go back through it, and tallies of statistics."""

    runner: Runner
    measured: list[_Measured] = field(default_factory=list)
    maps: list[tuple[int, Statistic]] = field(default_factory=list)


class Pass:
    """Importance of every unit by several criteria, added up batch by batch.

    Args:
        model: left bit-identical.
        found: the model's units, and its recorded forward pass.
        rules: criteria that need data, and the reduction of each.
        loss_fn: the user's loss, for criteria that measure one.
        amp_dtype: run the forward pass under autocast in this dtype.
        by_class: add up the samples of each class on their own as well.
        classes: those that samples come from, where these are not all; they must be outputs of the model.
        microbatch, memory_limit: at most so many samples, and so much memory, at once; None: as it comes.
        seed, progress: for criteria with a pass of their own.

    Attributes:
        tallies: one for each of `rules`.
        samples: how many were added.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Discovery,
        rules: Sequence[tuple[Criterion, Reduction]],
        *,
        loss_fn: LossFunction | None = None,
        amp_dtype: torch.dtype | None = None,
        device: torch.device,
        by_class: bool = False,
        classes: Sequence[int] = (),
        microbatch: int | None = None,
        memory_limit: Limit | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.model, self.units, self.device = model, found.units, device
        self.amp_dtype, self.by_class, self.highest = amp_dtype, by_class, max(classes, default=-1)
        # Nothing below knows of this pass: in a circle its memory would wait for the garbage collector.
        self._forward = functools.partial(_forward, model, device, amp_dtype)
        self.tallies = [Tally(rule, how, len(found.units), device) for rule, how in rules]
        self.own: dict[int, OwnPass] = {}  # by the position of their criterion
        for index, (rule, _) in enumerate(rules):
            own = rule.own_pass(
                model,
                found,
                objective=functools.partial(_first_of, Objective(rule, loss_fn)),
                forward=self._forward,
                seed=seed,
                progress=progress,
            )
            if own is not None and by_class:
                raise InputError(
                    f"the criterion {rule.name!r} does not tell classes apart; leave by_class out, or "
                    f"score one class at a time with classes=[k]"
                )
            if own is not None:
                self.own[index] = own
        self.shared = [index for index in range(len(rules)) if index not in self.own]
        self.runs = _arranged(model, found, [(i, *rules[i]) for i in self.shared], loss_fn)
        if any(run.maps for run in self.runs):
            self.places = find_places(model, found.units, found.record, found.channels, device)
        # What is not finite is looked for where that makes nobody wait for a GPU; there, once at the end.
        self.watchful = device.type == "cpu"
        plan = self.runs[0].runner.plan if self.runs else None
        self._portions = Portions(
            device,
            most=microbatch,
            limit=memory_limit,
            planned=bytes_per_sample(found.record, plan),
            comfort=_comfort(model, plan) if device.type == "cpu" else None,
            release=functools.partial(_give_back, self.runs),
            shrink=functools.partial(_more_segments, self.runs),
        )
        self.samples, self.classes = 0, 0
        self._class_samples: torch.Tensor | None = None

    @property
    def class_samples(self) -> torch.Tensor | None:
        """(K,) int64 on the CPU, how many samples of each class were added; None unless `by_class`."""
        return None if self._class_samples is None else self._class_samples.cpu()

    def add(self, batch: Batch) -> None:
        """Scores one batch of samples, on the model's device.

        Raises:
            OutOfMemoryError: memory does not hold the pass of one sample.
        """
        first = self.samples

        def measure(part: Batch) -> None:
            nonlocal first
            values = self._rows(part, first)
            labels = part.labels.long() if self.by_class else None
            for index, measured in zip(self.shared, values, strict=True):
                self.tallies[index].add(measured, labels, self.classes)
            first += part.samples

        if self.runs:
            self._portions.run(batch, measure)
        for own in self.own.values():
            self._portions.run(batch, own.add)
        self.samples += batch.samples
        if self.by_class:
            labels = batch.labels.long()
            if self._class_samples is None:
                self._class_samples = labels.new_zeros(self.classes)
            self._class_samples.index_add_(0, labels, torch.ones_like(labels))

    def _rows(self, batch: Batch, first: int) -> list[torch.Tensor]:
        """(n, U) for each tally that is shared, sample by sample where a layer mixes samples."""
        try:
            return self._values(batch, first)
        except RowsError as error:
            if batch.samples == 1:
                raise
            log.debug("%s: samples are scored one by one", error)
            parts = [self._values(part, first + i) for i, part in enumerate(batch.split(1))]
            return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def keep_groups(self) -> None:
        """From now on, sums over groups of samples are kept beside the totals, see `Groups`.

        Raises:
            InputError: a criterion measures in a way of its own, from which none can be told.
        """
        for index in self.own:
            raise InputError(
                f"the criterion {self.tallies[index].criterion.name!r} can't tell how sure it is before "
                f"all samples are read; leave stop out, and limit them by max_batches"
            )
        for tally in self.tallies:
            tally.groups = Groups(len(self.units), self.device)

    def _values(self, batch: Batch, first: int) -> list[torch.Tensor]:
        """(n, U) for each tally, from the batch whose first sample has this number in the pass."""
        values: dict[int, torch.Tensor] = {}
        for run in self.runs:
            try:
                self._run(run, batch, first, values)
            except PlanMismatchError:
                # The model went another way than when it was recorded: that way is recorded as well.
                record = trace(self.model, batch.args, batch.kwargs)
                channels = channels_in(self.model, self.units, record)
                self.places = find_places(self.model, self.units, record, channels, self.device)
                try:
                    self._run(run, batch, first, values)
                except PlanMismatchError as error:
                    raise ModelError(
                        f"the model goes another way every time that it sees the same batch, so its "
                        f"feature maps can't be told apart: {error}. Choose a criterion that reads "
                        f"gradients, or make the model's way depend on its input alone"
                    ) from error
        return [values[index] for index in self.shared]

    def _run(self, run: _Run, batch: Batch, first: int, values: dict[int, torch.Tensor]) -> None:
        owners: list[_Measured] = []

        def forward() -> Any:
            return self._forward(batch)

        def objectives(output: Any) -> list[torch.Tensor]:
            if self.by_class or self.highest >= 0:
                self._see_classes(main_output(output), batch)
            totals = []
            for measured in run.measured:
                for total in measured.objective(output, batch, first):
                    if self.watchful and not bool(torch.isfinite(total)):
                        name = measured.objective.criterion.name
                        self._explain(forward, batch, f"the objective of {name!r} is {total:g}")
                    totals.append(total)
                    owners.append(measured)
            return totals

        maps: list[MapMode] = []

        def watch(source: Source) -> MapMode:
            statistics = [statistic for _, statistic in run.maps]
            maps[:] = [MapMode(run.runner.state.names, self.places, statistics, batch.samples, source)]
            return maps[0]

        # Small gradients vanish in fp16; S is divided by the same power of two, so nothing else changes.
        scale = 1024.0 if self.amp_dtype == torch.float16 else 1.0
        with torch.set_grad_enabled(bool(run.measured)):
            matrices = run.runner.matrices(
                forward, objectives, batch.samples, scale, watch if run.maps else None
            )
            for owner, matrix in zip(owners, matrices, strict=True):
                self._check(forward, batch, matrix, "gradient")
                for index in owner.tallies:
                    part = self.tallies[index].reduction.each(matrix)
                    values[index] = values[index] + part if index in values else part
        if maps:
            for (index, _), means in zip(run.maps, maps[0].means(), strict=True):
                self._check(forward, batch, means, "feature map")
                values[index] = means

    def _see_classes(self, logits: torch.Tensor, batch: Batch) -> None:
        check_labels(batch, logits)
        self.classes = logits.shape[1]
        if self.highest >= self.classes:
            raise InputError(
                f"class {self.highest} is outside the model's {self.classes} outputs (0 to "
                f"{self.classes - 1})"
            )

    def _check(self, forward: Callable[[], Any], batch: Batch, matrix: torch.Tensor, what: str) -> None:
        if self.watchful and not bool(torch.isfinite(matrix.sum())):
            self._explain(forward, batch, self._bad_columns(matrix, what))

    def _bad_columns(self, matrix: torch.Tensor, what: str) -> str:
        bad = torch.nonzero(~torch.isfinite(matrix).all(0)).flatten()
        if not len(bad):
            return "the score matrix overflows"
        # Gradients run from the output down, so the trouble starts at the last of the layers; that of
        # feature maps, at the first.
        layers = self.units.layer_of[bad.cpu()]
        name = self.units.layers[int(layers.max() if what == "gradient" else layers.min())].name
        return f"the {what} at the filters of {name} is not finite"

    def _explain(self, forward: Callable[[], Any], batch: Batch, what: str) -> None:
        place = first_nonfinite(self.model, forward, batch.raw)
        where = f"; NaN or infinity first appears in {place}" if place else ""
        raise NumericalError(
            f"{what} in the batch after {self.samples} samples{where}. Check the data and the weights "
            f"there, or leave out amp_dtype"
        )

    def check_adds_up(self) -> None:
        """Refuses criteria that several processes can't measure together.

        Raises:
            InputError: a criterion's own pass is more than a sum over samples.
        """
        for index, own in self.own.items():
            _total_of(own, self.tallies[index])

    def sums(self, classes: int) -> torch.Tensor:
        """All that was added up, (`numbers`,) float64 on the CPU, with so many classes."""
        self._widen(classes)
        return torch.cat([row.flatten().double().cpu() for row in self._added()])

    def replace_sums(self, sums: torch.Tensor, classes: int) -> None:
        """Takes what `sums` gave, added up over several passes of the same model, for its own."""
        self._widen(classes)
        rows = self._added()
        parts = torch.split(sums, [row.numel() for row in rows])
        for row, part in zip(rows, parts, strict=True):
            row.copy_(part.view(row.shape))
        self.samples = int(rows[0])
        for own in self.own.values():
            own.samples = self.samples

    def _widen(self, classes: int) -> None:
        """Makes tables for so many classes, where no sample has done so yet."""
        self.classes = classes
        if self.by_class and self._class_samples is None:
            self._class_samples = torch.zeros(classes, dtype=torch.int64, device=self.device)
            for tally in self.tallies:
                tally.by_class = tally.total.new_zeros(classes, len(tally.total))

    def _added(self) -> list[torch.Tensor]:
        """The tensors that hold what was added up, after the number of samples."""
        rows = [torch.tensor(self.samples)]
        for index, tally in enumerate(self.tallies):
            rows.append(_total_of(self.own[index], tally) if index in self.own else tally.total)
            if tally.by_class is not None:
                rows.append(tally.by_class)
        return rows if self._class_samples is None else [*rows, self._class_samples]

    def results(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """For each tally the importance (U,), and by class (K, U), zero for classes without a sample, or None.

        Both are float64 on the CPU.

        Raises:
            NumericalError: a score is not finite.
        """
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for index, tally in enumerate(self.tallies):
            if index in self.own:
                found.append((self.own[index].importance(), None))
                continue
            finish, table = tally.reduction.finish, None
            if tally.by_class is not None and self._class_samples is not None:
                counts = self._class_samples.clamp(min=1)[:, None]
                table = self._finite(tally, finish(tally.by_class, counts))
            found.append((self._finite(tally, finish(tally.total, self.samples)), table))
        return found

    def _finite(self, tally: Tally, found: torch.Tensor) -> torch.Tensor:
        raw = found.cpu()
        if not bool(torch.isfinite(raw).all()):
            what = "feature map" if isinstance(tally.criterion, ActivationCriterion) else "gradient"
            raise NumericalError(
                f"{self._bad_columns(raw.view(-1, raw.shape[-1]), what)} in one of the batches. Check "
                f"the data and the weights, or leave out amp_dtype"
            )
        return raw.to(torch.float64)


def _forward(model: nn.Module, device: torch.device, amp_dtype: torch.dtype | None, batch: Batch) -> Any:
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        return batch.feed(model)


def _give_back(runs: Sequence[_Run]) -> None:
    for run in runs:
        run.runner.give_back()


def _more_segments(runs: Sequence[_Run]) -> bool:
    shorter = [run.runner.more_segments() for run in runs]
    return any(shorter)


def _comfort(model: nn.Module, plan: Plan | None) -> float:
    """Bytes of activations above which a batch runs in halves on a CPU: half the memory for little time.

    Every part has every call made and every weight laid out anew: quarters took DenseNet-121 1.3 to 1.5 times
    as long as halves. Where stages make so little each that calls are what takes time, halves took 1.45 times
    as long as batches (chains of 300 and 1,000 layers, 260 KB each).
    """
    stages = set() if plan is None else {stage.last for stage in plan.stages.values()}
    return max(64e6, 0.6 * sum(p.nbytes for p in model.parameters()), 0.5e6 * len(stages))


def numbers(criteria: int, units: int, classes: int, by_class: bool) -> int:
    """How many numbers `Pass.sums` gives."""
    tables = classes if by_class else 0
    return 1 + criteria * units * (1 + tables) + tables


def _total_of(own: OwnPass, tally: Tally) -> torch.Tensor:
    total = getattr(own, "total", None)
    if not isinstance(total, torch.Tensor):
        raise InputError(
            f"the criterion {tally.criterion.name!r} is more than a sum over samples, so several processes "
            f"can't add it up; score in one process (distributed=False), or by another criterion"
        )
    return total


def _first_of(objective: Objective, output: Any, batch: Batch) -> torch.Tensor:
    """J, of a criterion that has one."""
    return objective(output, batch, 0)[0]


def _arranged(
    model: nn.Module,
    found: Discovery,
    rules: Sequence[tuple[int, Criterion, Reduction]],
    loss_fn: LossFunction | None,
) -> list[_Run]:
    """The fewest runs of the model that give all criteria, each with its position, what they need."""
    runs: dict[tuple[bool, bool], _Run] = {}

    def run(guided: bool, absolute: bool) -> _Run:
        key = guided, absolute
        if key not in runs:
            runs[key] = _Run(Runner(model, found, guided=guided, absolute=absolute))
        return runs[key]

    watchers: list[tuple[int, Statistic]] = []
    for index, rule, how in rules:
        if isinstance(rule, ActivationCriterion):
            watchers.append((index, rule.statistic))
            continue
        through = run(rule.guided, how.absolute)
        for measured in through.measured:
            if same_objective(measured.objective.criterion, rule):
                measured.tallies.append(index)
                break
        else:
            through.measured.append(_Measured(Objective(rule, loss_fn), [index]))
    if watchers:
        # Any run will do; one by the fast tier, as without other criteria, has the same rounding.
        fast = next((r for (_, absolute), r in runs.items() if not absolute), None)
        (fast or run(False, False)).maps = watchers
    return list(runs.values())
