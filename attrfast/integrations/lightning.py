"""A callback that scores filters while Lightning trains."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from attrfast.recorder import ScoreRecorder
from attrfast.scores import Scores


class ScoreCallback(lightning.Callback):
    """Scores every filter over each training epoch, by the gradients of the training itself.

        scoring = ScoreCallback(model="net")
        lightning.Trainer(callbacks=[scoring]).fit(module, loader)
        scoring.scores    # of the last epoch

    Accumulated gradients and a gradient scaler are undone as the trainer has them.

    Args:
        model: name of the submodule to score, which `training_step` calls, for instance `"net"` where it
            calls `self.net(...)`; None for the Lightning module itself, where it calls `self(...)`.
        options: as of `attrfast.ScoreRecorder`.

    Attributes:
        scores: of the last epoch that was trained to its end; None before that.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.model, self.options = model, options
        self.scores: Scores | None = None
        self._recorder: ScoreRecorder | None = None

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        known = {} if self.scores is None else {"units": self.scores.units}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._recorder = ScoreRecorder(
            pl_module.get_submodule(self.model or ""),
            **{
                "divided_by": trainer.accumulate_grad_batches,
                "grad_scaler": scaler if isinstance(scaler, torch.amp.GradScaler) else None,
                **known,
                **self.options,
            },
        )
        self._recorder.__enter__()

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        recorder = self._leave()
        if recorder is not None:
            self.scores = recorder.scores()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self._leave()

    def _leave(self) -> ScoreRecorder | None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None, None, None)
        return recorder
