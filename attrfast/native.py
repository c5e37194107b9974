"""The CPU backend: launches of `attrfast._native` over raw pointers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attrfast import _native
from attrfast.errors import BackendError
from attrfast.launching import LaunchingBackend, Windows
from attrfast.layouts import laid
from attrfast.pointers import DTYPES, NORMS, pointer, shape_of

Tensor = torch.Tensor


class CpuBackend(LaunchingBackend):
    """The ops of `attrfast.reference`, by the native kernels."""

    name = "cpu"
    has_winograd = True
    has_pointwise = True
    has_depthwise = True
    has_joined = True

    def check_device(self, kind: str) -> None:
        if kind != "cpu":
            raise BackendError(f"ATTRFAST_BACKEND=cpu can't be used on a tensor on {kind}")

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
        _native.affine_relu(
            *shape_of(z, last),
            *map(pointer, (z, scale, shift, residual, y, count)),
            lower,
            upper,
            torch.get_num_threads(),
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
        _native.affine_relu_backward(
            *shape_of(a, last),
            *map(pointer, (a, g, scale, residual, g1, gz, s)),
            lower,
            upper,
            guided,
            attribute,
            torch.get_num_threads(),
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
        _native.affine_relu_max_pool(
            *shape_of(z, last)[:4],
            *windows,
            *map(pointer, (z, scale, shift, p, code, count)),
            lower,
            upper,
            torch.get_num_threads(),
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
        if attribute:
            self._attribution(p, last, g, s, False)
        _native.affine_relu_max_pool_backward(
            *shape_of(p, last)[:4],
            *windows,
            *map(pointer, (p, code, g, scale, gz)),
            lower,
            upper,
            guided,
            torch.get_num_threads(),
        )

    def _attribution(self, x: Tensor, last: bool, g: Tensor | None, s: Tensor, absolute: bool) -> None:
        _native.attribution(
            *shape_of(x, last), *map(pointer, (x, g, s)), absolute, torch.get_num_threads()
        )

    def winograd_floats(self, x: Tensor, channels: int, padding: Sequence[int]) -> int:
        """Floats of scratch that `winograd` needs."""
        size = tuple(x.shape[2:])
        shape = len(x), size, x.shape[1], channels, tuple(padding)
        return _native.winograd_floats(*shape, torch.get_num_threads())

    def winograd(
        self,
        x: Tensor,
        weight: Tensor,
        padding: Sequence[int],
        transposed: bool,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        lower: float,
        upper: float,
        y: Tensor,
        scratch: Tensor,
    ) -> None:
        """See `attrfast.winograd.convolve`; fills y, which lies channels-last as all others do."""
        reads, makes = (0, 1) if transposed else (1, 0)
        _native.winograd(
            len(x),
            tuple(x.shape[2:]),
            weight.shape[reads],
            weight.shape[makes],
            tuple(padding),
            x.data_ptr(),
            weight.data_ptr(),
            weight.stride(makes),
            weight.stride(reads),
            weight.stride(3),
            transposed,
            *map(pointer, (scale, shift, residual, y, scratch)),
            lower,
            upper,
            torch.get_num_threads(),
        )

    def pointwise_floats(self, x: Tensor, channels: int, backward: bool) -> int:
        """Floats of scratch that `pointwise` needs, or `pointwise_backward`."""
        shape = DTYPES[x.dtype], len(x), x.shape[2:].numel(), x.shape[1], channels
        return _native.pointwise_floats(*shape, backward, torch.get_num_threads())

    def pointwise(
        self,
        x: Tensor,
        weight: Tensor,
        transposed: bool,
        factor: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        lower: float,
        upper: float,
        y: Tensor,
        scratch: Tensor,
    ) -> None:
        """See `attrfast.pointwise.convolve`; fills y, which lies channels-last as all others do."""
        reads, makes = (0, 1) if transposed else (1, 0)
        _native.pointwise(
            DTYPES[x.dtype],
            len(x),
            x.shape[2:].numel(),
            weight.shape[reads],
            weight.shape[makes],
            x.data_ptr(),
            weight.data_ptr(),
            weight.stride(makes),
            weight.stride(reads),
            *map(pointer, (factor, scale, shift, residual, y, scratch)),
            lower,
            upper,
            torch.get_num_threads(),
        )

    def pointwise_backward(
        self,
        a: Tensor,
        g: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        scale: Tensor | None,
        g1: Tensor | None,
        gx: Tensor,
        s: Tensor,
        scratch: Tensor,
        lower: float,
        upper: float,
        guided: bool,
        attribute: int,
    ) -> None:
        """See `attrfast.pointwise.gradient`; fills gx, g1 where it is given, and s unless `attribute` is 0."""
        _native.pointwise_backward(
            DTYPES[g.dtype],
            len(g),
            g.shape[2:].numel(),
            *weight.shape[:2],
            *map(pointer, (a, g, residual, weight)),
            weight.stride(1),
            weight.stride(0),
            *map(pointer, (scale, g1, gx, s, scratch)),
            lower,
            upper,
            guided,
            attribute,
            torch.get_num_threads(),
        )

    def depthwise_floats(
        self,
        x: Tensor,
        size: Sequence[int],
        kernel: int,
        stride: int,
        padding: Sequence[int],
        transposed: bool,
    ) -> int:
        """Floats of scratch that `depthwise` needs, and `depthwise_backward` with `transposed`."""
        shape = *x.shape[:2], tuple(x.shape[2:]), size, kernel, stride, padding, transposed
        return _native.depthwise_floats(*shape, torch.get_num_threads())

    def depthwise(
        self,
        x: Tensor,
        size: Sequence[int],
        kernel: int,
        stride: int,
        padding: Sequence[int],
        transposed: bool,
        weight: Tensor,
        factor: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        lower: float,
        upper: float,
        y: Tensor,
        scratch: Tensor,
    ) -> None:
        """See `attrfast.depthwise.convolve`; fills y, which lies channels-last as all others do."""
        _native.depthwise(
            DTYPES[x.dtype],
            *x.shape[:2],
            tuple(x.shape[2:]),
            size,
            kernel,
            stride,
            padding,
            transposed,
            x.data_ptr(),
            weight.data_ptr(),
            *(weight.stride(i) for i in (0, 2, 3)),
            *map(pointer, (factor, scale, shift, residual, y, scratch)),
            lower,
            upper,
            torch.get_num_threads(),
        )

    def depthwise_backward(
        self,
        a: Tensor,
        g: Tensor,
        size: Sequence[int],
        kernel: int,
        stride: int,
        padding: Sequence[int],
        weight: Tensor,
        scale: Tensor | None,
        gx: Tensor,
        s: Tensor | None,
        scratch: Tensor,
        lower: float,
        upper: float,
        guided: bool,
    ) -> None:
        """See `attrfast.depthwise.gradient`; fills gx, and s where it is given."""
        _native.depthwise_backward(
            DTYPES[g.dtype],
            *g.shape[:2],
            tuple(g.shape[2:]),
            size,
            kernel,
            stride,
            padding,
            *map(pointer, (a, g, weight)),
            *(weight.stride(i) for i in (0, 2, 3)),
            *map(pointer, (scale, gx, s, scratch)),
            lower,
            upper,
            guided,
            torch.get_num_threads(),
        )

    def joined(
        self,
        parts: list[int],
        channels: list[int],
        last: bool,
        scale: Tensor,
        shift: Tensor,
        y: Tensor,
        lower: float,
        upper: float,
    ) -> None:
        """See `attrfast.joined.forward`; fills y, which lies channels-last or contiguous, as the parts do.

        Args:
            parts: where each begins in memory.
        """
        _native.joined(
            *shape_of(y, last),
            parts,
            channels,
            *map(pointer, (scale, shift, y)),
            lower,
            upper,
            torch.get_num_threads(),
        )

    def joined_backward(
        self,
        parts: list[int],
        channels: list[int],
        last: bool,
        g: Tensor,
        scale: Tensor,
        shift: Tensor,
        into: list[int],
        adds: Sequence[bool],
        s: Tensor | None,
        lower: float,
        upper: float,
        guided: bool,
    ) -> None:
        """See `attrfast.joined.gradient`; fills or adds to `into`, and fills s where it is given.

        Args:
            parts, into: where each begins in memory; 0 for none.
        """
        _native.joined_backward(
            *shape_of(g, last),
            parts,
            channels,
            *map(pointer, (g, scale, shift)),
            into,
            adds,
            pointer(s),
            lower,
            upper,
            guided,
            torch.get_num_threads(),
        )

    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        theta, offsets = laid(theta, False), laid(offsets, False)
        out = torch.empty_like(theta)
        _native.segment_normalize(
            DTYPES[theta.dtype],
            theta.data_ptr(),
            offsets.data_ptr(),
            offsets.numel() - 1,
            theta.numel(),
            out.data_ptr(),
            NORMS[kind],
            torch.get_num_threads(),
        )
        return out
