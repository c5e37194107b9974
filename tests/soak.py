"""Many rounds of one thing in a process of its own, and what memory they leave: `python soak.py KIND ROUNDS`.

Prints a row of figures after a twentieth of the rounds, a quarter, half and all of them. Resident memory alone
tells little: allocators keep what was freed, and where the next round finds room for it changes. So what is in
use is counted besides: blocks of Python's allocator, objects that its collector follows, and bytes of the C
library's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn

import attrfast


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def native_bytes() -> int:
    """Bytes that the C library has given out; 0 where it is not one that tells."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Mallinfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).eval()


BATCHES = [(torch.randn(4, 3, 8, 8), torch.arange(4))]


def passes() -> Callable[[], Any]:
    model = network()
    return lambda: attrfast.attribute(model, BATCHES, progress=False)


def prunings() -> Callable[[], Any]:
    """New models and new surgery each time."""
    return lambda: attrfast.prune(
        network(), BATCHES, keep_ratio=0.5, filters_per_step=3, finetune=1, progress=False
    )


def recorders() -> Callable[[], Any]:
    """A recorder entered and left, with a step of training within."""
    model = network()

    def round_() -> None:
        with attrfast.ScoreRecorder(model) as recorder:
            images, labels = BATCHES[0]
            nn.functional.cross_entropy(model(images), labels).backward()
            model.zero_grad()
        recorder.scores()

    return round_


def controls() -> Callable[[], Any]:
    """PyTorch by itself: what grows here is not attrfast's."""
    model = network()

    def round_() -> None:
        images, labels = BATCHES[0]
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    return round_


KINDS = {"passes": passes, "prunings": prunings, "recorders": recorders, "controls": controls}


def main(kind: str, rounds: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    one, rows = KINDS[kind](), []
    process = psutil.Process()
    marks = {rounds // 20, rounds // 4, rounds // 2, rounds}
    for count in range(1, rounds + 1):
        one()
        if count in marks:
            gc.collect()
            rows.append(
                {
                    "rounds": count,
                    "resident": process.memory_info().rss,
                    "native": native_bytes(),
                    "blocks": sys.getallocatedblocks(),
                    "objects": len(gc.get_objects()),
                }
            )
    return rows


if __name__ == "__main__":
    for row in main(sys.argv[1], int(sys.argv[2])):
        print(json.dumps(row))
