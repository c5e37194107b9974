"""The code in docs/latency.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from latency_clock import by_blocks, install

import attrfast

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "latency.md").read_text()


def test_the_block_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock that other programs don't disturb."""
    pytest.importorskip("sklearn")
    install(monkeypatch, by_blocks(8))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(code, "latency.md", "exec"), scope)
    result = scope["result"]
    assert result.history[-1].latency_share <= 0.5
    assert result.summary() in capsys.readouterr().out
    assert len(list((tmp_path / "tables").iterdir())) == 1


@pytest.mark.parametrize("name", sorted(set(re.findall(r"attrfast\.(\w+)", PAGE))))
def test_every_name_exists(name: str) -> None:
    assert hasattr(attrfast, name)
