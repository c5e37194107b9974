"""The rows of a pruning run as TensorBoard's event files. Must not know how a run is carried out."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from torch import nn

from attrfast.data._optional import require
from attrfast.history import Step


class TensorBoard:
    """A callback of `attrfast.prune` that writes every row of the history, and every layer's width.

        with attrfast.tensorboard.TensorBoard("logs/run") as board:
            attrfast.prune(model, loader, max_macs=0.5, callback=board)

    Args:
        logdir: folder of the event files, made if need be.

    Raises:
        BackendError: tensorboard is not installed.
    """

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        require("tensorboard", of="tensorboard", what="TensorBoard logging", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(logdir))

    def __call__(self, row: Step, model: nn.Module | None) -> None:
        """Writes one row; without a model, no widths."""
        figures = {
            "accuracy/top1": row.top1,
            "accuracy/loss": row.loss,
            "size/filters_left": row.phi,
            "size/macs": row.macs,
            "size/params": row.params,
            "seconds/scoring": row.seconds_scoring,
            "seconds/cutting": row.seconds_cutting,
            "seconds/tuning": row.seconds_tuning,
        }
        for name, module in () if model is None else model.named_modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                figures[f"width/{name}"] = module.out_channels
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, row.step)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left; nothing can be written afterwards."""
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()
