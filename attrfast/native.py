"""The CPU backend: tensors in, launches of `attrfast._native` over raw pointers out.

Contiguous and channels-last tensors are used as they lie; anything else is copied first. Arguments were
checked by `attrfast.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attrfast import _native
from attrfast.reference import INF, compute_dtype, pooled_size

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_FIRST, _LAST = 0, 1

Tensor = torch.Tensor


def _layout(x: Tensor) -> int | None:
    """Layout that a tensor lies in, or None for one that must be copied."""
    if x.is_contiguous():
        return _FIRST
    if x.dim() in _CHANNELS_LAST:
        return _LAST if x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]) else None
    # (N, C, P) whose channels lie together: what a transposed linear layer's map looks like.
    return _LAST if x.dim() == 3 and x.transpose(1, 2).is_contiguous() else None


def _laid(x: Tensor, layout: int) -> Tensor:
    """The tensor in a layout: itself, or a copy."""
    if layout == _FIRST:
        return x.contiguous()
    if x.dim() in _CHANNELS_LAST:
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _common(x: Tensor) -> tuple[Tensor, int]:
    layout = _layout(x)
    return (x.contiguous(), _FIRST) if layout is None else (x, layout)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    n, c = x.shape[:2]
    return n, c, x.shape[2:].numel()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _empty(like: Tensor, layout: int, shape: Sequence[int] | None = None) -> Tensor:
    """New memory in a layout."""
    size = tuple(like.shape) if shape is None else tuple(shape)
    if layout == _FIRST:
        return torch.empty(size, dtype=like.dtype)
    if len(size) in _CHANNELS_LAST:
        return torch.empty(size, dtype=like.dtype, memory_format=_CHANNELS_LAST[len(size)])
    return torch.empty((size[0], size[2], size[1]), dtype=like.dtype).transpose(1, 2)


def _put(target: Tensor, laid: Tensor) -> None:
    """Writes back into the caller's tensor what was worked on in a copy."""
    if laid.data_ptr() != target.data_ptr() or laid.stride() != target.stride():
        target.copy_(laid)


