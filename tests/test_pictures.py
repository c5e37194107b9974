"""Pictures show every step and every convolution, and are refused where nothing is to be shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attrfast import pictures
from attrfast.errors import BackendError, InputError

pytest.importorskip("matplotlib")

HISTORY = [SimpleNamespace(macs=1000 - 100 * i, top1=0.95 - 0.01 * i) for i in range(6)]
RESULT = SimpleNamespace(
    gates={
        "features.0": torch.tensor([True, False, True]),
        "features.3": torch.tensor([False, False, True, True, True]),
    }
)


def svg(draw: Callable[[Any, Path], None], content: Any, folder: Path) -> str:
    """Draws with text kept as text, so that a test can read it."""
    import matplotlib

    path = folder / "picture.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(content, path)
    return path.read_text()


@pytest.mark.parametrize(
    ("draw", "content"), [(pictures.trade_off, HISTORY), (pictures.kept_filters, RESULT)]
)
def test_pictures_are_written_in_the_format_of_their_ending(
    tmp_path: Path, draw: Callable[[Any, Path], None], content: Any
) -> None:
    draw(content, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in svg(draw, content, tmp_path)


def test_trade_off_names_the_first_and_the_last_step(tmp_path: Path) -> None:
    text = svg(pictures.trade_off, HISTORY, tmp_path)
    assert "95.0% at 100%" in text
    assert "90.0% at 50%" in text


def test_a_single_step_can_be_drawn(tmp_path: Path) -> None:
    assert "95.0% at 100%" in svg(pictures.trade_off, HISTORY[:1], tmp_path)


def test_kept_filters_counts_every_convolution(tmp_path: Path) -> None:
    text = svg(pictures.kept_filters, RESULT, tmp_path)
    for expected in ("features.0", "features.3", "2 of 3", "3 of 5", "5 of 8"):
        assert expected in text


@pytest.mark.parametrize(
    ("draw", "content"),
    [
        (pictures.trade_off, []),
        (pictures.trade_off, [SimpleNamespace(macs=0, top1=0.5)]),
        (pictures.kept_filters, SimpleNamespace(gates={})),
    ],
)
def test_nothing_to_draw_is_refused(
    tmp_path: Path, draw: Callable[[Any, Path], None], content: Any
) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        draw(content, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_drawing_leaves_the_users_matplotlib_settings_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.trade_off(HISTORY, tmp_path / "picture.png")
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match="matplotlib"):
        pictures.trade_off(HISTORY, tmp_path / "picture.png")
