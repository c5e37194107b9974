"""Networks drawn at random: layers, activations, branches and views in orders that nobody designed.

A network is a list of steps over values; every step reads earlier ones. The last value is classified.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

CLASSES = 5
SIZE = 12

Function = Callable[..., torch.Tensor]

_ACTIVATIONS: dict[str, Function] = {
    "relu": lambda x: functional.relu(x),  # looked up when it runs, so that it can be replaced
    "relu_": lambda x: functional.relu_(x.clone()),
    "relu6": lambda x: functional.relu6(x),
    "method": lambda x: x.relu(),
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.1),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "hardswish": functional.hardswish,
    "tanh": torch.tanh,
    "sigmoid": lambda x: x.sigmoid(),
}
_POOLINGS: dict[str, tuple[Function, Callable[[int], int]]] = {
    "max 2": (lambda x: functional.max_pool2d(x, 2), lambda size: size // 2),
    "max 3": (lambda x: functional.max_pool2d(x, 3, 2, 1), lambda size: (size + 1) // 2),
    "max ceil": (lambda x: functional.max_pool2d(x, 2, 2, ceil_mode=True), lambda size: -(-size // 2)),
    "mean 2": (lambda x: functional.avg_pool2d(x, 2), lambda size: size // 2),
}
_SUMS: dict[str, Function] = {
    "add": lambda x, y: x + y,
    "in place": lambda x, y: x.clone().add_(y),
    "subtract": lambda x, y: x - y,
    "maximum": torch.maximum,
}
_HALVES: dict[str, Function] = {
    "chunk": lambda x: x.chunk(2, 1)[1],
    "slice": lambda x: x[:, : x.shape[1] // 2],
    "folded": lambda x: torch.add(*torch.split(x, x.shape[1] // 2, 1)),
}


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class _Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, max(2, channels // 2), 1)
        self.up = nn.Conv2d(max(2, channels // 2), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.up(gate))


@dataclass(frozen=True)
class _Value:
    index: int
    channels: int
    size: int


class RandomNetwork(nn.Module):
    """A network for (N, 3, 12, 12) images and 5 classes.

    Args:
        seed: of its structure; weights are drawn from torch's random state.
        steps: how many, besides the first convolution.
    """

    def __init__(self, seed: int, steps: int = 9) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str | int | Function, tuple[int, ...]]] = []
        self._values = [_Value(0, 3, SIZE)]
        self._convolution(self._values[0])
        for _ in range(steps):
            recent = self._draw.random() < 0.75
            x = self._values[-1] if recent else self._draw.choice(self._values[1:])
            kinds = [self._convolution] * 4 + [self._activation] * 3 + [self._sum, self._concatenation]
            kinds += [self._norm, self._pooling, self._half, self._shuffle, self._gate, self._larger]
            self._draw.choice(kinds)(x)
        last = self._values[-1]
        self.head, inputs = self._draw.choice(
            [("mean", last.channels), ("flat", last.channels * last.size**2)]
        )
        self.classifier = nn.Sequential(nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, CLASSES))

    def _add(self, what: nn.Module | Function, reads: list[_Value], channels: int, size: int) -> None:
        step: int | Function
        if isinstance(what, nn.Module):
            step = len(self.layers)
            self.layers.append(what)
        else:
            step = what
        self.steps.append((step, tuple(x.index for x in reads)))
        self._values.append(_Value(len(self._values), channels, size))

    def _convolution(self, x: _Value) -> None:
        c, bias, width = x.channels, self._draw.random() < 0.5, self._draw.choice([4, 6, 8, 12])
        divisor = self._draw.choice([k for k in (1, 2, 3, 4) if c % k == 0])
        mode = self._draw.choice(["zeros", "reflect", "circular"]) if x.size > 2 else "zeros"
        layer = self._draw.choice(
            [
                nn.Conv2d(c, width, 3, padding=1, bias=bias),
                nn.Conv2d(c, width, 1, bias=bias),
                nn.Conv2d(c, width, 3, stride=2 if x.size > 3 else 1, padding=1, bias=bias),
                nn.Conv2d(c, width, 3, padding=2, dilation=2),
                nn.Conv2d(c, width, (1, 3), padding="same", padding_mode=mode),
                nn.Conv2d(c, divisor * self._draw.choice([2, 3]), 3, padding=1, groups=divisor),
                nn.Conv2d(c, c * self._draw.choice([1, 2]), 3, padding=1, groups=c, bias=bias),
                nn.ConvTranspose2d(c, width, 3, padding=1),
            ]
        )
        size = (x.size + 1) // 2 if layer.stride[0] == 2 else x.size
        self._add(layer, [x], layer.out_channels, size)

    def _activation(self, x: _Value) -> None:
        if self._draw.random() < 0.15:
            self._add(nn.PReLU(self._draw.choice([1, x.channels])), [x], x.channels, x.size)
        else:
            name = self._draw.choice(list(_ACTIVATIONS))
            self._add(_ACTIVATIONS[name], [x], x.channels, x.size)

    def _norm(self, x: _Value) -> None:
        self._add(nn.BatchNorm2d(x.channels), [x], x.channels, x.size)

    def _pooling(self, x: _Value) -> None:
        function, size = _POOLINGS[self._draw.choice(list(_POOLINGS))]
        if x.size >= 4:
            self._add(function, [x], x.channels, size(x.size))

    def _sum(self, x: _Value) -> None:
        alike = [v for v in self._values[1:-1] if (v.channels, v.size) == (x.channels, x.size)]
        if not alike:
            self._add(nn.Conv2d(x.channels, x.channels, 3, padding=1), [x], x.channels, x.size)
            alike, x = [x], self._values[-1]
        function = _SUMS[self._draw.choice(list(_SUMS))]
        self._add(function, [x, self._draw.choice(alike)], x.channels, x.size)

    def _concatenation(self, x: _Value) -> None:
        other = self._draw.choice([v for v in self._values[1:] if v.size == x.size])
        self._add(lambda *both: torch.cat(both, 1), [x, other], x.channels + other.channels, x.size)

    def _half(self, x: _Value) -> None:
        if x.channels % 2 == 0:
            self._add(_HALVES[self._draw.choice(list(_HALVES))], [x], x.channels // 2, x.size)

    def _shuffle(self, x: _Value) -> None:
        if x.channels % 2 == 0:
            self._add(_shuffled, [x], x.channels, x.size)

    def _gate(self, x: _Value) -> None:
        self._add(_Squeeze(x.channels), [x], x.channels, x.size)

    def _larger(self, x: _Value) -> None:
        if x.size <= 6:
            self._add(lambda y: functional.interpolate(y, scale_factor=2), [x], x.channels, 2 * x.size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = [images]
        for step, reads in self.steps:
            function = self.layers[step] if isinstance(step, int) else step
            values.append(function(*(values[index] for index in reads)))
        last = values[-1]
        return self.classifier(last.mean((2, 3)) if self.head == "mean" else last.flatten(1))
