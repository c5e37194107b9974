"""The objective J of a pass: always a sum over samples, never a mean.

A criterion gives one value a sample. A user's `loss_fn` may give one value a sample, or their sum, or
their mean as torch's losses do; which of the three it is is found out on the first batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attrfast.batches import Batch, check_labels, main_output
from attrfast.criteria import Criterion
from attrfast.errors import AttrfastError, InputError, NoGradientError
from attrfast.rows import rows

LossFunction = Callable[[Any, Any], torch.Tensor]


class Loss:
    """A user's loss as a sum over samples.

    Args:
        loss_fn: called as `loss_fn(output, batch)`; a `torch.nn` loss module as
            `loss_fn(main output, labels)`. Returns one value a sample, or their sum or mean.
    """

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn = loss_fn
        self._kind: str | None = None  # of a scalar loss: "mean" or "sum"

    def __call__(self, output: Any, batch: Any, labels: Any, samples: int) -> torch.Tensor:
        """0-d, differentiable where the loss is.

        Raises:
            InputError: the loss is neither one value a sample nor their mean or sum.
        """
        values = _call(self.loss_fn, output, batch, labels)
        if values.dim() == 0:
            return values * self._scale(values, output, batch, labels, samples)
        if values.shape[0] != samples:
            raise InputError(
                f"loss_fn returned a tensor of shape {tuple(values.shape)} for {samples} samples; "
                f"return one value a sample, or their mean or sum"
            )
        return values.sum()

    def _scale(self, value: torch.Tensor, output: Any, batch: Any, labels: Any, samples: int) -> float:
        """What turns a scalar loss into a sum over samples: 1 or the number of samples."""
        if self._kind is None and samples > 1:
            first = samples // 2
            parts = []
            with torch.no_grad():
                for start, stop in ((0, first), (first, samples)):
                    one = (rows(tree, samples, start, stop) for tree in (output, batch, labels))
                    parts.append(float(_call(self.loss_fn, *one)))
            whole = float(value.detach())
            mean = (first * parts[0] + (samples - first) * parts[1]) / samples
            error = {"mean": abs(whole - mean), "sum": abs(whole - sum(parts))}
            size = max(abs(whole), *map(abs, parts))
            kind = min(error, key=lambda k: error[k])
            if error[kind] > 1e-3 * size:
                raise InputError(
                    f"loss_fn returned one number, {whole:g}, which is neither the mean ({mean:g}) "
                    f"nor the sum ({sum(parts):g}) of its values on the two halves of the batch; "
                    f"return one value a sample (in torch's losses: reduction='none')"
                )
            if size > 0:
                self._kind = kind
        return float(samples) if self._kind == "mean" else 1.0


class Objective:
    """J of one batch, from the model's output.

    Args:
        criterion: whose objectives are differentiated.
        loss_fn: takes the objective's place where the criterion measures a loss.
    """

    def __init__(self, criterion: Criterion, loss_fn: LossFunction | None) -> None:
        self.criterion = criterion
        self.loss = Loss(loss_fn) if loss_fn is not None and criterion.uses_loss else None

    def __call__(self, output: Any, batch: Batch, first: int) -> list[torch.Tensor]:
        """Every J of the criterion (most have one), summed over the batch's samples.

        Args:
            first: number of the batch's first sample in the whole pass.

        Returns:
            0-d tensors, float32 or float64.

        Raises:
            InputError: the output is no matrix of logits, or a label is outside it.
            NoGradientError: an objective is not differentiable.
        """
        if self.loss is not None:
            loss = self.loss(output, batch.raw, batch.labels, batch.samples)
            totals = [loss * self.criterion.loss_sign]
        else:
            logits = main_output(output)
            check_labels(batch, logits)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            totals = [
                self._summed(values, batch.samples)
                for values in self._values(logits.to(dtype), batch.labels.long(), first)
            ]
        if not all(total.requires_grad for total in totals):
            raise NoGradientError(
                "the objective has no gradient: no differentiable path leads from a convolution to "
                "the model's output; look for torch.no_grad() or .detach() in forward, or in the loss"
            )
        return [total.to(torch.promote_types(total.dtype, torch.float32)) for total in totals]

    def _summed(self, values: torch.Tensor, samples: int) -> torch.Tensor:
        if values.shape != (samples,):
            raise InputError(
                f"the objective of {self.criterion.name!r} returned shape {tuple(values.shape)} "
                f"for {samples} samples; return one value a sample"
            )
        return values.sum()

    def _values(self, logits: torch.Tensor, labels: torch.Tensor, first: int) -> list[torch.Tensor]:
        try:
            return list(self.criterion.objectives(logits, labels, first))
        except AttrfastError:
            raise
        except Exception as error:
            raise AttrfastError(
                f"the objective of the criterion {self.criterion.name!r} raised "
                f"{type(error).__name__}: {error}"
            ) from error


def _call(loss_fn: LossFunction, output: Any, batch: Any, labels: Any) -> torch.Tensor:
    try:
        if isinstance(loss_fn, nn.modules.loss._Loss):
            value = loss_fn(main_output(output), labels)
        else:
            value = loss_fn(output, batch)
    except AttrfastError:
        raise
    except Exception as error:
        raise AttrfastError(
            f"your loss_fn raised {type(error).__name__}: {error}; it is called as "
            f"loss_fn(output, batch)"
        ) from error
    if not isinstance(value, torch.Tensor):
        raise InputError(f"loss_fn returned {type(value).__name__}; it must return a tensor")
    return value
