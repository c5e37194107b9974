"""obd is half the Hessian's diagonal by the gates of units, computed here from explicit gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definition import gated_logits
from families import lived_in
from small_networks import NETWORKS, Plain
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional

import attrfast
from attrfast import tiers
from attrfast.criteria import OBD

LABELS = torch.tensor([0, 3, 1])
# Networks that are piecewise linear in every gate, so that Gauss-Newton's matrix is the Hessian.
LINEAR = ["plain", "functional", "several inputs and outputs", "never used", "1d", "3d", "fixed view"]


def small(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    return lived_in(make()).double(), tuple(x.double() for x in inputs(len(LABELS)))


def score(model: nn.Module, loader: Any, criterion: Any = "obd", **options: Any) -> attrfast.Scores:
    return attrfast.attribute(model, loader, criterion, normalize=None, progress=False, **options)


def gauss_newton(model: nn.Module, inputs: tuple[torch.Tensor, ...], units: Any) -> torch.Tensor:
    """1/2 mean_n of the variance of J[n, k, c] over k ~ p[n], (U,)."""
    logits = gated_logits(model, inputs, units)
    gate = torch.ones(len(units), dtype=torch.float64)
    j, p = jacobian(logits, gate), logits(gate).softmax(1)[:, :, None]
    mean = (p * j).sum(1, keepdim=True)
    return (p * (j - mean).square()).sum(1).mean(0) / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_small_network(name: str) -> None:
    model, inputs = small(name)
    got = score(model, [(inputs, LABELS)])
    expected = gauss_newton(model, inputs, got.units)
    assert float(expected.max()) > 0
    torch.testing.assert_close(got.raw, expected, rtol=1e-9, atol=1e-14)
    assert got.reduction == "sq_sample"


@pytest.mark.parametrize("name", LINEAR)
def test_it_is_the_hessian_where_the_network_is_piecewise_linear_in_a_gate(name: str) -> None:
    model, inputs = small(name)
    got = score(model, [(inputs, LABELS)])
    logits = gated_logits(model, inputs, got.units)

    def loss(gate: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits(gate), LABELS)

    h = hessian(loss, torch.ones(len(got.units), dtype=torch.float64))
    torch.testing.assert_close(got.raw, h.diagonal() / 2, rtol=1e-9, atol=1e-14)


def test_it_does_not_rank_as_the_empirical_fisher_does() -> None:
    model, inputs = small("plain")
    both = attrfast.attribute(model, [(inputs, LABELS)], ["obd", "taylor_fo"], progress=False)
    orders = [scores.raw.argsort().tolist() for scores in both.values()]
    assert orders[0] != orders[1]


class Signs(OBD):
    """Four of the sixteen sign vectors of five classes (a vector and its negative do the same)."""

    def __init__(self, part: int) -> None:
        super().__init__(passes=4)
        self.part = part

    def _signs(self, first: int, samples: int, classes: int) -> torch.Tensor:
        numbers = range(4 * self.part, 4 * self.part + 4)
        rows = [[1.0 if number >> bit & 1 else -1.0 for bit in range(classes)] for number in numbers]
        return torch.tensor(rows).expand(samples, 4, classes)


def test_random_combinations_of_classes_are_right_in_the_mean() -> None:
    model, inputs = small("plain")
    parts = [score(model, [(inputs, LABELS)], Signs(part)).raw for part in range(4)]
    exact = score(model, [(inputs, LABELS)]).raw
    assert not torch.allclose(parts[0], exact, rtol=1e-3)
    torch.testing.assert_close(sum(parts) / 4, exact, rtol=1e-9, atol=1e-14)


def test_the_signs_are_fair_and_belong_to_the_sample() -> None:
    signs = OBD(passes=3, seed=1)._signs(0, 500, 40)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    # 60,000 fair signs: their mean is within five standard deviations; so is that of products.
    assert abs(float(signs.mean())) < 5 / 60_000**0.5
    assert abs(float((signs[:, 0] * signs[:, 1]).mean())) < 5 / 20_000**0.5
    assert torch.equal(OBD(passes=3, seed=1)._signs(7, 20, 40), signs[7:27])
    assert not torch.equal(OBD(passes=3, seed=2)._signs(0, 500, 40), signs)


def test_splitting_a_batch_changes_nothing_with_random_signs() -> None:
    torch.manual_seed(0)
    model = lived_in(Plain()).double()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6) % 5
    whole = score(model, [(images, labels)], OBD(passes=2))
    for size in (1, 4):
        parts = score(model, [(images, labels)], OBD(passes=2), microbatch=size)
        torch.testing.assert_close(parts.raw, whole.raw, rtol=1e-10, atol=1e-16)
    assert torch.equal(score(model, [(images, labels)], OBD(passes=2)).raw, whole.raw)


def test_backward_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = small("functional")
    calls = []
    grad = tiers._grad
    monkeypatch.setattr(tiers, "_grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    for passes, expected in ((16, 5), (3, 3)):
        calls.clear()
        score(model, [(inputs, LABELS)], OBD(passes=passes))
        assert len(calls) == expected


def test_options_that_do_not_fit_are_refused() -> None:
    model, inputs = small("plain")
    with pytest.raises(attrfast.InputError, match="passes must be a whole number"):
        OBD(passes=0)
    with pytest.raises(attrfast.InputError, match="'obd' is defined with the reduction 'sq_sample'"):
        score(model, [(inputs, LABELS)], reduction="abs_sample")
