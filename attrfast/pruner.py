"""The loop: score, rank, cut, fine-tune, repeat until the model is as small as asked.

Source: the algorithm of "Convolution network pruning based on the evaluation of the importance of
characteristic attributions", Scientia Sinica Informationis 2021(1):13-26, doi 10.1360/SSI-2020-0186.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from attrfast import checkpoint as checkpoints
from attrfast.batches import Batch, reiterable, resolve_device, unpack
from attrfast.channels import Discovery, discover
from attrfast.checkpoint import Checkpoint, fingerprint
from attrfast.cost import Cost, CostModel, cost
from attrfast.criteria import Criterion, get_criterion
from attrfast.engine import attribute
from attrfast.errors import AttrfastError, InputError, ModelError, TargetError
from attrfast.evaluate import Evaluation, evaluate
from attrfast.finetune import FineTune, FineTuneLike, as_finetune, fine_tune
from attrfast.objective import LossFunction
from attrfast.result import PruneResult, Step
from attrfast.selection import Block, first_filters, mask, rank, spared
from attrfast.surgery import cut, without


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the loop works towards; None where nothing was asked.

    Attributes:
        filters: at most this many left.
        macs, params: at most.
        drop: top-1 may fall by at most this share.
    """

    filters: int | None
    macs: int | None
    params: int | None
    drop: float | None

    def reached(self, filters: int, now: Cost) -> bool:
        """Whether the model is as small as asked in every respect (never, if no size was asked)."""
        asked = (self.filters, self.macs, self.params)
        have = (filters, now.macs, now.params)
        limits = [(limit, size) for limit, size in zip(asked, have, strict=True) if limit is not None]
        return bool(limits) and all(size <= limit for limit, size in limits)

    def distance(self, filters: int, now: Cost, base: Cost, total: int) -> str:
        """How far a size is from the targets, in words."""
        parts = []
        if self.filters is not None:
            parts.append(
                f"{filters / total:.1%} of the filters are left where at most "
                f"{self.filters / total:.1%} were asked"
            )
        if self.macs is not None:
            parts.append(
                f"{now.macs / base.macs:.1%} of the multiply-adds where at most "
                f"{self.macs / base.macs:.1%} were asked"
            )
        if self.params is not None:
            parts.append(
                f"{now.params / base.params:.1%} of the parameters where at most "
                f"{self.params / base.params:.1%} were asked"
            )
        return ", ".join(parts)


def _targets(
    keep_ratio: float | None,
    max_macs: float | None,
    max_params: float | None,
    max_accuracy_drop: float | None,
    base: Cost,
    filters: int,
) -> Targets:
    if all(t is None for t in (keep_ratio, max_macs, max_params, max_accuracy_drop)):
        raise InputError(
            "prune needs a target: keep_ratio, max_macs, max_params or max_accuracy_drop (for "
            "instance max_macs=0.5 for half of the multiply-adds)"
        )
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise InputError(
            f"max_accuracy_drop must be a share of top-1 between 0 and 1 (0.01 is one point), got "
            f"{max_accuracy_drop!r}"
        )
    return Targets(
        filters=None if keep_ratio is None else math.floor(_share("keep_ratio", keep_ratio) * filters),
        macs=_limit("max_macs", max_macs, base.macs),
        params=_limit("max_params", max_params, base.params),
        drop=max_accuracy_drop,
    )


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {value!r}")
    return float(value)


