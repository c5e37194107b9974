"""Places taps where they are cheapest.

Attribution is a conserved flow: through an operation that acts channel by channel and is homogeneous of
degree one, the sum of activation times gradient is neither made nor lost (Euler's theorem). So what the
readers take in can be measured on any cut between them and everything else: the places that make a
channel, and those that use it without being readers. The cheapest cut, by bytes, is a minimum cut.

The network that is cut has for each value v two nodes, `in` and `out`: the edge between them is the flow
through v, and an edge from `out` is the flow into one use of v. A cut's edges towards the readers count
plus, the others minus.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import networkx
import torch
from networkx.algorithms.flow import boykov_kolmogorov

from attrfast.channels import Discovery
from attrfast.signatures import CONVOLUTIONS
from attrfast.stages import (
    INF,
    Stage,
    Uses,
    find_stages,
    has_fresh_gradient,
    uses_of,
)
from attrfast.trace import Call, Param, Ref, Trace, argument
from attrfast.turning import free_to_turn

log = logging.getLogger(__name__)

# Bytes that reading one element of a value costs, in units of its size.
_READ = 1.0
# Keeping a value that nothing else keeps until the backward pass: its memory counts for more than a
# pass over it.
_KEEP = 4.0
# What a tap costs whatever its size, so that of equal cuts the one with fewest taps is chosen.
_TAP = 4096.0

_SINGLE = frozenset(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    flatten view reshape unflatten permute transpose squeeze unsqueeze contiguous clone dropout dropout1d
    dropout2d dropout3d alpha_dropout feature_alpha_dropout leaky_relu getitem chunk split narrow select
    movedim swapaxes pad interpolate neg
    """.split()
)
_KEEPS_NOTHING = frozenset(
    """
    flatten view reshape unflatten permute transpose squeeze unsqueeze dropout dropout1d dropout2d
    dropout3d alpha_dropout feature_alpha_dropout
    """.split()
)

_MADE, _READERS = "made", "readers"


@dataclass(frozen=True)
class Tap:
    """One place where flow is measured.

    Attributes:
        value: whose channels the flow belongs to.
        sign: +1 or -1.
        call: for the flow into one use, the index of the call that uses the value; for the flow through
            the value, None.
        factor: measure the flow through `value`, the product of two tensors, as that through this
            factor of it (the call that multiplies, the value of the factor); None for a plain tap.
    """

    value: int
    sign: float
    call: int | None = None
    factor: tuple[int, int] | None = None


@dataclass
class Plan:
    """How to run a model that makes the recorded calls again.

    Attributes:
        calls: the recorded calls.
        stages: call index -> its stage.
        through: value -> sign of the tap on the flow through it.
        branch: output value of a stage with an addition -> sign of the tap on its own branch.
        into: (call index, value) -> (sign, the value whose channels the flow belongs to).
        tapped: the call indices in `into`.
        channels: value -> (dimension, unit of each channel).
        shapes: of every value, in the recorded pass.
        fresh: values whose gradient may be overwritten.
        free: values that may lie channels-last, whatever the model does.
        heads: what stages make of maps that they join, where the convolution of one other stage alone reads it.
    """

    calls: list[Call]
    stages: dict[int, Stage]
    through: dict[int, float] = field(default_factory=dict)
    branch: dict[int, float] = field(default_factory=dict)
    into: dict[tuple[int | None, int], tuple[float, int]] = field(default_factory=dict)
    tapped: frozenset[int | None] = frozenset()
    channels: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)
    shapes: list[torch.Size] = field(default_factory=list)
    fresh: frozenset[int] = frozenset()
    free: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()


