"""What every backend with kernels of its own does around a launch.

The forms of the ops stand here once: in place or into new memory, the layout that all tensors of a launch
share, what is copied and put back, what is empty. A backend adds the launches. Arguments were checked by
`attrfast.ops`. Must not know where a kernel runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from attrfast.layouts import common, empty_laid, laid, put_back
from attrfast.reference import INF, compute_dtype, pooled_size

Tensor = torch.Tensor
Pair = tuple[int, int]


class Windows(NamedTuple):
    """Geometry of a 2-d pooling: height before width."""

    size: Pair
    pooled: Pair
    kernel: Pair
    stride: Pair
    padding: Pair


def _pair(values: Sequence[int]) -> Pair:
    first, second = values
    return int(first), int(second)


def sums(x: Tensor, wanted: bool = True) -> Tensor:
    """New memory for one sum a sample and channel, or none of it."""
    shape = x.shape[:2] if wanted else (0,)
    return torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else laid(v, False)


class LaunchingBackend(ABC):
    """The ops of `attrfast.reference`, by launches that a subclass defines.

    A launch gets tensors that all lie channels-last (`last`) or all contiguous, contiguous vectors, and at
    least one element to write; it fills what it is given to write, and all of it.
    """

    name: ClassVar[str]
    has_winograd: ClassVar[bool] = False  # whether it convolves by `attrfast.winograd`
    has_pointwise: ClassVar[bool] = False  # likewise by `attrfast.pointwise`
    has_depthwise: ClassVar[bool] = False  # likewise by `attrfast.depthwise`
    has_joined: ClassVar[bool] = False  # whether it has the launches of `attrfast.joined`

    @abstractmethod
    def check_device(self, kind: str) -> None:
        """Whether tensors on such a device can be worked on.

        Raises:
            BackendError: they can't.
        """

    @abstractmethod
    def segment_normalize(self, theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
        """See `attrfast.reference.segment_normalize`."""

    # -- launches ------------------------------------------------------------------------------------

    @abstractmethod
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
        """Fills y, which may be z, and count where it is given."""

    @abstractmethod
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
        """Fills gz, g1 where it is given (either may be g), and s unless `attribute` is 0."""

    @abstractmethod
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
        """Fills p and code, and count where it is given."""

    @abstractmethod
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
        """Fills gz, and s if `attribute`."""

    @abstractmethod
    def _attribution(self, x: Tensor, last: bool, g: Tensor | None, s: Tensor, absolute: bool) -> None:
        """Fills s; without g, with the count of what is not zero."""

    # -- the ops -------------------------------------------------------------------------------------

    def affine_relu_(
        self,
        z: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
        count: bool = False,
    ) -> Tensor:
        x, last = common(z)
        n = self._forward(x, last, scale, shift, residual, x, lower, upper, count)
        put_back(z, x)
        return n

    def affine_relu(
        self,
        z: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        lower: float = 0.0,
        upper: float = INF,
        count: bool = False,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Into `out` where it is given: of z's shape and dtype, and dense in the layout that z has."""
        x, last = common(z)
        y = empty_laid(x, last, x.shape) if out is None else out
        return y, self._forward(x, last, scale, shift, residual, y, lower, upper, count)

    def _forward(
        self,
        x: Tensor,
        last: bool,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        lower: float,
        upper: float,
        count: bool,
    ) -> Tensor:
        if residual is not None:
            residual = laid(residual, last)
        n = sums(x, count)
        if x.numel():
            self._affine_relu(
                *(x, last, _vector(scale), _vector(shift), residual, y),
                *(n if count else None, lower, upper),
            )
        elif count:
            n.zero_()
        return n

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
        s = self._gradient(a, last, grad, None, scale, None, grad, lower, upper, guided, int(attribute))
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
        s = self._gradient(a, last, grad, None, scale, None, gz, lower, upper, guided, int(attribute))
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
        s = self._gradient(a, last, grad, residual, scale, grad, gz, lower, upper, guided, attribute)
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
        s = self._gradient(a, last, grad, residual, scale, g1, gz, lower, upper, guided, attribute)
        return g1, gz, s

    def _gradient(
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
        # The residual is read for the flow through z's branch alone.
        residual = laid(residual, last) if residual is not None and attribute == 2 else None
        s = sums(a)
        if not attribute or not a.numel():
            s.zero_()
        if a.numel():
            self._backward(
                *(a, last, g, residual, _vector(scale), g1, gz, s),
                *(lower, upper, guided, attribute),
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
        count: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, last = common(z)
        size = z.shape[2:]
        pooled = [pooled_size(size[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)]
        p = empty_laid(z, last, (*z.shape[:2], *pooled))
        code = empty_laid(z, last, p.shape, torch.uint8)
        windows = Windows(*map(_pair, (size, pooled, kernel, stride, padding)))
        n = sums(z, count)
        if p.numel():
            self._max_pool(
                *(z, last, _vector(scale), _vector(shift), p, code),
                *(n if count else None, windows, lower, upper),
            )
        return p, code, n

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
        windows = Windows(*map(_pair, (size, p.shape[2:], kernel, stride, padding)))
        s = sums(p)
        if not attribute or not p.numel():
            s.zero_()
        if gz.numel():
            self._max_pool_backward(
                *(p, last, code, g, _vector(scale), gz, s, windows),
                *(lower, upper, guided, attribute),
            )
        return gz, s

    def attribution(self, x: Tensor, g: Tensor, absolute: bool = False) -> Tensor:
        return self._sums(x, g, absolute)

    def count_nonzero(self, x: Tensor) -> Tensor:
        return self._sums(x, None, False)

    def _sums(self, x: Tensor, g: Tensor | None, absolute: bool) -> Tensor:
        x, last = common(x)
        g = None if g is None else laid(g, last)
        s = sums(x)
        if x.numel():
            self._attribution(x, last, g, s, absolute)
        else:
            s.zero_()
        return s
