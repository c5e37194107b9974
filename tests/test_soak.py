"""Many passes leave no memory behind."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from families import lived_in
from small_networks import Plain

import attrfast


@pytest.mark.parametrize(("passes", "megabytes"), [(200, 2.0)])
def test_memory_stays_flat_over_many_passes(passes: int, megabytes: float) -> None:
    torch.manual_seed(0)
    model = lived_in(Plain(4))
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    process = psutil.Process()
    sizes = []
    for count in (60, passes):
        for _ in range(count):
            attrfast.attribute(model, batches, progress=False)
        gc.collect()
        sizes.append(process.memory_info().rss / 2**20)
    assert sizes[1] - sizes[0] < megabytes
