"""The scores as design says what they are, computed slowly and by other means than attrfast's own.

Gates of ones stand on every reader's input, one for each sample and channel; float64 autograd gives
their gradients. Gates are set by module hooks on a copy of the model, so this serves networks whose
convolutions and linear layers are modules.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from attrfast.units import Units

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def logit_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits[torch.arange(len(labels)), labels].sum()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(1)[torch.arange(len(labels)), labels].sum()


# Criterion -> objective, whether ReLUs are guided, and the reduction of S (N, U) to (U,).
CRITERIA: dict[str, tuple[Objective, bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "taylor": (cross_entropy, False, lambda s: s.abs().mean(0)),
    "taylor_guided": (log_probability, True, lambda s: s.abs().mean(0)),
    "attribution": (logit_of_label, False, lambda s: s.abs().mean(0)),
    "taylor_fo": (cross_entropy, False, lambda s: s.square().mean(0)),
}


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, upper: float) -> torch.Tensor:
        ctx.save_for_backward((x > 0) & (x < upper))
        return x.clamp(0, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return torch.where(inside & (grads[0] > 0), grads[0], 0), None


def guided_relus() -> contextlib.AbstractContextManager[None]:
    return replaced_relus(_GuidedReLU.apply)


@contextlib.contextmanager
def replaced_relus(function: Callable[[torch.Tensor, float], torch.Tensor]) -> Iterator[None]:
    """Every spelling of ReLU, and ReLU6, calls `function(x, ceiling)`; none works in place."""

    def relu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return function(x, float("inf"))

    def relu6(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return function(x, 6.0)

    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            *((functional, n) for n in ("relu", "relu_")),
            *((torch, n) for n in ("relu", "relu_")),
            *((torch.Tensor, n) for n in ("relu", "relu_")),
        ):
            patch.setattr(place, name, relu)
        patch.setattr(functional, "relu6", relu6)
        patch.setattr(nn.ReLU6, "forward", lambda self, x: relu6(x))
        yield


def score_matrix(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    labels: torch.Tensor,
    units: Units,
    objective: Objective,
    *,
    guided: bool = False,
) -> torch.Tensor:
    """S (N, U) in float64.

    Args:
        model: in any state; a copy in float64 and eval mode is used.
        inputs: positional inputs (N, ...).
        labels: (N,).
        units: which channels of which reader belong to which unit.
        objective: of the first output and the labels, summed over samples.
        guided: at every ReLU, gradients pass only where they are positive.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    gates: list[tuple[torch.Tensor, torch.Tensor]] = []
    modules = dict(model.named_modules())
    for name, row in units.inputs.items():
        module = modules[name]
        dim = -1 if isinstance(module, nn.Linear) else 1

        def hook(_: nn.Module, args: tuple[Any, ...], row: torch.Tensor = row, dim: int = dim) -> Any:
            x = args[0]
            shape = [1] * x.dim()
            shape[0], shape[dim] = x.shape[0], len(row)
            gate = torch.ones(shape, dtype=torch.float64, requires_grad=True)
            gates.append((gate, row))
            return (x * gate, *args[1:])

        module.register_forward_pre_hook(hook)
    with guided_relus() if guided else contextlib.nullcontext():
        output = model(*(x.double() for x in inputs))
    while not isinstance(output, torch.Tensor):
        output = output[0]
    grads = torch.autograd.grad(objective(output, labels), [g for g, _ in gates], allow_unused=True)
    total = torch.zeros(len(labels), len(units) + 1, dtype=torch.float64)
    for (gate, row), grad in zip(gates, grads, strict=True):
        if grad is not None:
            index = torch.where(row < 0, len(units), row)
            total.index_add_(1, index, grad.reshape(gate.shape[0], len(row)))
    return total[:, :-1]


def map_means(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    units: Units,
    relus: Sequence[str | None],
    statistic: Callable[[np.ndarray[Any, Any]], float],
) -> torch.Tensor:
    """(N, U) in float64: a statistic of single feature maps, averaged over the maps of each unit.

    Args:
        relus: for every call of a ReLU, in order, the convolution whose filters its output's channels
            belong to; None where they belong to no convolution. Units that none of them names are
            measured at the inputs of their readers.
        statistic: of one map, an array with as many dimensions as there are positions.
    """
    model = copy.deepcopy(model).double().eval()
    outputs: list[torch.Tensor] = []
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def relu(x: torch.Tensor, ceiling: float) -> torch.Tensor:
        outputs.append(x.clamp(0, ceiling))
        return outputs[-1]

    for name, row in units.inputs.items():
        module = model.get_submodule(name)

        def hook(module: nn.Module, args: tuple[Any, ...], row: torch.Tensor = row) -> None:
            dim = -1 if isinstance(module, nn.Linear) else 1
            read.append((args[0].movedim(dim, 1), row))

        module.register_forward_pre_hook(hook)
    with torch.no_grad(), replaced_relus(relu):
        model(*(x.double() for x in inputs))
    assert len(outputs) == len(relus)
    made = [(x, units.filters[name]) for x, name in zip(outputs, relus, strict=True) if name is not None]
    samples = len(inputs[0])
    total = torch.zeros(samples, len(units), dtype=torch.float64)
    count = torch.zeros(len(units), dtype=torch.float64)
    for places in (made, read):
        done = count > 0
        for x, row in places:
            for channel, unit in enumerate(row.tolist()):
                if unit >= 0 and not done[unit]:
                    count[unit] += 1
                    for n in range(samples):
                        total[n, unit] += statistic(x[n, channel].numpy())
    return total / count.clamp(min=1)


def gated_logits(
    model: nn.Module, inputs: Sequence[torch.Tensor], units: Units
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits (N, K) in float64 as a function of the units' gates (U,), which are one in the model."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    gates = [torch.ones(0)]
    for name, row in units.inputs.items():
        module = model.get_submodule(name)

        def hook(module: nn.Module, args: tuple[Any, ...], row: torch.Tensor = row) -> Any:
            each = torch.where(row >= 0, gates[0][row.clamp(min=0)], 1.0)
            positions = 0 if isinstance(module, nn.Linear) else args[0].dim() - 2
            return (args[0] * each.view(-1, *[1] * positions), *args[1:])

        module.register_forward_pre_hook(hook)

    def logits(gate: torch.Tensor) -> torch.Tensor:
        gates[0] = gate
        output = model(*(x.double() for x in inputs))
        return output if isinstance(output, torch.Tensor) else output[0]

    return logits


def importance(
    matrix: torch.Tensor, units: Units, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """(U,): the reduced matrix, each layer divided by its Euclidean norm."""
    raw = reduce(matrix)
    out = torch.zeros_like(raw)
    for layer in units.layers:
        members = list(layer.units)
        norm = raw[members].square().sum().sqrt()
        if norm > 0:
            out[members] = raw[members] / norm
    return out


def layer_error(got: torch.Tensor, expected: torch.Tensor, units: Units) -> float:
    """Largest difference, relative to its layer's norm (0 / 0 counts as 0)."""
    worst = 0.0
    for layer in units.layers:
        members = list(layer.units)
        norm = float(expected[members].double().norm())
        error = float((got[members].double() - expected[members].double()).abs().max())
        worst = max(worst, error / norm if norm > 0 else (0.0 if error == 0 else float("inf")))
    return worst
