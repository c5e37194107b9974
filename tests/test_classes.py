"""Scores by class, and pruning that goes by classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definition import CRITERIA, gated_logits, importance, map_means, score_matrix
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.autograd.functional import jacobian

import attrfast
from attrfast.selection import for_the_worst_class

# The classes 2 and 4 have no sample, 1 has more than the others.
LABELS = torch.tensor([0, 1, 1, 3, 1, 0, 1, 3])
SEEN = [0, 1, 3]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain()).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(LABELS), 3, 16, 16, generator=generator, dtype=torch.float64).to(
        dtype
    ), LABELS


def score(model: nn.Module, loader: Any, *args: Any, **options: Any) -> Any:
    return attrfast.attribute(model, loader, *args, progress=False, **options)


def in_batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(*(t.split(list(sizes)) for t in data()), strict=True))


# -- scores by class -------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_class_has_the_scores_of_its_own_samples(criterion: str) -> None:
    model, (images, labels) = network(), data()
    got = score(model, in_batches(3, 1, 4), criterion, by_class=True)
    objective, guided, reduce = CRITERIA[criterion]
    matrix = score_matrix(model, (images,), labels, got.units, objective, guided=guided)
    assert got.by_class.shape == (CLASSES, len(got.units))
    assert got.class_samples.tolist() == [2, 4, 0, 2, 0]
    for k in range(CLASSES):
        mine = matrix[labels == k]
        expected = importance(mine, got.units, reduce) if len(mine) else torch.zeros(len(got.units))
        torch.testing.assert_close(got.by_class[k], expected.double(), rtol=1e-9, atol=1e-12)
    assert torch.equal(got.importance, score(model, in_batches(3, 1, 4), criterion).importance)


def test_other_criteria_by_class() -> None:
    model, (images, labels) = network(), data()
    scores = score(model, in_batches(5, 3), ["apoz", "obd"], by_class=True, normalize=None)
    units = scores["apoz"].units
    relus = ["features.0", "features.4", "features.7", None]
    alive = map_means(model, (images,), units, relus, lambda a: 1 - float((a == 0).mean()))
    gate = torch.ones(len(units), dtype=torch.float64)
    logits = gated_logits(model, (images,), units)
    j, p = jacobian(logits, gate), logits(gate).softmax(1)[:, :, None]
    half_variance = ((p * j.square()).sum(1) - (p * j).sum(1).square()) / 2
    for k in SEEN:
        chosen = labels == k
        for name, each in (("apoz", alive), ("obd", half_variance)):
            torch.testing.assert_close(
                scores[name].by_class[k], each[chosen].mean(0), rtol=1e-9, atol=1e-14
            )


def test_a_signed_reduction_by_class() -> None:
    model, (images, labels) = network(), data()
    got = score(model, in_batches(8), reduction="signed_batch", by_class=True, normalize=None)
    matrix = score_matrix(model, (images,), labels, got.units, CRITERIA["taylor"][0])
    for k in SEEN:
        expected = matrix[labels == k].sum(0).abs()
        torch.testing.assert_close(got.by_class[k], expected, rtol=1e-9, atol=1e-13)


def test_class_scores_read_filter_by_filter() -> None:
    got = score(network(torch.float32), [data(torch.float32)], by_class=True)
    assert got.class_scores("features.4").shape == (CLASSES, 16)
    assert got.class_scores("features.4").dtype == torch.float32
    assert torch.equal(
        got.class_scores("features.4")[3], got.by_class[3][got.units.filters["features.4"]]
    )
    with pytest.raises(KeyError, match="classifier"):
        got.class_scores("classifier.1")
    plain = score(network(), [data()])
    assert plain.by_class is None
    assert plain.class_samples is None
    with pytest.raises(attrfast.InputError, match=r"by_class=True"):
        plain.class_scores("features.4")


@pytest.mark.parametrize("criterion", ["taylor", "obd", "apoz"])
def test_chosen_classes_are_scored_as_if_there_were_no_others(criterion: str) -> None:
    model, (images, labels) = network(), data()
    chosen = (labels == 0) | (labels == 3)
    loader = [((x,), y, [f"note {i}" for i in range(len(y))]) for x, y in in_batches(3, 2, 3)]
    got = score(model, loader, criterion, classes=[3, 0])
    expected = score(model, [(images[chosen], labels[chosen])], criterion)
    assert got.samples == 4
    torch.testing.assert_close(got.raw, expected.raw, rtol=1e-12, atol=1e-15)


# -- pruning by classes ------------------------------------------------------------------------------------


def prune(loader: Any, **options: Any) -> attrfast.PruneResult:
    options = {"finetune": 0, "progress": False, "val_loader": [data(torch.float32)], **options}
    return attrfast.prune(network(torch.float32), loader, **options)


def gates(result: attrfast.PruneResult) -> dict[str, list[bool]]:
    return {name: gate.tolist() for name, gate in result.gates.items()}


def test_what_chosen_classes_need_is_kept() -> None:
    images, labels = data(torch.float32)
    chosen = labels == 3
    got = prune([(images, labels)], classes=[3], keep_ratio=0.5)
    expected = prune([(images[chosen], labels[chosen])], keep_ratio=0.5)
    assert gates(got) == gates(expected)
    assert gates(got) != gates(prune([(images, labels)], keep_ratio=0.5))
    assert got.history[0].top1 == expected.history[0].top1  # of all samples of val_loader


def test_the_worst_class_is_guarded_by_the_maximum_over_classes() -> None:
    """One step, whose filters an independent computation ranks."""
    images, labels = data(torch.float32)
    removed = 9
    units = score(network(), [data()], "l1").units
    objective, _, reduce = CRITERIA["taylor"]
    matrix = score_matrix(network(), (data()[0],), labels, units, objective)
    worst = torch.stack([importance(matrix[labels == k], units, reduce) for k in SEEN]).amax(0)
    gone = set(worst.argsort()[:removed].tolist())
    kept = {name: [int(unit) not in gone for unit in row] for name, row in units.filters.items()}
    got = prune(
        [(images, labels)],
        criterion="taylor",
        balance="worst_class",
        keep_ratio=31 / 40,
        filters_per_step=removed,
    )
    assert gates(got) == kept
    assert len(got.history) == 2


def rare_class() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two classes whose images lie in a channel each, and filters that look at one channel each.

    Class 1 is 1 image in 40, and so are the contributions of the two filters that it alone uses.
    """
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1, bias=False),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2, bias=False)),
    )
    conv, head = model[0], model[4]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:6, 0] = torch.linspace(0.5, 1.0, 6)[:, None, None]
        conv.weight[6:, 1] = 1.0
        head.weight.zero_()
        head.weight[0, :6] = 1.0
        head.weight[1, 6:] = 1.0
    images = torch.zeros(40, 2, 4, 4)
    images[:39, 0] = 1.0
    images[39:, 1] = 1.0
    return model, [(images, torch.tensor([0] * 39 + [1]))]


