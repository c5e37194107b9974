"""How a layer's time follows its widths: a law fitted to what was measured, corrected by it.

A convolution of I inputs and O outputs takes about a + b·I + c·O + d·I·O: a for the call, b and c for
reading and writing maps, d for the products. Kernels work on blocks of channels; widths that are no
multiple fill up the last block, and cost more than that besides. So they have a law of their own, in which I
and O are first rounded up to whole blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NEAR = 1e-3  # squared distance, as a share of the widths, within which samples are the same


@dataclass(frozen=True)
class Sample:
    """A layer at one pair of widths: seconds, and the quartiles of the passes."""

    inputs: int
    outputs: int
    median: float
    low: float
    high: float


class Surface:
    """Seconds over both widths, by samples of one sort.

    No coefficient of the law is negative, so that no filter less makes it slower. The prediction is the law
    times what the samples around, weighted by distance, took more than the law says.

    Args:
        samples: at least one.
        block: widths are rounded up to multiples of it.
        product: whether there is anything to I·O; other layers' time goes by what they make.
    """

    def __init__(self, samples: Sequence[Sample], block: int, *, product: bool) -> None:
        self._block = block
        inputs, outputs, seconds = (
            np.array([getattr(s, name) for s in samples], dtype=np.float64)
            for name in ("inputs", "outputs", "median")
        )
        self._most = inputs.max(), outputs.max()
        features = self._features(inputs, outputs)
        self._coefficients = _not_negative(features / seconds[:, None], range(4) if product else (0, 2))
        law = features @ self._coefficients
        self._places = inputs, outputs
        self._excess = np.log(seconds / np.maximum(law, 1e-12))

    def _features(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        i, o = (np.ceil(width / self._block) * self._block for width in (inputs, outputs))
        return np.stack([np.ones_like(i), i, o, i * o], -1)

    def law(self, inputs: int, outputs: int) -> float:
        """Seconds by the law alone."""
        return float(self._features(np.array(inputs), np.array(outputs)) @ self._coefficients)

    def seconds(self, inputs: int, outputs: int) -> float:
        """The prediction."""
        distance = sum(
            ((place - width) / most) ** 2
            for place, width, most in zip(self._places, (inputs, outputs), self._most, strict=True)
        )
        weight = 1 / (distance + _NEAR) ** 2
        excess = float((weight * self._excess).sum() / weight.sum())
        return self.law(inputs, outputs) * float(np.exp(excess))


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


class Law:
    """Seconds of a layer, for widths that are whole blocks and for those that are not.

    Args:
        samples: at least one.
        block: of channels; 1 where the layer works on each alone.
        product: see `Surface`.
    """

    def __init__(self, samples: Sequence[Sample], block: int, *, product: bool) -> None:
        self._block = block
        whole = [s for s in samples if self._is_whole(s.inputs, s.outputs)]
        ragged = [s for s in samples if not self._is_whole(s.inputs, s.outputs)]
        both = [Surface(some, block, product=product) for some in (whole, ragged) if some]
        self._whole, self._ragged = both[0], both[-1]

    def _is_whole(self, inputs: int, outputs: int) -> bool:
        # One input or output stands for a number that no removal changes.
        return all(width == 1 or width % self._block == 0 for width in (inputs, outputs))

    def seconds(self, inputs: int, outputs: int) -> float:
        """Of the layer with these widths; none where nothing comes out."""
        if inputs <= 0 or outputs <= 0:
            return 0.0
        surface = self._whole if self._is_whole(inputs, outputs) else self._ragged
        return surface.seconds(inputs, outputs)

    def slopes(self, inputs: int, outputs: int) -> tuple[float, float]:
        """Seconds that an input and an output are worth, over the next whole block of them.

        One channel less saves nothing as long as the last block has to be filled up, so this is what a block
        saves, shared among its channels. The last block of all saves nothing: it stays.
        """
        law, block = self._whole.law, self._block
        now = law(inputs, outputs)
        return (
            (now - law(inputs - block, outputs)) / block if inputs > block else 0.0,
            (now - law(inputs, outputs - block)) / block if outputs > block else 0.0,
        )
