"""One trained network, pruned to the same number of multiply-adds by each criterion.

Run: `python examples/compare_criteria.py` (digits, about two minutes on 2 cores) or
`python examples/compare_criteria.py --set fashion` (Fashion-MNIST, some hours). Prints a table and
writes it, with the history of every run and its pictures, to `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import attrfast
from attrfast import data, models, pictures

CRITERIA = ("attribution", "taylor", "taylor_guided", "taylor_fo", "l1", "l2", "random")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, metavar="NAME")
    parser.add_argument("--target", type=float, default=0.35, help="share of multiply-adds to keep")
    parser.add_argument("--epochs", type=int, default=4, help="of training")
    parser.add_argument("--finetune", type=int, default=1, help="epochs after each step")
    parser.add_argument("--step", type=int, default=32, help="filters removed in a step")
    parser.add_argument("--score-batches", type=int, default=16, help="batches scored in a step")
    parser.add_argument("--images", type=int, help="train, score and fine-tune on so many images only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/criteria"))
    return parser.parse_args()


def train(model: nn.Module, loader: DataLoader[Any], epochs: int) -> None:
    """With AdamW and one rise and fall of the learning rate."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=3e-3, total_steps=epochs * len(loader)
    )
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()


@torch.no_grad()
def top1(model: nn.Module, splits: data.Splits) -> float:
    """The share of test images that are right."""
    model.eval()
    pairs = [(model(images).argmax(1) == labels) for images, labels in splits.test]
    return torch.cat(pairs).float().mean().item()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.set == "digits":
        splits = data.digits(image_size=16, seed=options.seed)
    else:
        splits = data.fashion_mnist(seed=options.seed)
    loader = splits.train
    if options.images is not None:
        loader = DataLoader(
            Subset(loader.dataset, range(options.images)),
            batch_size=loader.batch_size,
            shuffle=True,
            collate_fn=loader.collate_fn,
            generator=torch.Generator().manual_seed(options.seed),
        )
    torch.manual_seed(options.seed)
    model = models.vgg_small()
    train(model, loader, options.epochs)
    whole = top1(model, splits)
    print(f"whole network: {whole:.2%} of the test images right")

    records = {}
    print(f"{'criterion':<16}{'multiply-adds':>14}{'parameters':>12}{'top-1':>9}{'change':>9}{'s':>7}")
    for criterion in options.criteria:
        start = time.perf_counter()
        result = attrfast.prune(
            model,
            loader,
            criterion=criterion,
            max_macs=options.target,
            filters_per_step=options.step,
            val_loader=splits.val,
            finetune=options.finetune,
            max_batches=options.score_batches,
            seed=options.seed,
            progress=False,
        )
        seconds = time.perf_counter() - start
        first, last = result.history[0], result.history[-1]
        after = top1(result.model, splits)
        print(
            f"{criterion:<16}{last.macs / first.macs:>14.1%}{last.params / first.params:>12.1%}"
            f"{after:>9.2%}{100 * (after - whole):>+8.2f}p{seconds:>7.0f}",
            flush=True,
        )
        records[criterion] = {
            "top1_whole": whole,
            "top1": after,
            "seconds": seconds,
            "history": [asdict(row) for row in result.history],
        }
        pictures.trade_off(result.history, options.out / f"{criterion}-trade-off.png")
        pictures.kept_filters(result, options.out / f"{criterion}-kept-filters.png")
        (options.out / "criteria.json").write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
