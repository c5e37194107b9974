"""The loop: score, rank, cut, fine-tune, repeat until the model is as small as asked.

Source: the algorithm of "Convolution network pruning based on the evaluation of the importance of
characteristic attributions", Scientia Sinica Informationis 2021(1):13-26, doi 10.1360/SSI-2020-0186.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from attrfast import checkpoint as checkpoints
from attrfast import epochs, random_state
from attrfast.batches import Batch, reiterable, resolve_device, unpack
from attrfast.checkpoint import Checkpoint, fingerprint
from attrfast.criteria import Criterion, TrainedCriterion
from attrfast.distributed import Group, together
from attrfast.engine import attribute, check_options
from attrfast.epochs import EpochKeeper, Position, Read
from attrfast.errors import AttrfastError, InputError
from attrfast.evaluate import Evaluation, evaluate
from attrfast.files import require_writable
from attrfast.finetune import FineTuneLike, as_finetune, fine_tune
from attrfast.history import Step
from attrfast.latency import Gauge, Reading, inputs_of_a_pass
from attrfast.learning import learn
from attrfast.objective import LossFunction
from attrfast.portions import parse_memory
from attrfast.residual import ResidualBranch
from attrfast.result import PruneResult
from attrfast.scores import normalized
from attrfast.seeding import seeded
from attrfast.selection import for_the_worst_class
from attrfast.shrinking import Shrinking, install
from attrfast.stopping import are_long_and_shuffled, can_stop, check_stop
from attrfast.targets import Asked, Targets
from attrfast.trace import ordinary_region

Callback = Callable[[Step, nn.Module], None]


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: str | Criterion = "attribution",
    *,
    keep_ratio: float | None = None,
    max_macs: float | None = None,
    max_params: float | None = None,
    max_latency: str | float | None = None,
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
    memory_limit: str | float | None = None,
    device: str | torch.device | None = None,
    amp_dtype: torch.dtype | None = None,
    stop: str | None = "auto",
    confidence: float = 0.95,
    classes: Sequence[int] | None = None,
    balance: str | None = None,
    round_to: int = 1,
    min_filters: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    latency_input: Any = None,
    latency_device: str | torch.device | None = None,
    latency_cache: str | Path | None = None,
    latency_weight: float = 0.0,
    inplace: bool = False,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[Step, nn.Module], None] | None = None,
    distributed: bool = True,
) -> PruneResult:
    """Removes the least important filters, step by step, until the model is as small as asked.

    Args:
        model: any module that classifies (or one for which `loss_fn` is given). Left as it is, unless
            `inplace`.
        loader: iterable of `(input, label)` batches, for scoring and fine-tuning. A generator is kept
            in memory, with a warning.
        criterion: a name (`attrfast.criterion_names()`) or an `attrfast.Criterion`. One that trains
            (`attrfast.criteria.SSS`, `Variational`, `Soft`, `BNScale(sparsity=...)`) trains the model in
            every step before the ranking, by options of its own; all filters that it finds to compute
            nothing go, even past the targets, and without any target one step of it is the result.
        keep_ratio: stop when at most this share of the filters is left, in (0, 1].
        max_macs, max_params: stop at this share of the original's multiply-adds or parameters, in
            (0, 1], or at this count (a whole number above 1).
        max_latency: stop when a pass of the real model takes at most this share of the original's time
            (`"0.5x"` or 0.5) or this time (`"12ms"`), measured. Widths are then kept to those that the device
            likes. See docs/latency.md.
        max_accuracy_drop: stop before top-1 has fallen by more than this share (0.01 is one point); the
            last model within it is the result.
        filters_per_step: τ, how many filters go in a step at least; None: a sixteenth of all. The last
            step takes no more than the targets need.
        val_loader: for accuracy and loss in the history; None: `loader`.
        finetune: after every step: epochs, an `attrfast.FineTune`, or a callable `(model, step)`.
        final_finetune: the same, once more after the last step.
        loss_fn: `loss_fn(output, batch)` in place of the cross-entropy, in evaluation, fine-tuning and
            the criteria that measure a loss.
        normalize, reduction, max_batches, microbatch, memory_limit, amp_dtype: of scoring, see `attribute`;
            all but the first without effect on a criterion that trains.
        device: run there; None: where the model is.
        stop: `"confident"` scores in every step until the lowest τ filters are settled, `None` by all
            samples, see `attribute`. `"auto"` is the former where the loader is a `DataLoader` that shuffles
            10,000 samples or more, and no `max_batches`, `balance`, `max_latency`, other process or criterion
            that measures in a way of its own stands against it.
        confidence: of `stop`.
        classes: keep what these classes need: importance comes from the samples with these labels alone.
            Fine-tuning and the history go by all samples of the loaders that are given.
        balance: None ranks filters by their importance over all samples; `"worst_class"` by that for the
            class which needs them most, so that no class pays for the others (and no class counts for
            less because it is rare). See `attrfast.selection.for_the_worst_class`.
        round_to: widths of pruned layers are multiples of this (with `max_latency` and 1, of what the
            device likes).
        min_filters: how many filters every convolution keeps at least.
        ignore: modules, or names or patterns of modules, that are left whole.
        latency_input: what `max_latency` is about: an input as a batch of the loader has it, or how many
            samples of the loader's first; None: one.
        latency_device: time there; None: where pruning runs.
        latency_cache: folder with the tables of what layers take; None: the user's folder for caches.
        latency_weight: with `max_latency`, the power of a filter's time that its importance is divided by. 0:
            the lowest importance goes first; 1: the lowest importance per millisecond saved.
        inplace: put the result into `model` itself, at the very end.
        seed: of fine-tuning and of the criterion `random`.
        output_dir: where every step is saved, and every epoch of a fine-tuning in it; see docs/resuming.md.
        resume: go on from what was saved in `output_dir` last, if there is anything.
        progress: show a bar when standard error is a terminal.
        callback: called with the new row and the model after every step.
        distributed: where `torch.distributed` has a default group, prune together with its other
            processes: each reads its own loaders, shards of the data, scores and evaluations are added up,
            fine-tuning goes by DistributedDataParallel, and all get the same model. Only the first writes
            `output_dir`. See docs/distributed.md.

    Returns:
        PruneResult: the smaller model, the history, and which filters are left. After Ctrl-C, what was pruned
        until then, with a warning and `interrupted` set; KeyboardInterrupt where no step was whole yet.

    Raises:
        InputError: an argument, a batch or a label is not usable; `output_dir` can't be written, or what it
            holds can't be used.
        TargetError: the targets can't be reached.
        ModelError: nothing can be pruned.
        NumericalError: something is not finite.
        BackendError: the device does not exist here.
        DistributedError: another process failed, died, did not come in time, or prunes something else.
    """
    if balance not in (None, "worst_class"):
        raise InputError(f"balance must be 'worst_class' or None, got {balance!r}")
    rule, _ = check_options(
        criterion,
        normalize=normalize,
        reduction=reduction,
        max_batches=max_batches,
        microbatch=microbatch,
        by_class=balance is not None,
        classes=classes,
    )
    if stop != "auto":
        check_stop(stop, confidence, filters_per_step)
    by = "balance" if balance is not None else "max_latency" if max_latency is not None else None
    if stop == "confident" and by is not None:
        raise InputError(
            f"stop='confident' settles the order of importance over all samples, and {by} ranks in another "
            f"way; leave one of them out"
        )
    for name, value in (
        ("latency_input", latency_input),
        ("latency_device", latency_device),
        ("latency_cache", latency_cache),
        ("latency_weight", latency_weight or None),
    ):
        if max_latency is None and value is not None:
            raise InputError(f"{name} says what max_latency is about, and there is no max_latency")
    if not (isinstance(latency_weight, (int, float)) and 0 <= latency_weight <= 10):
        raise InputError(f"latency_weight must be a number from 0 to 10, got {latency_weight!r}")
    tuning = as_finetune(finetune)
    final = None if final_finetune is None else as_finetune(final_finetune)
    asked = Asked(
        keep_ratio, max_macs, max_params, max_latency, max_accuracy_drop, needed=not rule.trains
    )
    if filters_per_step is not None and (not isinstance(filters_per_step, int) or filters_per_step < 1):
        raise InputError(
            f"filters_per_step must be a whole number of at least 1, got {filters_per_step!r}"
        )
    if resume and output_dir is None:
        raise InputError("resume=True needs output_dir, the folder with the steps that were saved")
    with together(distributed) as group, contextlib.ExitStack() as region:
        place, progress = resolve_device(model, device), progress and group.first
        region.enter_context(ordinary_region(place))
        if output_dir is not None and group.first:
            _require_folder(Path(output_dir))
        parse_memory(memory_limit, place)
        if rule.trains and not group.alone:
            raise InputError(
                f"the criterion {rule.name!r} trains, which it does in one process alone; prune in one "
                f"(distributed=False), or by a criterion that does not train"
            )
        user_model, model = model, getattr(model, "_orig_mod", model)  # under torch.compile's wrapper
        loader = reiterable(loader)
        validation = loader if val_loader is None else reiterable(val_loader)
        with seeded(seed, [loader], place):
            now = Shrinking(
                model,
                _examples(loader, place, group),
                place,
                min_filters=min_filters,
                round_to=round_to,
                ignore=ignore,
            )
            if isinstance(rule, TrainedCriterion):
                now.spare(rule.unscorable(now.model, now.found.units))
            gauge = None
            if max_latency is not None:
                timed_on = place if latency_device is None else resolve_device(model, latency_device)
                a_pass = inputs_of_a_pass(latency_input, now.example, timed_on)
                gauge = Gauge(
                    model, a_pass, timed_on, folder=latency_cache, progress=progress, group=group
                )
                now.follow(gauge, latency_weight)
        targets = asked.of(now.size())
        now.check_reachable(targets)
        count = filters_per_step or max(1, math.ceil(targets.whole.filters / 16))
        if stop == "auto":
            able = can_stop(rule) and by is None and max_batches is None
            stop = "confident" if able and are_long_and_shuffled(loader, group) else None
        scoring = {
            "criterion": rule,
            "loss_fn": loss_fn,
            "normalize": normalize,
            "reduction": reduction,
            "max_batches": max_batches,
            "microbatch": microbatch,
            "memory_limit": memory_limit,
            "amp_dtype": amp_dtype,
            "by_class": balance is not None,
            "classes": None if classes is None else sorted(set(classes)),
            "stop": stop,
            "confidence": confidence,
            "lowest": count,
        }
        saver = None
        if output_dir is not None or not group.alone:
            limits = [count, round_to, min_filters, sorted(now.whole), seed]
            timed = None if gauge is None else {**gauge.setting, "weight": latency_weight}
            settings = {"scoring": scoring, "targets": asked, "finetune": tuning, "limits": limits}
            mark = fingerprint(model, {**settings, "latency": timed})
            group.require_same(
                "pruning",
                mark,
                "it has another model, or other arguments of prune; give all processes the same",
            )
            if output_dir is not None:
                saver = _Saver(Path(output_dir), mark, group, (loader, validation), place)
        loop = _Loop(
            now=now,
            gauge=gauge,
            loader=loader,
            validation=validation,
            targets=targets,
            count=count,
            scoring=scoring,
            tuning=tuning,
            loss_fn=loss_fn,
            device=place,
            seed=seed,
            progress=progress,
            group=group,
            saver=saver,
        )
        interrupted = False
        try:
            loop.start(resume)
            stopped = loop.run(callback)
            if final is not None and len(loop.history) > 1:
                loop.tune_again(final)
        except KeyboardInterrupt:
            if len(loop.best.history) < 2 or not group.alone:
                raise  # there is nothing but the original, or others wait
            interrupted, stopped = True, loop.where_it_stood()
            warnings.warn(f"{stopped}; what is pruned so far is the result", stacklevel=2)
        best = loop.best
        smaller = best.model
        if inplace:
            install(model, smaller, best.taken)
            smaller = user_model
        return PruneResult(
            smaller,
            list(best.history),
            dict(best.gates),
            rule.name,
            stopped,
            original=None if inplace else model,
            interrupted=interrupted,
        )


def _require_folder(folder: Path) -> None:
    """Hours of pruning should not end in a folder that can't be written."""
    try:
        require_writable(folder)
    except OSError as error:
        raise InputError(
            f"steps can't be saved in output_dir {folder}: {error}; give another folder"
        ) from error


