"""timm, Hugging Face and Lightning: the examples run, and what stands behind them is right."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import attrfast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_a_model_of_timm() -> None:
    pytest.importorskip("timm", reason="needs the extra attrfast[integrations]")
    result = example("timm_model.py")["main"]()
    assert result.history[-1].filters <= 0.8 * result.history[0].filters
    assert result.model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_a_model_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra attrfast[integrations]")
    result = example("hugging_face.py")["main"]()
    images = torch.randn(2, 3, 32, 32)
    logits = result.model.eval()(pixel_values=images).logits
    assert logits.shape == (2, 10)
    loaded = attrfast.load(result.save(tmp_path / "smaller"), result.original)
    torch.testing.assert_close(loaded(pixel_values=images).logits, logits)


def test_importing_attrfast_imports_none_of_them() -> None:
    # Torch-Pruning imports timm by itself where it is installed.
    code = (
        "import sys, attrfast; names = 'captum lightning transformers attrfast.integrations'; "
        "print([name for name in names.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Keywords(Plain):
    """Takes and gives what Hugging Face's models do."""

    def forward(  # type: ignore[override]
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        logits = super().forward(pixel_values)
        loss = {} if labels is None else {"loss": functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def test_dictionaries_score_as_pairs_do() -> None:
    torch.manual_seed(0)
    model = lived_in(Keywords())
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % CLASSES
    pairs = [({"pixel_values": images}, labels)]
    batches = [{"pixel_values": images, "labels": labels}]

    def own(output: Any, batch: Any) -> torch.Tensor:
        targets = batch["labels"] if isinstance(batch, dict) else batch[1]
        return functional.cross_entropy(output["logits"], targets)

    for options in ({}, {"by_class": True, "microbatch": 4}, {"classes": [0, 2]}, {"loss_fn": own}):
        one, other = (
            attrfast.attribute(model, data, progress=False, **options) for data in (pairs, batches)
        )
        assert torch.equal(one.importance, other.importance)
        assert one.samples == other.samples
    assert attrfast.evaluate(model, batches) == attrfast.evaluate(model, pairs)


# -- Lightning -----------------------------------------------------------------------------------------


def test_lightning_trains_and_scores() -> None:
    pytest.importorskip("lightning", reason="needs the extra attrfast[integrations]")
    pytest.importorskip("sklearn")
    scores = example("lightning_callback.py")["main"](epochs=1)
    assert scores.samples > 1000
    assert float(scores.importance.min()) > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_gives_what_a_recorder_gives(accumulate: int, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs the extra attrfast[integrations]")
    from attrfast.integrations.lightning import ScoreCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Plain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index == self.fails_at:
                raise RuntimeError("the user's own")
            return functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self(batch[0])

        fails_at = -1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    data = DataLoader(TensorDataset(images, torch.arange(16) % CLASSES), batch_size=4)
    scoring = ScoreCallback(model="net")

    def fit(module: nn.Module) -> None:
        lightning.Trainer(
            max_epochs=2,
            callbacks=[scoring],
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data, data)

    fit(Module())
    assert scoring.scores is not None
    net = Module().net.train()
    with attrfast.ScoreRecorder(net) as recorder:
        for images, labels in data:
            functional.cross_entropy(net(images), labels).backward()
    torch.testing.assert_close(scoring.scores.raw, recorder.scores().raw, rtol=1e-4, atol=1e-9)
    assert scoring.scores.samples == 16
    broken = Module()
    broken.fails_at = 2
    with pytest.raises(RuntimeError, match="user"):
        fit(broken)
    assert torch.overrides._get_current_function_mode() is None  # nothing is left switched on
