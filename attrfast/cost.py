"""Multiply-adds and parameters: counted on a model, and predicted for a removal before it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attrfast.channels import Discovery
from attrfast.signatures import CONVOLUTIONS
from attrfast.trace import (
    Call,
    Param,
    Ref,
    argument,
    preserved,
    tensors_in,
)


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    Attributes:
        macs: multiply-adds of convolutions and matrix products, by torch's flop counter (two flops each).
        params: number of parameters.
    """

    macs: int
    params: int


def cost(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Cost:
    """Counts one eval-mode forward pass.

    Args:
        model: left as it is.
        args, kwargs: inputs (samples, ...); the count is divided by the number of samples.
    """
    samples = next(tensors_in((tuple(args), kwargs or {}))).shape[0]
    with preserved(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()
        model(*args, **(kwargs or {}))
    return Cost(counter.get_total_flops() // (2 * samples), _params(model))


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class _Product:
    """A call whose multiply-adds are `each` * inputs left * outputs left."""

    each: float
    inputs: torch.Tensor  # (channels,) int64 unit, -1 for none; one entry of -1 where nothing changes
    outputs: torch.Tensor


class CostModel:
    """Predicts the cost of a model after units are removed, without removing them.

    Args:
        model: the whole model.
        found: its units and its recorded pass.
        base: its cost.
    """

    def __init__(self, model: nn.Module, found: Discovery, base: Cost) -> None:
        self._units = found.units
        self._modules = dict(model.named_modules())
        samples = found.record.samples
        products = [self._product(call, found, samples) for call in found.record.calls]
        self._macs = [p for p in products if p is not None]
        self._params = self._parameter_products()
        whole = torch.zeros(len(found.units), dtype=torch.bool)
        # Whatever no removal changes: what was counted, less what is predicted for the whole model.
        self._rest = Cost(
            base.macs - _total(self._macs, whole), base.params - _total(self._params, whole)
        )

    def after(self, removed: torch.Tensor) -> Cost:
        """The cost without the units where `removed` (U,) is true."""
        return Cost(
            self._rest.macs + _total(self._macs, removed),
            self._rest.params + _total(self._params, removed),
        )

    def _rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Units of a layer's inputs and outputs."""
        module = self._modules[name]
        if isinstance(module, nn.Linear):
            width_in, width_out = module.in_features, module.out_features
        else:
            assert isinstance(module, nn.modules.conv._ConvNd)
            width_in, width_out = module.in_channels, module.out_channels
        none_in = torch.full((width_in,), -1, dtype=torch.int64)
        none_out = torch.full((width_out,), -1, dtype=torch.int64)
        outputs = self._units.outputs.get(name, none_out)
        if name in self._units.depthwise:
            return torch.full((1,), -1, dtype=torch.int64), outputs
        return self._units.inputs.get(name, none_in), outputs

    def _product(self, call: Call, found: Discovery, samples: int) -> _Product | None:
        if call.name not in CONVOLUTIONS and call.name != "linear":
            return None
        source, weight = argument(call, 0, "input"), argument(call, 1, "weight")
        if not isinstance(weight, Param) or not isinstance(source, Ref):
            return None
        name = weight.name.removesuffix(".weight")
        module = self._modules.get(name)
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            return None
        shape = found.record.shapes[source.value if "transpose" in call.name else call.outputs[0]]
        if isinstance(module, nn.Linear):
            each = float(shape[:-1].numel())
        else:
            spatial = int(call.name[-2])
            each = float(shape[-spatial:].numel() * shape[: -spatial - 1].numel())
            each *= float(torch.Size(module.kernel_size).numel())
            if name not in self._units.depthwise:
                each /= module.groups
        return _Product(each / samples, *self._rows(name))

    def _parameter_products(self) -> list[_Product]:
        out = []
        one = torch.full((1,), -1, dtype=torch.int64)
        seen = set(self._units.inputs) | set(self._units.outputs)
        for name in seen:
            module = self._modules.get(name)
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                inputs, outputs = self._rows(name)
                each = 1.0
                if isinstance(module, nn.modules.conv._ConvNd):
                    each = float(torch.Size(module.kernel_size).numel())
                    if name not in self._units.depthwise:
                        each /= module.groups
                out.append(_Product(each, inputs, outputs))
                if module.bias is not None:
                    out.append(_Product(1.0, one, outputs))
            elif module is not None:
                count = sum(p.numel() > 1 for p in module.parameters(recurse=False))
                out.append(_Product(float(count), one, self._units.outputs[name]))
        return out


def _total(products: Sequence[_Product], removed: torch.Tensor) -> int:
    return round(sum(p.each * _left(p.inputs, removed) * _left(p.outputs, removed) for p in products))


def _left(row: torch.Tensor, removed: torch.Tensor) -> int:
    return int((~((row >= 0) & removed[row.clamp(min=0)])).sum())
