"""Each op in plain PyTorch: the definition that every kernel is tested against.

Written to be read, not to be fast. Tensors are (N, C, positions...) with up to three spatial dimensions;
float32, bfloat16 and float16 compute in float32, float64 in float64. Must not know any backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional
from torch.nn.grad import conv2d_input

__all__ = [
    "affine_add_relu_backward",
    "affine_relu",
    "affine_relu_backward",
    "affine_relu_max_pool",
    "affine_relu_max_pool_backward",
    "attribution",
    "segment_normalize",
]

INF = float("inf")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and products are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(vector: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | float:
    """(C,) as (1, C, 1, ...) to go with `like`; 1.0 for none."""
    if vector is None:
        return 1.0
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _positions(product: torch.Tensor) -> torch.Tensor:
    """Sum over positions: (N, C, ...) -> (N, C)."""
    return product.flatten(2).sum(2) if product.dim() > 2 else product


def _count(y: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """How many of a channel's positions are not zero: (N, C, ...) -> (N, C)."""
    dtype = compute_dtype(y.dtype)
    if not wanted:
        return y.new_empty(0, dtype=dtype)
    # Plus zero, or NaN where an element is not finite: comparing would hide it.
    return _positions((y != 0).to(dtype) + 0.0 * y.to(dtype))


