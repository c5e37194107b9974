"""Calls of the ops that their tests share: arguments of every dtype, shape and stride.

Must not know what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from attrfast import ops, reference
from attrfast.reference import INF, compute_dtype

Tensor = torch.Tensor

# The argument that an in-place form writes into. Its result comes first, as in the form without "_".
MUTATES = {"affine_relu_": "z", "affine_relu_backward_": "g", "affine_add_relu_backward_": "g"}
OPS = (
    *("affine_relu", "affine_relu_backward", "affine_add_relu_backward", "attribution"),
    *("count_nonzero", "affine_relu_max_pool", "affine_relu_max_pool_backward", *MUTATES),
)
# The last two bounds are no numbers of any of the binary types.
BOUNDS = ((0.0, None), (0.0, 6.0), (None, None), (-1.0, 1.0), (-0.3, 0.7))
SENTINEL = 77.0  # lies beside arguments; exact in every dtype
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# -- strides ------------------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _reversed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _part_of(x: Tensor, shape: tuple[int, ...], place: tuple[Any, ...]) -> Tensor:
    """x as a part of a larger tensor full of sentinels."""
    part = torch.full(shape, SENTINEL, dtype=x.dtype)[place]
    return part.copy_(x)


def _some_channels(x: Tensor) -> Tensor:
    n, c, *size = x.shape
    return _part_of(x, (n, c + 2, *size), (slice(None), slice(1, -1)))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": _channels_last,
    "reversed": _reversed,
    "every other element": lambda x: _part_of(
        x, (*x.shape[:-1], 2 * x.shape[-1] + 1), (..., slice(1, None, 2))
    ),
    "some channels": _some_channels,
    "some channels, channels last": lambda x: _channels_last_part(x),
    "later samples": lambda x: _part_of(x, (x.shape[0] + 1, *x.shape[1:]), (slice(1, None),)),
}
# Elements that share memory: only for what is read. They replace the values.
SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "one sample": lambda x: x[:1].expand_as(x),
    "one value": lambda x: x.new_full((), 0.75).expand(x.shape),
}


def _channels_last_part(x: Tensor) -> Tensor:
    n, c, *size = x.shape
    return _part_of(x.movedim(1, -1), (n, *size, c + 2), (..., slice(1, -1))).movedim(-1, 1)


# -- calls --------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """An op and its arguments by name."""

    op: str
    args: dict[str, Any]

    @property
    def base(self) -> str:
        return self.op.rstrip("_")

    @property
    def first(self) -> Tensor:
        return next(iter(self.args.values()))  # type: ignore[no-any-return]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.args.items() if isinstance(x, Tensor)}

    def with_args(self, **args: Any) -> Call:
        return Call(self.op, {**self.args, **args})

    def run(self, function: Callable[..., Any] | None = None) -> list[Tensor]:
        """The results in the order of the form that is not in place."""
        out = (function or getattr(ops, self.op))(**self.args)
        results = [] if out is None else list(out) if isinstance(out, tuple | list) else [out]
        written = MUTATES.get(self.op)
        return results if written is None else [self.args[written], *results]

    def with_numbers(self) -> Call:
        """With infinities for missing bounds: what is called below the dispatcher."""
        if "lower" not in self.args:
            return self
        lower, upper = self.args["lower"], self.args["upper"]
        return self.with_args(
            lower=-INF if lower is None else lower, upper=INF if upper is None else upper
        )

    def copied(self) -> Call:
        """With its own memory for what is written, of the same strides."""
        written = MUTATES.get(self.op)
        return self.with_args(**{written: copy_of(self.args[written])}) if written else self


def copy_of(x: Tensor, device: torch.device | None = None) -> Tensor:
    """x and all that lies around it, in other memory: of the device, or of x's own."""
    base = whole(x)
    return base.to(device or x.device, copy=True).as_strided(
        x.shape, x.stride(), x.storage_offset() - base.storage_offset()
    )


