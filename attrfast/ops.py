"""The ops, registered with PyTorch under the namespace `attrfast`.

Each is one function over tensors; `attrfast.reference` holds its meaning, and the backend that fits the
tensor's device does the work. Results lie in memory as the first argument does where that is contiguous
or channels-last, and contiguous otherwise. In-place forms end in `_`. Code below the dispatcher, which
has checked shapes already, may call `backend_for(device)` and save the dispatcher's time.

What no op can work on raises `InputError`, which names the op and the argument: a wrong shape, dtype, device
or kind, a sparse or nested tensor, bounds that cross, a pooling without room, an in-place form whose elements
share memory. Arguments that overlap what an in-place form writes are read as they were before.

NaN, infinities and subnormal numbers are no special case: every op does with them what the PyTorch operations
do that it stands for, and says so below where that might surprise. Nothing is flushed to zero unless
`torch.set_flush_denormal` asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attrfast._backend import backend_for
from attrfast.argument_kinds import unusable_argument
from attrfast.errors import AttrfastError, InputError
from attrfast.layouts import apart_from, channels_lie_together, elements_lie_apart, empty_laid, laid
from attrfast.reference import INF, compute_dtype, pooled_size

__all__ = [
    "affine_add_relu_backward",
    "affine_add_relu_backward_",
    "affine_relu",
    "affine_relu_",
    "affine_relu_backward",
    "affine_relu_backward_",
    "affine_relu_max_pool",
    "affine_relu_max_pool_backward",
    "attribution",
    "backend_for",
    "count_nonzero",
    "segment_normalize",
]

Tensor = torch.Tensor
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(
    op: str,
    x: Tensor,
    same: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    optional: Sequence[str] = ("residual",),
) -> None:
    """Shapes, dtypes and devices that every op needs. The fakes check them too: PyTorch calls those, and
    not the op, where one argument is on the meta device.

    Raises:
        InputError: naming the op and the offending argument.
    """
    if x.dtype not in _DTYPES:
        raise InputError(f"{op}: dtype {x.dtype} is none of float32, float64, bfloat16, float16")
    if not 2 <= x.dim() <= 5:
        raise InputError(
            f"{op}: shape {tuple(x.shape)} must be (N, C) with up to three spatial dimensions"
        )
    for name, other in same.items():
        if other is None:
            if name in optional:
                continue
            # The dispatcher hands None to an op that wants a tensor.
            raise InputError(f"{op}: {name} must be a tensor, got None")
        if other.shape != x.shape:
            raise InputError(f"{op}: {name} has shape {tuple(other.shape)}, expected {tuple(x.shape)}")
        if other.dtype != x.dtype:
            raise InputError(f"{op}: {name} has dtype {other.dtype}, expected {x.dtype}")
        if other.device != x.device:
            raise InputError(f"{op}: {name} is on {other.device}, expected {x.device}")
    wide = compute_dtype(x.dtype)
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (x.shape[1],):
            raise InputError(
                f"{op}: {name} has shape {tuple(vector.shape)}, expected ({x.shape[1]},), one a channel"
            )
        if vector.dtype != wide:
            raise InputError(f"{op}: {name} has dtype {vector.dtype}, expected {wide}")
        if vector.device != x.device:
            raise InputError(f"{op}: {name} is on {vector.device}, expected {x.device}")


def _check_pool(
    op: str, x: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> None:
    """A pooling's geometry; x is its input or its result, size the H and W of its input."""
    if x.dim() != 4:
        raise InputError(f"{op}: shape {tuple(x.shape)} must be (N, C, H, W)")
    pairs = (("size", size), ("kernel", kernel), ("stride", stride), ("padding", padding))
    for name, pair in pairs:
        if len(pair) != 2:
            raise InputError(f"{op}: {name} must have two entries, got {list(pair)}")
    if min(*kernel, *stride) < 1 or kernel[0] * kernel[1] > 255 or max(stride) >= 2**31:
        raise InputError(
            f"{op}: kernel {list(kernel)} and stride {list(stride)} must be at least 1, with no more "
            f"than 255 places a window, and a stride of less than 2^31"
        )
    if any(2 * p > k or p < 0 for p, k in zip(padding, kernel, strict=True)):
        raise InputError(
            f"{op}: padding {list(padding)} must be between 0 and half the kernel {list(kernel)}"
        )
    if any(n < 1 or n + 2 * p < k for n, k, p in zip(size, kernel, padding, strict=True)):
        raise InputError(
            f"{op}: size {list(size)} with padding {list(padding)} has no room for a window of "
            f"{list(kernel)}"
        )


