"""The code in docs/integrations.md runs as printed, what comes before and what comes after."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lived_in
from test_ecosystem import Keywords
from torch import nn

from attrfast import models

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "integrations.md").read_text()
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


def fresh() -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16)
    return {
        "torch": torch,
        "model": lived_in(models.vgg_small(in_channels=3, width=0.25)),
        "hugging_face_model": lived_in(Keywords()),
        "images": images,
        "loader": [(images, torch.arange(6) % 5)],
    }


def run(section: str) -> list[dict[str, Any]]:
    """Each block of a section from the same start, since those after stand in the place of those before."""
    scopes = []
    for block in SECTIONS[section]:
        scopes.append(fresh() | {"attrfast": __import__("attrfast")})
        exec(compile(block, "integrations.md", "exec"), scopes[-1])
    return scopes


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_torch_pruning() -> None:
    before, after = run("Torch-Pruning")
    assert size(before["model"]) < size(fresh()["model"])
    assert size(after["model"]) < size(fresh()["model"])


def test_captum() -> None:
    pytest.importorskip("captum", reason="needs the extra attrfast[integrations]")
    before, after = run("Captum")
    for theirs, ours in zip(before["per_filter"], after["per_filter"], strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-6)


def masked(module: nn.Module) -> int:
    return int((module.weight.flatten(1) == 0).all(1).sum())


def test_masks() -> None:
    before, after = run("torch.nn.utils.prune")
    conv = before["model"].features[0]
    assert masked(conv) == round(0.3 * conv.out_channels)
    scores = after["scores"]
    total = sum(len(scores[name]) for name in scores)
    assert sum(masked(after["model"].get_submodule(n)) for n in scores) >= round(0.4 * total)


def test_a_loop() -> None:
    before, after = run("A training loop of your own")
    for one, other in zip(before["model"].parameters(), after["model"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert after["scores"].samples == 6


def test_files_and_dictionaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (scope,) = run("Scores elsewhere")
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]
    assert copy.copy(scope["scores"]).samples == 6
    (scope,) = run("timm and Hugging Face")
    assert scope["scores"].samples == 6


def test_every_section_is_tried() -> None:
    assert {title for title, blocks in SECTIONS.items() if blocks} == {
        "Torch-Pruning",
        "Captum",
        "torch.nn.utils.prune",
        "A training loop of your own",
        "Scores elsewhere",
        "timm and Hugging Face",
    }


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PAGE))))
def test_link_leads_to_a_file(link: str) -> None:
    assert (Path(__file__).resolve().parent.parent / "docs" / link).resolve().is_file()