def _clamp(y: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    return y if lower == -INF and upper == INF else y.clamp(lower, upper)


def affine_relu(
    z: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    count: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """clamp(z * scale + shift + residual, lower, upper): a folded batch norm, an addition and a ReLU.

    Args:
        z: (N, C, ...).
        scale, shift: (C,) in the compute dtype, or None for 1 and 0.
        residual: like z, or None for 0.
        lower, upper: 0 and inf for ReLU, 0 and 6 for ReLU6, -inf and inf for no activation. NaN stays.
        count: whether the positions that are not zero are counted.

    Returns:
        y: (N, C, ...) in z's dtype; n: (N, C) in the compute dtype, how many of a channel's positions in y,
        rounded as it is, are not zero: NaN where one of them is not finite. Without `count` n is empty: (0,).
    """
    y = _affine_relu(z, scale, shift, residual, lower, upper).to(z.dtype)
    return y.clone() if y is z else y, _count(y, count)


def _affine_relu(
    z: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    lower: float,
    upper: float,
) -> torch.Tensor:
    """`affine_relu` before it is rounded to z's dtype."""
    y = z.to(compute_dtype(z.dtype))
    if scale is not None:
        y = y * _per_channel(scale, z)
    if shift is not None:
        y = y + _per_channel(shift, z)
    if residual is not None:
        y = y + residual
    return _clamp(y, lower, upper)


def _passes(a: torch.Tensor, g: torch.Tensor, lower: float, upper: float, guided: bool) -> torch.Tensor:
    """Where the gradient passes the clamp whose output is a; NaN counts as inside the bounds.

    The bounds are rounded to a's dtype, as what was clamped to them is. An infinite one is none: an infinity
    that was not clamped lets its gradient pass, as through PyTorch's own ReLU.
    """
    wide = torch.tensor([lower, upper], dtype=compute_dtype(a.dtype), device="cpu")
    low, high = wide.to(a.dtype).tolist()
    outside = (a <= low) & (low > -INF) | (a >= high) & (high < INF)
    passes: torch.Tensor = ~outside
    return passes & (g > 0) if guided else passes


def affine_relu_backward(
    a: torch.Tensor,
    g: torch.Tensor,
    scale: torch.Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `affine_relu` from its output, with the attribution reduced on the way.

    Args:
        a: (N, C, ...) output of the forward.
        g: like a, the gradient with respect to a.
        scale: (C,) or None.
        lower, upper: the bounds of the forward.
        guided: let a gradient pass only where it is positive (Springenberg et al. 2014).
        attribute: whether the attribution is wanted.

    Returns:
        gz, like g: scale * where(lower < a < upper [and g > 0], g, 0); and s: (N, C) in the compute
        dtype, the sum over positions of a * g (zeros where it is not wanted).
    """
    dtype = compute_dtype(a.dtype)
    wide_a, wide = a.to(dtype), g.to(dtype)
    inside = torch.where(_passes(a, g, lower, upper, guided), wide, 0.0)
    s = _positions(wide_a * wide) if attribute else wide.new_zeros(wide.shape[:2])
    return (inside * _per_channel(scale, a)).to(g.dtype), s


def joined(
    parts: Sequence[torch.Tensor],
    scale: torch.Tensor,
    shift: torch.Tensor,
    lower: float = 0.0,
    upper: float = INF,
) -> torch.Tensor:
    """`affine_relu` of maps (N, C of each, ...) that are joined along the channels."""
    return affine_relu(torch.cat(list(parts), 1), scale, shift, None, lower, upper)[0]


def joined_backward(
    parts: Sequence[torch.Tensor],
    g: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Backward of `joined` from what it was given: `affine_relu_backward`, with gz cut into parts."""
    a = joined(parts, scale, shift, lower, upper)
    gz, s = affine_relu_backward(a, g, scale, lower, upper, guided, attribute)
    return torch.split(gz, [part.shape[1] for part in parts], 1), s


def affine_add_relu_backward(
    a: torch.Tensor,
    g: torch.Tensor,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of `affine_relu` with a residual.

    Args:
        a, g, scale, lower, upper, guided: see `affine_relu_backward`.
        residual: read when `attribute` is 2 only.
        attribute: 0: none; 1: the sum over positions of a * g; 2: of (a - residual) * g1, which is the
            flow through z's branch alone, because a ReLU conserves it.

    Returns:
        g1, the gradient with respect to the residual; gz = g1 * scale; s: (N, C).
    """
    dtype = compute_dtype(a.dtype)
    wide_a, wide = a.to(dtype), g.to(dtype)
    inside = torch.where(_passes(a, g, lower, upper, guided), wide, 0.0)
    if attribute == 2:
        assert residual is not None
        s = _positions((wide_a - residual.to(dtype)) * inside)
    else:
        s = _positions(wide_a * wide) if attribute else wide.new_zeros(wide.shape[:2])
    return inside.to(g.dtype), (inside * _per_channel(scale, a)).to(g.dtype), s


def pointwise_backward(
    a: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of `affine_relu` and of the 1x1 convolution before it.

    Args:
        a, g, residual, scale, lower, upper, guided, attribute: see `affine_add_relu_backward`.
        weight: (C, I, 1, ...) of the convolution, with stride 1, no padding and one group.

    Returns:
        gx: (N, I, ...), the gradient for what the convolution read; g1; s: (N, C).
    """
    g1, gz, s = affine_add_relu_backward(a, g, residual, scale, lower, upper, guided, attribute)
    return torch.einsum("nc...,ci->ni...", gz, weight.flatten(1)), g1, s


def depthwise_backward(
    a: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    padding: list[int],
    stride: int,
    size: list[int],
    scale: torch.Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `affine_relu` and of the depthwise convolution before it.

    Args:
        a, g, scale, lower, upper, guided, attribute: see `affine_relu_backward`.
        weight: (C, 1, k, k) of the convolution.
        padding, stride: of the convolution, which has no dilation.
        size: rows and columns of what the convolution read.

    Returns:
        gx: (N, C, *size), the gradient for what the convolution read; s: (N, C).
    """
    gz, s = affine_relu_backward(a, g, scale, lower, upper, guided, attribute)
    shape = [*g.shape[:2], *size]
    gx = conv2d_input(shape, weight, gz, stride, padding, groups=len(weight))  # type: ignore[no-untyped-call]
    return gx, s


def affine_relu_max_pool(
    z: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool = False,
    lower: float = 0.0,
    upper: float = INF,
    count: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """max_pool2d(affine_relu(z)), keeping one byte a window instead of an 8-byte index.

    Args:
        z: (N, C, H, W).
        scale, shift, lower, upper: see `affine_relu`.
        kernel, stride, padding: two numbers each; no more than 255 places a window.
        ceil_mode: as in PyTorch's pooling.
        count: as of `affine_relu`: of the pooling's input, each position once, also one in no window.

    Returns:
        p: (N, C, H', W') in z's dtype; code: uint8, like p: the place of the maximum in its window,
        row by row, by PyTorch's rules (the first of equals; NaN is the largest). Values are compared
        before they are rounded to z's dtype. n: as of `affine_relu`.
    """
    a = _affine_relu(z, scale, shift, None, lower, upper)
    p, index = functional.max_pool2d(
        a, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True
    )
    width = z.shape[3]
    top = torch.arange(p.shape[2], device=z.device).view(-1, 1) * stride[0] - padding[0]
    left = torch.arange(p.shape[3], device=z.device) * stride[1] - padding[1]
    code = (index // width - top) * kernel[1] + (index % width - left)
    return p.to(z.dtype), code.to(torch.uint8), _count(a.to(z.dtype), count)


def affine_relu_max_pool_backward(
    p: torch.Tensor,
    code: torch.Tensor,
    g: torch.Tensor,
    scale: torch.Tensor | None,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `affine_relu_max_pool`.

    Gradients of windows that share a maximum add up before the rule of the clamp is applied.

    Args:
        p, code: what the forward gave.
        g: like p.
        scale, kernel, stride, padding, lower, upper: those of the forward.
        size: H and W of z.
        guided, attribute: see `affine_relu_backward`.

    Returns:
        gz: (N, C, H, W); s: (N, C), the sum over windows of p * g.
    """
    dtype = compute_dtype(p.dtype)
    n, c, rows, columns = p.shape
    height, width = size
    place = code.to(torch.int64)
    top = torch.arange(rows, device=p.device).view(-1, 1) * stride[0] - padding[0]
    left = torch.arange(columns, device=p.device) * stride[1] - padding[1]
    index = (top + place // kernel[1]) * width + left + place % kernel[1]
    wide_p, wide = p.to(dtype), g.to(dtype)
    # A window's maximum is the value at its place, so the clamp's bounds are tested on p.
    inside = _passes(p, g, lower, upper, guided=False)
    flat = wide.new_zeros(n, c, height * width)
    kept = torch.where(inside, wide, 0.0)
    flat.scatter_add_(2, index.flatten(2), kept.flatten(2))
    if guided:
        flat = torch.where(flat > 0, flat, 0.0)
    gz = flat.view(n, c, height, width) * _per_channel(scale, p)
    s = _positions(wide_p * wide) if attribute else wide.new_zeros(n, c)
    return gz.to(g.dtype), s


def pooled_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Output size of a pooling along one axis, by PyTorch's rule."""
    span = size + 2 * padding - kernel
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1  # the last window must start inside the input
    return out


def attribution(x: torch.Tensor, g: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """Sum over positions of x * g, or of abs(x * g).

    Args:
        x, g: (N, C, ...), of any strides.
        absolute: add up absolute values.

    Returns:
        (N, C) in the compute dtype.
    """
    dtype = compute_dtype(x.dtype)
    product = x.to(dtype) * g.to(dtype)
    return _positions(product.abs() if absolute else product)


def count_nonzero(x: torch.Tensor) -> torch.Tensor:
    """How many of a channel's positions are not zero: (N, C, ...) -> (N, C), as `affine_relu` counts."""
    return _count(x)


def segment_normalize(theta: torch.Tensor, offsets: torch.Tensor, kind: str) -> torch.Tensor:
    """Divides each segment of theta by its own norm.

    Args:
        theta: (U,) floating.
        offsets: (L + 1,) int64, ascending from 0 to U: segment l is offsets[l] to offsets[l + 1].
        kind: `"l2"`: the Euclidean norm; `"mean"`, `"max"`: of the absolute values.

    Returns:
        (U,) in theta's dtype; a segment of zeros stays zero. Large and small values neither overflow nor
        vanish: the segment is divided by its largest first.
    """
    out = theta.clone()
    bounds = offsets.tolist()
    for start, stop in itertools.pairwise(bounds):
        segment = theta[start:stop].to(compute_dtype(theta.dtype))
        if start == stop:
            continue
        largest = segment.abs().max()
        if largest == 0:
            continue
        unit = segment / largest
        size = {
            "l2": lambda u: u.square().sum().sqrt(),
            "mean": lambda u: u.abs().mean(),
            "max": lambda u: u.abs().max(),
        }[kind](unit)
        out[start:stop] = unit / size
    return out
