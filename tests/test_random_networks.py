"""Scores and pruning of networks that nobody designed."""

from __future__ import annotations

import copy

import pytest
import torch
from definition import CRITERIA, importance, layer_error, score_matrix
from families import lived_in
from random_networks import CLASSES, SIZE, RandomNetwork

import attrfast

# Of the first hundreds: those that once were wrong, and enough others to have every kind of step.
SEEDS = range(24)


def drawn(seed: int) -> tuple[RandomNetwork, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = lived_in(RandomNetwork(seed)).double()
    return model, torch.randn(5, 3, SIZE, SIZE, dtype=torch.float64), torch.randint(0, CLASSES, (5,))


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_what_the_definition_says(seed: int) -> None:
    model, images, labels = drawn(seed)
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    before = copy.deepcopy(model.state_dict())
    for criterion, (objective, guided, reduce) in CRITERIA.items():
        scores = attrfast.attribute(model, batches, criterion, progress=False)
        matrix = score_matrix(model, (images,), labels, scores.units, objective, guided=guided)
        expected = importance(matrix, scores.units, reduce)
        assert layer_error(scores.importance, expected, scores.units) <= 1e-10, criterion
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:left whole")
def test_what_can_be_cut_is_cut_and_nothing_else_changes(seed: int) -> None:
    """`prune` itself compares each smaller model with the masked one."""
    model, images, labels = drawn(seed)
    try:
        result = attrfast.prune(
            model, [(images, labels)], "l1", keep_ratio=0.9, finetune=0, progress=False
        )
    except attrfast.TargetError:
        return  # too much of it has to stay
    except attrfast.ModelError as error:
        if "no layer of the model can be pruned" not in str(error):
            raise
        return
    assert result.history[-1].filters <= 0.9 * result.history[0].filters
    assert result.model(images).shape == (5, CLASSES)
