"""Does pruning hurt one class more than the others, and does `balance="worst_class"` help it?

Trains a small network, prunes it by attribution with and without protection, and prints the top-1 of every
class on the test images, mean over seeds.

Run: `python examples/protect_a_class.py` (digits, under a minute), or with Fashion-MNIST
`python examples/protect_a_class.py --data fashion-mnist --images 8000 --seeds 3`.
"""

import argparse
import itertools

import torch

import attrfast
from attrfast import data, models


def top1_by_class(model: torch.nn.Module, loader, classes: int) -> torch.Tensor:
    right, seen = torch.zeros(classes), torch.zeros(classes)
    model.eval()
    with torch.no_grad():
        for images, labels in loader:
            hits = model(images).argmax(1) == labels
            seen += torch.bincount(labels, minlength=classes)
            right += torch.bincount(labels[hits], minlength=classes)
    return right / seen


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Way to prune -> (classes,) top-1, of a network that was trained with this seed."""
    torch.manual_seed(seed)
    open_data = {"digits": data.digits, "fashion-mnist": data.fashion_mnist}[options.data]
    splits = open_data(seed=seed)
    count = -(-options.images // len(next(iter(splits.train))[1]))
    train = list(itertools.islice(splits.train, count))
    model = models.vgg_small(num_classes=splits.num_classes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 3e-3, total_steps=options.epochs * len(train)
    )
    for _ in range(options.epochs):
        for images, labels in train:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()
    found = {"whole network": top1_by_class(model, splits.test, splits.num_classes)}
    for name, balance in (("pruned", None), ("worst class protected", "worst_class")):
        result = attrfast.prune(
            model,
            train,
            max_macs=options.max_macs,
            balance=balance,
            filters_per_step=options.step,
            val_loader=splits.val,
            finetune=1,
            final_finetune=2,
            seed=seed,
            progress=False,
        )
        found[name] = top1_by_class(result.model, splits.test, splits.num_classes)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--images", type=int, default=2000, help="train on so many")
    parser.add_argument("--epochs", type=int, default=5, help="of training before pruning")
    parser.add_argument("--max-macs", type=float, default=0.15, help="share of multiply-adds left")
    parser.add_argument("--step", type=int, default=80, help="filters removed in a step")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    runs = [one_seed(seed, options) for seed in range(options.seeds)]
    table = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
    print("class  " + "".join(f"{name:>24}" for name in table))
    for label in range(next(iter(table.values())).shape[1]):
        print(f"{label:>5}  " + "".join(f"{top1[:, label].mean():>24.1%}" for top1 in table.values()))
    mean = [f"{top1.mean():>24.1%}" for top1 in table.values()]
    print(" mean  " + "".join(mean))
    before = table["whole network"]
    for name, top1 in itertools.islice(table.items(), 1, None):
        loss = (before - top1).amax(1)
        print(
            f"{name}: the worst class loses {100 * loss.mean():.1f} points (seeds: {(100 * loss).tolist()})"
        )


if __name__ == "__main__":
    main()
