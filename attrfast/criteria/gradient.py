"""The criteria that read activations and gradients.

Source of `Taylor`: Molchanov et al. 2016; of `TaylorFO`: Molchanov et al. 2019. `TaylorGuided` and
`Attribution` are our reconstruction, from its public abstract, of the paper "Convolution network pruning
based on the evaluation of the importance of characteristic attributions", Scientia Sinica Informationis
2021(1):13-26, doi 10.1360/SSI-2020-0186, whose full formulas are not public.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from attrfast.criteria.base import Criterion, register_criterion
from attrfast.errors import InputError


@register_criterion("taylor")
class Taylor(Criterion):
    """mean_n abs(S[n, c]) for the cross-entropy, or for the user's loss.

    Source: Molchanov et al. 2016, Pruning Convolutional Neural Networks for Resource Efficient
    Inference, in the form for feature maps.
    """

    uses_loss = True

    def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")


@register_criterion("taylor_guided")
class TaylorGuided(Criterion):
    """mean_n abs(S[n, c]) for the log-probability of the labelled class, with guided gradients.

    J is minus the cross-entropy (or minus the user's loss), because the rule g > 0 then keeps what
    supports the class. Our reconstruction, with Springenberg et al. 2014 for the guided rule.
    """

    guided = True
    uses_loss = True
    loss_sign = -1.0

    def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -functional.cross_entropy(logits, labels, reduction="none")


@register_criterion("attribution")
class Attribution(Criterion):
    """mean_n abs(S[n, c]) for the logit of one class: the part of the decision a unit carries.

    Args:
        target: `"label"` (default), `"predicted"` (the largest logit), or a callable
            `(logits (N, K), labels (N,)) -> (N,)` that gives J itself.

    Our reconstruction, with Selvaraju et al. 2017 (Grad-CAM) for gradients of a logit.
    """

    def __init__(
        self,
        target: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "label",
    ) -> None:
        if target not in ("label", "predicted") and not callable(target):
            raise InputError(
                f"target must be 'label', 'predicted' or a callable (logits, labels) -> (N,), "
                f"got {target!r}"
            )
        self.target = target

    def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if callable(self.target):
            return self.target(logits, labels)
        chosen = labels if self.target == "label" else logits.detach().argmax(1)
        return logits.gather(1, chosen[:, None]).squeeze(1)


@register_criterion("taylor_fo")
class TaylorFO(Taylor):
    """mean_n S[n, c]^2 for the cross-entropy, or for the user's loss.

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, eq. 8, on feature
    maps (its gates).
    """

    reduction = "sq_sample"
