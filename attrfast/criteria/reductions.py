"""How the score matrix of many samples becomes one importance a unit.

The numbers that go by the name "Taylor 2016" differ in nothing but this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reduction:
    """A sum over samples and what is made of it at the end.

    Attributes:
        name: as given to `attribute(reduction=...)`.
        each: S (n, U) of some samples -> (n, U), to be added up over all samples.
        finish: the total (U,) and the number of samples -> importance (U,); or several totals (K, U) and
            the numbers of their samples (K, 1).
        absolute: take abs(x * g) at every position before summing. Such sums are not conserved from
            one tensor to the next, so they are taken at the readers' inputs alone.
    """

    name: str
    each: Callable[[torch.Tensor], torch.Tensor]
    finish: Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]
    absolute: bool = False


def _mean(total: torch.Tensor, samples: int | torch.Tensor) -> torch.Tensor:
    return total / samples


# Of criteria that have no S: what they measure of a sample is averaged.
MEAN = Reduction("mean", lambda s: s, _mean)


REDUCTIONS: dict[str, Reduction] = {
    r.name: r
    for r in (
        # mean_n abs(sum_p a g): Molchanov et al. 2016, Pruning Convolutional Neural Networks, eq. 8.
        Reduction("abs_sample", torch.abs, _mean),
        # mean_n (sum_p a g)^2: Molchanov et al. 2019, Importance Estimation, eq. 8.
        Reduction("sq_sample", torch.square, _mean),
        # abs(sum_n sum_p a g): widely copied scripts; equals abs(<W, dJ/dW> + b dJ/db) of the layer.
        Reduction("signed_batch", lambda s: s, lambda total, _: total.abs()),
        # mean_n sum_p abs(a g): some of the 2019 authors' code.
        Reduction("abs_element", lambda s: s, _mean, absolute=True),
    )
}
