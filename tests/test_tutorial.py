"""The tutorial runs from its first block to its last, and what it prints is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "tutorial.md").read_text()


def test_the_tutorial_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxscript", reason="needs the extra attrfast[onnx]")
    pytest.importorskip("onnxruntime", reason="needs the extra attrfast[onnx]")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "tutorial.md", "exec"), scope)
    printed = capsys.readouterr().out
    for shown in re.findall(r"```text\n(.*?)\n```", PAGE, flags=re.DOTALL):
        assert shown in printed
    result, again = scope["result"], scope["again"]
    assert result.history[-1].macs <= 0.4 * result.history[0].macs
    assert result.history[-1].top1 >= 0.9
    assert again.history[-1].params <= 0.8 * result.history[-1].params
    assert "the same decisions: True" in printed
    assert {"scores.png", "trade_off.png", "kept.png", "smaller", "smaller.onnx", "run"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("page", sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")))
def test_links_of_every_page_lead_somewhere(page: str) -> None:
    file = DOCS / page
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / link).exists(), link
