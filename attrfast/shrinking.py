"""A copy of a model that loses filters step by step, and what is left of the original's.

Must not know how importance is measured, nor how the model is trained in between.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from attrfast.batches import Batch
from attrfast.channels import Discovery, discover
from attrfast.cost import CostModel, cost
from attrfast.errors import InputError, ModelError, TargetError
from attrfast.latency import Gauge, weighed
from attrfast.residual import ResidualBranch, find_branches, take_out
from attrfast.selection import Block, first_filters, mask, rank, spared
from attrfast.surgery import computes_the_same, cut, without
from attrfast.targets import Size, Targets
from attrfast.units import Layer, Units

log = logging.getLogger(__name__)

_MORE_EXAMPLES = 4  # batches that are tried for layers which the first one does not lead to


class Shrinking:
    """The model as it is now.

    Args:
        model: the original, left as it is.
        batches: small batches on `device`, at least one. More than the first are read only where it does
            not lead to all layers.
        min_filters, round_to: limits of every convolution's width.
        ignore: modules, or names or patterns of modules, that stay whole.

    Attributes:
        model: the smaller model.
        found: its units, and a recorded pass.
        gates: convolution -> (filters of the original,) bool, true for those that are left.
        taken: residual branches that are gone, in this order.

    Raises:
        ModelError: nothing can be cut, or the model can't be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        device: torch.device,
        *,
        min_filters: int,
        round_to: int,
        ignore: Iterable[str | nn.Module],
    ) -> None:
        self.model = _copied(model).to(device)
        self._min_filters = min_filters
        self._round_to: int | Mapping[str, int] = round_to
        self._gauge: Gauge | None = None
        self._weight = 0.0
        rest = iter(batches)
        self._examples = [next(rest)]

        def more() -> Iterable[tuple[Sequence[object], dict[str, object]]]:
            for _, batch in zip(range(_MORE_EXAMPLES), rest, strict=False):
                self._examples.append(batch)
                yield batch.args, batch.kwargs

        first = self._examples[0]
        self.found = discover(self.model, first.args, first.kwargs, others=more())
        units = self.found.units
        self.gates = {
            name: torch.ones(len(row), dtype=torch.bool) for name, row in units.filters.items()
        }
        self.taken: list[ResidualBranch] = []
        whole = spared(ignore, model, units)
        # Names of convolutions stay what they are while filters go, so layers are spared by name.
        self.whole = {n for n, row in units.filters.items() if bool(whole[row].any())}
        self._tell_what_stays()

    def _tell_what_stays(self) -> None:
        stay: dict[str, list[str]] = {}
        for layer in self.found.units.layers:
            if layer.frozen is not None and not self.whole.issuperset(layer.convs):
                stay.setdefault(layer.frozen, []).append(layer.name)
        if not bool(self._allowed().any()):
            raise ModelError(
                "no layer of the model can be pruned: "
                + ("; ".join(f"{_list(n)}: {why}" for why, n in stay.items()) or "`ignore` names all")
            )
        for why, names in stay.items():
            warnings.warn(f"left whole: {_list(names)}: {why}", stacklevel=4)

    def _allowed(self) -> torch.Tensor:
        """(U,) bool, the units that may go."""
        units = self.found.units
        free = torch.tensor([reason is None for reason in units.frozen])
        for name in self.whole:
            row = units.filters[name]
            free[row[row >= 0]] = False
        return free

    def spare(self, layers: Mapping[str, str]) -> None:
        """Leaves layers whole from now on.

        Args:
            layers: name of a layer -> why.

        Raises:
            ModelError: nothing is left that can be pruned.
        """
        by_name = {layer.name: layer for layer in self.found.units.layers}
        reasons: dict[str, list[str]] = {}
        for name, why in layers.items():
            if not self.whole.issuperset(by_name[name].convs):
                self.whole.update(by_name[name].convs)
                reasons.setdefault(why, []).append(name)
        told = [f"{_list(names)}: {why}" for why, names in reasons.items()]
        if told and not bool(self._allowed().any()):
            raise ModelError(f"no layer of the model can be pruned: {'; '.join(told)}")
        for text in told:
            warnings.warn(f"left whole: {text}", stacklevel=3)

    @property
    def example(self) -> Batch:
        """A small batch."""
        return self._examples[0]

    def follow(self, gauge: Gauge, weight: float) -> None:
        """From now on, widths are kept to those that the device likes, unless others were asked for.

        Args:
            gauge: knows them, and what is left of the latency.
            weight: how much the time that a unit costs counts against its importance, see `weighed`.
        """
        self._gauge, self._weight = gauge, weight
        if self._round_to == 1:
            self._round_to = gauge.widths()

    def may_go(self) -> Discovery:
        """The units as they are now, those that `ignore` spares frozen like the others that must stay."""
        units = self.found.units
        reasons = tuple(
            reason if free or reason is not None else "it is to be left whole"
            for reason, free in zip(units.frozen, self._allowed().tolist(), strict=True)
        )
        return dataclasses.replace(self.found, units=dataclasses.replace(units, frozen=reasons))

    def branches(self) -> tuple[ResidualBranch, ...]:
        """Residual branches that may go as a whole."""
        found = find_branches(self.model, self.found.record)
        return tuple(branch for branch in found if self.whole.isdisjoint(branch.modules))

    def size(self) -> Size:
        filters = sum(int(gate.sum()) for gate in self.gates.values())
        first = self._examples[0]
        return Size(filters, cost(self.model, first.args, first.kwargs), self._latency())

    def _latency(self, removed: torch.Tensor | None = None) -> float:
        return 0.0 if self._gauge is None else self._gauge.left(self.gates, self.found.units, removed)

    def _sizes_after(self, blocks: Sequence[Block]) -> Callable[[int], Size]:
        """What predicts the size after the first so many of these blocks are gone."""
        now = self.size()
        predictor = CostModel(self.model, self.found, now.cost)

        def after(number: int) -> Size:
            taken = blocks[:number]
            removed = mask(taken, self.found.units)
            left = now.filters - sum(block.filters for block in taken)
            return Size(left, predictor.after(removed), self._latency(removed))

        return after

    def check_reachable(self, targets: Targets) -> None:
        """Predicts the size after all cuts that are allowed.

        Raises:
            TargetError: it is above the targets.
        """
        blocks = self._ranked(torch.zeros(len(self.found.units)))
        self._refuse_unless_reached(targets, self._sizes_after(blocks)(len(blocks)))

    def _refuse_unless_reached(self, targets: Targets, least: Size) -> None:
        if targets.sizes and not targets.reached(least):
            raise TargetError(
                f"the target can't be reached: with everything gone that may go, "
                f"{targets.missed(least)}; ask for less, lower min_filters ({self._min_filters}) or "
                f"round_to ({self._widest_step()}), or ignore less"
            )

    def _widest_step(self) -> int:
        return self._round_to if isinstance(self._round_to, int) else max(self._round_to.values())

    def remove_branches(
        self, branches: Iterable[ResidualBranch], importance: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Takes out residual branches that add nothing but zeros.

        Args:
            branches: of `self.branches()`.
            importance: (U,) of the units as they are now.

        Returns:
            The importance of the units that are left, and how many filters went, by layer. A branch without
            which the model computes something else stays.
        """
        gone: dict[str, int] = {}
        for branch in branches:
            smaller = copy.deepcopy(self.model)
            try:
                take_out(smaller, branch)
                computes_the_same(smaller, self.model, self._inputs)
            except ModelError as error:  # it went with a branch around it, or does more than add
                log.debug("the residual branch of %s stays: %s", branch.owner, error)
                continue
            before = self.found.units
            self._adopt(smaller, branch)
            importance = _carried(importance, before, self.found.units)
            for layer in before.layers:
                for name in layer.convs:
                    if name not in self.found.units.filters:
                        gone[layer.name] = gone.get(layer.name, 0) + int(self.gates[name].sum())
                        self.gates[name] = torch.zeros_like(self.gates[name])
        return importance, gone

    def _adopt(self, smaller: nn.Module, branch: ResidualBranch) -> None:
        self.model = smaller
        self.taken.append(branch)
        first, *others = self._inputs
        self.found = discover(self.model, *first, others=others)

    def remove(
        self, importance: torch.Tensor, count: int, targets: Targets, *, zeros: bool = False
    ) -> dict[str, int]:
        """Cuts off the least important units.

        Args:
            importance: (U,) of the units as they are now.
            count: filters that go at least, unless the targets are reached before.
            zeros: all units of importance zero go, whatever `count` and the targets say.

        Returns:
            How many filters went, by layer; empty where nothing is left to take.

        Raises:
            TargetError: nothing is left to take, and the targets are not reached.
            ModelError: a cut model computes something else, and no layer can be blamed for it.
        """
        while blocks := self._chosen(importance, count, targets, zeros):
            units = self.found.units
            removed = mask(blocks, units)
            try:
                self.model = without(self.model, self._inputs, units, removed)
            except ModelError as error:
                self._spare_culprits(blocks, error)
            else:
                gone = self._close_gates(removed)
                first, *others = self._inputs
                self.found = discover(self.model, *first, others=others)
                return gone
        return {}

    @property
    def _inputs(self) -> list[tuple[Sequence[object], dict[str, object]]]:
        return [(batch.args, batch.kwargs) for batch in self._examples]

    def _ranked(self, importance: torch.Tensor) -> list[Block]:
        if self._gauge is not None:
            savings = self._gauge.savings(self.gates, self.found.units)
            importance = weighed(importance, savings, self._weight)
        return rank(
            importance,
            self.found.units,
            min_filters=self._min_filters,
            round_to=self._round_to,
            allowed=self._allowed(),
        )

    def _chosen(
        self, importance: torch.Tensor, count: int, targets: Targets, zeros: bool
    ) -> list[Block]:
        """The lowest blocks: `count` filters, or fewer where the targets are reached before."""
        blocks = self._ranked(importance)
        if not blocks:
            self._refuse_unless_reached(targets, self.size())
            return []
        after = self._sizes_after(blocks)

        def enough(number: int) -> bool:
            return targets.reached(after(number))

        low, high = 0, first_filters(blocks, count)
        if enough(high):  # the least number that is enough lies in (low, high]
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if enough(middle) else (middle, high)
        if zeros:
            high = max(high, sum(block.score == 0 for block in blocks))
        return blocks[:high]

    def _spare_culprits(self, blocks: Sequence[Block], error: ModelError) -> None:
        """Finds the layers whose cut changes more than it should, and leaves them whole from now on."""
        units = self.found.units
        by_layer: dict[int, list[Block]] = {}
        for block in blocks:
            by_layer.setdefault(int(units.layer_of[block.units[0]]), []).append(block)
        culprits: list[Layer] = []
        for index, mine in by_layer.items():
            try:
                without(self.model, self._inputs, units, mask(mine, units))
            except ModelError as reason:
                culprits.append(units.layers[index])
                warnings.warn(f"left whole: {units.layers[index].name}: {reason}", stacklevel=5)
        if not culprits:
            names = [units.layers[index].name for index in by_layer]
            raise ModelError(
                f"{error}, when {_list(names)} are cut together, though not one by one; leave one of "
                f"them whole with `ignore`"
            ) from error
        for layer in culprits:
            self.whole.update(layer.convs)

    def _close_gates(self, removed: torch.Tensor) -> dict[str, int]:
        units = self.found.units
        gone: dict[str, int] = {}
        for layer in units.layers:
            for name in layer.convs:
                lost = removed[units.filters[name]]
                if bool(lost.any()):
                    gone[layer.name] = gone.get(layer.name, 0) + int(lost.sum())
                    gate = self.gates[name].clone()
                    gate[torch.nonzero(gate).flatten()[lost]] = False
                    self.gates[name] = gate
        return gone

    def restore(
        self,
        gates: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        taken: Iterable[ResidualBranch],
    ) -> None:
        """Takes the model from where it is to where an earlier run left it, as a copy.

        Raises:
            InputError: no run of this model led there.
        """
        taken = list(taken)
        self._require_further(gates, taken)
        self.model = copy.deepcopy(self.model)
        try:
            for branch in taken[len(self.taken) :]:
                take_out(self.model, branch)
                self._adopt(self.model, branch)
            units = self.found.units
            removed = torch.zeros(len(units), dtype=torch.bool)
            for name, row in units.filters.items():
                removed[row[~gates[name][self.gates[name]]]] = True
            cut(self.model, units, removed)
            self.model.load_state_dict(weights)
        except (ModelError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint does not fit the model: {error}; remove it, or call with resume=False"
            ) from error
        self.gates = {name: gate.clone() for name, gate in gates.items()}
        first, *others = self._inputs
        self.found = discover(self.model, *first, others=others)

    def _require_further(
        self, gates: Mapping[str, torch.Tensor], taken: Sequence[ResidualBranch]
    ) -> None:
        """Refuses what would open a gate again, or belongs to other layers."""
        fits = gates.keys() == self.gates.keys() and all(
            gates[name].shape == gate.shape and not bool((gates[name] & ~gate).any())
            for name, gate in self.gates.items()
        )
        if not fits or list(taken[: len(self.taken)]) != self.taken or not all(b.owner for b in taken):
            raise InputError(
                "the checkpoint does not fit the model: its layers have other filters; remove it, or call "
                "with resume=False"
            )


def _copied(model: nn.Module) -> nn.Module:
    try:
        smaller = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the model can't be copied: {error}. Something that it holds, such as a tensor kept from "
            f"a forward pass, can't be; set it to None first"
        ) from error
    for parameter in smaller.parameters():
        parameter.grad = None
    return smaller


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more layers"


def _carried(importance: torch.Tensor, before: Units, now: Units) -> torch.Tensor:
    """Importance (U,) of units, for what they are after some of the layers went as a whole."""
    carried = importance.new_zeros(len(now))
    for name, row in now.filters.items():
        carried[row] = importance[before.filters[name]]
    return carried


def install(model: nn.Module, smaller: nn.Module, taken: Iterable[ResidualBranch] = ()) -> None:
    """Puts a smaller copy's weights and widths into the modules of the model that it was copied from.

    Only these: what else a module holds (hooks, other objects) may point to the model itself. A module
    that lost a residual branch is replaced.
    """
    for branch in taken:
        take_out(model, branch)
    replacements = dict(smaller.named_modules())
    for name, module in model.named_modules():
        for key, value in vars(replacements[name]).items():
            if key in ("_parameters", "_buffers") or isinstance(value, (int, float, str, tuple)):
                module.__dict__[key] = value