def make_plan(found: Discovery, weights: dict[str, str], *, guided: bool, joins: bool) -> Plan | None:
    """Stages and taps for a recorded pass, or None where no finite cut exists.

    Args:
        found: the units and the record.
        weights: full name of a reader's weight -> name of the reader.
        guided: gradients are guided at every ReLU, which therefore conserves nothing.
        joins: whether the backend reads maps that are joined one by one.
    """
    record = found.record
    uses = uses_of(record)
    stages = find_stages(record, uses, joins=joins)
    by_call = {index: stage for stage in stages for index in stage.roles}
    network = _Network(found, uses, stages, by_call, weights, guided)
    taps = network.cut()
    if taps is None:
        return None
    plan = Plan(calls=record.calls, stages=by_call, channels=found.channels, shapes=record.shapes)
    for tap in taps:
        if tap.call == _BRANCH:
            plan.branch[tap.value] = tap.sign
        elif tap.call is None and tap.factor is None:
            plan.through[tap.value] = tap.sign
        else:
            place = tap.factor if tap.factor is not None else (tap.call, tap.value)
            # A factor's own use and the product that it stands for are one flow, and may cancel.
            sign = plan.into.pop(place, (0.0, tap.value))[0] + tap.sign
            if sign:
                plan.into[place] = (sign, tap.value)
    plan.tapped = frozenset(index for index, _ in plan.into)
    plan.fresh = frozenset(
        stage.output for stage in stages if has_fresh_gradient(stage.output, record, uses, by_call)
    )
    plan.free = free_to_turn(record, uses, by_call)
    plan.heads = frozenset(
        stage.output for stage in stages if stage.has("cat") and _is_head(stage, plan, uses)
    )
    return plan


def _is_head(stage: Stage, plan: Plan, uses: Uses) -> bool:
    """Whether the convolution of one other stage alone reads a stage's output, with no tap between them."""
    call = uses.only_reader(stage.output)
    reader = None if call is None else plan.stages.get(call.index)
    if call is None or reader is None or reader.roles[call.index] != "conv":
        return False
    return reader.residual is None and (call.index, stage.output) not in plan.into


def bytes_per_sample(record: Trace, plan: Plan | None) -> float:
    """What a sample takes at the peak of a pass, roughly: what is kept, and the two largest tensors besides.

    Args:
        record: a forward pass.
        plan: whose stages make no tensor but their last, and do not keep what they join; None where every call
            makes its own.
    """
    size = [shape.numel() * each for shape, each in zip(record.shapes, record.itemsizes, strict=True)]
    stages = {} if plan is None else plan.stages
    joined = {stage.output for stage in stages.values() if stage.has("cat")}
    heads = frozenset() if plan is None else plan.heads
    made = [
        value
        for call in record.calls
        if call.index not in stages or stages[call.index].last == call.index
        for value in call.outputs
        if call.name not in _KEEPS_NOTHING and (call.overwrites is None or call.index in stages)
    ]
    kept = sum(size[value] for value in made if value not in joined)
    largest = sorted((size[value] for value in made if value not in heads), reverse=True)
    return (kept + sum(largest[:2])) / max(1, record.samples)


def is_reader(call: Call, weights: dict[str, str]) -> bool:
    """Whether a call reads units' channels.

    Args:
        weights: full name of a reader's weight -> name of the reader.
    """
    if call.name not in CONVOLUTIONS and call.name != "linear":
        return False
    weight = argument(call, 1, "weight")
    return isinstance(weight, Param) and weight.name in weights


_BRANCH = -1


