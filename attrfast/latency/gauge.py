"""What a model takes that has lost filters: predicted from its layers' laws, and measured.

The laws say how models compare, in the state in which the machine was when the layers were timed. The same
machine may be slower in the next minute, and not by one factor: what threads and calls cost does not shrink
with the widths. So whenever a model is measured, the original and narrow copies of it are, too.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attrfast.batches import Batch
from attrfast.channels import discover
from attrfast.distributed import Group
from attrfast.latency.allocator import memory_is_kept
from attrfast.latency.blocks import liked_block
from attrfast.latency.law import Law
from attrfast.latency.layers import timed_calls
from attrfast.latency.narrow import evenly, narrowed, uncuttable
from attrfast.latency.sampling import sample
from attrfast.latency.table import Layers, Table
from attrfast.measure import device_name, in_turns
from attrfast.trace import tensors_in
from attrfast.units import Units

_SECONDS = 3.0  # to spend on one comparison, about
_ROUNDS = (7, 41)  # of a comparison, at least and at most
_NARROW = (0.125, 0.375)  # of every layer, that the narrow copies keep
_CAUTION = 1.02  # a cut that just so reaches the target by prediction misses it every other time

Gates = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reading:
    """The real model beside the original, both measured in turns.

    Attributes:
        seconds: of a pass of the model, the median over rounds.
        predicted: seconds by the table, for an original and narrow copies that take what they took here.
        share: of the original's time, the median over rounds.
    """

    seconds: float
    predicted: float
    share: float


class Gauge:
    """Predicts and measures what is left of a model's latency.

    Args:
        model: the original, left as it is.
        batch: inputs of one pass, on `device`.
        device: where it is timed.
        folder: of the tables; None: the user's folder for caches.
        progress: show a bar while layers are timed.
        group: processes that prune together: the first times for all, while the others wait.

    Attributes:
        original: seconds of a pass of the original.
        setting: what the times depend on, in words.
        block: how many channels the device works on at a time: widths that are a multiple waste nothing.

    Raises:
        ModelError: the model does not run, or does not make the same calls in every pass.
        InputError: the table can't be written.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        device: torch.device,
        *,
        folder: str | Path | None = None,
        progress: bool = True,
        group: Group | None = None,
    ) -> None:
        self._model, self._batch, self._device = model, batch, device
        self._group = group or Group()
        whole = copy.deepcopy(model).to(device).eval()
        found = discover(whole, batch.args, batch.kwargs)
        self._units = found.units
        self._calls = timed_calls(whole, found)
        inputs = batch.args, batch.kwargs
        fixed = uncuttable(whole, found, inputs)
        few = [evenly(self._units, share, fixed) for share in _NARROW]
        self._narrow = [narrowed(whole, self._units, removed) for removed in few]
        table = Table(folder, _setting(whole, batch, device))
        shapes = [list(tensor.shape) for tensor in tensors_in((batch.args, batch.kwargs))]
        keys = Counter(call.key for call in self._calls)

        def known() -> tuple[dict[str, str], Layers]:
            table.read()
            if not keys.keys() <= table.layers.keys():
                with memory_is_kept(device):
                    table.add(
                        sample(
                            whole,
                            self._units,
                            self._calls,
                            inputs,
                            device,
                            whole=fixed,
                            beside=self._narrow[-1],
                            progress=progress,
                        )
                    )
            return {**table.setting, "inputs": str(shapes)}, table.layers

        self.setting, layers = self._group.from_first("timing layers", known)
        products = {call.key for call in self._calls if call.product}
        self.block = liked_block({key: layers[key] for key in products}, keys)
        self._laws = {
            key: Law(layers[key], self.block if key in products else 1, product=key in products)
            for key in keys
        }
        self._whole = self._by_law(torch.zeros(len(self._units), dtype=torch.bool))
        self._few = [self._by_law(removed) for removed in few]
        self._correction = 1.0
        first = self._timed(whole)
        self.original = statistics.median(first.original)
        self._few_shares = first.few_shares()

    def _by_law(self, removed: torch.Tensor) -> float:
        return sum(self._laws[call.key].seconds(*call.widths(removed)) for call in self._calls)

    def _removed(self, gates: Gates) -> torch.Tensor:
        """(U,) bool of the original's units, those that are gone."""
        removed = torch.zeros(len(self._units), dtype=torch.bool)
        for name, row in self._units.filters.items():
            if name in gates:
                removed[row[~gates[name]]] = True
        return removed

    def _originals(self, units: Units, gates: Gates) -> torch.Tensor:
        """For every unit of a model that has lost filters, the original's unit that it is; -1 for none."""
        index = torch.full((len(units),), -1, dtype=torch.int64)
        for name, row in units.filters.items():
            if name in self._units.filters:
                index[row] = self._units.filters[name][gates[name]]
        return index

    def left(self, gates: Gates, units: Units, removed: torch.Tensor | None = None) -> float:
        """Seconds that are left, in the time of `original`, by the table and the last reading.

        Args:
            gates: convolution -> (filters of the original,) bool, those that are left.
            units: of the model as it is now.
            removed: (U,) bool of `units`, which go as well.
        """
        gone = self._removed(gates)
        if removed is not None:
            more = self._originals(units, gates)[removed]
            gone[more[more >= 0]] = True
        caution = 1.0 if removed is None else _CAUTION
        return caution * self.original * self._correction * self._share(gone, self._few_shares)

    def savings(self, gates: Gates, units: Units) -> torch.Tensor:
        """(U,) seconds that each unit costs at the present widths, see `Law.slopes`."""
        gone = self._removed(gates)
        worth = torch.zeros(len(self._units), dtype=torch.float64)
        for call in self._calls:
            slopes = self._laws[call.key].slopes(*call.widths(gone))
            for row, slope in zip((call.inputs, call.outputs), slopes, strict=True):
                mine = row[row >= 0]
                worth.index_add_(0, mine, torch.full((len(mine),), slope, dtype=torch.float64))
        index = self._originals(units, gates)
        return torch.where(index >= 0, worth[index.clamp(min=0)], 0.0) * (self.original / self._whole)

    def widths(self) -> dict[str, int]:
        """For every convolution, which multiples the device likes as its width, at most half of it."""
        return {name: _step(self.block, len(row)) for name, row in self._units.filters.items()}

    def read(self, model: nn.Module, gates: Gates) -> Reading:
        """Measures the model beside the original; from now on, predictions start from what it took."""
        took = self._timed(model)
        gone = self._removed(gates)
        predicted = [
            before * self._share(gone, [few / before for few in narrow])
            for before, *narrow in zip(took.original, *took.narrow, strict=True)
        ]
        share = statistics.median(_ratios(took.pruned, took.original))
        self._few_shares = took.few_shares()
        self.start_from(share, gates)
        return Reading(statistics.median(took.pruned), statistics.median(predicted), share)

    def start_from(self, share: float, gates: Gates) -> None:
        """Lets predictions start from a share that was measured."""
        self._correction = share / self._share(self._removed(gates), self._few_shares)

    def _share(self, removed: torch.Tensor, few_shares: Sequence[float]) -> float:
        """Of the original's time, by the table: read off between the original and the narrow copies."""
        places, shares = [self._whole], [1.0]
        start = 0.0  # of what has no widths left
        for place, share in zip(reversed(self._few), reversed(few_shares), strict=True):
            if place < places[0]:
                slope = (shares[0] - share) / (places[0] - place)
                start = min(max(0.0, share - slope * place), share)
                places, shares = [place, *places], [share, *shares]
        return float(np.interp(self._by_law(removed), [0.0, *places], [start, *shares]))

    def _timed(self, model: nn.Module) -> _Times:
        return self._group.from_first("timing", lambda: self._timed_here(model))

    def _timed_here(self, model: nn.Module) -> _Times:
        each = getattr(self, "original", None)
        least, most = _ROUNDS
        rounds = least if each is None else max(least, min(most, int(_SECONDS / (4 * each))))
        batch = self._batch
        narrow = {f"narrow {i}": copied for i, copied in enumerate(self._narrow)}
        models = {"original": self._model, "pruned": model, **narrow}
        with memory_is_kept(self._device):
            found = in_turns(models, batch.args, batch.kwargs, self._device, rounds)
        original, pruned, *few = (latency.seconds for latency in found.values())
        return _Times(original, pruned, tuple(few))


@dataclass(frozen=True)
class _Times:
    """Seconds of passes, in the same rounds: of the original, of a model, and of the narrow copies."""

    original: tuple[float, ...]
    pruned: tuple[float, ...]
    narrow: tuple[tuple[float, ...], ...]

    def few_shares(self) -> list[float]:
        """Of the original's time, what each narrow copy takes."""
        return [statistics.median(_ratios(few, self.original)) for few in self.narrow]


def _ratios(some: Sequence[float], whole: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(some, whole, strict=True)]


def _step(block: int, width: int) -> int:
    while block > max(1, width // 2):
        block //= 2
    return block


def _setting(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, str]:
    """What a layer's time depends on besides the layer."""
    first = next(tensors_in((batch.args, batch.kwargs)))
    images = [t for t in (first, *model.parameters()) if t.dim() == 4]
    last = all(t.is_contiguous(memory_format=torch.channels_last) for t in images)
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "torch": str(torch.__version__),
        "dtypes": ",".join(sorted({str(p.dtype) for p in (first, *model.parameters())})),
        "layout": "channels last" if images and last else "contiguous",
        "memory": "kept" if device.type == "cpu" else "",
    }
