"""Second order: what the loss gains by curvature alone when a unit goes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from attrfast.criteria.base import Criterion, register_criterion
from attrfast.errors import InputError


@register_criterion("obd")
class OBD(Criterion):
    """1/2 h_cc, with h the Hessian of the mean cross-entropy with respect to the units' gates.

    A gate multiplies what the readers of a unit read; it stands at one, and removing the unit takes it to
    zero: the saliency 1/2 h_cc u_c^2 of Optimal Brain Damage with u_c = 1. As there, the diagonal alone
    counts, and the term of first order does not.

    h is the Gauss-Newton matrix, the mean over samples of J^T (diag(p) - p p^T) J with J[k, c] the
    derivative of logit k by gate c and p the softmax of the logits. Its diagonal is the variance of
    J[k, c] over k ~ p. It does not depend on labels, equals the Fisher information of the model's own
    distribution, and is never negative. It differs from the Hessian by the curvature of the logits
    themselves, which is zero wherever the network is piecewise linear in a gate: where a unit's readers
    do not feed each other, between ReLUs, poolings and batch norms in eval mode. (The "empirical Fisher",
    1/2 mean_n S^2 for the loss of the label, would be half of `taylor_fo` and rank the same.)

    diag(p) - p p^T is B B^T with the columns b_k = sqrt(p_k) (e_k - p). Up to `passes` classes every
    column has a backward pass of its own, and the result is exact. With more classes, `passes` random
    combinations B v of columns (v of independent signs) stand for all: the mean of their squares is
    unbiased, its error falls with the root of passes and samples, and it depends on `seed` alone.

    Args:
        passes: backward passes a batch, at most.
        seed: of the signs.

    Source: LeCun, Denker and Solla 1990, Optimal Brain Damage, section 2; Schraudolph 2002, Fast Curvature
    Matrix-Vector Products for Second-Order Gradient Descent, for the Gauss-Newton matrix; Dangel, Kunstner
    and Hennig 2020, BackPACK: Packing more into Backprop, for its diagonal through a factor of the loss's
    Hessian; Hutchinson 1990, A Stochastic Estimator of the Trace, for the random signs.

    Raises:
        InputError: `passes` is no whole number of at least 1.
    """

    reduction = "sq_sample"
    own_reduction = True

    def __init__(self, passes: int = 16, seed: int = 0) -> None:
        if not isinstance(passes, int) or passes < 1:
            raise InputError(f"passes must be a whole number of at least 1, got {passes!r}")
        self.passes, self.seed = passes, seed

    def objectives(
        self, logits: torch.Tensor, labels: torch.Tensor, first: int
    ) -> Iterator[torch.Tensor]:
        """J whose squared S add up to the saliency: sum_k w[k] logits[:, k] with w = B v / sqrt(2)."""
        p = logits.detach().softmax(1)
        samples, classes = p.shape
        root = (p / 2).sqrt()
        if classes <= self.passes:
            for k in range(classes):
                weights = -p * root[:, k, None]
                weights[:, k] += root[:, k]
                yield (weights * logits).sum(1)
            return
        for signs in self._signs(first, samples, classes).to(p).unbind(1):
            v = root * signs / self.passes**0.5
            yield ((v - p * v.sum(1, keepdim=True)) * logits).sum(1)

    def _signs(self, first: int, samples: int, classes: int) -> torch.Tensor:
        """(samples, passes, classes) of -1 and 1; those of a sample don't depend on its batch."""
        bits = np.random.PCG64(self.seed).advance(first * self.passes * classes)
        draws = np.random.Generator(bits).random((samples, self.passes, classes))
        return torch.from_numpy(np.where(draws < 0.5, -1.0, 1.0))
