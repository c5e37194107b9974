"""What a criterion that trains is: options, and hooks into ordinary training.

`prune` trains the current model with the hooks of `TrainedCriterion.begin` in place, and ranks by what
`Phase.finish` gives. Must not know how the loop over batches is written, nor what is removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from attrfast.criteria.base import Criterion
from attrfast.errors import InputError
from attrfast.residual import ResidualBranch
from attrfast.units import Units


@dataclass(frozen=True)
class Trainee:
    """What a phase of training works on.

    Attributes:
        model: changed in place, on its device.
        units: its units; those that must stay are frozen.
        branches: residual branches that may go as a whole.
        samples: counts the samples of the loader, in one pass over it.
    """

    model: nn.Module
    units: Units
    branches: Sequence[ResidualBranch]
    samples: Callable[[], int]

    @property
    def free(self) -> torch.Tensor:
        """(U,) bool, the units that may go."""
        return torch.tensor([reason is None for reason in self.units.frozen], dtype=torch.bool)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of factors: at least float32."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)


@dataclass(frozen=True)
class Learnt:
    """What a phase of training found.

    Attributes:
        importance: (U,) float64 on the CPU. A unit of exactly zero computes nothing: no reader reads it.
        idle: residual branches that add nothing but zeros.
    """

    importance: torch.Tensor
    idle: tuple[ResidualBranch, ...] = ()


class Phase:
    """Hooks into training, one object a phase. This one does nothing, and finds nothing."""

    parameters: tuple[nn.Parameter, ...] = ()  # trained by the optimizer besides the model's own

    def around_forward(self) -> contextlib.AbstractContextManager[Any]:
        """Context of every forward pass."""
        return contextlib.nullcontext()

    def penalty(self) -> torch.Tensor | None:
        """0-d, added to the mean loss of every batch."""
        return None

    def after_backward(self) -> None:
        """Gradients are there, and the optimizer has not stepped yet."""

    def after_step(self, lr: float) -> None:
        """The optimizer has stepped, with this learning rate."""

    def after_epoch(self) -> None:
        """All batches were seen once more."""

    def finish(self) -> Learnt:
        """Puts what was learnt beside the weights into them, so that the model alone computes the same."""
        raise NotImplementedError

    def close(self) -> None:
        """Called in any case at the end, also after an error."""


@dataclass
class TrainedCriterion(Criterion):
    """Base class of criteria that train, with the options of their training.

    Args:
        epochs: passes over the loader in each step of pruning.
        lr: learning rate at the start of each step.
        momentum: of SGD (Nesterov).
        weight_decay: of the weights.
        schedule: `"cosine"` (to 0), `"constant"` or `"onecycle"`.

    Raises:
        InputError: an option is not usable.
    """

    epochs: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"

    needs_data = False
    trains = True
    # Whether importance can be compared within a layer alone, so that `prune` normalises it.
    per_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise InputError(f"epochs must be a whole number of at least 1, got {self.epochs!r}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must lie in [0, 1), got {self.momentum!r}")
        if not self.lr > 0:
            raise InputError(f"lr must be above 0, got {self.lr!r}")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if self.schedule not in ("cosine", "constant", "onecycle"):
            raise InputError(
                f"schedule must be 'cosine', 'constant' or 'onecycle', got {self.schedule!r}"
            )

    def unscorable(self, model: nn.Module, units: Units) -> Mapping[str, str]:
        """Layers that this criterion has no score for, by name, and why; `prune` leaves them whole."""
        return {}

    def begin(self, trainee: Trainee) -> Phase:
        """Prepares a model for training.

        Raises:
            ModelError: a layer can't be trained by this criterion; it is named.
        """
        raise NotImplementedError(f"the criterion {self.name!r} defines no training")

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        """Refuses: what such a criterion measures is there only after its training."""
        raise InputError(
            f"the criterion {self.name!r} gets its scores by training the model, which attribute leaves "
            f"as it is; use attrfast.prune(model, loader, criterion={self.name!r})"
        )

    def check_positive(self, *names: str) -> None:
        """Raises InputError unless the options of these names are above 0."""
        for name in names:
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"{name} must be above 0, got {value!r}")
