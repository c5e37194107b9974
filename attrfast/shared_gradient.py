"""One memory for the gradient of a tensor that many read: each of them adds its share to it.

autograd would have every reader make a tensor of its own, and add it to those before. Must not know who reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor


def shared(x: Tensor) -> tuple[Tensor, SharedGradient]:
    """A tensor for readers to take in the place of x, which needs a gradient, and where their gradients go.

    These are theirs alone: readers of x itself bring their gradients to autograd, as ever.
    """
    gradient = SharedGradient()
    tensor = _Gathered.apply(x, gradient)
    assert isinstance(tensor, torch.Tensor)
    return tensor, gradient


class SharedGradient:
    """Memory that the first reader of a backward pass is given to fill, and that the others add to."""

    def __init__(self) -> None:
        # Never a tensor that knows of this one: nobody would break the circle.
        self._gradient: Tensor | None = None

    def memory(self, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The memory, and whether it holds a gradient already, to which this reader's is added.

        A reader that is the first hands the memory on to autograd, once it has filled it; the others hand on
        nothing.

        Args:
            make: memory for the first.
        """
        if self._gradient is not None:
            return self._gradient, True
        self._gradient = make()
        return self._gradient, False

    def take(self) -> Tensor | None:
        """What all readers have made together; the next backward pass begins anew."""
        gradient, self._gradient = self._gradient, None
        return gradient


class _Gathered(torch.autograd.Function):
    """Identity, behind which all shares have come together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: SharedGradient) -> Tensor:
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.gradient.take(), None
