"""The CUDA backend: launches of `attrfast._native.cuda` over raw pointers.

Nothing here waits for the GPU: launches go to PyTorch's current stream, and
memory comes from PyTorch, which does not hand it out again before the stream is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attrfast.errors import BackendError
from attrfast.launching import LaunchingBackend, Windows, sums
from attrfast.layouts import common, laid
from attrfast.pointers import DTYPES, NORMS, pointer, shape_of

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


def _scratch(count: int, x: Tensor) -> Tensor | None:
    """Memory for the pieces of sums that take two stages."""
    return torch.empty(count, dtype=torch.float64, device=x.device) if count else None


class CudaBackend(LaunchingBackend):
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
        if kind != "cuda":
            raise BackendError(f"ATTRFAST_BACKEND=cuda can't be used on a tensor on {kind}")

    def _affine_relu(
        self,
        z: Tensor,
        last: bool,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        count: Tensor | None,
        lower: float,
        upper: float,
    ) -> None:
        shape = shape_of(z, last)
        scratch = _scratch(0 if count is None else self._launches.sums_scratch(*shape), z)
        self._launches.affine_relu(
            *shape,
            *map(pointer, (z, scale, shift, residual, y, count)),
            lower,
            upper,
            pointer(scratch),
            *self._queue(z),
        )

    def _backward(
        self,
        a: Tensor,
        last: bool,
        g: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        g1: Tensor | None,
        gz: Tensor,
        s: Tensor,
        lower: float,
        upper: float,
        guided: bool,
        attribute: int,
    ) -> None:
        shape = shape_of(a, last)
        scratch = _scratch(self._launches.sums_scratch(*shape) if attribute else 0, a)
        self._launches.affine_relu_backward(
            *shape,
            *map(pointer, (a, g, scale, residual, g1, gz, s)),
            lower,
            upper,
            guided,
            attribute,
            pointer(scratch),
            *self._queue(a),
        )

    def _max_pool(
        self,
        z: Tensor,
        last: bool,
        scale: Tensor | None,
        shift: Tensor | None,
        p: Tensor,
        code: Tensor,
        count: Tensor | None,
        windows: Windows,
        lower: float,
        upper: float,
    ) -> None:
        shape = (*shape_of(z, last)[:4], *windows)
        scratch = _scratch(0 if count is None else self._launches.pool_scratch(*shape), z)
        self._launches.affine_relu_max_pool(
            *shape,
            *map(pointer, (z, scale, shift, p, code, count)),
            lower,
            upper,
            pointer(scratch),
            *self._queue(z),
        )

    def _max_pool_backward(
        self,
        p: Tensor,
        last: bool,
        code: Tensor,
        g: Tensor,
        scale: Tensor | None,
        gz: Tensor,
        s: Tensor,
        windows: Windows,
        lower: float,
        upper: float,
        guided: bool,
        attribute: bool,
    ) -> None:
        shape = (*shape_of(p, last)[:4], *windows)
        scratch = _scratch(self._launches.pool_backward_scratch(*shape) if attribute else 0, p)
        self._launches.affine_relu_max_pool_backward(
            *shape,
            *map(pointer, (p, code, g, scale, gz, s if attribute else None)),
            lower,
            upper,
            guided,
            pointer(scratch),
            *self._queue(p),
        )

    def _attribution(self, x: Tensor, last: bool, g: Tensor | None, s: Tensor, absolute: bool) -> None:
        shape = shape_of(x, last)
        scratch = _scratch(self._launches.sums_scratch(*shape), x)
        self._launches.attribution(
            *shape, *map(pointer, (x, g, s)), absolute, pointer(scratch), *self._queue(x)
        )

    def attributions(
        self, taps: Sequence[tuple[Tensor, Tensor]], absolute: bool = False
    ) -> list[Tensor]:
        """`attribution` of many small pairs (x, g) on one device, in as few launches as hold them."""
        found, rows, kept = [], [], []
        for given, gradient in taps:
            x, last = common(given)
            g = laid(gradient, last)
            s = sums(x)
            kept += [x, g]  # copies must live until the launch is queued
            found.append(s)
            rows.append((*shape_of(x, last), *map(pointer, (x, g, s)), x.shape[1]))
        if not found:
            return []
        self._launches.many_taps(rows, absolute, *self._queue(found[0]))
        return found

    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        theta, offsets = laid(theta, False), laid(offsets, False)
        out = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        self._launches.segment_normalize(
            DTYPES[theta.dtype],
            theta.data_ptr(),
            offsets.data_ptr(),
            offsets.numel() - 1,
            theta.numel(),
            out.data_ptr(),
            NORMS[kind],
            *self._queue(theta),
        )
        return out
