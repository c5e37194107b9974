"""The kernels under pytest-benchmark, to compare one commit with another; `make test` does not run it.

`python -m pytest benchmarks/test_ops.py --benchmark-autosave`, then `--benchmark-compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import kernels, machine
from benchmarks.networks import FORMATS

OPS = [case.op for case in kernels.cases("contiguous", (1, 8, 8, 8))]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(machine.THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FORMATS)
def by_op(request: pytest.FixtureRequest) -> dict[str, kernels.Case]:
    return {case.op: case for case in kernels.cases(request.param)}


@pytest.mark.parametrize("op", OPS)
def test_kernel(benchmark: Callable[..., Any], by_op: dict[str, kernels.Case], op: str) -> None:
    with torch.no_grad():
        benchmark(by_op[op].ours)