@pytest.mark.parametrize(("balance", "accuracy"), [(None, 0.0), ("worst_class", 1.0)])
def test_a_rare_class_survives_with_balance_alone(balance: str | None, accuracy: float) -> None:
    model, loader = rare_class()
    result = attrfast.prune(
        model, loader, balance=balance, keep_ratio=0.5, finetune=0, progress=False, filters_per_step=4
    )
    images, labels = loader[0]
    with torch.no_grad():
        logits = result.model(images[labels == 1])
    # Without its filters, the rare class has logits of zero, which tell nothing.
    assert float((logits[:, 1] > logits[:, 0]).float().mean()) == accuracy
    assert float((result.model(images).argmax(1) == labels)[:39].float().mean()) == 1


def test_the_maximum_over_classes() -> None:
    table = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0]])
    assert for_the_worst_class(table).tolist() == pytest.approx([0.8, 0.9, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": [7]}, r"no sample of the classes \[7\]"),
        ({"classes": [0, 7]}, "class 7 is outside the model's 5 outputs"),
        ({"classes": [2]}, r"no sample of the classes \[2\]"),
        ({"classes": []}, r"list of one class number or more.*got \[\]"),
        ({"classes": [-1]}, r"got \[-1\]"),
        ({"classes": [True]}, r"got \[True\]"),
        ({"classes": "ab"}, "got 'ab'"),
        ({"classes": 3}, "got 3"),
        ({"classes": [1], "criterion": "l1"}, "'l1' is not measured on samples"),
        ({"balance": "worst_class", "criterion": "random"}, "'random' is not measured on samples"),
        ({"balance": "worst"}, "balance must be 'worst_class' or None, got 'worst'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(attrfast.InputError, match=message):
        prune([data(torch.float32)], keep_ratio=0.5, **options)
    if "balance" not in options:
        options = {"criterion": "taylor", **options}
        with pytest.raises(attrfast.InputError, match=message):
            score(network(), [data()], **options)


@pytest.mark.parametrize("options", [{"classes": [0]}, {"by_class": True}])
def test_data_without_labels_is_refused(options: dict[str, Any]) -> None:
    images, _ = data()
    with pytest.raises(attrfast.InputError, match="label"):
        score(network(), [(images, images)], loss_fn=lambda out, _: out.square().sum(1), **options)


def test_scores_by_class_of_weights_are_refused() -> None:
    with pytest.raises(attrfast.InputError, match="'l2' is not measured on samples"):
        score(network(), [data()], ["taylor", "l2"], by_class=True)
