"""Times a pruned model against its original on the machine at hand.

Fewer multiply-adds are not always faster: widths that a kernel does not like, small batches and memory
bandwidth all have a say. Both models run in turns, so that what slows the machine for a while slows both.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from attrfast.batches import resolve_device, unpack
from attrfast.errors import InputError, ModelError
from attrfast.memory import peak
from attrfast.plain_text import as_text
from attrfast.rows import repeated
from attrfast.trace import preserved, tensors_in

_SHORTEST = 2e-3  # seconds: shorter forward passes are repeated, so that the clock can tell


@dataclass(frozen=True)
class Latency:
    """Forward passes of one model on one batch size.

    Attributes:
        seconds: of one pass, round by round.
        memory: bytes that a pass needs at its peak, over weights and inputs. On a CUDA device by torch's
            allocator; elsewhere the tensors that are alive at once.
    """

    seconds: tuple[float, ...]
    memory: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds between which the middle half of the rounds lies."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Comparison:
    """Both models on one batch size.

    Attributes:
        batch_size: samples a pass.
        original, pruned: what was measured, rounds in the same order.
    """

    batch_size: int
    original: Latency
    pruned: Latency

    @property
    def speedup(self) -> float:
        """Median over rounds of the original's time divided by the pruned model's of the same round."""
        pairs = zip(self.original.seconds, self.pruned.seconds, strict=True)
        return statistics.median(before / after for before, after in pairs)


@dataclass(frozen=True)
class Measurement:
    """What `PruneResult.measure` gives back.

    Attributes:
        rows: one a batch size.
        weights: bytes of parameters and buffers, of the original and of the pruned model.
        device: where it was measured, in words.
        threads: that torch used on the CPU.
        torch: its version.
    """

    rows: tuple[Comparison, ...]
    weights: tuple[int, int]
    device: str
    threads: int
    torch: str

    def summary(self) -> str:
        """A table, one line a batch size: medians, the middle half of the rounds in brackets."""
        rounds = len(self.rows[0].original.seconds)
        table = Table(
            title=f"{self.device}, threads: {self.threads}, torch {self.torch}, rounds: {rounds}",
            title_justify="left",
        )
        for name in ("batch", "original", "pruned", "faster", "memory before", "after"):
            table.add_column(name, justify="right")
        table.add_row("weights", "", "", "", *map(_bytes, self.weights))
        for row in self.rows:
            table.add_row(
                str(row.batch_size),
                _time(row.original),
                _time(row.pruned),
                f"{row.speedup:.2f}×",
                _bytes(row.original.memory),
                _bytes(row.pruned.memory),
            )
        return as_text(table, width=112)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values that JSON can hold; times in seconds, memory in bytes."""
        plain = asdict(self)
        for row, found in zip(plain["rows"], self.rows, strict=True):
            row["speedup"] = found.speedup
            for name, latency in (("original", found.original), ("pruned", found.pruned)):
                row[name]["seconds"] = list(latency.seconds)
                row[name] |= {"median": latency.median, "quartiles": list(latency.quartiles)}
        return {**plain, "rows": list(plain["rows"]), "weights": list(self.weights)}


def measure(
    original: nn.Module,
    pruned: nn.Module,
    example: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 20,
    device: str | torch.device | None = None,
) -> Measurement:
    """Times two models side by side, see `PruneResult.measure`."""
    sizes = _checked(batch_sizes, rounds)
    if original is pruned:
        raise InputError(
            "the original is the pruned model itself; give original=, the model before pruning"
        )
    place = resolve_device(pruned, device)
    batch = unpack((example, None), place)
    models = {"original": _on(original, place), "pruned": _on(pruned, place)}
    rows = []
    for size in sizes:
        args, kwargs = (repeated(t, batch.samples, size) for t in (batch.args, batch.kwargs))
        rows.append(Comparison(size, **in_turns(models, args, kwargs, place, rounds)))
    return Measurement(
        rows=tuple(rows),
        weights=(_size(original), _size(pruned)),
        device=device_name(place),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
    )


def in_turns(
    models: Mapping[str, nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    rounds: int,
) -> dict[str, Latency]:
    """Times forward passes of several models side by side, by the models' names.

    Args:
        models: in any mode; left as they are.
        args, kwargs: the batch, on `device`.
        device: where they are timed; models that lie elsewhere are copied there.
        rounds: how often each is timed.

    Raises:
        ModelError: a model does not run on the batch.
    """
    there = {name: _on(model, device) for name, model in models.items()}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for model in there.values():
            stack.enter_context(preserved(model))
            model.eval()
        runs = {name: _Run(name, model, args, kwargs, device) for name, model in there.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        orders = itertools.cycle([list(runs.items()), list(runs.items())[::-1]])
        for order in itertools.islice(orders, rounds):  # none always follows another
            for name, run in order:
                seconds[name].append(run.seconds())
    return {name: Latency(tuple(seconds[name]), run.memory) for name, run in runs.items()}


class _Run:
    """A model's forward pass on one batch; warmed up, its peak of memory known."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._forward: Callable[[], Any] = lambda: model(*args, **kwargs)
        self._device = device
        present = [*model.parameters(), *model.buffers(), *tensors_in((args, kwargs))]
        try:
            self._forward()  # libraries choose their kernels
            self.memory = peak(self._forward, device, present)
        except Exception as error:
            shapes = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]
            raise ModelError(
                f"the {name} model's forward pass failed on inputs of shape {shapes}: {error}"
            ) from error
        self._times = 1
        took = self.seconds()
        while took * self._times < _SHORTEST:
            self._times *= 2
            took = self.seconds()

    def seconds(self) -> float:
        """Of one pass, after another of the same model: the other's weights are out of the caches."""
        self._forward()
        self._wait()
        start = time.perf_counter()
        for _ in range(self._times):
            self._forward()
        self._wait()
        return (time.perf_counter() - start) / self._times

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _checked(batch_sizes: Sequence[int], rounds: int) -> list[int]:
    if not isinstance(rounds, int) or rounds < 2:
        raise InputError(f"rounds must be a whole number of at least 2, got {rounds!r}")
    sizes = list(batch_sizes) if isinstance(batch_sizes, Sequence) else [batch_sizes]
    if not sizes:
        raise InputError("batch_sizes is empty; give at least one, such as (1, 32)")
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise InputError(f"batch_sizes must be whole numbers of at least 1, got {size!r}")
    return sizes


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    """The model where it is to be measured: itself, or a copy if it lies elsewhere."""
    if all(tensor.device == device for tensor in (*model.parameters(), *model.buffers())):
        return model
    return copy.deepcopy(model).to(device)


def _size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def device_name(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def _unit(seconds: float) -> tuple[float, str]:
    units = ((unit, name) for unit, name in ((1.0, "s"), (1e-3, "ms")) if seconds >= unit)
    return next(units, (1e-6, "µs"))


def in_words(seconds: float) -> str:
    """A time with its unit."""
    unit, name = _unit(seconds)
    return f"{seconds / unit:.3g} {name}"


def _time(latency: Latency) -> str:
    unit, name = _unit(latency.median)
    low, high = latency.quartiles
    return f"{latency.median / unit:.3g} {name} ({low / unit:.3g}–{high / unit:.3g})"


def _bytes(count: int) -> str:
    value: float = count
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
