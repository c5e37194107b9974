"""What the README shows is true: its code runs as printed, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attrfast
from attrfast import data, models
from attrfast.criteria.base import get_criterion
from attrfast.models.vgg import VGG

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_quick_start_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With handwritten digits in the place of Fashion-MNIST, which takes minutes."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(data, "fashion_mnist", lambda: data.digits(image_size=16))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = blocks("python")
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    result, model = scope["result"], scope["model"]
    assert result.history[-1].macs <= 0.35 * result.history[0].macs
    assert result.history[-1].top1 >= 0.8
    assert result.summary() in capsys.readouterr().out
    saved = attrfast.load(tmp_path / "smaller", models.vgg_small)
    assert isinstance(saved, VGG)
    assert sum(p.numel() for p in saved.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE)))
)
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).is_file()


def test_reconstructed_definitions_are_called_so() -> None:
    assert "reconstruction" in README
    assert "10.1360/SSI-2020-0186" in README


def test_every_explained_criterion_exists() -> None:
    (table,) = re.findall(r"\| criterion \|.*?\n\n", README, flags=re.DOTALL)
    first_column = "\n".join(line.split("|")[1] for line in table.strip().splitlines())
    explained = re.findall(r"`(\w+)`", first_column)
    assert len(explained) >= 7
    for name in explained:
        get_criterion(name)  # raises if there is none
