"""A list of criteria gives what each gives alone, from data that is read once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, NETWORKS, Plain
from torch import nn
from torch.utils.checkpoint import checkpoint

import attrfast
from attrfast import tiers
from attrfast.criteria import Attribution, Taylor, get_criterion, same_objective

ALL = ["taylor", "apoz", "taylor_guided", "l1", "attribution", "obd", "taylor_fo", "hrank", "random"]


def small(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).to(dtype)
    return model, [
        (tuple(x.to(dtype) for x in inputs(samples)), torch.arange(samples) % CLASSES)
        for samples in (3, 2)
    ]


def assert_as_alone(model: nn.Module, loader: Any, criteria: list[Any], **options: Any) -> None:
    together = attrfast.attribute(model, loader, criteria, progress=False, **options)
    assert isinstance(together, dict)
    assert list(together) == [get_criterion(criterion).name for criterion in criteria]
    for criterion, got in zip(criteria, together.values(), strict=True):
        alone = attrfast.attribute(model, loader, criterion, progress=False, **options)
        assert isinstance(alone, attrfast.Scores)
        assert torch.equal(got.raw, alone.raw), criterion
        assert torch.equal(got.importance, alone.importance), criterion
        assert got.importance.dtype == alone.importance.dtype
        for name in ("samples", "criterion", "reduction", "normalize"):
            assert getattr(got, name) == getattr(alone, name)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_list_gives_what_each_gives_alone(name: str) -> None:
    model, loader = small(name, torch.float64)
    assert_as_alone(model, loader, ALL)


@pytest.mark.parametrize("name", ["plain", "reused", "grouped"])
def test_to_the_last_bit_in_float32(name: str) -> None:
    model, loader = small(name, torch.float32)
    assert_as_alone(model, loader, ALL)


@pytest.mark.parametrize("reduction", ["abs_element", "signed_batch"])
def test_a_reduction_for_all_gradients(reduction: str) -> None:
    model, loader = small("plain", torch.float64)
    assert_as_alone(model, loader, ["apoz", "taylor", "attribution", "l2"], reduction=reduction)


def test_instances_and_losses_of_ones_own() -> None:
    def loss_fn(output: Any, batch: Any) -> torch.Tensor:
        return output.square().mean(1)

    model, loader = small("plain", torch.float64)
    criteria = [Attribution("predicted"), "taylor", "taylor_guided", "taylor_fo"]
    assert_as_alone(model, loader, criteria, loss_fn=loss_fn)


class Checkpointed(nn.Module):
    """Runs its middle again during the backward pass."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = checkpoint(self.middle, x, use_reentrant=False) if self.again else self.middle(x)
        return self.head(x.mean((2, 3)))


def test_several_backward_passes_through_a_checkpoint() -> None:
    images = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    loader = [(images, torch.tensor([0, 1, 2]))]
    model, plain = Checkpointed(True).double(), Checkpointed(False).double()
    plain.load_state_dict(model.state_dict())
    criteria = ["taylor", "attribution", "apoz", "obd"]
    assert_as_alone(model, loader, criteria)
    got, expected = (attrfast.attribute(m, loader, criteria, progress=False) for m in (model, plain))
    for name in criteria:
        torch.testing.assert_close(got[name].raw, expected[name].raw, rtol=1e-10, atol=1e-15)


class Counting(Plain):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("criteria", "forwards", "backwards"),
    [
        (["taylor"], 1, 1),
        (["taylor", "taylor_fo"], 1, 1),
        (["taylor", "apoz", "hrank", "l1"], 1, 1),
        (["apoz", "hrank"], 1, 0),
        (["attribution", "taylor_fo", "apoz"], 1, 2),
        (["taylor", "taylor_guided", "apoz"], 2, 2),
        (["obd", "attribution"], 1, CLASSES + 1),
    ],
)
def test_data_is_read_once_and_passes_are_shared(
    criteria: list[str], forwards: int, backwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = 3
    read, grads = [], []

    def loader() -> Iterator[Any]:
        for i in range(batches):
            read.append(i)
            yield torch.randn(2, 3, 16, 16), torch.tensor([0, 1])

    grad = tiers._grad
    monkeypatch.setattr(tiers, "_grad", lambda *a, **k: grads.append(1) or grad(*a, **k))
    model = lived_in(Counting())
    monkeypatch.setattr(Counting, "calls", 0)
    attrfast.attribute(model, loader(), criteria, progress=False)
    assert read == list(range(batches))
    assert Counting.calls == 1 + batches * forwards  # and the recorded one
    assert len(grads) == batches * backwards


def test_criteria_of_weights_alone_read_one_batch_to_find_the_units() -> None:
    model, loader = small("plain", torch.float64)
    stream = iter(loader)
    got = attrfast.attribute(model, stream, ["l1", "l2"], progress=False)
    assert [scores.samples for scores in got.values()] == [0, 0]
    assert len(list(stream)) == len(loader) - 1


class Sharper(Taylor):
    """Inherits its objective, and what the objective reads is another."""

    name = "test_sharper"
    temperature = 0.5


def test_criteria_share_s_only_where_nothing_but_the_reduction_differs() -> None:
    taylor, fo = get_criterion("taylor"), get_criterion("taylor_fo")
    assert same_objective(taylor, fo)
    assert same_objective(Attribution(), Attribution())
    assert not same_objective(Attribution(), Attribution("predicted"))
    assert not same_objective(taylor, Sharper())
    assert not same_objective(taylor, get_criterion("taylor_guided"))


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        (["taylor", "apos"], "unknown criterion 'apos'; did you mean 'apoz'"),
        (["taylor", "l1", "taylor"], "'taylor' is given twice"),
        ([Attribution(), Attribution("predicted")], "'attribution' is given twice.*register"),
        ([], "list of criteria is empty"),
        (["taylor", 3], "criterion must be a name or an attrfast.Criterion, got int"),
        ({"taylor"}, "criterion must be a name or an attrfast.Criterion, got set"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(criteria: Any, message: str) -> None:
    model, loader = small("plain", torch.float64)
    with pytest.raises(attrfast.InputError, match=message):
        attrfast.attribute(model, loader, criteria, progress=False)


@pytest.mark.parametrize("criterion", ["apoz", "hrank", "obd"])
@pytest.mark.parametrize("name", ["plain", "reused", "grouped"])
def test_pruning_takes_the_lowest_of_each(name: str, criterion: str) -> None:
    model, loader = small(name, torch.float64)
    scores = attrfast.attribute(model, loader, criterion, progress=False)
    result = attrfast.prune(
        model, loader, criterion, keep_ratio=0.9, filters_per_step=1000, finetune=0, progress=False
    )
    assert len(result.history) == 2
    gone = {int(u) for n, row in scores.units.filters.items() for u in row[~result.gates[n]]}
    assert gone
    for layer in scores.units.layers:
        lost = [u for u in layer.units if u in gone]
        left = [u for u in layer.units if u not in gone]
        if lost:
            assert float(scores.importance[lost].max()) <= float(scores.importance[left].min())


def test_a_run_of_pruning_takes_one_criterion() -> None:
    model, loader = small("plain", torch.float32)
    with pytest.raises(attrfast.InputError, match="criterion must be a name"):
        attrfast.prune(model, loader, ["taylor"], keep_ratio=0.5)  # type: ignore[arg-type]
