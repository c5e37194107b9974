"""The Triton backend. What devices and versions demand stands here alone.

Nothing here waits for the GPU, and memory comes from `torch.empty` alone, so
that calls can be captured in a CUDA graph (after a first call has compiled and chosen, see `launch.py`).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

from attrfast.errors import BackendError
from attrfast.kernels import affine_relu as forward
from attrfast.kernels import affine_relu_backward as backward
from attrfast.kernels import attribution as flow
from attrfast.kernels import max_pool, max_pool_backward, segment_normalize
from attrfast.kernels.launch import interpreted
from attrfast.kernels.max_pool import Pool
from attrfast.launching import LaunchingBackend, Windows
from attrfast.reference import compute_dtype

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


class TritonBackend(LaunchingBackend):
    """The ops of `attrfast.reference`, by the Triton kernels."""

    name = "triton"

    def check_device(self, kind: str) -> None:
        if interpreted() == (kind == "cpu") and kind in ("cpu", "cuda"):
            return
        advice = "that takes TRITON_INTERPRET=1, set before attrfast is imported"
        if interpreted():
            advice = "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it"
        raise BackendError(f"ATTRFAST_BACKEND=triton can't be used on a tensor on {kind}: {advice}")

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
        with _place(z):
            forward.affine_relu(z, scale, shift, residual, y, count, lower, upper, last)

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
        bounds = _stored(lower, a.dtype), _stored(upper, a.dtype)
        with _place(a):
            backward.affine_relu_backward(
                a, g, scale, residual, g1, gz, s, *bounds, guided, attribute, last
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
        with _place(z):
            max_pool.affine_relu_max_pool(
                z, scale, shift, p, code, count, _pool(windows), lower, upper, last
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
        bounds = _stored(lower, p.dtype), _stored(upper, p.dtype)
        with _place(p):
            max_pool_backward.affine_relu_max_pool_backward(
                p, code, g, scale, gz, s, _pool(windows), *bounds, guided, attribute, last
            )

    def _attribution(self, x: Tensor, last: bool, g: Tensor | None, s: Tensor, absolute: bool) -> None:
        with _place(x):
            flow.attribution(x, g, s, absolute, last)

    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        offsets = offsets.to(theta.device, non_blocking=True)
        with _place(theta):
            out: Tensor = segment_normalize.segment_normalize(theta, offsets, kind)
        return out


def _pool(windows: Windows) -> Pool:
    return Pool(*windows.size, *windows.pooled, windows.kernel, windows.stride, windows.padding)
