"""The CPU backend: tensors in, launches of `attrfast._native` over raw pointers out.

Contiguous and channels-last tensors are used as they lie; anything else is copied first. Arguments were
checked by `attrfast.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attrfast import _native
from attrfast.layouts import common, empty_laid, laid, put_back
from attrfast.reference import INF, compute_dtype, pooled_size

_NORMS = {"l2": 0, "mean": 1, "max": 2}
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Tensor = torch.Tensor


def _sizes(x: Tensor) -> tuple[int, int, int]:
    n, c = x.shape[:2]
    return n, c, x.shape[2:].numel()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _sums(x: Tensor) -> Tensor:
    """New memory for one sum a sample and channel."""
    return torch.empty(x.shape[:2], dtype=compute_dtype(x.dtype), device=x.device)


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
        x, last = common(z)
        self._affine_relu(x, last, scale, shift, residual, x, lower, upper)
        put_back(z, x)

    def affine_relu(
        self,
        z: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
    ) -> Tensor:
        x, last = common(z)
        y = empty_laid(x, last, x.shape)
        self._affine_relu(x, last, scale, shift, residual, y, lower, upper)
        return y

    def _affine_relu(
        self,
        z: Tensor,
        last: bool,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        lower: float,
        upper: float,
    ) -> None:
        if residual is not None:
            residual = laid(residual, last)
        scale, shift = _vector(scale), _vector(shift)
        _native.affine_relu(
            _DTYPES[z.dtype],
            last,
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
        a, last = common(a)
        grad = laid(g, last)
        s = self._backward(a, last, grad, None, scale, None, grad, lower, upper, guided, int(attribute))
        put_back(g, grad)
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
        a, last = common(a)
        gz = empty_laid(a, last, a.shape)
        grad = laid(g, last)
        s = self._backward(a, last, grad, None, scale, None, gz, lower, upper, guided, int(attribute))
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
        a, last = common(a)
        grad = laid(g, last)
        gz = empty_laid(a, last, a.shape)
        s = self._backward(a, last, grad, residual, scale, grad, gz, lower, upper, guided, attribute)
        put_back(g, grad)
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
        a, last = common(a)
        grad = laid(g, last)
        g1, gz = empty_laid(a, last, a.shape), empty_laid(a, last, a.shape)
        s = self._backward(a, last, grad, residual, scale, g1, gz, lower, upper, guided, attribute)
        return g1, gz, s

    def _backward(
        self,
        a: Tensor,
        last: bool,
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
        s = _sums(a) if attribute else _sums(a).zero_()
        if residual is not None:
            residual = laid(residual, last)
        scale = _vector(scale)
        _native.affine_relu_backward(
            _DTYPES[a.dtype],
            last,
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
        z, last = common(z)
        size = z.shape[2:]
        pooled = [pooled_size(size[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)]
        p = empty_laid(z, last, (*z.shape[:2], *pooled))
        code = empty_laid(z, last, p.shape, torch.uint8)
        scale, shift = _vector(scale), _vector(shift)
        _native.affine_relu_max_pool(
            _DTYPES[z.dtype],
            last,
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
        p, last = common(p)
        code, g = laid(code, last), laid(g, last)
        gz = empty_laid(p, last, (*p.shape[:2], *size))
        scale = _vector(scale)
        s = self.attribution(p, g) if attribute else _sums(p).zero_()
        _native.affine_relu_max_pool_backward(
            _DTYPES[p.dtype],
            last,
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
        x, last = common(x)
        g = laid(g, last)
        s = _sums(x)
        _native.attribution(
            _DTYPES[x.dtype],
            last,
            *_sizes(x),
            x.data_ptr(),
            g.data_ptr(),
            s.data_ptr(),
            absolute,
            torch.get_num_threads(),
        )
        return s

    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        theta, offsets = theta.contiguous(), offsets.contiguous()
        out = torch.empty_like(theta)
        _native.segment_normalize(
            _DTYPES[theta.dtype],
            theta.data_ptr(),
            offsets.data_ptr(),
            offsets.numel() - 1,
            out.data_ptr(),
            _NORMS[kind],
            torch.get_num_threads(),
        )
        return out
