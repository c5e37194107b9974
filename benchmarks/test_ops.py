"""Every op and backend under pytest-benchmark, beside PyTorch's eager ops; `make test` does not run it.

`python -m pytest benchmarks/test_ops.py`; to compare one commit with another, `--benchmark-autosave`, then
`--benchmark-compare`. On a CPU, and on a GPU where there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from attrfast import _backend
from benchmarks import kernels, machine
from benchmarks.networks import FORMATS

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
RUNS_ON = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(machine.THREADS)
    yield
    torch.set_num_threads(before)


@functools.lru_cache(1)  # the tensors of one are enough to have at a time
def _cases(
    device: str, layout: str, name: str, shape: tuple[int, int, int, int]
) -> dict[str, kernels.Case]:
    found = kernels.cases(layout, shape, backend=_backend.find(name).backend, device=device)
    return {case.op: case for case in found}


def _runs() -> Iterator[tuple[str, str, str, str, str]]:
    """Device, memory format, backend, op, and who runs it: the backend or a peer of PyTorch's."""
    for device in DEVICES:
        there = [name for name in RUNS_ON[device] if _backend.find(name).backend is not None]
        for layout in FORMATS:
            for name in there:
                for op, case in _cases(device, layout, name, (1, 8, 8, 8)).items():
                    yield device, layout, name, op, f"attrfast, {name}"
                    if name == there[0]:
                        yield from ((device, layout, name, op, peer) for peer in case.peers)


@pytest.mark.parametrize(("device", "layout", "name", "op", "who"), _runs())
def test_op(benchmark: Any, device: str, layout: str, name: str, op: str, who: str) -> None:
    benchmark.group = f"{op}, {layout}, {device}"
    case = _cases(device, layout, name, kernels.SHAPE)[op]
    run: Callable[[], object] = case.ours if who.startswith("attrfast") else case.peers[who]

    def finished() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark(finished)
