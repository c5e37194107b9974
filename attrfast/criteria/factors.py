"""Factors on channels, and how they are folded into weights.

A factor stands either where readers take a unit in, or on the output of a layer. Both are linear there,
so a factor of any sign can be folded into the weights next to it, and the model computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from attrfast.errors import ModelError
from attrfast.signatures import CONVOLUTIONS, batch_norm_arguments, bound_arguments, channel_dim
from attrfast.trace import CallMode
from attrfast.units import Units, reader_weights


def of_channels(factors: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """(channels,) factor of each channel: its unit's, and one for a channel of none (differentiable).

    Args:
        factors: (U,).
        row: (channels,) int64, unit of each channel or -1.
    """
    row = row.to(factors.device)
    return torch.where(row >= 0, factors[row.clamp(min=0)], torch.ones_like(factors[:1]))


class scaled(CallMode):  # noqa: N801 - read as a context: `with scaled(...): model(x)`
    """Context in which channels are multiplied by factors. Nothing is written to the model.

    Args:
        model: the whole model.
        inputs: full name of a reader's weight -> (channels,) factors on what it takes in.
        outputs: full name of a layer's weight -> (channels,) or 0-d factors on what it gives out. The
            layers are convolutions, linear layers and batch norms.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor] | None = None,
        outputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        state = _state(model)
        self._inputs = {id(state[name]): factor for name, factor in (inputs or {}).items()}
        self._outputs = {id(state[name]): factor for name, factor in (outputs or {}).items()}

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in CONVOLUTIONS or name == "linear":
            x, weight, *rest = bound_arguments(name, args, kwargs)
            if id(weight) in self._inputs:
                x = _multiplied(x, self._inputs[id(weight)], channel_dim(name, x))
            out = func(x, weight, *rest)
            if id(weight) in self._outputs:
                out = _multiplied(out, self._outputs[id(weight)], channel_dim(name, out))
            return out
        out = func(*args, **kwargs)
        if name == "batch_norm":
            weight = batch_norm_arguments(args, kwargs)[3]
            if id(weight) in self._outputs:
                out = _multiplied(out, self._outputs[id(weight)], 1)
        return out


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by full name: a bare buffer may be a reader's weight as well."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _multiplied(x: torch.Tensor, factors: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [1] * x.dim()
    if factors.dim():
        shape[dim] = len(factors)
    return x * factors.view(shape).to(x.dtype)


def at_readers(model: nn.Module, units: Units, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Full name of every reader's weight -> (channels,) the factors (U,) of what it takes in."""
    return {
        weight: of_channels(factors, units.inputs[name])
        for weight, name in reader_weights(model, units).items()
    }


@torch.no_grad()
def fold_into_readers(model: nn.Module, units: Units, factors: torch.Tensor) -> None:
    """Multiplies the weights that read each unit by the unit's factor, in place.

    Where a factor is zero, nothing reads the unit any more.
    """
    state = _state(model)
    for name, factor in at_readers(model, units, factors).items():
        weight = state[name]
        if bool((factor == 1).all()):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        view = _input_view(owner, weight, factor.to(weight.dtype).to(weight.device))
        # Where a factor is zero the product must be zero, whatever the weight is.
        weight.copy_(torch.where(view == 0, torch.zeros_like(weight), weight * view))


def _input_view(owner: nn.Module, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Factors of a layer's input channels in the shape in which they multiply its weight."""
    rest = [1] * (weight.dim() - 2)
    if not isinstance(owner, nn.modules.conv._ConvNd):
        return factor.view(1, -1, *rest)
    if owner.transposed:  # (in, out / groups, ...)
        return factor.view(-1, 1, *rest)
    # (out, in / groups, ...): the filters of group g read the g-th part of the inputs.
    each = factor.view(owner.groups, -1)
    return each.repeat_interleave(owner.out_channels // owner.groups, dim=0).view(
        owner.out_channels, -1, *rest
    )


@torch.no_grad()
def fold_into_output(layer: nn.Module, factor: torch.Tensor) -> None:
    """Multiplies all that a convolution, linear layer or batch norm gives out by a factor, in place.

    Args:
        layer: with a weight; its bias, if it has one, is multiplied as well.
        factor: 0-d.
    """
    for parameter in (layer.weight, layer.bias):
        if isinstance(parameter, torch.Tensor):
            scale = factor.to(parameter.dtype)
            parameter.copy_(torch.zeros_like(parameter) if float(scale) == 0 else parameter * scale)


def batch_norms(model: nn.Module, units: Units) -> dict[str, torch.Tensor]:
    """Batch norm with scales -> (channels,) the unit of each, for all that belong to a unit."""
    found = {}
    for name, row in units.outputs.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            found[name] = row
    return found


def without_batch_norm(model: nn.Module, units: Units) -> dict[str, str]:
    """Layers with a unit that may go and has no batch norm, by name, and what is missing."""
    covered = torch.tensor([reason is not None for reason in units.frozen], dtype=torch.bool)
    for row in batch_norms(model, units).values():
        covered[row[row >= 0]] = True
    return {
        layer.name: "no batch norm scales its filters"
        for layer in units.layers
        if not bool(covered[list(layer.units)].all())
    }


def require_batch_norms(model: nn.Module, units: Units, criterion: str) -> dict[str, torch.Tensor]:
    """`batch_norms`, where every unit that may go has one.

    Raises:
        ModelError: a layer's filters have none; it is named.
    """
    bare = list(without_batch_norm(model, units))
    if bare:
        more = f" and {len(bare) - 3} more layers" if len(bare) > 3 else ""
        raise ModelError(
            f"the criterion {criterion!r} reads the scales of batch norms, and the filters of "
            f"{', '.join(bare[:3])}{more} have none; score them by another criterion (attrfast.prune "
            f"leaves them whole)"
        )
    return batch_norms(model, units)
