"""Narrows copies of a model in many ways and times every layer of each.

Beside every copy, one and the same narrow model is timed. It tells what state the machine was in: a copy that
met another state than most is timed again.

Each way gives every layer one of five widths so that, over all ways, a layer meets each of its widths with
each width of every layer that feeds it: an orthogonal array of 25 rows, whose columns go to layers like
colours to a map. A second sweep takes widths that are no round numbers.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import nn
from tqdm import tqdm

from attrfast.errors import ModelError
from attrfast.latency.clock import pass_seconds, whole_pass_seconds
from attrfast.latency.law import Sample
from attrfast.latency.layers import TimedCall
from attrfast.latency.narrow import Inputs, cut_to, narrowed, rounded
from attrfast.units import Units

_LEVELS = (1.0, 0.75, 0.5, 0.25, 0.125)
_WAYS = len(_LEVELS) ** 2
_SHARE = 0.45  # of the whole model's time, that a narrowed one takes on average
_SECONDS = 40.0  # to spend on passes, about
_MOST = 90.0  # seconds, after which nothing is timed again
_PASSES = 11  # of one narrowed copy, at most
_SWEEPS = 3  # over the ways that met another state, the first one included
_SAME = math.log(1.1)  # between times of one model, within which the machine is in the same state


def sample(
    model: nn.Module,
    units: Units,
    calls: Sequence[TimedCall],
    inputs: Inputs,
    device: torch.device,
    *,
    whole: set[int],
    beside: nn.Module,
    progress: bool,
) -> dict[str, list[Sample]]:
    """Times every call at about fifty pairs of widths.

    Args:
        model: in eval mode, on `device`; left as it is.
        units, calls: its units and its calls.
        inputs: what it is timed on.
        whole: layers (by index) that can't be cut.
        beside: the narrow model that tells the machine's state.
        progress: show a bar.

    Returns:
        By the calls' keys; calls with the same key share their samples.

    Raises:
        ModelError: the model does not make the same calls in every pass.
    """
    begun = time.perf_counter()
    passes = _passes(model, inputs, device)
    ways = list(_ways(units, calls, whole))
    random.Random(0).shuffle(ways)  # a slow minute of the machine spoils no one width
    tries: list[list[_Try]] = [[] for _ in ways]
    others = list(range(len(ways)))
    for sweep in range(_SWEEPS):
        for index in tqdm(others, desc="timing layers", leave=False, disable=None if progress else True):
            if sweep and time.perf_counter() - begun > _MOST:
                break
            narrow = narrowed(model, units, ways[index])
            tries[index].append(_watched(narrow, beside, inputs, device, passes, len(calls)))
        usual = statistics.median(each.state for done in tries for each in done)
        best = [min(done, key=lambda each: each.distance(usual)) for done in tries]
        others = [index for index, each in enumerate(best) if each.distance(usual) > _SAME]
    times: dict[str, dict[tuple[int, int], list[float]]] = {call.key: {} for call in calls}
    for removed, each in zip(ways, best, strict=True):
        for call, took in zip(calls, each.seconds.T.tolist(), strict=True):
            times[call.key].setdefault(call.widths(removed), []).extend(took)
    return {key: [_summed_up(*at, took) for at, took in rows.items()] for key, rows in times.items()}


@dataclass(frozen=True)
class _Try:
    """A narrowed copy, timed: (passes, calls) seconds, and seconds of the model beside it."""

    seconds: torch.Tensor
    state: float

    def distance(self, usual: float) -> float:
        """From a state to this one."""
        return abs(math.log(self.state / usual))


def _watched(
    model: nn.Module,
    beside: nn.Module,
    inputs: Inputs,
    device: torch.device,
    passes: int,
    calls: int,
) -> _Try:
    """Seconds without what watching costs: their medians add up to that of passes which nobody watches. (Where
    something disturbs one call or another, medians add up to less than that of the sums.)
    """
    seconds, alone, state = [], [], []
    for watched in range(passes + 1):
        if watched:  # in the first pass libraries choose their kernels
            state.append(whole_pass_seconds(beside, *inputs, device))
            alone.append(whole_pass_seconds(model, *inputs, device))
        seconds.append(pass_seconds(model, *inputs, device))
        if len(seconds[-1]) != calls:
            raise ModelError(
                f"the model made {len(seconds[-1])} calls in a pass and {calls} in another; a latency can "
                f"only be predicted for one that makes the same calls in every pass"
            )
    found = torch.tensor(seconds[1:], dtype=torch.float64)
    usual = statistics.median(alone)
    excess = float(found.sum(1).median()) - usual
    found = torch.maximum(found - excess / calls, found / 4)
    return _Try(found * (usual / float(found.median(0).values.sum())), statistics.median(state))


def _summed_up(inputs: int, outputs: int, took: list[float]) -> Sample:
    took = [max(seconds, 1e-9) for seconds in took]  # the clock may not tell
    low, _, high = statistics.quantiles([*took, *took], n=4, method="inclusive")
    return Sample(inputs, outputs, statistics.median(took), low, high)


def _passes(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    pass_seconds(model, *inputs, device)
    start = time.perf_counter()
    pass_seconds(model, *inputs, device)
    all_ways = (time.perf_counter() - start) * _SHARE * 2 * _WAYS
    # One pass to warm up; each other is followed by one that is watched, and by the model beside.
    return max(1, min(_PASSES, int((_SECONDS / all_ways - 1) / 3)))


def _ways(units: Units, calls: Sequence[TimedCall], whole: set[int]) -> Iterator[torch.Tensor]:
    """(U,) bool each, the units that are gone."""
    column = _columns(units, calls)
    chance = random.Random(1)

    def way(round_numbers: bool, p: int, q: int) -> torch.Tensor:
        def keep(index: int, width: int) -> int:
            if index in whole:
                return width
            kind = column[index]
            place = (p, q)[kind] if kind < 2 else p + (kind - 1) * q
            level = round(_LEVELS[place % len(_LEVELS)] * width)
            return rounded(level, width) if round_numbers else _odd(level, chance)

        return cut_to(units, keep)

    for round_numbers in (True, False):
        for p, q in itertools.product(range(len(_LEVELS)), repeat=2):
            yield way(round_numbers, p, q)


def _odd(level: int, chance: random.Random) -> int:
    """A width a little below, by a block that a device may like, or by anything."""
    return max(1, level - chance.choice((0, 4, 8, 16, chance.randrange(1, 16))))


def _columns(units: Units, calls: Sequence[TimedCall]) -> dict[int, int]:
    """Layers (by index) -> a column; layers that meet in a call have different ones, while there are six."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(units.layers)))
    for call in calls:
        sides = [set(units.layer_of[row[row >= 0]].tolist()) for row in (call.inputs, call.outputs)]
        graph.add_edges_from((a, b) for a in sides[0] for b in sides[1] if a != b)
    colours = nx.greedy_color(graph)
    return {layer: colour % (len(_LEVELS) + 1) for layer, colour in colours.items()}
