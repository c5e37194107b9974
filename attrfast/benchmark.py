"""What `attrfast bench` measures: kernels and whole passes, in turns, by medians. Must not print.

The benchmarks of the checkout wait for a quiet machine and compare with other packages; these are short.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from attrfast import reference
from attrfast._backend import NAMES, find
from attrfast.batches import main_output
from attrfast.data import Splits
from attrfast.engine import attribute
from attrfast.errors import BackendError
from attrfast.measure import device_name
from attrfast.memory import peak
from attrfast.names import network
from attrfast.plain_text import as_text

_KERNEL_SHAPE = (16, 64, 56, 56)
_CLASSES = 10


@dataclass(frozen=True)
class Timed:
    """One thing that was timed.

    Attributes:
        name: in words.
        seconds: median over rounds.
        ratio: to the first of its table, median over rounds.
        memory: bytes at the peak over weights and inputs, see `attrfast.memory.peak`; None: not measured.
    """

    name: str
    seconds: float
    ratio: float
    memory: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """What was measured, kernels and passes."""

    device: str
    threads: int
    torch: str
    passes_title: str
    passes: tuple[Timed, ...]
    kernels_title: str
    kernels: tuple[Timed, ...]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values; seconds and bytes."""
        return asdict(self)

    def summary(self) -> str:
        """Two tables."""
        parts: list[Any] = [f"{self.device}, threads: {self.threads}, torch {self.torch}\n"]
        for title, rows in ((self.passes_title, self.passes), (self.kernels_title, self.kernels)):
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            table.add_column("")
            for name in ("median", "of the first", "memory"):
                table.add_column(name, justify="right")
            for row in rows:
                memory = "" if row.memory is None else f"{row.memory / 1e6:,.1f} MB"
                table.add_row(row.name, f"{1000 * row.seconds:.2f} ms", f"{row.ratio:.2f}×", memory)
            parts.append(table)
        return as_text(*parts, width=112)


def benchmark(
    model: str,
    shape: tuple[int, int, int],
    *,
    batch_size: int = 32,
    rounds: int = 7,
    criterion: str = "attribution",
    device: torch.device,
    seed: int = 0,
    progress: bool = False,
) -> Benchmark:
    """Times kernels and passes in turns, after a first run of each that does not count.

    Args:
        model: by the names of `attrfast.names`; random weights.
        shape: (C, H, W) of an image.
        batch_size: images in each of the two batches of a pass.
        rounds: how often each is timed.
        criterion: what the pass scores by.
        device: where.
        seed: of weights and images.
        progress: show a bar when standard error is a terminal.

    Raises:
        AttrfastError: there is no such network, or it does not take such images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network(model, _random_splits(shape))().to(device).eval()
        batches = [
            (
                torch.randn(batch_size, *shape).to(device),
                (torch.arange(batch_size) % _CLASSES).to(device),
            )
            for _ in range(2)
        ]
        a, g = (torch.randn(_KERNEL_SHAPE).to(device) for _ in range(2))
    a = a.relu_()
    passes: dict[str, Callable[[], object]] = {
        "training step, bare": lambda: _trained(net, batches),
        "forward pass alone": lambda: _run(net, batches),
        f"attrfast, {criterion}": lambda: attribute(net, batches, criterion, progress=False, seed=seed),
    }
    kernels = _kernels(a, g, device)
    present = [*net.parameters(), *net.buffers(), *(t for pair in batches for t in pair)]
    with tqdm(
        total=(rounds + 1) * (len(passes) + len(kernels)),
        desc="timing",
        leave=False,
        disable=None if progress else True,
    ) as bar:
        memory = {name: peak(run, device, present) for name, run in passes.items()}
        timed_passes = _timed(passes, rounds, device, bar)
        timed_kernels = _timed(kernels, rounds, device, bar)
    return Benchmark(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        passes_title=f"{model}, 2 batches of {batch_size} x {' x '.join(map(str, shape))}",
        passes=_rows(timed_passes, memory),
        kernels_title=(
            f"ReLU backward with every filter's sum of a·g, {' x '.join(map(str, _KERNEL_SHAPE))}"
        ),
        kernels=_rows(timed_kernels, {}),
    )


def _random_splits(shape: tuple[int, int, int]) -> Splits:
    """No images: what `network` must know of them."""
    nothing: DataLoader[Any] = DataLoader([])  # type: ignore[arg-type]
    classes = tuple(str(label) for label in range(_CLASSES))
    return Splits(nothing, nothing, nothing, classes, shape, (), ())


def _kernels(a: torch.Tensor, g: torch.Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    """PyTorch's own ops, then every backend that runs on the device."""
    runs: dict[str, Callable[[], object]] = {
        "PyTorch ops": lambda: reference.affine_relu_backward(a, g, None, 0.0, math.inf, False, True)
    }
    for name in NAMES:
        backend = find(name).backend
        if backend is None or name == "reference":
            continue
        try:
            backend.check_device(device.type)
        except BackendError:
            continue
        runs[f"backend {name}"] = functools.partial(
            backend.affine_relu_backward, a, g, None, 0.0, math.inf, False, True
        )
    return runs


def _trained(net: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    for images, labels in batches:
        torch.autograd.grad(functional.cross_entropy(main_output(net(images)), labels), parameters)


@torch.no_grad()
def _run(net: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for images, _ in batches:
        net(images)


def _timed(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, bar: Any
) -> dict[str, list[float]]:
    """Seconds of each, round by round; the first of each does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            bar.update()
    return {name: times[1:] for name, times in seconds.items()}


def _rows(seconds: dict[str, list[float]], memory: dict[str, int]) -> tuple[Timed, ...]:
    first = next(iter(seconds.values()))
    return tuple(
        Timed(
            name,
            statistics.median(times),
            statistics.median(t / f for t, f in zip(times, first, strict=True)),
            memory.get(name),
        )
        for name, times in seconds.items()
    )
