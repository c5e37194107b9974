"""A criterion of the user's own that measures in another way than by S."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import CLASSES, Functional
from torch import nn

import attrfast
from attrfast.batches import Batch
from attrfast.channels import Discovery

SAMPLES = 7


class _Seen:
    def __init__(self, units: int, measured: Callable[[Batch], torch.Tensor]) -> None:
        self.samples, self.sizes, self.total = 0, [], 0.0
        self.units, self.measured = units, measured

    def add(self, batch: Batch) -> None:
        self.samples += batch.samples
        self.sizes.append(batch.samples)
        self.total += float(self.measured(batch).detach())

    def importance(self) -> torch.Tensor:
        return torch.arange(self.units, dtype=torch.float64) + self.total


class MeanLoss(attrfast.Criterion):
    """Every unit's number plus the sum of J: no use, but easy to know."""

    uses_loss = True

    def __init__(self) -> None:
        self.seen: _Seen | None = None
        self.given: dict[str, Any] = {}

    def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, labels[:, None])[:, 0]

    def own_pass(
        self,
        model: nn.Module,
        found: Discovery,
        *,
        objective: Callable[[Any, Batch], torch.Tensor],
        forward: Callable[[Batch], Any],
        seed: int,
        progress: bool,
    ) -> _Seen:
        self.given = {"training": model.training, "seed": seed, "progress": progress}
        self.seen = _Seen(len(found.units), lambda batch: objective(forward(batch), batch))
        return self.seen


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SAMPLES, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.arange(SAMPLES) % CLASSES


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_it_is_given_the_model_the_batches_and_the_objective(
    batch: tuple[torch.Tensor, torch.Tensor], amp_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    model, rule = Functional().double().train(), MeanLoss()
    with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
        logits = model(batch[0]).detach().float()
    expected = float(logits.gather(1, batch[1][:, None]).sum())
    scores = attrfast.attribute(
        model, [batch], rule, microbatch=3, seed=5, amp_dtype=amp_dtype, normalize=None, progress=False
    )
    assert rule.seen is not None
    assert rule.seen.sizes == [3, 3, 1]
    assert rule.given == {"training": False, "seed": 5, "progress": False}
    got = scores.raw - torch.arange(len(scores.units))
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=1e-5, atol=1e-5)
    assert scores.samples == SAMPLES
    assert scores.reduction is None


def test_the_users_loss_is_measured(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model, rule = Functional().double(), MeanLoss()
    attrfast.attribute(model, [batch], rule, loss_fn=lambda output, _: output[:, 0], progress=False)
    assert rule.seen is not None
    assert rule.seen.total == pytest.approx(float(model(batch[0])[:, 0].detach().sum()))


def test_it_goes_together_with_other_criteria(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = Functional().double()
    names = ["taylor", "causal_map", "l1", "iba", "apoz"]
    together = attrfast.attribute(model, [batch], names, progress=False)
    for name in names:
        alone = attrfast.attribute(model, [batch], name, progress=False)
        assert torch.equal(together[name].raw, alone.raw), name
        assert (together[name].samples, together[name].reduction) == (alone.samples, alone.reduction)


def test_some_classes_may_be_scored_but_not_all_at_once(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    torch.manual_seed(0)
    model = Functional().double()
    chosen = (batch[1] == 1) | (batch[1] == 4)
    some = attrfast.attribute(model, [batch], "causal_map", classes=[1, 4], progress=False)
    part = (batch[0][chosen], batch[1][chosen])
    assert torch.equal(some.raw, attrfast.attribute(model, [part], "causal_map", progress=False).raw)
    with pytest.raises(attrfast.InputError, match="classes apart"):
        attrfast.attribute(model, [batch], "causal_map", by_class=True, progress=False)