@dataclass
class _Saver:
    """Where a run is saved, the mark of this run, and what else than the model it depends on.

    Of several processes, the first reads and writes, and epochs are not kept.
    """

    folder: Path
    mark: str
    group: Group
    loaders: tuple[Iterable[Any], Iterable[Any]]
    device: torch.device
    found: EpochKeeper | None = None

    def load(self) -> Checkpoint | None:
        """The last step; what was kept of the next one's fine-tuning is `found` from now on."""
        saved = self.group.from_first("loading", lambda: checkpoints.load(self.folder, self.mark))
        if self.group.alone:
            self.found = epochs.load(self.folder, self.mark, alone=saved is None)
        return saved

    def save(self, history: list[Step], now: Shrinking) -> None:
        if not self.group.first:
            return
        weights, random = now.model.state_dict(), random_state.now(self.loaders, self.device)
        checkpoints.save(
            self.folder, Checkpoint(self.mark, history, now.gates, weights, now.taken, random)
        )
        self.found = None
        epochs.forget(self.folder)

    def restore_random(self, saved: Checkpoint) -> None:
        if self.group.first:
            random_state.restore(saved.random, self.loaders, self.device)

    def tuned_before(self, step: int, *, final: bool = False) -> EpochKeeper | None:
        """The fine-tuning in which an earlier process was cut off, if it is that of this step."""
        where = None if self.found is None else self.found.position
        return self.found if where is not None and (where.step, where.final) == (step, final) else None

    def keeper(self, position: Position) -> EpochKeeper | None:
        """For a fine-tuning that begins."""
        return EpochKeeper(self.folder, self.mark, position) if self.group.alone else None