class CpuBackend:
    """The ops of `attrfast.reference`, by the native kernels."""

    name = "cpu"

    def affine_relu_(
        self,
        z: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
    ) -> None:
        x, layout = _common(z)
        self._affine_relu(x, layout, scale, shift, residual, x, lower, upper)
        _put(z, x)

    def affine_relu(
        self,
        z: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
    ) -> Tensor:
        x, layout = _common(z)
        y = _empty(x, layout)
        self._affine_relu(x, layout, scale, shift, residual, y, lower, upper)
        return y

    def _affine_relu(
        self,
        z: Tensor,
        layout: int,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        lower: float,
        upper: float,
    ) -> None:
        if residual is not None:
            residual = _laid(residual, layout)
        scale, shift = _vector(scale), _vector(shift)
        _native.affine_relu(
            _DTYPES[z.dtype],
            layout,
            *_sizes(z),
            z.data_ptr(),
            _pointer(scale),
            _pointer(shift),
            _pointer(residual),
            y.data_ptr(),
            lower,
            upper,
            torch.get_num_threads(),
        )

    def affine_relu_backward_(
        self,
        a: Tensor,
        g: Tensor,
        scale: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
        guided: bool = False,
        attribute: bool = True,
    ) -> Tensor:
        a, layout = _common(a)
        grad = _laid(g, layout)
        s = self._backward(
            a, layout, grad, None, scale, None, grad, lower, upper, guided, int(attribute)
        )
        _put(g, grad)
        return s

    def affine_relu_backward(
        self,
        a: Tensor,
        g: Tensor,
        scale: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
        guided: bool = False,
        attribute: bool = True,
    ) -> tuple[Tensor, Tensor]:
        a, layout = _common(a)
        gz = _empty(a, layout)
        grad = _laid(g, layout)
        s = self._backward(a, layout, grad, None, scale, None, gz, lower, upper, guided, int(attribute))
        return gz, s

    def affine_add_relu_backward_(
        self,
        a: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
        guided: bool = False,
        attribute: int = 1,
    ) -> tuple[Tensor, Tensor]:
        a, layout = _common(a)
        grad = _laid(g, layout)
        gz = _empty(a, layout)
        s = self._backward(a, layout, grad, residual, scale, grad, gz, lower, upper, guided, attribute)
        _put(g, grad)
        return gz, s

    def affine_add_relu_backward(
        self,
        a: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
        guided: bool = False,
        attribute: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, layout = _common(a)
        grad = _laid(g, layout)
        g1, gz = _empty(a, layout), _empty(a, layout)
        s = self._backward(a, layout, grad, residual, scale, g1, gz, lower, upper, guided, attribute)
        return g1, gz, s

    def _backward(
        self,
        a: Tensor,
        layout: int,
        g: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        g1: Tensor | None,
        gz: Tensor,
        lower: float,
        upper: float,
        guided: bool,
        attribute: int,
    ) -> Tensor:
        make = torch.empty if attribute else torch.zeros
        s = make(a.shape[:2], dtype=compute_dtype(a.dtype))
        if residual is not None:
            residual = _laid(residual, layout)
        scale = _vector(scale)
        _native.affine_relu_backward(
            _DTYPES[a.dtype],
            layout,
            *_sizes(a),
            a.data_ptr(),
            g.data_ptr(),
            _pointer(scale),
            _pointer(residual),
            _pointer(g1),
            gz.data_ptr(),
            s.data_ptr(),
            lower,
            upper,
            guided,
            attribute,
            torch.get_num_threads(),
        )
        return s

    def affine_relu_max_pool(
        self,
        z: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool = False,
        lower: float = 0.0,
        upper: float = INF,
    ) -> tuple[Tensor, Tensor]:
        z, layout = _common(z)
        size = z.shape[2:]
        pooled = [pooled_size(size[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)]
        p = _empty(z, layout, (*z.shape[:2], *pooled))
        code = torch.empty_like(p, dtype=torch.uint8)
        scale, shift = _vector(scale), _vector(shift)
        _native.affine_relu_max_pool(
            _DTYPES[z.dtype],
            layout,
            z.shape[0],
            z.shape[1],
            tuple(size),
            tuple(pooled),
            tuple(kernel),
            tuple(stride),
            tuple(padding),
            z.data_ptr(),
            _pointer(scale),
            _pointer(shift),
            p.data_ptr(),
            code.data_ptr(),
            lower,
            upper,
            torch.get_num_threads(),
        )
        return p, code

    def affine_relu_max_pool_backward(
        self,
        p: Tensor,
        code: Tensor,
        g: Tensor,
        scale: Tensor | None,
        size: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        lower: float = 0.0,
        upper: float = INF,
        guided: bool = False,
        attribute: bool = True,
    ) -> tuple[Tensor, Tensor]:
        p, layout = _common(p)
        code, g = _laid(code, layout), _laid(g, layout)
        gz = _empty(p, layout, (*p.shape[:2], *size))
        scale = _vector(scale)
        if attribute:
            s = self.attribution(p, g)
        else:
            s = torch.zeros(p.shape[:2], dtype=compute_dtype(p.dtype))
        _native.affine_relu_max_pool_backward(
            _DTYPES[p.dtype],
            layout,
            p.shape[0],
            p.shape[1],
            tuple(size),
            tuple(p.shape[2:]),
            tuple(kernel),
            tuple(stride),
            tuple(padding),
            p.data_ptr(),
            code.data_ptr(),
            g.data_ptr(),
            _pointer(scale),
            gz.data_ptr(),
            lower,
            upper,
            guided,
            torch.get_num_threads(),
        )
        return gz, s

    def attribution(self, x: Tensor, g: Tensor, absolute: bool = False) -> Tensor:
        x, layout = _common(x)
        g = _laid(g, layout)
        s = torch.empty(x.shape[:2], dtype=compute_dtype(x.dtype))
        _native.attribution(
            _DTYPES[x.dtype],
            layout,
            *_sizes(x),
            x.data_ptr(),
            g.data_ptr(),
            s.data_ptr(),
            absolute,
            torch.get_num_threads(),
        )
        return s
