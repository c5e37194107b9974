"""The Triton backend: tensors in, launches out. What devices and versions demand stands here alone.

Contiguous and channels-last tensors are used as they lie; anything else is copied first. Arguments were
checked by `attrfast.ops`. Nothing here waits for the GPU, and memory comes from `torch.empty` alone, so
that calls can be captured in a CUDA graph (after a first call has compiled and chosen, see `launch.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from attrfast.errors import BackendError
from attrfast.kernels import affine_relu as forward
from attrfast.kernels import affine_relu_backward as backward
from attrfast.kernels import attribution as flow
from attrfast.kernels import max_pool, max_pool_backward, segment_normalize
from attrfast.kernels.launch import interpreted
from attrfast.kernels.max_pool import Pool
from attrfast.layouts import common, empty_laid, laid, put_back
from attrfast.reference import INF, compute_dtype, pooled_size

Tensor = torch.Tensor


def unusable() -> str:
    """Why Triton kernels can't run here, or nothing."""
    if interpreted() or torch.cuda.is_available():
        return ""
    return "no GPU was found, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"


def _place(x: Tensor) -> AbstractContextManager[None]:
    """Where a launch goes: Triton takes the current device, which need not be the tensor's."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)  # type: ignore[return-value]
    return nullcontext()


@functools.cache
def _stored(bound: float, dtype: torch.dtype) -> float:
    """A bound as a tensor of that dtype holds it."""
    wide = torch.tensor(bound, dtype=compute_dtype(dtype), device="cpu")
    return wide.to(dtype).item()


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _sums(x: Tensor) -> Tensor:
    """New memory for one sum a sample and channel."""
    return torch.empty(x.shape[:2], dtype=compute_dtype(x.dtype), device=x.device)


class TritonBackend:
    """The ops of `attrfast.reference`, by the Triton kernels."""

    name = "triton"

    def check_device(self, kind: str) -> None:
        """Whether tensors on such a device can be worked on.

        Raises:
            BackendError: they can't.
        """
        if interpreted() == (kind == "cpu") and kind in ("cpu", "cuda"):
            return
        advice = "that takes TRITON_INTERPRET=1, set before attrfast is imported"
        if interpreted():
            advice = "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it"
        raise BackendError(f"ATTRFAST_BACKEND=triton can't be used on a tensor on {kind}: {advice}")

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
        with _place(z):
            if z.numel():
                forward.affine_relu(z, _vector(scale), _vector(shift), residual, y, lower, upper, last)

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
        bounds = _stored(lower, a.dtype), _stored(upper, a.dtype)
        residual = laid(residual, last) if residual is not None and attribute == 2 else None
        s = _sums(a)
        with _place(a):
            if not attribute or not a.numel():
                s.zero_()
            if a.numel():
                backward.affine_relu_backward(
                    a, g, _vector(scale), residual, g1, gz, s, *bounds, guided, attribute, last
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
        rows, columns = (
            pooled_size(size[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)
        )
        p = empty_laid(z, last, (*z.shape[:2], rows, columns))
        code = empty_laid(z, last, p.shape, torch.uint8)
        pool = _pool(size, (rows, columns), kernel, stride, padding)
        with _place(z):
            if p.numel():
                max_pool.affine_relu_max_pool(
                    z, _vector(scale), _vector(shift), p, code, pool, lower, upper, last
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
        bounds = _stored(lower, p.dtype), _stored(upper, p.dtype)
        pool = _pool(size, p.shape[2:], kernel, stride, padding)
        s = _sums(p)
        with _place(p):
            if not attribute or not p.numel():
                s.zero_()
            if gz.numel():
                max_pool_backward.affine_relu_max_pool_backward(
                    p, code, g, _vector(scale), gz, s, pool, *bounds, guided, attribute, last
                )
        return gz, s

    def attribution(self, x: Tensor, g: Tensor, absolute: bool = False) -> Tensor:
        x, last = common(x)
        g = laid(g, last)
        s = _sums(x)
        with _place(x):
            if x.numel():
                flow.attribution(x, g, s, absolute, last)
            else:
                s.zero_()
        return s

    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        offsets = offsets.to(theta.device, non_blocking=True)
        with _place(theta):
            out: Tensor = segment_normalize.segment_normalize(theta, offsets, kind)
        return out


def _pool(
    size: Sequence[int],
    pooled: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Pool:
    pairs = [(int(a), int(b)) for a, b in (kernel, stride, padding)]
    return Pool(size[0], size[1], pooled[0], pooled[1], *pairs)
