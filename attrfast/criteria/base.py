"""What a criterion is, and the registry that users add theirs to.

A criterion must not know how S is measured, nor what is done with the importance.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from attrfast.errors import InputError
from attrfast.units import Units

if TYPE_CHECKING:
    from attrfast.batches import Batch
    from attrfast.channels import Discovery


class OwnPass(Protocol):
    """An importance that is measured otherwise than by S, batch by batch.

    One that adds up a tensor `total` and makes its importance of that and `samples` alone can be measured
    by several processes, which put the sums over all into both.

    Attributes:
        samples: how many were added.
    """

    samples: int

    def add(self, batch: Batch) -> None:
        """Takes up one batch, on the model's device."""

    def importance(self) -> torch.Tensor:
        """(U,) float64 on the CPU, called once after the last batch."""


class Criterion:
    """Base class: one importance a unit, from data and gradients.

    A subclass defines `objective` and is scored by S[n, c], the first-order effect on J[n] of removing
    unit c. One that needs no data sets `needs_data = False` and defines `from_weights` instead; one that
    is measured in another way than by S defines `own_pass`.

        @attrfast.register_criterion("margin")
        class Margin(attrfast.Criterion):
            def objective(self, logits, labels):
                top2 = logits.topk(2, dim=1).values
                return top2[:, 0] - top2[:, 1]

    Attributes:
        name: set by `register_criterion`.
        needs_data: whether a pass over the data is made.
        guided: whether gradients pass a ReLU only where they are positive (Springenberg et al. 2014).
        reduction: name of the default reduction, see `attrfast.criteria.reductions`.
        own_reduction: whether its formula holds with that reduction alone.
        uses_loss: whether a user's `loss_fn` takes the place of `objective`.
        trains: whether `prune` trains the model by this criterion before every ranking, see
            `attrfast.criteria.trained`.
    """

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True
    guided: ClassVar[bool] = False
    reduction: ClassVar[str] = "abs_sample"
    own_reduction: ClassVar[bool] = False
    uses_loss: ClassVar[bool] = False
    loss_sign: ClassVar[float] = 1.0
    trains: bool = False

    def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """J of every sample.

        Args:
            logits: (N, K) the model's main output, in the model's dtype.
            labels: (N,) int64.

        Returns:
            (N,), differentiable; its sum over samples is what is differentiated.
        """
        raise NotImplementedError(f"the criterion {self.name!r} defines no objective")

    def own_pass(
        self,
        model: nn.Module,
        found: Discovery,
        *,
        objective: Callable[[Any, Batch], torch.Tensor],
        forward: Callable[[Batch], Any],
        seed: int,
        progress: bool,
    ) -> OwnPass | None:
        """What takes up the batches in place of S; None (the default) for a criterion that S is for.

        Args:
            model: in eval mode, to be left bit-identical.
            found: its units, and a recorded forward pass.
            objective: (the model's output, batch) -> J or the user's loss, 0-d, summed over samples.
            forward: runs the model on a batch, under autocast where that was asked for.
            seed: of whatever is random.
            progress: whether to show a bar.
        """
        return None

    def objectives(
        self, logits: torch.Tensor, labels: torch.Tensor, first: int
    ) -> Iterable[torch.Tensor]:
        """Several J of every sample, for a criterion that needs more than one.

        Each takes a backward pass of its own through the same forward pass; what the reduction makes of
        their S is added up.

        Args:
            logits, labels: as of `objective`.
            first: number of the batch's first sample in the whole pass. A criterion that draws random
                numbers for a sample draws them by this, so that splitting a batch changes nothing.

        Returns:
            any number of (N,), as of `objective`.
        """
        return (self.objective(logits, labels),)

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        """Importance (U,) float64 of every unit from the model alone; read when `needs_data` is False."""
        raise NotImplementedError(f"the criterion {self.name!r} reads no weights")


def has_own_pass(criterion: Criterion) -> bool:
    """Whether a criterion measures in another way than by S.

    Args:
        criterion: any.
    """
    return type(criterion).own_pass is not Criterion.own_pass


def same_objective(a: Criterion, b: Criterion) -> bool:
    """Whether two criteria differ in their reduction alone, and can share S.

    Args:
        a, b: the criteria.
    """
    left, right = _traits(a), _traits(b)
    return left.keys() == right.keys() and all(left[key] is right[key] for key in left)


def _traits(criterion: Criterion) -> dict[str, object]:
    """All that a criterion is made of, except its name and what is done with S."""
    return {
        key: inspect.getattr_static(criterion, key)
        for key in dir(criterion)
        if not key.startswith("__") and key not in ("name", "reduction", "own_reduction")
    }


_REGISTRY: dict[str, type[Criterion]] = {}


def register_criterion(name: str) -> Callable[[type[Criterion]], type[Criterion]]:
    """Class decorator: makes a criterion known by `name` to `attribute` and `prune`.

    Args:
        name: what it is asked for by.

    Raises:
        InputError: the name is taken by another class, or the class is no `Criterion`.
    """

    def add(cls: type[Criterion]) -> type[Criterion]:
        if not (isinstance(cls, type) and issubclass(cls, Criterion)):
            raise InputError(f"register_criterion needs a subclass of attrfast.Criterion, got {cls!r}")
        taken = _REGISTRY.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise InputError(
                f"the criterion name {name!r} is taken by {taken.__qualname__}; choose another"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def criterion_names() -> tuple[str, ...]:
    """Names of all criteria, built-in first."""
    return tuple(_REGISTRY)


def get_criterion(criterion: str | Criterion | type[Criterion]) -> Criterion:
    """The criterion of that name; an instance or a class is taken as it is.

    Args:
        criterion: a name, a `Criterion`, or a subclass that is made without arguments.

    Raises:
        InputError: no criterion has that name; the message suggests the nearest.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, type) and issubclass(criterion, Criterion):
        return criterion()
    if not isinstance(criterion, str):
        raise InputError(
            f"criterion must be a name or an attrfast.Criterion, got {type(criterion).__name__}"
        )
    found = _REGISTRY.get(criterion)
    if found is None:
        near = difflib.get_close_matches(criterion.lower(), _REGISTRY, n=1, cutoff=0.0)
        raise InputError(
            f"unknown criterion {criterion!r}; did you mean {near[0]!r}? Known: {', '.join(_REGISTRY)}"
        )
    return found()
