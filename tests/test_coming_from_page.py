"""What docs/coming_from.md says of scripts and of other libraries is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from families import lived_in
from torch import nn

import attrfast
from attrfast import models

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "coming_from.md").read_text()
HOOKS, ONE_CALL, PEER, PRUNE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def fresh() -> dict[str, Any]:
    torch.manual_seed(0)
    model = lived_in(models.vgg_small(in_channels=3, width=0.25))
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
    return {"model": model, "loader": batches, "torch": torch, "attrfast": attrfast}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_one_call_gives_what_the_script_with_hooks_gives() -> None:
    scope = fresh()
    exec(compile(HOOKS, "coming_from.md", "exec"), scope)
    assert all(float(total.sum()) > 0 for total in scope["scores_by_hooks"].values())
    exec(compile(ONE_CALL, "coming_from.md", "exec"), scope)


def test_both_ways_of_pruning_run() -> None:
    scope = fresh()
    before = size(scope["model"])
    exec(compile(PEER, "coming_from.md", "exec"), scope)
    assert size(scope["model"]) < before
    scope = fresh()
    exec(compile(PRUNE, "coming_from.md", "exec"), scope)
    assert size(scope["smaller"]) < before == size(scope["model"])


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+Importance)[`(]", PAGE))))
def test_importance_of_torch_pruning_exists(name: str) -> None:
    assert hasattr(tp.importance, name)


@pytest.mark.parametrize("name", sorted(set(re.findall(r'`(?:criterion=)?"(\w+)"`', PAGE))))
def test_criterion_or_reduction_exists(name: str) -> None:
    assert name in attrfast.criterion_names()
