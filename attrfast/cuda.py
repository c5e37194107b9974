"""The CUDA backend: tensors in, launches of `attrfast._native.cuda` over raw pointers out.

Contiguous and channels-last tensors are used as they lie; anything else is copied first. Arguments were
checked by `attrfast.ops`. Nothing here waits for the GPU: launches go to PyTorch's current stream, and
memory comes from PyTorch, which does not hand it out again before the stream is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attrfast.errors import BackendError
from attrfast.layouts import common, empty_laid, laid, put_back
from attrfast.reference import INF, compute_dtype, pooled_size

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NORMS = {"l2": 0, "mean": 1, "max": 2}

Tensor = torch.Tensor


def unusable() -> str:
    """Why the CUDA kernels can't run here, or nothing."""
    try:
        from attrfast import _native
    except ImportError as error:
        return f"the native module is not built ({error})"
    if getattr(_native, "cuda", None) is None:
        return "the native module was built without the CUDA sources; `python -m attrfast.env` says why"
    if not torch.cuda.is_available():
        return "no GPU was found"
    return ""


def _queue(x: Tensor) -> tuple[int, int]:
    """The device of x and the stream that PyTorch works on there."""
    device = torch.cuda.current_device() if x.device.index is None else x.device.index
    return device, torch.cuda.current_stream(device).cuda_stream


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


def _scratch(count: int, x: Tensor) -> Tensor | None:
    """Memory for the pieces of sums that take two stages."""
    return torch.empty(count, dtype=torch.float64, device=x.device) if count else None


class CudaBackend:
    """The ops of `attrfast.reference`, by the CUDA kernels.

    Args:
        launches: the module of launches; `attrfast._native.cuda` if None.
        queue: the device and stream for a tensor.
    """

    name = "cuda"

    def __init__(
        self, launches: Any = None, queue: Callable[[Tensor], tuple[int, int]] = _queue
    ) -> None:
        if launches is None:
            from attrfast import _native

            launches = _native.cuda
        self._launches = launches
        self._queue = queue

    def check_device(self, kind: str) -> None:
        """Whether tensors on such a device can be worked on.

        Raises:
            BackendError: they can't.
        """
        if kind != "cuda":
            raise BackendError(f"ATTRFAST_BACKEND=cuda can't be used on a tensor on {kind}")

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
        self._launches.affine_relu(
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
            *self._queue(z),
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
        shape = (_DTYPES[a.dtype], last, *_sizes(a))
        scratch = _scratch(self._launches.sums_scratch(*shape) if attribute else 0, a)
        self._launches.affine_relu_backward(
            *shape,
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
            _pointer(scratch),
            *self._queue(a),
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
        self._launches.affine_relu_max_pool(
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
            *self._queue(z),
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
        s = _sums(p) if attribute else _sums(p).zero_()
        shape = (
            _DTYPES[p.dtype],
            last,
            p.shape[0],
            p.shape[1],
            tuple(size),
            tuple(p.shape[2:]),
            tuple(kernel),
            tuple(stride),
            tuple(padding),
        )
        scratch = _scratch(self._launches.pool_scratch(*shape) if attribute else 0, p)
        self._launches.affine_relu_max_pool_backward(
            *shape,
            p.data_ptr(),
            code.data_ptr(),
            g.data_ptr(),
            _pointer(scale),
            gz.data_ptr(),
            s.data_ptr() if attribute else 0,
            lower,
            upper,
            guided,
            _pointer(scratch),
            *self._queue(p),
        )
        return gz, s

    def attribution(self, x: Tensor, g: Tensor, absolute: bool = False) -> Tensor:
        x, last = common(x)
        g = laid(g, last)
        s = _sums(x)
        shape = (_DTYPES[x.dtype], last, *_sizes(x))
        scratch = _scratch(self._launches.sums_scratch(*shape), x)
        self._launches.attribution(
            *shape,
            x.data_ptr(),
            g.data_ptr(),
            s.data_ptr(),
            absolute,
            _pointer(scratch),
            *self._queue(x),
        )
        return s

    def attributions(
        self, taps: Sequence[tuple[Tensor, Tensor]], absolute: bool = False
    ) -> list[Tensor]:
        """`attribution` of many pairs (x, g) on one device, in one launch: for small ones."""
        sums, rows, kept = [], [], []
        for given, gradient in taps:
            x, last = common(given)
            g = laid(gradient, last)
            s = _sums(x)
            kept += [x, g]  # copies must live until the launch is queued
            sums.append(s)
            pointers = (x.data_ptr(), g.data_ptr(), s.data_ptr())
            rows.append((_DTYPES[x.dtype], last, *_sizes(x), *pointers, x.shape[1]))
        if not sums:
            return []
        bytes_ = self._launches.tap_table_bytes(len(rows))
        table = torch.empty(bytes_, dtype=torch.uint8, device=sums[0].device)
        self._launches.many_taps(rows, absolute, table.data_ptr(), *self._queue(sums[0]))
        return sums

    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        theta, offsets = theta.contiguous(), offsets.contiguous()
        out = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        self._launches.segment_normalize(
            _DTYPES[theta.dtype],
            theta.data_ptr(),
            offsets.data_ptr(),
            offsets.numel() - 1,
            out.data_ptr(),
            _NORMS[kind],
            *self._queue(theta),
        )
        return out
