"""The demonstration: handwritten digits to a trained and pruned network in under a minute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from attrfast import data, models, pictures
from attrfast.pruner import prune

TARGET: Final = 0.4  # multiply-adds of the pruned network as a share of the whole one
_EPOCHS: Final = 5
_LEARNING_RATE: Final = 3e-3


@dataclass(frozen=True)
class Figures:
    """What the demonstration came to; top-1 is the share of the test images that are right."""

    top1_before: float
    top1_after: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int

    def table(self) -> str:
        """The figures before and after, and what is left."""
        lines = [f"{'':<24}{'whole':>14}{'pruned':>14}{'left':>9}"]
        for name, before, after in (
            ("multiply-adds an image", self.macs_before, self.macs_after),
            ("parameters", self.params_before, self.params_after),
        ):
            lines.append(f"{name:<24}{before:>14,}{after:>14,}{after / before:>9.1%}")
        change = 100 * (self.top1_after - self.top1_before)
        lines.append(
            f"{'top-1 on test images':<24}{self.top1_before:>14.2%}{self.top1_after:>14.2%}"
            f"{change:>+8.2f}p"
        )
        return "\n".join(lines)


def run(out: Path, *, seed: int = 0, progress: bool = True) -> str:
    """Trains `vgg_small` on digits, prunes it with `attribution` and writes a report.

    Args:
        out: folder for `figures.json`, `trade_off.png` and `kept_filters.png`; made when missing.
        seed: of the weights, the batches and the split.
        progress: show progress bars.

    Returns:
        The report as text.

    Raises:
        BackendError: scikit-learn or matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    splits = data.digits(image_size=16, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.vgg_small(num_classes=splits.num_classes)
    _train(model, splits.train, progress=progress)
    result = prune(
        model,
        splits.train,
        criterion="attribution",
        max_macs=TARGET,
        val_loader=splits.val,
        finetune=1,
        seed=seed,
        progress=progress,
    )
    first, last = result.history[0], result.history[-1]
    figures = Figures(
        top1_before=_top1(model, splits.test),
        top1_after=_top1(result.model, splits.test),
        macs_before=first.macs,
        macs_after=last.macs,
        params_before=first.params,
        params_after=last.params,
    )
    (out / "figures.json").write_text(json.dumps(asdict(figures), indent=2) + "\n")
    pictures.trade_off(result.history, out / "trade_off.png")
    pictures.kept_filters(result, out / "kept_filters.png")
    written = "\n".join(str(out / name) for name in ("trade_off.png", "kept_filters.png"))
    return f"{result.summary()}\n\n{figures.table()}\n\n{written}"


def _train(model: nn.Module, loader: DataLoader[Any], *, progress: bool) -> None:
    """Trains in place, with one rise and fall of the learning rate."""
    steps = _EPOCHS * len(loader)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="training", leave=False, disable=None if progress else True) as bar:
        for _ in range(_EPOCHS):
            for images, labels in loader:
                optimiser.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
                optimiser.step()
                schedule.step()
                bar.update()
    model.eval()


@torch.no_grad()
def _top1(model: nn.Module, loader: DataLoader[Any]) -> float:
    """The share of the loader's images whose largest logit is that of the label."""
    model.eval()
    right = seen = 0
    for images, labels in loader:
        right += int((model(images).argmax(1) == labels).sum())
        seen += len(labels)
    return right / seen
