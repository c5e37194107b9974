"""Runs that are killed and resumed, in processes forked from this one: `python killed_runs.py WORKLOAD SEED`.

The one that forks has torch loaded, and has computed nothing, so that no thread is lost in a fork. Prints how
often runs were killed, how many came to their end, and the names of those that ended in another model.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import lived_in
from safetensors.torch import save_file
from small_networks import CLASSES
from torch import nn
from torch.utils.data import DataLoader, Dataset

import attrfast

TIMED, AT_FILES = 25, 25


class Shaken(Dataset[Any]):
    """Images that are augmented by random numbers of Python and NumPy, as users' are."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(16, 3, 8, 8, generator=generator)
        self.labels = torch.randint(CLASSES, (16,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index] * (0.5 + random.random()) + float(np.random.normal()) / 10
        return image, self.labels[index]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)),
    )
    return lived_in(model).to(memory_format=torch.channels_last)


def own_training(loader: DataLoader[Any]) -> Callable[[nn.Module, int], None]:
    """A user's, which draws from the global generators and from the loader's own."""

    def train(model: nn.Module, step: int) -> None:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for images, labels in loader:
            optimizer.zero_grad()
            noise = torch.randn_like(images) * random.random()
            nn.functional.cross_entropy(model(images + noise), labels).backward()
            optimizer.step()

    return train


def run(workload: str, folder: Path) -> None:
    """One run, which goes on where the one before was killed; its model and history go beside the folder."""
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    own = torch.Generator().manual_seed(6)
    loader: DataLoader[Any] = DataLoader(Shaken(), batch_size=8, shuffle=True, generator=own)
    model = network()
    tuning: Any = own_training(loader)
    if workload == "built in":
        tuning = attrfast.FineTune(epochs=3, optimizer="adamw", lr=0.01, schedule="onecycle")
    result = attrfast.prune(
        model,
        loader,
        keep_ratio=0.4,
        filters_per_step=4,
        finetune=tuning,
        final_finetune=tuning,
        output_dir=folder,
        resume=True,
        progress=False,
    )
    drawn = {"torch": torch.rand(4), "python": torch.tensor([random.random(), float(np.random.rand())])}
    told = [(row.step, row.top1, row.loss, row.macs) for row in result.history]
    state = {name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}
    save_file(state | drawn, folder.parent / "end.safetensors", {"history": json.dumps(told)})


def die_at(operation: int) -> None:
    """Kills this process in the so-manieth operation on files, half of the writes half done."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == operation:
                if real is fsync and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    fsync = os.fsync
    os.fsync, os.replace, os.unlink = map(counted, (os.fsync, os.replace, os.unlink))  # type: ignore[assignment]


def forked(workload: str, folder: Path, operation: int = 0) -> int:
    child = os.fork()
    if child:
        return child
    try:
        if operation:
            die_at(operation)
        run(workload, folder)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(child: int, seconds: float | None = None) -> bool:
    """Waits for a run, no longer than this; whether it came to its end, and was not killed."""
    until = None if seconds is None else time.monotonic() + seconds
    while until is not None and time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return own_end(status)
        time.sleep(0.001)
    if until is not None:
        os.kill(child, signal.SIGKILL)
    return own_end(os.waitpid(child, 0)[1])


def own_end(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with {code}")
    return code == 0


def main(workload: str, seed: int) -> dict[str, Any]:
    """Kills runs at random moments, and at random operations on files."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        whole = root / "whole"
        begun = time.monotonic()
        assert ended(forked(workload, whole / "steps"))
        length = time.monotonic() - begun
        expected = (whole / "end.safetensors").read_bytes()
        killed, finished, differ, left = 0, 0, [], [True] * TIMED + [False] * AT_FILES
        draw.shuffle(left)
        while left:
            own = root / f"run {finished}"
            while True:
                if not left:
                    done = ended(forked(workload, own / "steps"))
                elif left[-1]:
                    done = ended(forked(workload, own / "steps"), draw.uniform(0, length))
                else:
                    done = ended(forked(workload, own / "steps", draw.randint(1, 40)))
                if done:
                    break
                killed += 1
                left.pop()
            finished += 1
            if (own / "end.safetensors").read_bytes() != expected:
                differ.append(own.name)
        return {"killed": killed, "finished": finished, "differ": differ, "seconds": length}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
