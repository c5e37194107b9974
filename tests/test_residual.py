"""Residual branches: which are found, and what is left when one is taken out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import family, images_for
from torch import nn
from torch.nn import functional

from attrfast.channels import discover
from attrfast.cost import cost
from attrfast.criteria.factors import fold_into_output
from attrfast.errors import ModelError
from attrfast.residual import ResidualBranch, find_branches, take_out
from attrfast.trace import trace

IMAGES = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class PreActivation(nn.Module):
    """Norm and ReLU before each convolution; one of both serves the shortcut as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm1(x), inplace=True)
        out = self.conv2(torch.relu(self.norm2(self.conv1(x))))
        out += self.shortcut(x)
        return out


class InPlace(nn.Module):
    """The sum is made and activated in the memory of one operand; the branch ends in a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x.add_(self.drop(self.relu(self.body(x)))))


class Nested(nn.Module):
    """A branch with a residual module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.inner = InPlace()
        self.last = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, self.last(self.inner(torch.tanh(self.first(x)))))


class Twice(nn.Module):
    """Both sides have the same number of convolutions: neither is the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


class Leaking(nn.Module):
    """What the branch makes on its way is used beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = self.a(x)
        return (self.b(middle) + x) * middle


class Saturating(nn.Module):
    """A sigmoid makes one half of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sigmoid(self.a(x))


class DataDependent(nn.Module):
    """torch.fx cannot record it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x) if float(x.sum()) > 0 else x


class Repeated(nn.Module):
    """The branch's layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(torch.relu(self.a(x)))


class Network(nn.Module):
    """A residual module between other layers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = block
        self.side = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.relu(self.stem(x)) * 1)
        return self.head(torch.relu(self.side(x)).mean((2, 3)))


def network(block: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Network(block()).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def branches(model: nn.Module, images: torch.Tensor = IMAGES) -> tuple[ResidualBranch, ...]:
    return find_branches(model, trace(model, (images,)))


def silenced(model: nn.Module, branch: ResidualBranch) -> nn.Module:
    """A copy in which the branch adds zeros."""
    model = copy.deepcopy(model)
    fold_into_output(model.get_submodule(branch.last), torch.tensor(0.0))
    return model


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (PreActivation, [("block.conv2", {"block.conv1", "block.norm2", "block.conv2"})]),
        (InPlace, [("block.body.1", {"block.body.0", "block.body.1"})]),
        (
            Nested,
            [
                (
                    "block.last",
                    {"block.first", "block.inner.body.0", "block.inner.body.1", "block.last"},
                ),
                ("block.inner.body.1", {"block.inner.body.0", "block.inner.body.1"}),
            ],
        ),
        (Twice, []),
        (Leaking, []),
        (Saturating, []),
        (DataDependent, []),
        (Repeated, []),
    ],
)
def test_branches_are_found_by_what_is_computed(
    block: Callable[[], nn.Module], expected: list[tuple[str, set[str]]]
) -> None:
    found = branches(network(block))
    assert [(b.last, set(b.modules)) for b in found] == expected


def test_a_module_with_hooks_or_shared_weights_stays() -> None:
    hooked = network(InPlace)
    hooked.block.register_forward_hook(lambda *_: None)
    assert branches(hooked) == ()
    shared = network(PreActivation)
    shared.block.shortcut.weight = nn.Parameter(torch.randn(6, 6, 1, 1).double())
    shared.extra = nn.Conv2d(4, 6, 3).double()
    shared.extra.weight = shared.block.conv2.weight
    assert branches(shared) == ()


@pytest.mark.parametrize("block", [PreActivation, InPlace, Nested])
@pytest.mark.parametrize("training", [False, True])
def test_without_a_silent_branch_the_model_computes_the_same(
    block: Callable[[], nn.Module], training: bool
) -> None:
    model = network(block)
    for branch in branches(model):
        silent = silenced(model, branch).train(training)
        smaller = copy.deepcopy(silent)
        take_out(smaller, branch)
        assert [m.training for m in smaller.modules()] == [training] * len(list(smaller.modules()))
        torch.testing.assert_close(smaller(IMAGES.clone()), silent(IMAGES.clone()), rtol=1e-12, atol=0)
        names = dict(smaller.named_modules())
        assert not any(name in names for name in branch.modules)
        lost = sum(p.numel() for n in branch.modules for p in model.get_submodule(n).parameters(False))
        before, after = cost(model, (IMAGES,)), cost(smaller, (IMAGES,))
        assert after.params == before.params - lost
        assert after.macs < before.macs
        smaller(IMAGES.clone()).sum().backward()  # nothing that is kept for it was overwritten


def test_what_is_left_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = network(PreActivation)
    take_out(model, branches(model)[0])
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_nested_branch_goes_with_the_one_around_it() -> None:
    model = network(Nested)
    outer, inner = branches(model)
    take_out(model, outer)
    with pytest.raises(ModelError, match=r"block\.inner"):
        take_out(model, inner)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("mobilenet_v2", 10)])
def test_all_branches_of_a_family_can_go(name: str, count: int) -> None:
    model, images = family(name).double(), images_for(name, 1).double()
    found = branches(model, images)
    assert len(found) == count
    smaller = model
    for branch in found:
        model = silenced(model, branch)
    smaller = copy.deepcopy(model)
    for branch in found:
        take_out(smaller, branch)
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-12, atol=1e-12)
    gone = {n for branch in found for n in branch.modules}
    assert gone.isdisjoint(dict(smaller.named_modules()))
    # What is left is a network like any other: its units are found, its state has the same names.
    assert discover(smaller, (images,)).units.total_filters > 0
    assert smaller.state_dict().keys() <= model.state_dict().keys()
