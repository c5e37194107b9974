"""How a layer's time follows its widths: a law fitted to what was measured, corrected by it.

A convolution of I inputs and O outputs takes about a + b·I + c·O + d·I·O: a for the call, b and c for
reading and writing maps, d for the products. Kernels work on blocks of channels and fill up the last one, so
that I and O are first rounded up to whole blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NEAR = 1e-3  # squared distance, as a share of the widths, within which samples are the same
_EVEN = 0.6  # distance between odd widths and multiples of 32
_POWERS = 5  # of two, in 32


@dataclass(frozen=True)
class Sample:
    """A layer at one pair of widths: seconds, and the quartiles of the passes."""

    inputs: int
    outputs: int
    median: float
    low: float
    high: float


class Law:
    """Seconds of a layer over both widths.

    No coefficient is negative, so that no filter less makes the law slower. The prediction is the law times
    what the samples around, weighted by distance, took more than it says. Widths that are divisible by the
    same powers of two are nearer to each other: odd ones cost more than the blocks that they fill up.

    Args:
        samples: at least one.
        block: of channels; 1 where the layer works on each alone.
        product: whether there is anything to I·O; other layers' time goes by what they make.
    """

    def __init__(self, samples: Sequence[Sample], block: int, *, product: bool) -> None:
        self._block, self._even = block, _EVEN if product else 0.0
        inputs, outputs, seconds = (
            np.array([getattr(s, name) for s in samples], dtype=np.float64)
            for name in ("inputs", "outputs", "median")
        )
        features = self._features(inputs, outputs)
        self._coefficients = _not_negative(features / seconds[:, None], range(4) if product else (0, 2))
        self._most = np.array([inputs.max(), outputs.max()])
        self._places = np.stack([self._place(s.inputs, s.outputs) for s in samples])
        self._seconds = seconds
        self._excess = np.log(seconds / np.maximum(features @ self._coefficients, 1e-12))

    def _features(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        i, o = (np.ceil(width / self._block) * self._block for width in (inputs, outputs))
        return np.stack([np.ones_like(i), i, o, i * o], -1)

    def _place(self, inputs: int, outputs: int) -> np.ndarray:
        even = self._even * math.log2(alignment(inputs, outputs)) / _POWERS
        return np.array([*(np.array([inputs, outputs]) / self._most), even])

    def law(self, inputs: int, outputs: int) -> float:
        """Seconds by the law alone."""
        return float(self._features(np.array(inputs), np.array(outputs)) @ self._coefficients)

    def seconds(self, inputs: int, outputs: int) -> float:
        """The prediction; none where nothing comes out."""
        if inputs <= 0 or outputs <= 0:
            return 0.0
        weight = self._weights(self._place(inputs, outputs))
        excess = float((weight * self._excess).sum() / weight.sum())
        return self.law(inputs, outputs) * math.exp(excess)

    def _weights(self, place: np.ndarray) -> np.ndarray:
        """Of the samples, in what is said about a place."""
        weights: np.ndarray = 1 / (((self._places - place) ** 2).sum(-1) + _NEAR) ** 2
        return weights

    def error_elsewhere(self) -> float:
        """Seconds by which every sample is foretold wrongly by the law and by the others around it, in all."""
        if len(self._seconds) < 2:
            return 0.0
        weights = self._weights(self._places[:, None])
        np.fill_diagonal(weights, 0.0)
        foretold = (weights @ self._excess) / weights.sum(1)
        return float((self._seconds * np.abs(np.expm1(foretold - self._excess))).sum())

    def slopes(self, inputs: int, outputs: int) -> tuple[float, float]:
        """Seconds that an input and an output are worth, over the next whole block of them.

        One channel less saves nothing as long as the last block has to be filled up, so this is what a block
        saves, shared among its channels. The last block of all saves nothing: it stays.
        """
        law, block = self.law, self._block
        now = law(inputs, outputs)
        return (
            (now - law(inputs - block, outputs)) / block if inputs > block else 0.0,
            (now - law(inputs, outputs - block)) / block if outputs > block else 0.0,
        )


def alignment(inputs: int, outputs: int) -> int:
    """The largest power of two, up to 32, in both widths (an input of one is a number that stays)."""
    return math.gcd(*(() if inputs == 1 else (inputs,)), outputs, 2**_POWERS)


def _not_negative(features: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Coefficients (4,) >= 0 for which `features` (S, 4) times them come nearest to ones."""
    best, least = np.zeros(4), np.inf
    # Of four columns, every set that may be positive can be tried: the best is exact.
    for count in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(columns, count)):
            some = features[:, chosen]
            values = np.linalg.lstsq(some, np.ones(len(some)), rcond=None)[0]
            error = ((some @ values - 1) ** 2).sum()
            if (values >= 0).all() and error < least:
                best, least = np.zeros(4), error
                best[chosen] = values
    return best
