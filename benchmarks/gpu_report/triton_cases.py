"""The calls that stand for all: each path of each Triton kernel, and the bytes that it must move.

Shapes are those of ResNet and VGG layers, on the meta device, so that they take no memory. Where bytes
are counted in the interpreter, which is slow, the same maps run with one sample and a few channels: that
changes nothing in how often a row is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from attrfast.kernels.backend import TritonBackend
from attrfast.reference import compute_dtype

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
USUAL = (64, 64, 56, 56)
POOLED = ((64, 64, 112, 112), (64, 64, 32, 32))
TILING = ([2, 2], [2, 2], [0, 0])
OVERLAPPING = ([3, 3], [2, 2], [1, 1])


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        name: of the call, with the shape.
        run: makes it, on a device.
        floor: bytes that it must move: each input once, each result once.
        aligned: whether rows begin at multiples of 16 bytes and windows let them be read as they lie.
        usual: whether it is the one shape that stands for its op where not every shape is tried.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[str], None]
    floor: int
    aligned: bool
    usual: bool


def _laid(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.zeros(shape, dtype=dtype, device=device).to(memory_format=form)


def cases(small: bool = False) -> Iterator[Case]:
    """Every path, in every dtype; the small ones have the names of the large."""
    for dtype in DTYPES:
        for last in (False, True):
            shapes = [USUAL, (64, 256, 14, 14), (64, 512, 7, 7)]
            if not last:
                shapes += [(64, 64, 112, 112), (64, 512, 2, 2), (64, 4096)]
            else:
                shapes += [(64, 16, 32, 32)]
            for shape in shapes:
                yield from _elementwise(shape, _shrunk(shape, last) if small else shape, dtype, last)
            for shape in POOLED:
                yield from _pooling(shape, _shrunk(shape, last) if small else shape, dtype, last)
        yield _normalisation(dtype)


def _shrunk(shape: tuple[int, ...], last: bool) -> tuple[int, ...]:
    return (1, *shape[1:]) if len(shape) == 2 else (1, 16 if last else 4, *shape[2:])


def _name(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype)[6:]}{' channels-last' if last else ''}"


def _elementwise(
    named: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, last: bool
) -> Iterator[Case]:
    backend = TritonBackend()
    e, wide = dtype.itemsize, compute_dtype(dtype)
    count = torch.Size(shape).numel()
    sums = shape[0] * shape[1] * wide.itemsize
    positions = torch.Size(shape[2:]).numel()
    aligned = last or positions * e % 16 == 0 or len(shape) == 2
    name, usual = _name(named, dtype, last), named == USUAL

    def arguments(device: str, tensors: int) -> list[Tensor]:
        made = [_laid(shape, dtype, last, device) for _ in range(tensors)]
        return [*made, torch.ones(shape[1], dtype=wide, device=device)]

    def forward(device: str) -> None:
        z, residual, scale = arguments(device, 2)
        backend.affine_relu_(z, scale, scale, residual)

    def counting(device: str) -> None:
        z, residual, scale = arguments(device, 2)
        backend.affine_relu_(z, scale, scale, residual, count=True)

    def relu_backward(device: str) -> None:
        a, g, scale = arguments(device, 2)
        backend.affine_relu_backward_(a, g, scale)

    def add_backward(device: str) -> None:
        a, g, residual, scale = arguments(device, 3)
        backend.affine_add_relu_backward_(a, g, residual, scale, guided=True, attribute=2)

    def alone(device: str) -> None:
        x, g, _ = arguments(device, 2)
        backend.attribution(x, g)

    def nonzero(device: str) -> None:
        backend.count_nonzero(arguments(device, 1)[0])

    yield Case(f"affine_relu {name}", dtype, forward, 3 * count * e, aligned, usual)
    yield Case(f"affine_relu counting {name}", dtype, counting, 3 * count * e + sums, aligned, usual)
    yield Case(f"count_nonzero {name}", dtype, nonzero, count * e + sums, aligned, usual)
    yield Case(
        f"affine_relu_backward {name}", dtype, relu_backward, 3 * count * e + sums, aligned, usual
    )
    yield Case(
        f"affine_add_relu_backward {name}", dtype, add_backward, 5 * count * e + sums, aligned, usual
    )
    yield Case(f"attribution {name}", dtype, alone, 2 * count * e + sums, aligned, usual)


def _pooling(
    named: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, last: bool
) -> Iterator[Case]:
    backend = TritonBackend()
    e, wide = dtype.itemsize, compute_dtype(dtype)
    n, c, h, w = shape
    for kind, pool in (("2x2", TILING), ("3x3 overlapping", OVERLAPPING)):
        aligned, usual = last or pool is TILING, named == POOLED[0]
        name = f"{kind} {_name(named, dtype, last)}"

        def forward(device: str, pool: tuple[list[int], ...] = pool, *, count: bool = False) -> None:
            z, scale = _laid(shape, dtype, last, device), torch.ones(c, dtype=wide, device=device)
            backend.affine_relu_max_pool(z, scale, scale, *pool, count=count)

        def backward(device: str, pool: tuple[list[int], ...] = pool) -> None:
            scale = torch.ones(c, dtype=wide, device=device)
            p = _laid((n, c, h // 2, w // 2), dtype, last, device)
            code = _laid(tuple(p.shape), torch.uint8, last, device)
            g = _laid(tuple(p.shape), dtype, last, device)
            backend.affine_relu_max_pool_backward(p, code, g, scale, [h, w], *pool)

        windows = n * c * (h // 2) * (w // 2)
        moved = e * n * c * h * w + windows * (e + 1)
        sums = n * c * wide.itemsize
        counting = functools.partial(forward, count=True)
        yield Case(f"max_pool {name}", dtype, forward, moved, aligned, usual)
        yield Case(f"max_pool counting {name}", dtype, counting, moved + sums, aligned, usual)
        yield Case(
            f"max_pool_backward {name}", dtype, backward, moved + windows * e + sums, aligned, usual
        )


def _normalisation(dtype: torch.dtype) -> Case:
    backend = TritonBackend()

    def run(device: str) -> None:
        theta = torch.ones(4224, dtype=dtype, device=device)
        # Thirteen layers of VGG-16; their sizes decide nothing when kernels are compiled.
        sizes = torch.tensor([0, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512])
        backend.segment_normalize(theta, sizes.cumsum(0).to(device), "l2")

    # Read by segments that begin anywhere: nothing is known of their alignment.
    return Case(
        f"segment_normalize 4224 {str(dtype)[6:]}", dtype, run, 2 * 4224 * dtype.itemsize, False, True
    )
