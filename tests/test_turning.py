"""Contiguous models run channels-last inside, and see nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from small_networks import NETWORKS
from test_tiers import assert_same, matrices
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import turning
from attrfast.layouts import channels_lie_together
from attrfast.stages import find_stages, uses_of
from attrfast.trace import trace

Tensor = torch.Tensor
LAST = torch.channels_last


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Whatever is turned: in float64 as well, so that nothing but the layout can make a difference."""
    made: list[Tensor] = []
    real = turning.turned

    def noted(x: Tensor) -> Tensor:
        made.append(real(x))
        return made[-1]

    monkeypatch.setattr(
        turning, "pays", lambda x: x.dim() == 4 and x.is_contiguous() and x.shape[2:].numel() > 1
    )
    monkeypatch.setattr(turning, "turned", noted)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_same(name: str, turns: list[Tensor]) -> None:
    model, images = family(name).double(), images_for(name, 2).double()
    fast, called, runner, _ = matrices(model, (images,), guided=False)
    assert runner.plan is not None, "the fast tier did not run"
    assert bool(turns) == (name != "convnext_tiny")  # which permutes its maps itself
    assert_same(fast, called)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_small_network_gives_the_same(name: str, turns: list[Tensor]) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).double()
    fast, called, _, _ = matrices(model, tuple(x.double() for x in inputs(3)), guided=False)
    assert_same(fast, called)


class Watched(nn.Module):
    """Two convolutions, and between them and behind them whatever a test wants."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], end: Callable[[Tensor], Tensor], channels: int = 3
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 4)
        self.between, self.end = between, end

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(functional.relu(self.first(x)))
        x = self.end(functional.relu(self.second(x)))
        return x if x.dim() == 4 else self.head(x)


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def through_a_view(x: Tensor) -> Tensor:
    return x.view(len(x), x.shape[1], -1).mean(-1)


def images(channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 8, 8, dtype=torch.float64)


def assert_the_same_with(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Watched(between, through_a_view).double().eval()
    fast, called, runner, _ = matrices(model, (images(),), guided=False)
    assert runner.plan is not None, "the fast tier did not run"
    assert_same(fast, called)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: functional.dropout(x, 0.5, training=False),
        lambda x: functional.pad(x, (1, 1)),
        lambda x: functional.max_pool2d(x, 2),
        lambda x: functional.leaky_relu(x * 2.0, inplace=True),
        lambda x: functional.interpolate(x, scale_factor=2.0),
        lambda x: functional.silu(x + 1.0, inplace=True),
        lambda x: torch.cat([x, -x], 1).view(len(x), 2, 24, *x.shape[2:]).sum(1),
    ],
)
def test_code_that_wants_contiguous_maps_gets_them(
    between: Callable[[Tensor], Tensor], turns: list[Tensor]
) -> None:
    assert_the_same_with(between)
    assert turns


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.view(x.shape).contiguous(),
        lambda x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1),
        lambda x: torch.cat([x[:, :12], x[:, 12:]], 1),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ],
)
def test_nothing_turns_that_such_code_reads(
    between: Callable[[Tensor], Tensor], turns: list[Tensor]
) -> None:
    assert_the_same_with(between)
    assert not turns


def seen_by(model: nn.Module, x: Tensor) -> list[bool]:
    """How each map lies that the model's own code meets between its layers."""
    lie: list[bool] = []
    inside = model.between

    def look(x: Tensor) -> Tensor:
        lie.append(channels_lie_together(x))
        return inside(x)

    model.between = look
    attrfast.attribute(model, [(x, torch.zeros(len(x), dtype=torch.int64))], progress=False)
    return lie[-1:]


def test_maps_turn_only_where_nobody_sees_it(turns: list[Tensor]) -> None:
    assert seen_by(Watched(lambda x: x + 1, mean).double().eval(), images()) == [True]
    assert seen_by(Watched(lambda x: x.view(x.shape), mean).double().eval(), images()) == [False]


def test_maps_of_one_channel_turn_as_well(turns: list[Tensor]) -> None:
    assert seen_by(Watched(lambda x: x, mean, channels=1).double().eval(), images(1)) == [True]
    assert turns[-1].stride(1) == 1


def test_what_lies_channels_last_by_itself_is_not_laid_back(turns: list[Tensor]) -> None:
    def needs_last(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).view(len(x), -1, x.shape[1]).mean(1)

    torch.manual_seed(0)
    model = Watched(lambda x: x, needs_last).double().eval().to(memory_format=LAST)
    for x in (images().contiguous(memory_format=LAST), images()):
        fast, called, runner, _ = matrices(model, (x,), guided=False)
        assert runner.plan is not None, "the fast tier did not run"
        assert_same(fast, called)
    assert not turns


def test_what_the_model_returns_lies_as_ever(turns: list[Tensor]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 3), nn.ReLU()).double().eval()

    def objective(out: Tensor, _: object) -> Tensor:
        assert out.is_contiguous()
        return out.view(len(out), -1).sum(1)

    data = [(images(), torch.zeros(4, dtype=torch.int64))]
    attrfast.attribute(net, data, "taylor", loss_fn=objective, progress=False)
    assert turns


def free(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the calls that make what may turn."""
    record = trace(model, (x,))
    uses = uses_of(record)
    stages = {index: stage for stage in find_stages(record, uses, joins=True) for index in stage.roles}
    found = turning.free_to_turn(record, uses, stages)
    return [uses.makers[v].name if v in uses.makers else "input" for v in sorted(found)]


def test_a_value_that_shares_memory_with_one_that_is_seen_may_not_turn() -> None:
    def dropped(x: Tensor) -> Tensor:
        return functional.dropout(x, training=False)

    hidden = free(Watched(dropped, mean).eval().double(), images())
    seen = free(Watched(lambda x: dropped(x).view(x.shape), mean).eval().double(), images())
    assert "dropout" in hidden
    assert hidden.count("relu") == 2
    assert "dropout" not in seen
    assert seen.count("relu") == 1


@pytest.mark.parametrize("kind", ["float64", "autocast", "one position"])
def test_what_gains_nothing_stays_as_it_lies(kind: str) -> None:
    x = torch.ones(2, 24, 4, 4)
    assert turning.pays(x)
    if kind == "float64":
        assert not turning.pays(x.double())
    elif kind == "one position":
        assert not turning.pays(x[:, :, :1, :1].contiguous())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert not turning.pays(x)
