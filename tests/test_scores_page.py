"""The code on the page about scores runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain

PAGE = Path(__file__).parents[1] / "docs" / "scores.md"


def test_the_code_runs_as_it_stands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10) % CLASSES
    scope: dict[str, Any] = {"images": images, "labels": labels}
    scope |= {"model": lived_in(Plain()), "loader": [(images, labels)]}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 7
    for block in blocks:
        exec(block, scope)
    assert {p.name for p in tmp_path.iterdir()} == {"map.png", "filters.png", "scores.png"}
    assert "tensor([2, 2, 2, 2, 2])" in capsys.readouterr().out