def _limit(name: str, value: float | None, whole: int) -> int | None:
    """A share of the original as float, or a count as int."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return value
    try:
        return math.floor(_share(name, value) * whole)
    except InputError:
        raise InputError(
            f"{name} must be a share of the original in (0, 1], or a count as a whole number above 1, "
            f"got {value!r}"
        ) from None


class _Run:
    """One pruning run: the model as it is now, and everything that was decided about it."""

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        device: torch.device,
        *,
        min_filters: int,
        round_to: int,
        ignore: Iterable[str | nn.Module],
        quiet: bool,
    ) -> None:
        self.original = model
        self.model = copy.deepcopy(model).to(device)
        self.example, self.device = example, device
        self.min_filters, self.round_to, self.quiet = min_filters, round_to, quiet
        self.found = self._discover()
        units = self.found.units
        self.total = units.total_filters
        self.base = cost(self.model, example.args, example.kwargs)
        self.gates = {name: torch.ones(len(row), dtype=torch.bool) for name, row in units.filters.items()}
        whole = spared(ignore, model, units)
        # Names of convolutions stay what they are while filters go, so layers are spared by name.
        self.whole = {n for n, row in units.filters.items() if bool(whole[row].any())}
        self._warn_of_frozen()

    def _discover(self) -> Discovery:
        return discover(self.model, self.example.args, self.example.kwargs)

    def _warn_of_frozen(self) -> None:
        units = self.found.units
        for layer in units.layers:
            if layer.frozen is not None and not self.whole.issuperset(layer.convs):
                warnings.warn(f"{layer.name} is left whole: {layer.frozen}", stacklevel=4)
        if not bool(self.allowed().any()):
            reasons = sorted({layer.frozen for layer in units.layers if layer.frozen})
            raise ModelError(
                "no layer of the model can be pruned: "
                + ("; ".join(reasons[:3]) if reasons else "all of them are in `ignore`")
            )

    def allowed(self) -> torch.Tensor:
        """(U,) bool, the units that may go."""
        units = self.found.units
        free = torch.tensor([reason is None for reason in units.frozen])
        for name in self.whole:
            row = units.filters[name]
            free[row[row >= 0]] = False
        return free

    @property
    def filters(self) -> int:
        return sum(int(gate.sum()) for gate in self.gates.values())

    def predictor(self) -> CostModel:
        return CostModel(
            self.model, self.found, cost(self.model, self.example.args, self.example.kwargs)
        )

    def blocks(self, importance: torch.Tensor) -> list[Block]:
        return rank(
            importance,
            self.found.units,
            min_filters=self.min_filters,
            round_to=self.round_to,
            allowed=self.allowed(),
        )

    def check_reachable(self, targets: Targets) -> None:
        """Raises TargetError where even removing all that may go is not enough."""
        blocks = self.blocks(torch.zeros(len(self.found.units)))
        left = self.filters - sum(b.filters for b in blocks)
        least = self.predictor().after(mask(blocks, self.found.units))
        self._refuse(targets, left, least)

    def _refuse(self, targets: Targets, filters: int, now: Cost) -> None:
        asked = Targets(targets.filters, targets.macs, targets.params, None)
        if any((asked.filters, asked.macs, asked.params)) and not asked.reached(filters, now):
            raise TargetError(
                f"the target can't be reached: with everything removed that may be, "
                f"{targets.distance(filters, now, self.base, self.total)}; ask for less, lower "
                f"min_filters ({self.min_filters}) or round_to ({self.round_to}), or ignore less"
            )

    def choose(self, importance: torch.Tensor, count: int, targets: Targets) -> list[Block]:
        """The lowest blocks: `count` filters, or fewer where the targets are reached before."""
        blocks = self.blocks(importance)
        if not blocks:
            if targets.drop is None or any((targets.filters, targets.macs, targets.params)):
                now = cost(self.model, self.example.args, self.example.kwargs)
                self._refuse(targets, self.filters, now)
            return []
        most = max(1, first_filters(blocks, count))
        predictor, units = self.predictor(), self.found.units

        def enough(number: int) -> bool:
            taken = blocks[:number]
            left = self.filters - sum(b.filters for b in taken)
            return targets.reached(left, predictor.after(mask(taken, units)))

        if enough(most):
            low, high = 0, most  # the least number that is enough lies in (low, high]
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if enough(middle) else (middle, high)
            most = high
        return blocks[:most]

    def cut(self, importance: torch.Tensor, count: int, targets: Targets) -> dict[str, int]:
        """Removes units; returns how many filters went, by layer (empty: nothing is left to take)."""
        blocks = self.choose(importance, count, targets)
        while blocks:
            removed = mask(blocks, self.found.units)
            try:
                self.model = without(
                    self.model, self.example.args, self.example.kwargs, self.found.units, removed
                )
                break
            except ModelError as error:
                self._spare_culprits(blocks, error)
                blocks = self.choose(importance, count, targets)
        else:
            return {}
        gone = self._close_gates(removed)
        self.found = self._discover()
        return gone

    def _spare_culprits(self, blocks: list[Block], error: ModelError) -> None:
        """Finds the layers whose cut changes more than it should, and leaves them whole from now on."""
        units = self.found.units
        culprits = []
        for index, layer in enumerate(units.layers):
            mine = [b for b in blocks if int(units.layer_of[b.units[0]]) == index]
            if not mine:
                continue
            try:
                without(
                    self.model, self.example.args, self.example.kwargs, units, mask(mine, units)
                )
            except ModelError as reason:
                culprits.append(layer.name)
                self.whole.update(layer.convs)
                warnings.warn(f"{layer.name} is left whole: {reason}", stacklevel=5)
        if not culprits:
            raise error

    def _close_gates(self, removed: torch.Tensor) -> dict[str, int]:
        units = self.found.units
        gone: dict[str, int] = {}
        for layer in units.layers:
            for name in layer.convs:
                row = units.filters[name]
                lost = removed[row]
                if bool(lost.any()):
                    gone[layer.name] = gone.get(layer.name, 0) + int(lost.sum())
                    alive = torch.nonzero(self.gates[name]).flatten()
                    gate = self.gates[name].clone()
                    gate[alive[lost]] = False
                    self.gates[name] = gate
        return gone

    def restore(self, saved: Checkpoint) -> None:
        """Takes the model to where a checkpoint left it."""
        units = self.found.units
        removed = torch.zeros(len(units), dtype=torch.bool)
        for name, gate in saved.gates.items():
            row = units.filters[name]
            removed[row[~gate]] = True
        cut(self.model, units, removed)
        self.model.load_state_dict(saved.weights)
        self.gates = {name: gate.clone() for name, gate in saved.gates.items()}
        self.found = self._discover()

    def row(
        self, step: int, seen: Evaluation, removed: dict[str, int], seconds: tuple[float, float, float]
    ) -> Step:
        now = cost(self.model, self.example.args, self.example.kwargs)
        return Step(
            step=step,
            phi=self.filters / self.total,
            filters=self.filters,
            top1=seen.top1,
            loss=seen.loss,
            macs=now.macs,
            params=now.params,
            macs_pruned_percent=100 * (1 - now.macs / self.base.macs),
            params_pruned_percent=100 * (1 - now.params / self.base.params),
            removed=removed,
            seconds_scoring=seconds[0],
            seconds_cutting=seconds[1],
            seconds_tuning=seconds[2],
        )


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: str | Criterion = "attribution",
    *,
    keep_ratio: float | None = None,
    max_macs: float | None = None,
    max_params: float | None = None,
    max_accuracy_drop: float | None = None,
    filters_per_step: int | None = None,
    val_loader: Iterable[Any] | None = None,
    finetune: FineTuneLike = 1,
    final_finetune: FineTuneLike | None = None,
    loss_fn: LossFunction | None = None,
    normalize: str | None = "l2",
    reduction: str | None = None,
    max_batches: int | None = None,
    microbatch: int | None = None,
    device: str | torch.device | None = None,
    amp_dtype: torch.dtype | None = None,
    round_to: int = 1,
    min_filters: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    inplace: bool = False,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[Step, nn.Module], None] | None = None,
) -> PruneResult:
    """Removes the least important filters, step by step, until the model is as small as asked.

    Args:
        model: any module that classifies (or one for which `loss_fn` is given). Left as it is, unless
            `inplace`.
        loader: iterable of `(input, label)` batches, for scoring and fine-tuning. A generator is kept
            in memory, with a warning.
        criterion: a name (`attrfast.criterion_names()`) or an `attrfast.Criterion`.
        keep_ratio: stop when at most this share of the filters is left, in (0, 1].
        max_macs, max_params: stop at this share of the original's multiply-adds or parameters, in
            (0, 1], or at this count (a whole number above 1).
        max_accuracy_drop: stop before top-1 has fallen by more than this share (0.01 is one point); the
            last model within it is the result.
        filters_per_step: τ, how many filters go in a step at least; None: a sixteenth of all. The last
            step takes no more than the targets need.
        val_loader: for accuracy and loss in the history; None: `loader`.
        finetune: after every step: epochs, an `attrfast.FineTune`, or a callable `(model, step)`.
        final_finetune: the same, once more after the last step.
        loss_fn: `loss_fn(output, batch)` in place of the cross-entropy, in evaluation, fine-tuning and
            the criteria that measure a loss.
        normalize, reduction, max_batches, microbatch, amp_dtype: of scoring, see `attribute`.
        device: run there; None: where the model is.
        round_to: widths of pruned layers are multiples of this.
        min_filters: how many filters every convolution keeps at least.
        ignore: modules, or names or patterns of modules, that are left whole.
        inplace: put the result into `model` itself, at the very end.
        seed: of fine-tuning and of the criterion `random`.
        output_dir: where every step is saved.
        resume: go on from the last step saved in `output_dir`, if there is one.
        progress: show a bar when standard error is a terminal.
        callback: called with the new row and the model after every step.

    Returns:
        PruneResult: the smaller model, the history, and which filters are left.

    Raises:
        InputError: an argument, a batch or a label is not usable.
        TargetError: the targets can't be reached.
        ModelError: nothing can be pruned.
        NumericalError: something is not finite.
        BackendError: the device does not exist here.
    """
    rule = get_criterion(criterion)
    tuning = as_finetune(finetune)
    final = None if final_finetune is None else as_finetune(final_finetune)
    if filters_per_step is not None and (
        not isinstance(filters_per_step, int) or filters_per_step < 1
    ):
        raise InputError(
            f"filters_per_step must be a whole number of at least 1, got {filters_per_step!r}"
        )
    if resume and output_dir is None:
        raise InputError("resume=True needs output_dir, the folder with the steps that were saved")
    place = resolve_device(model, device)
    loader = reiterable(loader)
    validation = loader if val_loader is None else reiterable(val_loader)
    _targets(keep_ratio, max_macs, max_params, max_accuracy_drop, Cost(1, 1), 1)
    run = _Run(
        model,
        _example(loader, place),
        place,
        min_filters=min_filters,
        round_to=round_to,
        ignore=ignore,
        quiet=not progress,
    )
    targets = _targets(
        keep_ratio, max_macs, max_params, max_accuracy_drop, run.base, run.total
    )
    run.check_reachable(targets)
    count = filters_per_step or max(1, math.ceil(run.total / 16))
    settings = dict(
        criterion=rule.name,
        targets=dataclasses.asdict(targets),
        count=count,
        finetune=repr(tuning) if isinstance(tuning, FineTune) else "callable",
        options=[normalize, reduction, max_batches, str(amp_dtype), round_to, min_filters, seed],
        whole=sorted(run.whole),
    )
    mark = fingerprint(model, settings) if output_dir is not None else ""
    folder = None if output_dir is None else Path(output_dir)

    def measure() -> Evaluation:
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            return evaluate(run.model, validation, loss_fn=loss_fn, device=place)

    saved = checkpoints.load(folder, mark) if folder is not None and resume else None
    if saved is not None:
        run.restore(saved)
        history = saved.history
    else:
        history = [run.row(0, measure(), {}, (0.0, 0.0, 0.0))]
    best, best_gates = run.model, dict(run.gates)
    stopped = ""
    bar = tqdm(
        total=100, desc="pruning", leave=False, disable=None if progress else True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
    )  # fmt: skip
    with bar:
        while not stopped:
            if targets.reached(run.filters, Cost(history[-1].macs, history[-1].params)):
                stopped = _done(targets)
                break
            step = len(history)
            begun = time.perf_counter()
            scores = attribute(
                run.model,
                loader,
                rule,
                loss_fn=loss_fn,
                normalize=normalize,
                reduction=reduction,
                max_batches=max_batches,
                microbatch=microbatch,
                device=place,
                amp_dtype=amp_dtype,
                progress=progress,
                seed=seed + step,
                units=run.found.units,
            )
            scored = time.perf_counter()
            removed = run.cut(scores.importance, count, targets)
            done = time.perf_counter()
            if not removed:
                stopped = "nothing more can be removed"
                break
            fine_tune(
                run.model, loader, tuning, step=step, loss_fn=loss_fn, device=place, seed=seed
            )
            tuned = time.perf_counter()
            row = run.row(
                step, measure(), removed, (scored - begun, done - scored, tuned - done)
            )
            if targets.drop is not None and history[0].top1 - row.top1 > targets.drop:
                stopped = (
                    f"top-1 fell from {history[0].top1:.2%} to {row.top1:.2%} in step {step}, more "
                    f"than max_accuracy_drop={targets.drop:g}; the model before it is kept"
                )
                break
            history.append(row)
            best, best_gates = run.model, dict(run.gates)
            _show(bar, row, targets, run)
            if folder is not None:
                checkpoints.save(
                    folder, Checkpoint(mark, history, run.gates, run.model.state_dict())
                )
            if callback is not None:
                _call_back(callback, row, run.model)
    if final is not None and len(history) > 1:
        fine_tune(
            best, loader, final, step=len(history), loss_fn=loss_fn, device=place, seed=seed
        )
        run.model = best
        last = measure()
        history[-1] = dataclasses.replace(history[-1], top1=last.top1, loss=last.loss)
    if inplace:
        _install(model, best)
        best = model
    return PruneResult(best, history, best_gates, rule.name, stopped)


def _example(loader: Iterable[Any], device: torch.device) -> Batch:
    """Two samples of the first batch (one, if it has no more)."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        first = next(iter(loader), None)
    if first is None:
        raise InputError(
            "the loader gave no batch; pass a non-empty iterable of (input, label) batches"
        )
    return next(iter(unpack(first, device).split(2)))