def _check_pooled(
    p: Tensor, code: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> None:
    """What the backward of a pooling is told about it."""
    op = "affine_relu_max_pool_backward"
    _check_pool(op, p, size, kernel, stride, padding)
    if list(p.shape[2:]) not in [_pooled(size, kernel, stride, padding, up) for up in (False, True)]:
        raise InputError(f"{op}: size {list(size)} does not pool to p's {list(p.shape[2:])}")
    if code.shape != p.shape or code.dtype != torch.uint8 or code.device != p.device:
        raise InputError(
            f"{op}: code must be uint8 of shape {tuple(p.shape)} on {p.device}, got {code.dtype} "
            f"{tuple(code.shape)} on {code.device}"
        )


def _check_written(op: str, name: str, x: Tensor) -> None:
    if not elements_lie_apart(x):
        raise InputError(
            f"{op}: elements of {name}, with strides {x.stride()}, share memory, or may do so; clone it"
        )


def _pooled(
    size: Sequence[int], kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> list[int]:
    return [pooled_size(size[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)]


def _bounds(op: str, lower: float | None, upper: float | None) -> tuple[float, float]:
    """None means that there is no bound (a schema can't say infinity)."""
    low, high = -INF if lower is None else lower, INF if upper is None else upper
    if not low <= high or low == INF or high == -INF:
        raise InputError(
            f"{op}: lower {lower} must not exceed upper {upper}, neither may be NaN, and None stands for none"
        )
    return low, high


def _empty(x: Tensor, size: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A result in x's layout: of x's shape, or with other spatial dimensions."""
    shape = x.shape if size is None else (*x.shape[:2], *size)
    return empty_laid(x, channels_lie_together(x), shape, dtype)


def _placed(x: Tensor, *results: Tensor) -> Any:
    """A backend's results as its fake says that they lie, on which compiled code relies: sums contiguous,
    all others in x's layout. Most are so already."""
    last = channels_lie_together(x)
    placed = [laid(result, last and result.dim() == x.dim()) for result in results]
    return tuple(placed) if len(placed) > 1 else placed[0]


def _op(writes: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """`custom_op`, behind a function that says by an `InputError` what the dispatcher refuses in its own words.

    Args:
        writes: the argument that an in-place form writes into. PyTorch lets autograd pass by such an op
            unnoticed, so the function refuses tensors that need it.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        op = torch.library.custom_op(
            f"attrfast::{name}", function, mutates_args=() if writes is None else (writes,)
        )

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if writes is not None and torch.is_grad_enabled():
                given = (*args, *kwargs.values())
                if any(isinstance(x, Tensor) and x.requires_grad for x in given):
                    raise InputError(
                        f"{name} has no gradient, but an argument requires one: detach it, or call under "
                        f"torch.no_grad()"
                    )
            try:
                return op(*args, **kwargs)
            except AttrfastError:
                raise
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                fault = unusable_argument(function, args, kwargs, writes)
                if fault is None:
                    raise
                raise InputError(f"{name}: {fault}") from error

        call.register_fake = op.register_fake  # type: ignore[attr-defined]
        call.register_autograd = op.register_autograd  # type: ignore[attr-defined]
        return call

    return register


def _sums(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape[:2] if wanted else 0, dtype=compute_dtype(x.dtype))


# -- affine_relu ----------------------------------------------------------------------------------------


@_op()
def affine_relu(
    z: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, n) with y = clamp(z * scale + shift + residual, lower, upper); differentiable in z and residual.

    NaN stays NaN, as through `torch.relu` and `torch.clamp`; an infinity is clamped; infinity - infinity and
    0 * infinity are NaN. The count n of a channel is NaN where one of its y is not finite. See
    `attrfast.reference.affine_relu`.
    """
    _check("affine_relu", z, {"residual": residual}, {"scale": scale, "shift": shift})
    bounds = _bounds("affine_relu", lower, upper)
    backend = backend_for(z.device)
    out = _placed(z, *backend.affine_relu(z, scale, shift, residual, *bounds, count))
    return out  # type: ignore[no-any-return]


@affine_relu.register_fake
def _(
    z: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor]:
    _check("affine_relu", z, {"residual": residual}, {"scale": scale, "shift": shift})
    _bounds("affine_relu", lower, upper)
    return _empty(z), _sums(z, count)


def _save_affine_relu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, scale, shift, residual, ctx.lower, ctx.upper, _ = inputs
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and vector.requires_grad:
            raise InputError(f"affine_relu has no gradient for {name}; detach it")
    ctx.split = residual is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[0], scale)


def _affine_relu_gradients(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    a, scale = ctx.saved_tensors
    if ctx.split:
        g1, gz, _ = affine_add_relu_backward(a, g, None, scale, ctx.lower, ctx.upper, False, 0)
        return gz, None, None, g1, None, None, None
    gz, _ = affine_relu_backward(a, g, scale, ctx.lower, ctx.upper, False, False)
    return gz, None, None, None, None, None, None


affine_relu.register_autograd(_affine_relu_gradients, setup_context=_save_affine_relu)


@_op(writes="z")
def affine_relu_(
    z: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    count: bool = False,
) -> Tensor:
    """n; z becomes y. Not differentiable. NaN and infinities: as of `affine_relu`. See
    `attrfast.reference.affine_relu`."""
    _check("affine_relu_", z, {"residual": residual}, {"scale": scale, "shift": shift})
    _check_written("affine_relu_", "z", z)
    scale, shift, residual = (apart_from(z, x) for x in (scale, shift, residual))
    bounds = _bounds("affine_relu_", lower, upper)
    backend = backend_for(z.device)
    out = _placed(z, backend.affine_relu_(z, scale, shift, residual, *bounds, count))
    return out  # type: ignore[no-any-return]


@affine_relu_.register_fake
def _(
    z: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    count: bool = False,
) -> Tensor:
    _check("affine_relu_", z, {"residual": residual}, {"scale": scale, "shift": shift})
    _bounds("affine_relu_", lower, upper)
    return _sums(z, count)


# -- its backward, with the attribution -------------------------------------------------------------------


@_op()
def affine_relu_backward(
    a: Tensor,
    g: Tensor,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[Tensor, Tensor]:
    """(gz, s): see `attrfast.reference.affine_relu_backward`.

    NaN in a lies within the bounds and NaN in g passes there, as through `torch.relu`'s backward
    (`torch.nn.functional.hardtanh`'s gives 0 for NaN). Infinity passes where there is no bound. Where a is
    clamped, g is not looked at and gz is 0 * scale; guidance stops NaN, which is not greater than 0. s sums
    what the arithmetic gives: NaN where any a or g is NaN, or 0 meets infinity, also where nothing passes.
    """
    _check("affine_relu_backward", a, {"g": g}, {"scale": scale})
    bounds = _bounds("affine_relu_backward", lower, upper)
    out = _placed(
        a, *backend_for(a.device).affine_relu_backward(a, g, scale, *bounds, guided, attribute)
    )
    return out  # type: ignore[no-any-return]


@affine_relu_backward.register_fake
def _(
    a: Tensor,
    g: Tensor,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[Tensor, Tensor]:
    _check("affine_relu_backward", a, {"g": g}, {"scale": scale})
    _bounds("affine_relu_backward", lower, upper)
    return _empty(a), _sums(a)


@_op(writes="g")
def affine_relu_backward_(
    a: Tensor,
    g: Tensor,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: bool = True,
) -> Tensor:
    """s; g becomes gz. NaN and infinities: as of `affine_relu_backward`. See
    `attrfast.reference.affine_relu_backward`."""
    _check("affine_relu_backward_", a, {"g": g}, {"scale": scale})
    _check_written("affine_relu_backward_", "g", g)
    a, scale = (apart_from(g, x) for x in (a, scale))  # type: ignore[assignment]
    bounds = _bounds("affine_relu_backward_", lower, upper)
    backend = backend_for(a.device)
    out = _placed(a, backend.affine_relu_backward_(a, g, scale, *bounds, guided, attribute))
    return out  # type: ignore[no-any-return]


@affine_relu_backward_.register_fake
def _(
    a: Tensor,
    g: Tensor,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: bool = True,
) -> Tensor:
    _check("affine_relu_backward_", a, {"g": g}, {"scale": scale})
    _bounds("affine_relu_backward_", lower, upper)
    return _sums(a)


@_op()
def affine_add_relu_backward(
    a: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g1, gz, s): see `attrfast.reference.affine_add_relu_backward`.

    NaN and infinities: as of `affine_relu_backward`; with attribute=2, s sums (a - residual) * g1, and a g that
    does not pass is no part of it.
    """
    _check_branch("affine_add_relu_backward", residual, attribute)
    _check("affine_add_relu_backward", a, {"g": g, "residual": residual}, {"scale": scale})
    bounds = _bounds("affine_add_relu_backward", lower, upper)
    backend = backend_for(a.device)
    out = _placed(
        a, *backend.affine_add_relu_backward(a, g, residual, scale, *bounds, guided, attribute)
    )
    return out  # type: ignore[no-any-return]


@affine_add_relu_backward.register_fake
def _(
    a: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    _check("affine_add_relu_backward", a, {"g": g, "residual": residual}, {"scale": scale})
    _check_branch("affine_add_relu_backward", residual, attribute)
    _bounds("affine_add_relu_backward", lower, upper)
    return _empty(a), _empty(a), _sums(a)


@_op(writes="g")
def affine_add_relu_backward_(
    a: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: int = 1,
) -> tuple[Tensor, Tensor]:
    """(gz, s); g becomes g1. NaN and infinities: as of `affine_add_relu_backward`. See
    `attrfast.reference.affine_add_relu_backward`."""
    _check_branch("affine_add_relu_backward_", residual, attribute)
    _check("affine_add_relu_backward_", a, {"g": g, "residual": residual}, {"scale": scale})
    _check_written("affine_add_relu_backward_", "g", g)
    a, residual, scale = (apart_from(g, x) for x in (a, residual, scale))  # type: ignore[assignment]
    bounds = _bounds("affine_add_relu_backward_", lower, upper)
    backend = backend_for(a.device)
    out = _placed(
        a, *backend.affine_add_relu_backward_(a, g, residual, scale, *bounds, guided, attribute)
    )
    return out  # type: ignore[no-any-return]


@affine_add_relu_backward_.register_fake
def _(
    a: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: int = 1,
) -> tuple[Tensor, Tensor]:
    _check("affine_add_relu_backward_", a, {"g": g, "residual": residual}, {"scale": scale})
    _check_branch("affine_add_relu_backward_", residual, attribute)
    _bounds("affine_add_relu_backward_", lower, upper)
    return _empty(a), _sums(a)


def _check_branch(op: str, residual: Tensor | None, attribute: int) -> None:
    if attribute not in (0, 1, 2):
        raise InputError(f"{op}: attribute must be 0, 1 or 2, got {attribute}")
    if attribute == 2 and residual is None:
        raise InputError(f"{op}: attribute=2 measures a - residual and needs the residual")


# -- with max-pooling ---------------------------------------------------------------------------------------


@_op()
def affine_relu_max_pool(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool = False,
    lower: float | None = 0.0,
    upper: float | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, code, n); differentiable in z.

    NaN is the largest value of a window, as of `torch.nn.functional.max_pool2d`, and the last NaN of a window
    is its maximum; NaN and infinities before that, and n: as of `affine_relu`. See
    `attrfast.reference.affine_relu_max_pool`.
    """
    _check("affine_relu_max_pool", z, {}, {"scale": scale, "shift": shift})
    _check_pool("affine_relu_max_pool", z, list(z.shape[2:]), kernel, stride, padding)
    bounds = _bounds("affine_relu_max_pool", lower, upper)
    backend = backend_for(z.device)
    out = _placed(
        z,
        *backend.affine_relu_max_pool(
            z, scale, shift, kernel, stride, padding, ceil_mode, *bounds, count
        ),
    )
    return out  # type: ignore[no-any-return]


@affine_relu_max_pool.register_fake
def _(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool = False,
    lower: float | None = 0.0,
    upper: float | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check("affine_relu_max_pool", z, {}, {"scale": scale, "shift": shift})
    _check_pool("affine_relu_max_pool", z, list(z.shape[2:]), kernel, stride, padding)
    _bounds("affine_relu_max_pool", lower, upper)
    size = _pooled(z.shape[2:], kernel, stride, padding, ceil_mode)
    return _empty(z, size), _empty(z, size, torch.uint8), _sums(z, count)


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, scale, shift, ctx.kernel, ctx.stride, ctx.padding, _, ctx.lower, ctx.upper, _ = inputs
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and vector.requires_grad:
            raise InputError(f"affine_relu_max_pool has no gradient for {name}; detach it")
    ctx.size = list(z.shape[2:])
    p, code, count = output
    ctx.mark_non_differentiable(code, count)
    ctx.save_for_backward(p, code, scale)


def _pool_gradients(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    p, code, scale = ctx.saved_tensors
    gz, _ = affine_relu_max_pool_backward(
        p,
        code,
        g,
        scale,
        ctx.size,
        ctx.kernel,
        ctx.stride,
        ctx.padding,
        ctx.lower,
        ctx.upper,
        False,
        False,
    )
    return gz, None, None, None, None, None, None, None, None, None


affine_relu_max_pool.register_autograd(_pool_gradients, setup_context=_save_pool)


@_op()
def affine_relu_max_pool_backward(
    p: Tensor,
    code: Tensor,
    g: Tensor,
    scale: Tensor | None,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[Tensor, Tensor]:
    """(gz, s): see `attrfast.reference.affine_relu_max_pool_backward`.

    NaN and infinities: as of `affine_relu_backward`, with p in a's place. Gradients of windows that share a
    maximum are added before guidance looks at their sign, and what is no maximum is 0 * scale.
    """
    _check("affine_relu_max_pool_backward", p, {"g": g}, {"scale": scale})
    _check_pooled(p, code, size, kernel, stride, padding)
    bounds = _bounds("affine_relu_max_pool_backward", lower, upper)
    backend = backend_for(p.device)
    out = _placed(
        p,
        *backend.affine_relu_max_pool_backward(
            p, code, g, scale, size, kernel, stride, padding, *bounds, guided, attribute
        ),
    )
    return out  # type: ignore[no-any-return]


@affine_relu_max_pool_backward.register_fake
def _(
    p: Tensor,
    code: Tensor,
    g: Tensor,
    scale: Tensor | None,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    lower: float | None = 0.0,
    upper: float | None = None,
    guided: bool = False,
    attribute: bool = True,
) -> tuple[Tensor, Tensor]:
    _check("affine_relu_max_pool_backward", p, {"g": g}, {"scale": scale})
    _check_pooled(p, code, size, kernel, stride, padding)
    _bounds("affine_relu_max_pool_backward", lower, upper)
    return _empty(p, size), _sums(p)


# -- attribution and counts alone, and normalisation ----------------------------------------------------------


@_op()
def attribution(x: Tensor, g: Tensor, absolute: bool = False) -> Tensor:
    """Sum over positions of x * g, or of abs(x * g): see `attrfast.reference.attribution`.

    NaN where any product is NaN (0 * infinity is), or where infinities of both signs meet.
    """
    _check("attribution", x, {"g": g}, {})
    return _placed(x, backend_for(x.device).attribution(x, g, absolute))  # type: ignore[no-any-return]


@attribution.register_fake
def _(x: Tensor, g: Tensor, absolute: bool = False) -> Tensor:
    _check("attribution", x, {"g": g}, {})
    return _sums(x)


@_op()
def count_nonzero(x: Tensor) -> Tensor:
    """How many of a channel's positions are not zero: see `attrfast.reference.count_nonzero`.

    A subnormal number is not zero. NaN where a position is not finite.
    """
    _check("count_nonzero", x, {}, {})
    return _placed(x, backend_for(x.device).count_nonzero(x))  # type: ignore[no-any-return]


@count_nonzero.register_fake
def _(x: Tensor) -> Tensor:
    _check("count_nonzero", x, {}, {})
    return _sums(x)


@_op()
def segment_normalize(theta: Tensor, offsets: Tensor, kind: str = "l2") -> Tensor:
    """Divides each segment of theta (U,) by its own norm: see `attrfast.reference.segment_normalize`.

    A segment with NaN or an infinity becomes NaN as a whole, and no other one does.
    """
    _check_segments(theta, offsets, kind)
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != theta.shape[0] or bounds != sorted(bounds):
        raise InputError(
            f"segment_normalize: offsets must ascend from 0 to {theta.shape[0]}, got {bounds}"
        )
    out = backend_for(theta.device).segment_normalize(theta, offsets, kind)
    return out  # type: ignore[no-any-return]


def _check_segments(theta: Tensor, offsets: Tensor, kind: str) -> None:
    if kind not in ("l2", "mean", "max"):
        raise InputError(f"segment_normalize: kind must be 'l2', 'mean' or 'max', got {kind!r}")
    if theta.dim() != 1 or theta.dtype not in _DTYPES:
        raise InputError(
            f"segment_normalize: theta must be floating and of shape (U,), got {theta.dtype} "
            f"{tuple(theta.shape)}"
        )
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.numel() < 1:
        raise InputError("segment_normalize: offsets must be int64 of shape (L + 1,)")
    if offsets.device != theta.device:
        raise InputError(f"segment_normalize: offsets is on {offsets.device}, expected {theta.device}")


@segment_normalize.register_fake
def _(theta: Tensor, offsets: Tensor, kind: str = "l2") -> Tensor:
    _check_segments(theta, offsets, kind)
    return torch.empty_like(theta)
