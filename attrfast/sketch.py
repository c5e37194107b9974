"""What calls would make, in shape and layout alone: a pass that is only to be recorded needs no more.

Products are left out and their results are zero; calls that cost little run on those. A call that may look at
values, to choose a way or a size, asks for the real pass. Must not know what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attrfast.convolution import each, size_made
from attrfast.layouts import channels_lie_together, empty_laid, is_dense
from attrfast.signatures import CONVOLUTIONS, batch_norm_arguments, bound_arguments

Tensor = torch.Tensor


class ValuesNeededError(Exception):
    """A call whose result depends on values in more than its own values."""


# Element by element, with a result that lies like their input.
_LIKE_INPUT = frozenset(
    """
    relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish tanh
    """.split()
)
_POOLS = frozenset({"max_pool2d", "avg_pool2d"})
# What runs as it is: shapes, layouts and dtypes of results don't depend on values, and no value leaves torch.
_BLIND = frozenset(
    """
    instance_norm group_norm layer_norm rms_norm local_response_norm normalize prelu rrelu
    softplus softsign softmax log_softmax logsigmoid softmin softshrink hardshrink tanhshrink threshold
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool3d max_pool1d max_pool3d max_pool2d_with_indices lp_pool1d lp_pool2d
    interpolate upsample pad pixel_shuffle pixel_unshuffle channel_shuffle
    add sub subtract rsub mul multiply div divide pow square abs neg negative exp log log1p expm1 sqrt rsqrt
    reciprocal maximum minimum clamp clip clamp_min clamp_max sin cos erf lerp addcmul addcdiv
    mean sum amax amin var std norm logsumexp prod cumsum vector_norm matmul bmm baddbmm addmm mm einsum
    scaled_dot_product_attention
    cat concat concatenate stack view reshape flatten unflatten permute transpose swapaxes swapdims movedim
    moveaxis squeeze unsqueeze expand expand_as repeat tile narrow select chunk split tensor_split unbind
    flip roll t get:T get:mT adjoint broadcast_to view_as reshape_as hsplit vsplit dsplit ravel
    contiguous clone detach to type type_as float double half bfloat16 get:data alias
    tensor as_tensor zeros ones full empty arange linspace zeros_like ones_like full_like empty_like new_zeros
    new_ones new_full new_empty
    """.split()
)


def sketched(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool
) -> Any:
    """What `func(*args, **kwargs)` returns, with other values.

    Args:
        func: a torch function.
        name: its plain name, see `attrfast.trace.call_name`.
        in_place: whether it writes into its input.

    Raises:
        ValuesNeededError: its result, or what the model does next, may depend on values.
    """
    made: Tensor | None = None
    if kwargs.get("out") is not None:
        raise ValuesNeededError(name)
    if name in CONVOLUTIONS:
        made = _convolved(name, args, kwargs)
    elif name == "linear":
        made = _multiplied(args, kwargs)
    elif name == "batch_norm":
        made = _normalized(*batch_norm_arguments(args, kwargs)[:6])
    elif name in _LIKE_INPUT:
        x = args[0] if args else kwargs.get("input")
        made = x if in_place and _is_plain(x) else _alike(x)
    elif name in _POOLS:
        made = _pooled(func, args, kwargs)
    elif name not in _BLIND and not (name == "getitem" and _is_basic(args[1])):
        raise ValuesNeededError(name)
    return func(*args, **kwargs) if made is None else made


def _is_basic(index: Any) -> bool:
    """Whether an index is made of numbers, slices and the like: a tensor may choose by values."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items)


def _is_plain(*tensors: Any) -> bool:
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def _alike(x: Any) -> Tensor | None:
    """A tensor shaped and laid like x, in its memory."""
    return x.detach() if _is_plain(x) and x.is_floating_point() and is_dense(x) else None


def _normalized(x: Any, mean: Any, var: Any, weight: Any, bias: Any, training: bool) -> Tensor | None:
    known = not training and _is_plain(x, mean, var) and x.dim() > 1
    fits = known and all(v is None or v.shape == x.shape[1:2] for v in (mean, var, weight, bias))
    return _alike(x) if fits else None


def _pooled(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, *rest = args or (None,)
    if not _is_plain(x) or x.dim() != 4 or not is_dense(x):
        return None
    shaped = func(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), *rest, **kwargs
    )
    if not _is_plain(shaped) or not is_dense(shaped):
        return None
    return torch.empty_strided(shaped.shape, shaped.stride(), dtype=x.dtype, device=x.device).zero_()


def _may_multiply(x: Any, weight: Any, bias: Any, makes: int) -> bool:
    """Whether a product of these is one that torch would not refuse, or make in another dtype."""
    return (
        x.numel() > 0
        and weight.numel() > 0
        and x.dtype == weight.dtype
        and x.device == weight.device
        and (bias is None or (bias.shape == (makes,) and bias.dtype == x.dtype))
        and not torch.is_autocast_enabled(x.device.type)
    )


def _multiplied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A linear layer's result; None where it has to run."""
    x, weight, bias = bound_arguments("linear", args, kwargs)
    if not _is_plain(x, weight) or x.dim() < 2 or weight.dim() != 2 or not x.is_contiguous():
        return None
    if x.shape[-1] != weight.shape[1] or not _may_multiply(x, weight, bias, len(weight)):
        return None
    shape = *x.shape[:-1], len(weight)
    return torch.zeros(shape, dtype=x.dtype, device=x.device)


def _convolved(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A convolution's result; None where it has to run, or where torch chooses the layout by more than x's."""
    x, weight, bias, stride, padding, *rest = bound_arguments(name, args, kwargs)
    spatial, transposed = int(name[-2]), "transpose" in name
    if not _is_plain(x, weight) or x.dim() != spatial + 2 or weight.dim() != x.dim():
        return None
    if isinstance(padding, str) or not weight.is_contiguous() or not is_dense(x):
        return None
    if x.shape[1] == 1 or x.shape[2:].numel() <= 1 or (spatial != 2 and not x.is_contiguous()):
        return None
    more, groups, dilation = rest if transposed else (0, rest[1], rest[0])
    across = groups * weight.shape[1]
    reads, makes = (len(weight), across) if transposed else (across, len(weight))
    if reads != x.shape[1] or makes % groups or not _may_multiply(x, weight, bias, makes):
        return None
    strides, paddings, dilations, added = (each(v, spatial) for v in (stride, padding, dilation, more))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if transposed:
        if any(o >= max(s, d) for o, s, d in zip(added, strides, dilations, strict=True)):
            return None
        dimensions = zip(x.shape[2:], reach, strides, paddings, added, strict=True)
        size = [(n - 1) * s - 2 * p + r + o for n, r, s, p, o in dimensions]
    else:
        size = size_made(x.shape[2:], reach, paddings, strides)
    if min(size) <= 0:
        return None
    return empty_laid(x, channels_lie_together(x), (len(x), makes, *size)).zero_()
