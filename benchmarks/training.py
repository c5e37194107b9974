"""Trains networks for benchmarks that need trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def train(model: nn.Module, loader: Any, epochs: int) -> None:
    """AdamW with a cycle of the learning rate up to 3e-3 and back.

    Args:
        model: in place.
        loader: of images and labels.
        epochs: none, perhaps.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = max(1, epochs * len(loader))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimiser.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()
