"""Lightning trains, a callback scores, and attrfast takes out what the scores say least about.

Run: `python examples/lightning_callback.py`. Takes some seconds, needs no download, and
`pip install "attrfast[integrations,data]"`.
"""

import lightning
import torch
from torch import nn

import attrfast
from attrfast import data, models
from attrfast.integrations.lightning import ScoreCallback


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = models.vgg_small(width=0.25)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 2) -> attrfast.Scores:
    lightning.seed_everything(0)
    scoring = ScoreCallback(model="net")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[scoring],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), data.digits(image_size=16).train)
    assert scoring.scores is not None
    print(scoring.scores)
    return scoring.scores


if __name__ == "__main__":
    main()