def _done(targets: Targets) -> str:
    parts = [
        name
        for name, limit in (
            ("keep_ratio", targets.filters),
            ("max_macs", targets.macs),
            ("max_params", targets.params),
        )
        if limit is not None
    ]
    return " and ".join(parts) + " reached"


def _show(bar: Any, row: Step, targets: Targets, run: _Run) -> None:
    """Moves the bar by the size that is furthest from its target."""
    ways = [
        (1 - now / whole) / (1 - limit / whole)
        for limit, now, whole in (
            (targets.filters, row.filters, run.total),
            (targets.macs, row.macs, run.base.macs),
            (targets.params, row.params, run.base.params),
        )
        if limit is not None and limit < whole
    ]
    bar.n = round(100 * min([1.0, *ways])) if ways else 0
    bar.set_postfix_str(f"step {row.step}, φ {row.phi:.2f}, top-1 {row.top1:.2%}")


def _call_back(callback: Callable[[Step, nn.Module], None], row: Step, model: nn.Module) -> None:
    try:
        callback(row, model)
    except AttrfastError:
        raise
    except Exception as error:
        raise AttrfastError(
            f"your callback raised {type(error).__name__} at step {row.step}: {error}"
        ) from error


def _install(model: nn.Module, smaller: nn.Module) -> None:
    """Puts the layers of a pruned copy into the user's own module objects."""
    replacements = dict(smaller.named_modules())
    for name, module in model.named_modules():
        replacement = replacements[name]
        for key, value in replacement.__dict__.items():
            if key != "_modules":
                module.__dict__[key] = value
