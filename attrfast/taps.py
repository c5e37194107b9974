"""The call tier: every reader's call meets its tap, whoever makes the call.

A `TorchFunctionMode` around the forward pass swaps every parameter for a detached alias, so that no
weight gradient is ever computed, and puts an identity in front of every reader whose backward reduces
activation times gradient. No hook is set and nothing is written to the model. This is the definition of
the score matrix word for word; the graph tier must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from attrfast import ops
from attrfast.convolution import Geometry, each, input_gradient
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.signatures import CONVOLUTIONS, batch_norm_arguments, bound_arguments, channel_dim
from attrfast.stages import relu_ceiling
from attrfast.trace import CallMode, is_inplace


class Tap(torch.autograd.Function):
    """Identity whose backward measures the flow that comes back through it.

    The anchor is a 0-d leaf that every tap hangs on: the gradient of the objective with respect to it
    is what runs all taps, and backward goes no further down than to the first of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,
        matrix: ScoreMatrix,
        columns: Columns,
        dim: int,
        sign: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.tap = matrix, columns, dim, sign
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        (x,) = ctx.saved_tensors
        matrix, columns, dim, sign = ctx.tap
        matrix.add(columns, x, g, dim, sign)
        return (g if ctx.needs_input_grad[0] else None), None, None, None, None, None


class _GuidedReLU(torch.autograd.Function):
    """ReLU or ReLU6 whose backward lets a gradient pass where a > 0 and g > 0.

    Source: Springenberg et al. 2014, Striving for Simplicity, guided backpropagation.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, upper: float, inplace: bool) -> torch.Tensor:
        out = x.clamp_(0.0, upper) if inplace else x.clamp(0.0, upper)
        if inplace:
            ctx.mark_dirty(x)
        ctx.upper = upper
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (out,) = ctx.saved_tensors
        (g,) = grads
        return torch.where((out > 0) & (out < ctx.upper) & (g > 0), g, 0.0), None, None


class _Affine(torch.autograd.Function):
    """Batch norm in eval mode: x * scale + shift, which keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        out: torch.Tensor = ops.affine_relu(x, scale, shift, None, -_INF, _INF)[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (scale,) = ctx.saved_tensors
        return ops.affine_relu(grads[0], scale, None, None, -_INF, _INF)[0], None, None


_INF = float("inf")


def folded_batch_norm(
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of an eval-mode batch norm, in the kernels' compute dtype."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = (var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    return scale, shift if bias is None else shift + bias.to(dtype)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose backward needs the weight alone.

    autograd's own keeps the input as well, which nothing else may want (a depthwise convolution is no
    reader, so no tap keeps it).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.input = x.shape, x.stride()
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        return torch.convolution(
            x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        shape, strides = ctx.input
        return input_gradient(grads[0], weight, shape, strides, ctx.geometry), None, None, None


class TapMode(CallMode):
    """Runs a forward pass with the call tier's taps in it.

    Args:
        model: whose parameters are met by identity.
        readers: id of a reader's weight -> the columns of its inputs.
        matrix: what the taps add to, during the backward pass.
        anchor: what they hang on.
        guided: the guided rule at every ReLU.
    """

    def __init__(
        self,
        model: nn.Module,
        readers: dict[int, Columns],
        matrix: ScoreMatrix,
        anchor: torch.Tensor,
        *,
        guided: bool,
    ) -> None:
        super().__init__()
        self.matrix, self.anchor, self.guided, self.readers = matrix, anchor, guided, readers
        self.frozen = {id(p): p.detach() for p in model.parameters()}

    def _detached(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return self.frozen.get(id(tree), tree)
        if type(tree) in (list, tuple):
            return type(tree)(self._detached(item) for item in tree)
        return tree

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in CONVOLUTIONS or name == "linear":
            return self._reader(func, name, args, kwargs)
        if name == "batch_norm":
            out = self._batch_norm(args, kwargs)
            if out is not None:
                return out
        args = tuple(self._detached(a) for a in args)
        kwargs = {key: self._detached(value) for key, value in kwargs.items()}
        if self.guided:
            upper = relu_ceiling(name, _arguments(args, kwargs))
            x = args[0] if args else kwargs.get("input")
            if upper is not None and isinstance(x, torch.Tensor) and x.requires_grad:
                return _GuidedReLU.apply(x, upper, is_inplace(func, kwargs))
        return func(*args, **kwargs)

    def _reader(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        x, weight, *rest = bound_arguments(name, args, kwargs)
        reader = self.readers.get(id(weight))
        weight, *rest = (self._detached(item) for item in (weight, *rest))
        if reader is not None:
            dim = channel_dim(name, x)
            x = Tap.apply(x, self.anchor, self.matrix, reader, dim, 1.0)
        elif x.requires_grad and name in ("conv1d", "conv2d", "conv3d"):
            out = _frozen_convolution(x, weight, rest, int(name[-2]))
            if out is not None:
                return out
        out = func(x, weight, *rest)
        assert isinstance(out, torch.Tensor)
        return out

    def _batch_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        x, mean, var, weight, bias, training, eps = batch_norm_arguments(args, kwargs)
        if training or mean is None or not x.requires_grad:
            return None
        weight, bias = self._detached(weight), self._detached(bias)
        out = _Affine.apply(x, *folded_batch_norm(mean, var, weight, bias, eps))
        assert isinstance(out, torch.Tensor)
        return out


def _frozen_convolution(
    x: torch.Tensor, weight: torch.Tensor, rest: Sequence[Any], spatial: int
) -> torch.Tensor | None:
    """The convolution that keeps no input, or None for a call that it does not cover."""
    bias, stride, padding, dilation, groups = rest
    if isinstance(padding, str) or x.dim() != spatial + 2 or weight.requires_grad:
        return None
    if torch.is_autocast_enabled(x.device.type) or (bias is not None and bias.requires_grad):
        return None

    geometry = Geometry(
        each(stride, spatial), each(padding, spatial), each(dilation, spatial), int(groups)
    )
    out = _FrozenConvolution.apply(x, weight, bias, geometry)
    assert isinstance(out, torch.Tensor)
    return out


def _arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[int, str, Any], Any]:
    def given(position: int, keyword: str, default: Any) -> Any:
        return args[position] if position < len(args) else kwargs.get(keyword, default)

    return given