def whole(x: Tensor) -> Tensor:
    """All of the memory that x is a view of, as one row."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((count,), (1,), 0)


def outside(x: Tensor) -> Tensor:
    """What lies around x in its memory."""
    row = whole(x)
    inside = torch.zeros_like(row, dtype=torch.bool)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return row[~inside]


def make_call(
    op: str,
    shape: tuple[int, ...] = (2, 3, 5, 7),
    dtype: torch.dtype = torch.float32,
    *,
    layouts: tuple[str, ...] = ("contiguous",),
    bounds: tuple[float | None, float | None] = (0.0, None),
    scale: bool = True,
    shift: bool = True,
    residual: bool = True,
    guided: bool = False,
    attribute: int = 1,
    absolute: bool = False,
    count: bool = True,
    pool: tuple[list[int], list[int], list[int], bool] = ([3, 2], [2, 1], [1, 0], False),
    coarse: bool = False,
    seed: int = 0,
) -> Call:
    """A call with random arguments, which take turns in the layouts.

    Args:
        coarse: few different values, halves of small integers, so that no sum is rounded and there are
            many equal ones.
    """
    random = torch.Generator().manual_seed(seed)
    turn = iter(layouts * 4)
    wide = compute_dtype(dtype)

    def values(*size: int) -> Tensor:
        if coarse:
            return torch.randint(-4, 5, size, generator=random) / 2
        return torch.randn(size, generator=random, dtype=torch.float64)

    def laid(x: Tensor) -> Tensor:
        name = next(turn)
        if x.is_floating_point():
            return (LAYOUTS | SHARED)[name](x.to(dtype))
        return LAYOUTS.get(name, torch.Tensor.contiguous)(x)  # the places of maxima must stay

    def vector(wanted: bool, step: int) -> Tensor | None:
        return values(step * shape[1]).to(wide)[::step] if wanted else None

    def activation(*size: int) -> Tensor:
        """Much of it exactly at the bounds."""
        x = values(*size) * 2
        for bound in bounds:
            if bound is not None:
                x = torch.where(torch.rand(size, generator=random) < 0.25, bound, x)
        return x.clamp(*bounds) if bounds != (None, None) else x

    base = op.rstrip("_")
    limits = {"lower": bounds[0], "upper": bounds[1]}
    kernel, stride, padding, ceil_mode = pool
    geometry = {"kernel": kernel, "stride": stride, "padding": padding}
    args: dict[str, Any]
    if base == "affine_relu":
        args = {"z": laid(values(*shape) * 2), "scale": vector(scale, 2), "shift": vector(shift, 1)}
        args |= {"residual": laid(values(*shape)) if residual else None, **limits, "count": count}
    elif base == "affine_relu_backward":
        args = {"a": laid(activation(*shape)), "g": laid(values(*shape)), "scale": vector(scale, 2)}
        args |= {**limits, "guided": guided, "attribute": attribute > 0}
    elif base == "affine_add_relu_backward":
        args = {"a": laid(activation(*shape)), "g": laid(values(*shape))}
        args |= {"residual": laid(values(*shape)) if residual or attribute == 2 else None}
        args |= {"scale": vector(scale, 1), **limits, "guided": guided, "attribute": attribute}
    elif base == "attribution":
        args = {"x": laid(values(*shape)), "g": laid(values(*shape)), "absolute": absolute}
    elif base == "count_nonzero":
        args = {"x": laid(activation(*shape))}
    elif base == "affine_relu_max_pool":
        args = {"z": laid(values(*shape) * 2), "scale": vector(scale, 2), "shift": vector(shift, 1)}
        args |= {**geometry, "ceil_mode": ceil_mode, **limits, "count": count}
    else:
        z = (values(*shape) * 2).to(dtype)
        forward = Call(
            "affine_relu_max_pool",
            {"z": z, "scale": None, "shift": None, **geometry, "ceil_mode": ceil_mode, **limits},
        )
        p, code, _ = reference.affine_relu_max_pool(**forward.with_numbers().args)
        args = {"p": laid(p), "code": laid(code), "g": laid(values(*p.shape))}
        args |= {"scale": vector(scale, 1), "size": list(shape[2:]), **geometry, **limits}
        args |= {"guided": guided, "attribute": attribute > 0}
    return Call(op, args)


_SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 17, 31])
_LONG = st.sampled_from([63, 64, 65, 511, 512, 513, 1031, 2111])  # around the lengths of blocks
_MOST = 20_000  # elements


@st.composite
def shapes(draw: st.DrawFn, pooled: bool) -> tuple[int, ...]:
    """(N, C, ...): empty, single and prime sizes, and rows longer than what is summed at once."""
    n = draw(st.sampled_from([1, 2, 3, 0]))
    if pooled:
        return n, draw(_SIZES), draw(st.integers(1, 12)), draw(st.integers(1, 20))
    size = [draw(_SIZES) for _ in range(draw(st.integers(0, 3)))]
    if size and draw(st.booleans()):
        size[-1] = draw(_LONG)
    shape = [n, draw(_SIZES), *size]
    if draw(st.integers(0, 9)) == 9:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    while math.prod(shape) > _MOST:
        largest = shape.index(max(shape[:-1])) if max(shape[:-1]) > 3 else len(shape) - 1
        shape[largest] = shape[largest] // 3
    return tuple(shape)


@st.composite
def pools(draw: st.DrawFn, size: tuple[int, ...]) -> tuple[list[int], list[int], list[int], bool]:
    """A pooling that has room in (H, W)."""
    kernel = [draw(st.integers(1, 5)) for _ in size]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    kernel = [min(k, n + 2 * p) for k, n, p in zip(kernel, size, padding, strict=True)]
    padding = [min(p, k // 2) for p, k in zip(padding, kernel, strict=True)]
    kernel = [min(k, n + 2 * p) for k, n, p in zip(kernel, size, padding, strict=True)]
    return kernel, [draw(st.integers(1, 6)) for _ in size], padding, draw(st.booleans())


@st.composite
def calls(draw: st.DrawFn, op: str) -> Call:
    pooled = "pool" in op
    shape = draw(shapes(pooled))
    layouts = [draw(st.sampled_from(sorted(LAYOUTS | SHARED))) for _ in range(3)]
    written = MUTATES.get(op)
    if written is not None:
        place = 0 if written == "z" else 1
        layouts[place] = draw(st.sampled_from(sorted(LAYOUTS)))
    return make_call(
        op,
        shape,
        draw(st.sampled_from(DTYPES)),
        layouts=tuple(layouts),
        bounds=draw(st.sampled_from(BOUNDS)),
        scale=draw(st.booleans()),
        shift=draw(st.booleans()),
        residual=draw(st.booleans()),
        guided=draw(st.booleans()),
        attribute=draw(st.integers(0, 2)),
        absolute=draw(st.booleans()),
        count=draw(st.booleans()),
        pool=draw(pools(shape[2:])) if pooled else ([1, 1], [1, 1], [0, 0], False),
        # A place of a maximum can only be compared where the values are exact.
        coarse=op == "affine_relu_max_pool" or draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 30)),
    )
