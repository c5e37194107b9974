"""Cuts units out of a model, for real.

torch-pruning's layer pruners do the cutting; which channels go where comes from `attrfast.units`. Must
not know why a unit goes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from attrfast.errors import ModelError
from attrfast.masking import masked
from attrfast.trace import preserved, tensors_in
from attrfast.units import Units

log = logging.getLogger(__name__)


def cut(model: nn.Module, units: Units, removed: torch.Tensor) -> None:
    """Removes units from a model, in place.

    Args:
        model: whose layers become narrower; values, dtypes, devices and `requires_grad` of what is left
            stay, gradients are dropped.
        units: the model's units.
        removed: (U,) bool.

    Raises:
        ModelError: a unit that cannot be removed is among them, or a layer would be left empty.
    """
    _refuse(units, removed)
    modules = dict(model.named_modules())
    for name, row in units.outputs.items():
        gone = _gone(row, removed)
        if gone:
            _cut_outputs(modules[name], gone, name in units.depthwise)
    for name, row in units.inputs.items():
        gone = _gone(row, removed)
        if gone:
            _cut_inputs(modules[name], gone)


def _gone(row: torch.Tensor, removed: torch.Tensor) -> list[int]:
    """Channels whose unit is removed."""
    return torch.nonzero((row >= 0) & removed[row.clamp(min=0)]).flatten().tolist()


def _refuse(units: Units, removed: torch.Tensor) -> None:
    for unit in torch.nonzero(removed).flatten().tolist():
        reason = units.frozen[unit]
        if reason is not None:
            layer = units.layers[int(units.layer_of[unit])].name
            raise ModelError(f"a filter of {layer} can't be removed: {reason}")
    for name, row in units.filters.items():
        if len(_gone(row, removed)) == len(row):
            raise ModelError(f"{name} would lose all of its {len(row)} filters")


def _cut_outputs(module: nn.Module, gone: list[int], depthwise: bool) -> None:
    before = _flags(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        if depthwise and (module.transposed or module.out_channels > module.groups):
            _narrow_depthwise(module, gone)
        elif depthwise:
            tp.prune_depthwise_conv_out_channels(module, gone)
        elif module.transposed and module.groups > 1:
            # torch-pruning takes its groups for those of an ordinary convolution.
            _narrow_transposed(module, gone)
        else:
            tp.prune_conv_out_channels(module, gone)
    elif isinstance(module, nn.Linear):
        tp.prune_linear_out_channels(module, gone)
    elif isinstance(module, nn.PReLU):
        tp.prune_prelu_out_channels(module, gone)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        # Instance norms too: torch-pruning's own pruner for them leaves their statistics whole.
        tp.prune_batchnorm_out_channels(module, gone)
    else:
        raise ModelError(f"attrfast cannot cut channels out of a {type(module).__name__}")
    _restore(module, before)


def _cut_inputs(module: nn.Module, gone: list[int]) -> None:
    before = _flags(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed and module.groups > 1:
            keep = sorted(set(range(module.in_channels)) - set(gone))
            _select(module, "weight", keep, 0)
            module.in_channels = len(keep)
        else:
            tp.prune_conv_in_channels(module, gone)
    elif isinstance(module, nn.Linear):
        tp.prune_linear_in_channels(module, gone)
    else:
        raise ModelError(f"attrfast cannot cut inputs off a {type(module).__name__}")
    _restore(module, before)


def _narrow_depthwise(module: nn.modules.conv._ConvNd, gone: list[int]) -> None:
    """A channel and all the filters that read it go together, which torch-pruning does not know."""
    keep = sorted(set(range(module.out_channels)) - set(gone))
    each = module.out_channels // module.groups
    channels = sorted({index // each for index in keep})
    _select(module, "weight", channels if module.transposed else keep, 0)
    if module.bias is not None:
        _select(module, "bias", keep, 0)
    module.out_channels = len(keep)
    module.in_channels = module.groups = len(channels)


def _narrow_transposed(module: nn.modules.conv._ConvNd, gone: list[int]) -> None:
    """Every group loses the same places, so those of the first say which columns stay."""
    keep = sorted(set(range(module.out_channels)) - set(gone))
    _select(module, "weight", keep[: len(keep) // module.groups], 1)
    if module.bias is not None:
        _select(module, "bias", keep, 0)
    module.out_channels = len(keep)


def _select(module: nn.Module, name: str, keep: list[int], dim: int) -> None:
    old = getattr(module, name)
    index = torch.tensor(keep, device=old.device)
    setattr(module, name, nn.Parameter(old.detach().index_select(dim, index)))


def _flags(module: nn.Module) -> dict[str, tuple[bool, torch.memory_format | None]]:
    """What torch-pruning's new parameters forget."""
    for parameter in module.parameters(recurse=False):
        parameter.grad = None
    return {name: (p.requires_grad, _format(p)) for name, p in module.named_parameters(recurse=False)}


def _format(x: torch.Tensor) -> torch.memory_format | None:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return None
    return last


def _restore(module: nn.Module, before: dict[str, tuple[bool, torch.memory_format | None]]) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        flag, form = before[name]
        if form is not None:
            parameter.data = parameter.data.contiguous(memory_format=form)
        parameter.requires_grad_(flag)


def without(
    model: nn.Module,
    inputs: Iterable[tuple[Sequence[Any], dict[str, Any]]],
    units: Units,
    removed: torch.Tensor,
) -> nn.Module:
    """A copy of the model without the removed units, checked to compute what the masked model computes.

    Args:
        model: left as it is.
        inputs: inputs and keyword inputs on which the two are compared, on the model's device.
        units: the model's units.
        removed: (U,) bool.

    Raises:
        ModelError: a unit cannot be removed, or the smaller model computes something else.
    """
    smaller = copy.deepcopy(model)
    cut(smaller, units, removed)
    computes_the_same(smaller, model, inputs, masked(model, units, removed))
    return smaller


def computes_the_same(
    smaller: nn.Module,
    model: nn.Module,
    inputs: Iterable[tuple[Sequence[Any], dict[str, Any]]],
    context: contextlib.AbstractContextManager[Any] | None = None,
) -> None:
    """Compares a smaller model with the one that it came from, in eval mode; both are left as they are.

    Args:
        inputs: inputs and keyword inputs, on the models' device.
        context: may be entered again and again; the larger model runs in it.

    Raises:
        ModelError: the smaller model does not run, or its outputs differ.
    """
    with preserved(model), preserved(smaller), torch.no_grad():
        model.eval()
        smaller.eval()
        for args, kwargs in inputs:
            with context or contextlib.nullcontext():
                expected = list(tensors_in(model(*args, **kwargs)))
            try:
                got = list(tensors_in(smaller(*args, **kwargs)))
            except RuntimeError as error:
                raise ModelError(f"the smaller model does not run: {error}") from error
            if len(got) != len(expected) or any(map(_differ, got, expected)):
                raise ModelError(
                    f"the smaller model computes something else than the masked one (off by "
                    f"{_worst(got, expected):.3g})"
                )


def _worst(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference, or infinity where shapes differ."""
    if [a.shape for a in got] != [b.shape for b in expected]:
        return float("inf")
    pairs = zip(got, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return not torch.equal(a, b)
    # Rounding differs with the widths; a wrong cut is off by the size of the outputs themselves.
    slack = {torch.float64: 1e-8, torch.float32: 2e-3}.get(a.dtype, 5e-2)
    size = max(float(b.abs().max()), 1e-30) if b.numel() else 0.0
    return not torch.allclose(a, b, rtol=slack, atol=slack * size, equal_nan=True)