class _Network:
    def __init__(
        self,
        found: Discovery,
        uses: Uses,
        stages: list[Stage],
        by_call: dict[int, Stage],
        weights: dict[str, str],
        guided: bool,
    ) -> None:
        self.record, self.channels = found.record, found.channels
        self.uses, self.stages, self.by_call = uses, stages, by_call
        self.weights, self.guided = weights, guided
        self.graph = networkx.DiGraph()
        self.graph.add_node(_MADE)
        self.graph.add_node(_READERS)
        self.taps: dict[tuple[object, object], Tap] = {}
        self.kept: set[int] = set()
        self.hidden: set[int] = set()  # values inside stages, which never exist by themselves
        for stage in stages:
            inside = [self._made(index) for index in stage.roles]
            self.hidden.update(v for v in inside if v != stage.output)
            if (stage.has("relu") or stage.has("pool")) and not stage.has("cat"):
                self.kept.add(stage.output)
        for call in self.record.calls:
            passes = call.name in _KEEPS_NOTHING and call.outputs and call.inputs[:1]
            if passes and call.inputs[0] in self.kept:
                self.kept.add(call.outputs[0])

    def _made(self, index: int) -> int:
        return self.record.calls[index].outputs[0]

    def _bytes(self, value: int) -> float:
        return float(self.record.shapes[value].numel() * self.record.itemsizes[value])

    def _cost(self, value: int) -> float:
        """Of measuring the flow of a value by a pass over it and its gradient."""
        if value in self.uses.overwritten:
            return INF  # by then it is something else
        kept = 0.0 if value in self.kept else _KEEP
        return (2 * _READ + kept) * self._bytes(value) + _TAP

    # -- building ------------------------------------------------------------------------------------

    def _edge(self, a: object, b: object, cost: float, tap: Tap | None) -> None:
        for u, v in ((a, b), (b, a)):
            if self.graph.has_edge(u, v):
                before = self.graph[u][v].get("capacity", INF)
                self.graph[u][v]["capacity"] = before + cost
            else:
                self.graph.add_edge(u, v, capacity=cost)
        if tap is not None:
            self.taps[a, b] = tap

    def _value(self, value: int) -> None:
        """The flow through a value."""
        maker = self.uses.makers.get(value)
        stage = self.by_call.get(maker.index) if maker is not None else None
        cost, factor = self._cost(value), None
        measured = stage is not None and (stage.has("relu") or stage.has("pool"))
        if stage is not None and stage.output == value and measured:
            cost = _TAP / 4  # its backward reads a and g anyway
        elif maker is not None:
            factor = self._factor(maker)
            if factor is not None:
                cost = self._cost(factor)
        if maker is not None and len(maker.outputs) > 1:
            cost = INF  # a tap has the whole of what a call makes
        tap = Tap(value, 1.0)
        if factor is not None:
            assert maker is not None
            tap = Tap(value, 1.0, factor=(maker.index, factor))
        self._edge((value, "in"), (value, "out"), cost, tap)

    def _factor(self, call: Call) -> int | None:
        """The small factor of a product, whose flow is that of the product."""
        if call.name != "mul" or len(set(call.inputs)) != 2:
            return None
        small = min(call.inputs, key=self._bytes)
        place, out = self.channels.get(small), self.channels.get(call.outputs[0])
        if place is None or out is None or place[0] != out[0] or small in self.hidden:
            return None
        if len(self.record.shapes[small]) != len(self.record.shapes[call.outputs[0]]):
            return None
        fewer = self._bytes(small) < self._bytes(call.outputs[0])
        return small if fewer and torch.equal(place[1], out[1]) else None

    def _use(self, value: int, call: Call, target: object) -> None:
        """The flow of a value into one call that ends there: a reader, or a leak."""
        if value in self.channels and value not in self.hidden:
            self._edge((value, "out"), (target, value, call.index), INF, None)
            tap = Tap(value, 1.0, call=call.index)
            self._edge((target, value, call.index), target, self._cost(value), tap)

    def _pass_on(self, value: int, out: int) -> None:
        """The flow of a value into a call that conserves it."""
        if value in self.channels:
            self._edge((value, "out"), (out, "in"), INF, None)

    def _source(self, out: int) -> None:
        self._edge(_MADE, (out, "in"), INF, None)

    def build(self) -> None:
        for stage in self.stages:
            self._stage(stage)
        for call in self.record.calls:
            if call.index not in self.by_call:
                self._call(call)
        for value in self.channels:
            if value in self.hidden:
                continue
            if value not in self.uses.makers:
                self._source(value)
            if value in self.uses.results:
                self._edge((value, "out"), _MADE, INF, None)
            self._value(value)

    def _stage(self, stage: Stage) -> None:
        first = self.record.calls[stage.first]
        last = self.record.calls[stage.last]
        out = stage.output
        through = stage.roles[stage.first] in ("relu", "pool")
        conserving = not stage.has("relu") or (stage.upper == INF and not self.guided)
        if through and conserving:
            for source in stage.sources:
                self._pass_on(source, out)
            return
        for source in stage.sources:
            self._use(source, first, _READERS if is_reader(first, self.weights) else _MADE)
        if stage.residual is None:
            self._source(out)
        elif conserving and stage.residual in self.channels and self._same(stage.residual, out):
            self._pass_on(stage.residual, out)
            cost = INF
            if stage.has("relu") and stage.residual not in self.uses.overwritten:
                cost = _READ * self._bytes(out) + _TAP / 4
            branch = (_MADE, out)
            self._edge(_MADE, branch, INF, None)
            self._edge(branch, (out, "in"), cost, Tap(out, 1.0, call=_BRANCH))
        else:
            self._use(stage.residual, last, _MADE)
            self._source(out)

    def _same(self, a: int, b: int) -> bool:
        left, right = self.channels.get(a), self.channels.get(b)
        return (
            left is not None
            and right is not None
            and left[0] == right[0]
            and torch.equal(left[1], right[1])
        )

    def _call(self, call: Call) -> None:
        if is_reader(call, self.weights):
            for value in dict.fromkeys(call.inputs):
                self._use(value, call, _READERS)
            for out in call.outputs:
                self._source(out)
            return
        flowing = self._conserved(call)
        for value in dict.fromkeys(call.inputs):
            if value in flowing:
                for out in call.outputs:
                    if out in self.channels:
                        self._pass_on(value, out)
                    elif value in self.channels:  # goes where it is not followed
                        self._edge((value, "out"), _MADE, INF, None)
            else:
                self._use(value, call, _MADE)
        if not flowing:
            for out in call.outputs:
                if out in self.channels:
                    self._source(out)

    def _conserved(self, call: Call) -> set[int]:
        """The inputs of a call whose flow goes on through its outputs, if those are all that feed them."""
        values = list(dict.fromkeys(call.inputs))
        labelled = [v for v in values if v in self.channels]
        if not labelled or not call.outputs or call.overwrites in labelled[1:]:
            return set()
        if call.name in _SINGLE and len(values) == 1:
            if call.name in ("dropout", "dropout1d", "dropout2d", "dropout3d") and argument(
                call, 2, "training", False
            ):
                return set()
            if call.name == "pad" and argument(call, 3, "value", 0) not in (0, 0.0, None):
                return set()
            return set(labelled)
        if call.name in ("mul", "div") and len(values) == 1 and len(call.args) == 2:
            scalar = call.args[1] if isinstance(call.args[0], Ref) else None
            return set(labelled) if isinstance(scalar, (int, float)) else set()
        if call.name == "mean" and len(values) == 1:
            return set(labelled) if call.outputs[0] in self.channels else set()
        if call.name in ("cat", "concat", "concatenate") and len(values) == len(call.inputs):
            return set(labelled) if not self._has_state(call) else set()
        if call.name in ("add", "sub") and len(values) == 2 and len(labelled) == 2:
            out = call.outputs[0]
            scaled = any(not isinstance(a, Ref) for a in call.args) or call.kwargs
            same = all(self._same(v, out) for v in labelled)
            shapes = {self.record.shapes[v] for v in (*labelled, out)}
            return set(labelled) if same and not scaled and len(shapes) == 1 else set()
        if call.name == "mul" and self._factor(call) is not None:
            # Bilinear: the flow through the large factor alone is already that of the product.
            small = self._factor(call)
            large = [v for v in labelled if v != small]
            return set(large) if large and self._same(large[0], call.outputs[0]) else set()
        return set()

    def _has_state(self, call: Call) -> bool:
        parts = argument(call, 0, "tensors")
        return not all(isinstance(part, Ref) for part in parts)

    # -- cutting ---------------------------------------------------------------------------------------

    def cut(self) -> list[Tap] | None:
        self.build()
        try:
            _, (made, readers) = networkx.minimum_cut(
                self.graph,
                _MADE,
                _READERS,
                flow_func=boykov_kolmogorov,  # 11 ms for DenseNet-121, where the default takes 50
            )
        except networkx.NetworkXUnbounded:
            log.debug("no finite cut: a reader's input is overwritten, or not followed")
            return None
        taps = []
        for (a, b), tap in self.taps.items():
            if a in made and b in readers:
                sign = 1.0
            elif b in made and a in readers:
                sign = -1.0
            else:
                continue
            taps.append(Tap(tap.value, sign, tap.call, tap.factor))
        return taps
