"""The code in docs/deploy.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attrfast

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "deploy.md").read_text()


def run(code: str, scope: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "deploy.md", "exec"), scope)
    return scope


def test_every_block_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page; the block that loads knows nothing of those before it."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    prune, load, recipe, measure, onnx = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    scope = run(prune, {})
    result = scope["result"]
    assert result.history[-1].macs <= 0.4 * result.history[0].macs
    assert result.history[-1].top1 >= 0.8
    told = re.findall(r"^\| `(\w+\.\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(told) == sorted(file.name for file in (tmp_path / "smaller").iterdir())
    elsewhere = run(load, {})
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(elsewhere["smaller"](images), result.model.eval()(images))
    capsys.readouterr()
    run(recipe, scope)
    assert f"top-1 {result.history[-1].top1:.1%}" in capsys.readouterr().out
    run(measure, scope)
    assert scope["measured"].summary() in capsys.readouterr().out
    pytest.importorskip("onnxscript", reason="needs the extra attrfast[onnx]")
    pytest.importorskip("onnxruntime", reason="needs the extra attrfast[onnx]")
    run(onnx, scope)
    assert scope["logits"].shape == (len(scope["images"]), 10)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"attrfast\.(\w+)", PAGE))))
def test_every_name_exists(name: str) -> None:
    assert hasattr(attrfast, name)
