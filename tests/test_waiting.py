"""No batch of a pass reads a value back: on a GPU that would make the CPU wait for it.

Here without a GPU, at the dispatcher; `test_gpu.py` asks CUDA itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import family, images_for, lived_in
from small_networks import NETWORKS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.criteria import REDUCTIONS, get_criterion
from attrfast.passes import Pass

CPU = torch.device("cpu")
aten = torch.ops.aten
# What reads values to learn a number, a truth or a shape.
READS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero),
    *(aten.masked_select, aten._unique2, aten.unique_consecutive, aten.bincount),
}


class Reads(TorchDispatchMode):
    """Notes every op that reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put_) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func.overloadpacket in READS or by_mask:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def reads_of_a_batch(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    criterion: str,
    reduction: str | None,
    watchful: bool,
) -> list[str]:
    rule = get_criterion(criterion)
    found = discover(model, tuple(x[:2] for x in inputs))
    running = Pass(
        model, found, [(rule, REDUCTIONS[reduction or rule.reduction])], device=CPU, by_class=True
    )
    running.watchful = watchful
    batch = unpack((inputs, torch.arange(len(inputs[0])) % 2), CPU)
    running.add(batch)  # what is found out once may be
    reads = Reads()
    with reads:
        running.add(batch)
    return reads.found


@pytest.mark.parametrize(
    ("criterion", "reduction"),
    [
        ("taylor", None),
        ("taylor_guided", None),
        ("attribution", None),
        ("taylor", "abs_element"),
        ("apoz", None),
        ("obd", None),
    ],
)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "data dependent"])
def test_a_batch_of_a_small_network(name: str, criterion: str, reduction: str | None) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make())
    assert reads_of_a_batch(model, inputs(4), criterion, reduction, watchful=False) == []


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v3_small", "densenet121"])
def test_a_batch_of_a_family(name: str) -> None:
    found = reads_of_a_batch(family(name), (images_for(name, 2),), "taylor", None, watchful=False)
    assert found == []


def test_the_checks_that_the_cpu_allows_would_be_found() -> None:
    make, inputs = NETWORKS["plain"]
    found = reads_of_a_batch(lived_in(make()), inputs(4), "taylor", None, watchful=True)
    assert "aten._local_scalar_dense.default" in found