@dataclass(frozen=True)
class _Best:
    """What the result would be if the run ended now."""

    model: nn.Module
    gates: dict[str, torch.Tensor]
    taken: tuple[ResidualBranch, ...]
    history: tuple[Step, ...]


@dataclass
class _Loop:
    """The steps of one run, and the best model so far: the last within `targets`' accuracy drop."""

    now: Shrinking
    gauge: Gauge | None
    loader: Iterable[Any]
    validation: Iterable[Any]
    targets: Targets
    count: int
    scoring: dict[str, Any]
    tuning: Any
    loss_fn: LossFunction | None
    device: torch.device
    seed: int
    progress: bool
    group: Group
    saver: _Saver | None
    history: list[Step] = dataclasses.field(default_factory=list)
    best: _Best = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._keep()

    def start(self, resume: bool) -> None:
        """Measures the original, or takes up an earlier run."""
        saved = self.saver.load() if self.saver is not None and resume else None
        if saved is None:
            self.history = [self._row(0, {}, (0.0, 0.0, 0.0), Read())]
        else:
            self.now.restore(saved.gates, saved.weights, saved.taken)
            self.history = saved.history
            share = self.history[-1].latency_share
            if self.gauge is not None and share is not None:
                self.gauge.start_from(share, self.now.gates)
        if self.targets.drop is not None and math.isnan(self.history[0].top1):
            raise InputError(
                f"max_accuracy_drop={self.targets.drop:g} needs a top-1, and the model's output is no "
                f"matrix of logits with one label a sample; leave max_accuracy_drop out"
            )
        self._keep()
        if self.saver is not None and saved is not None:
            self.saver.restore_random(saved)

    def _keep(self) -> None:
        # In one piece: Ctrl-C may come between any two lines.
        now = self.now
        self.best = _Best(now.model, dict(now.gates), tuple(now.taken), tuple(self.history))

    def where_it_stood(self) -> str:
        """In words, after Ctrl-C."""
        saved = "" if self.saver is None else f"; resume=True goes on in {self.saver.folder}"
        return f"interrupted after step {self.best.history[-1].step}{saved}"

    def run(self, callback: Callback | None) -> str:
        """Steps until the targets hold; returns why it ended, in words."""
        bar = tqdm(
            total=100,
            desc="pruning",
            leave=False,
            disable=None if self.progress else True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
        )
        with bar:
            while not self._finished():
                row = self._step()
                if row is None:
                    return "nothing more can be removed"
                first = self.history[0]
                if self.targets.drop is not None and first.top1 - row.top1 > self.targets.drop:
                    return (
                        f"top-1 fell from {first.top1:.2%} to {row.top1:.2%} in step {row.step}, more "
                        f"than max_accuracy_drop={self.targets.drop:g}; the model before it is kept"
                    )
                self.history.append(row)
                self._keep()
                bar.n = round(100 * self.targets.progress(self.now.size()))
                bar.set_postfix_str(f"step {row.step}, φ {row.phi:.2f}, top-1 {row.top1:.2%}")
                if self.saver is not None:
                    self.saver.save(self.history, self.now)
                if callback is not None:
                    _call_back(callback, row, self.now.model)
        if self.once:
            return "one step of training, and what computed nothing after it"
        return " and ".join(self.targets.sizes) + " reached"

    def _finished(self) -> bool:
        return len(self.history) > 1 if self.once else self.targets.reached(self.now.size())

    def _step(self) -> Step | None:
        """Scores, cuts and tunes; None where nothing is left to cut."""
        step = len(self.history)
        keeper = None if self.saver is None else self.saver.tuned_before(step)
        if keeper is None:
            removed, seconds, read = self._cut(step)
            if not removed and not self.once:
                return None
            if self.saver is not None:
                gates, taken = dict(self.now.gates), tuple(self.now.taken)
                keeper = self.saver.keeper(Position(step, False, gates, taken, removed, seconds, read))
        else:
            where = keeper.position
            self.now.restore(where.gates, keeper.weights(), where.taken)
            removed, seconds, read = dict(where.removed), where.seconds, where.read
        begun = time.perf_counter()
        self._tune(self.tuning, step, keeper)
        return self._row(step, removed, (*seconds, time.perf_counter() - begun), read)

    def _cut(self, step: int) -> tuple[dict[str, int], tuple[float, float], Read]:
        """How many filters went, by layer, the seconds that scoring and cutting took, and what was read."""
        times = [time.perf_counter()]
        importance, idle, read = self._importance(step)
        times.append(time.perf_counter())
        importance, branches = self.now.remove_branches(idle, importance)
        enough = self.targets.reached(self.now.size()) or self.once
        removed = self.now.remove(
            importance, 0 if enough else self.count, self.targets, zeros=self.trained
        )
        times.append(time.perf_counter())
        for name, count in branches.items():
            removed[name] = removed.get(name, 0) + count
        return removed, (times[1] - times[0], times[2] - times[1]), read

    @property
    def trained(self) -> bool:
        """Whether the criterion trains before it ranks."""
        rule = self.scoring["criterion"]
        return isinstance(rule, TrainedCriterion) and rule.trains

    @property
    def once(self) -> bool:
        """Whether nothing is asked but what one step of training finds to compute nothing."""
        return not self.targets.sizes and self.targets.drop is None

    def _importance(self, step: int) -> tuple[torch.Tensor, Sequence[ResidualBranch], Read]:
        """Normalised importance (U,), residual branches that may go as a whole, and what was read for it."""
        found, seed = self.now.may_go(), self.seed + 2 * step
        if not self.trained:
            with seeded(seed, [self.loader], self.device):
                scores = attribute(
                    self.now.model,
                    self.loader,
                    device=self.device,
                    progress=self.progress,
                    seed=self.seed + step,
                    units=found,
                    distributed=not self.group.alone,
                    **self.scoring,
                )
            doubts = scores.undecided
            read = Read(scores.samples, None if doubts is None else int(doubts.sum()))
            if scores.by_class is not None:
                return for_the_worst_class(scores.by_class), (), read
            return scores.importance, (), read
        self.now.model = copy.deepcopy(self.now.model)  # the best so far may be this one
        rule = self.scoring["criterion"]
        learnt = learn(
            self.now.model,
            self.loader,
            rule,
            units=found.units,
            branches=self.now.branches(),
            step=step,
            loss_fn=self.loss_fn,
            device=self.device,
            seed=seed,
            progress=self.progress,
        )
        kind = self.scoring["normalize"] if rule.per_layer else None
        return normalized(learnt.importance, found.units, kind), learnt.idle, Read()

    def _tune(self, how: Any, step: int, keeper: EpochKeeper | None) -> None:
        fine_tune(
            self.now.model,
            self.loader,
            how,
            step=step,
            loss_fn=self.loss_fn,
            device=self.device,
            seed=self.seed + 2 * step + 1,
            bar="fine-tuning" if self.progress else None,
            group=self.group,
            keeper=keeper,
        )

    def tune_again(self, how: Any) -> None:
        """Fine-tunes the best model once more, and corrects the last row."""
        best, step, keeper = self.best, len(self.history), None
        self.now.model = copy.deepcopy(best.model)
        if self.saver is not None:
            where = Position(step, True, best.gates, best.taken, {}, (0.0, 0.0), Read())
            keeper = self.saver.tuned_before(step, final=True) or self.saver.keeper(where)
        self._tune(how, step, keeper)
        seen = self._measure()
        last = dataclasses.replace(best.history[-1], top1=seen.top1, loss=seen.loss)
        self.best = dataclasses.replace(best, model=self.now.model, history=(*best.history[:-1], last))

    def _measure(self) -> Evaluation:
        with seeded(self.seed, [self.validation], self.device):
            return evaluate(
                self.now.model,
                self.validation,
                loss_fn=self.loss_fn,
                device=self.device,
                progress=self.progress,
                group=self.group,
            )

    def _row(
        self,
        step: int,
        removed: dict[str, int],
        seconds: tuple[float, float, float],
        read: Read,
    ) -> Step:
        seen, timed, whole = self._measure(), self._timed(step), self.targets.whole
        size = self.now.size()
        return Step(
            step=step,
            phi=size.filters / whole.filters,
            filters=size.filters,
            top1=seen.top1,
            loss=seen.loss,
            macs=size.cost.macs,
            params=size.cost.params,
            macs_pruned_percent=100 * (1 - size.cost.macs / whole.cost.macs),
            params_pruned_percent=100 * (1 - size.cost.params / whole.cost.params),
            removed=removed,
            seconds_scoring=seconds[0],
            seconds_cutting=seconds[1],
            seconds_tuning=seconds[2],
            samples_scored=read.samples,
            undecided=read.undecided,
            latency=None if timed is None else timed.seconds,
            latency_predicted=None if timed is None else timed.predicted,
            latency_share=None if timed is None else timed.share,
        )

    def _timed(self, step: int) -> Reading | None:
        """The latency as it is, where one was asked for."""
        if self.gauge is None:
            return None
        whole = self.gauge.original
        return self.gauge.read(self.now.model, self.now.gates) if step else Reading(whole, whole, 1.0)


def _examples(loader: Iterable[Any], device: torch.device, group: Group) -> Iterator[Batch]:
    """Two samples of every batch (one, of a batch that has no more), the same in all processes."""

    def own() -> Iterator[Any]:
        for raw in loader:
            batch = next(iter(unpack(raw, device).split(2)))
            yield batch if group.alone else batch.portable()

    empty = True
    for example in group.shared("examples", own()):
        empty = False
        yield example if group.alone else unpack(example, device)
    if empty:
        raise InputError("the loader gave no batch; pass a non-empty iterable of (input, label) batches")


def _call_back(callback: Callback, row: Step, model: nn.Module) -> None:
    try:
        callback(row, model)
    except AttrfastError:
        raise
    except Exception as error:
        raise AttrfastError(
            f"your callback raised {type(error).__name__} at step {row.step}: {error}"
        ) from error
