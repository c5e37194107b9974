"""TensorBoard's event files hold the rows of a pruning run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain

import attrfast
from attrfast.errors import BackendError
from attrfast.tensorboard import TensorBoard


def test_every_row_is_written_and_read_back(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.manual_seed(0)
    batch = torch.randn(8, 3, 16, 16), torch.arange(8) % CLASSES
    with TensorBoard(tmp_path) as board:
        result = attrfast.prune(
            lived_in(Plain()), [batch], max_macs=0.5, finetune=0, progress=False, callback=board
        )
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    rows = result.history[1:]
    for tag, field in (("accuracy/top1", "top1"), ("size/macs", "macs"), ("size/filters_left", "phi")):
        written = [(event.step, event.value) for event in read.Scalars(tag)]
        assert written == [(row.step, pytest.approx(getattr(row, field), rel=1e-6)) for row in rows]
    for name, gate in result.gates.items():
        assert read.Scalars(f"width/{name}")[-1].value == int(gate.sum())


def test_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BackendError, match=r"TensorBoard logging needs.*attrfast\[tensorboard\]"):
        TensorBoard(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
