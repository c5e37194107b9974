"""What must come out of a call of an op, and how near; what must not be written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from op_cases import MUTATES, SENTINEL, Call, outside, whole
from torch.overrides import TorchFunctionMode

from attrfast import reference
from attrfast.buffers import Buffers
from attrfast.reference import INF, compute_dtype

try:
    from attrfast import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# The instruction sets whose kernels this processor runs; empty where the native module is not built.
ISAS = _native.available_isas() if _native is not None else []

Tensor = torch.Tensor
POISON = math.nan

# Allowed error: ROUNDING * the result + TERMS * the sum of the sizes of the terms that make it up.
# ROUNDING is half a unit in the last place, for the one store. TERMS is a few roundings of the compute
# type, for products, and for sums of a few terms. SUMS are as many times that, for sums over positions,
# however many there are: at most 512 terms, in at least 4 lanes of float32 or 2 of float64, are added up
# before they go into a double. Where all of them are equal, each is rounded alike, by up to an eighth of a
# unit: 16 units for 128 of float32, 32 for 256 of float64. (Mixed terms stay below three.)
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
TERMS = {torch.float32: 6 * 2.0**-23, torch.float64: 6 * 2.0**-52}
SUMS = {torch.float32: 3, torch.float64: 6}
if os.environ.get("ATTRFAST_SANITIZE") == "1":  # built without vectors: 512 terms in one lane, 64 units
    SUMS = {torch.float32: 12, torch.float64: 12}


class Poisoned(Buffers):
    """Memory full of NaN: what a kernel reads before it was written shows."""

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        return super().empty(shape, strides, dtype).fill_(torch.nan)

    def scratch(self, count: int) -> Tensor:
        return super().scratch(count).fill_(torch.nan)

    def piece(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        return super().piece(shape, strides, dtype).fill_(torch.nan)


def laid(x: Tensor) -> Tensor:
    """x (N, C, H, W), channels-last."""
    return x.movedim(1, 3).contiguous().movedim(3, 1)


def stored(bound: float | None, dtype: torch.dtype, otherwise: float) -> float:
    """A bound as a tensor of that dtype holds it."""
    return otherwise if bound is None else torch.tensor(bound, dtype=dtype).item()


def exact(call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """The results in float64, and what `assert_close` wants: the sum of the sizes of the terms that each is
    made of, times SUMS for a sum over positions."""
    dtype = call.first.dtype
    args = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in call.args.items()
    }
    if "lower" in args:
        args["lower"] = stored(args["lower"], dtype, -INF)
        args["upper"] = stored(args["upper"], dtype, INF)
    results = getattr(reference, call.base)(**args)
    results = list(results) if isinstance(results, tuple) else [results]
    size = {name: x.abs() if isinstance(x, Tensor) else x for name, x in args.items()}
    unbounded = {"lower": -INF, "upper": INF}
    if call.base in ("affine_relu", "affine_relu_max_pool"):
        *terms, _ = getattr(reference, call.base)(**size | unbounded)
        *_, count = results
        return results, [*terms, _doubtful(call, args, terms[0]) if len(count) else count]
    if call.base == "count_nonzero":
        return results, [torch.zeros_like(results[0])]
    if call.base == "attribution":
        return results, [SUMS[compute_dtype(dtype)] * reference.attribution(size["x"], size["g"])]
    if call.base == "affine_relu_max_pool_backward":
        terms = reference.affine_relu_max_pool_backward(
            **{**args, "g": size["g"], "scale": size["scale"], "guided": False}
        )[:1]
        flow = size["p"]
    else:
        terms = tuple(x.abs() for x in results[:-1])
        flow = size["a"] + (size["residual"] if args["attribute"] == 2 else 0)
    sums = SUMS[compute_dtype(dtype)] * reference.attribution(flow, size["g"])
    return results, [*terms, sums if args["attribute"] else torch.zeros_like(sums)]


def _doubtful(call: Call, args: dict[str, Any], size: Tensor) -> Tensor:
    """For `assert_close`: in how many positions of a channel rounding decides whether it is zero."""
    dtype = compute_dtype(call.first.dtype)
    if call.base == "affine_relu_max_pool":  # its arguments are such that nothing is rounded
        return torch.zeros_like(size.flatten(2).sum(2))
    y, _ = reference.affine_relu(**args | {"lower": -INF, "upper": INF})
    doubtful = (y != 0) & (y.abs() <= TERMS[dtype] * size + torch.finfo(call.first.dtype).tiny)
    return doubtful.double().flatten(2).sum(2) / TERMS[dtype] if y.dim() > 2 else doubtful / TERMS[dtype]


def assert_close(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """Within the table's tolerance; whole numbers must be equal."""
    assert got.shape == want.shape
    if not got.is_floating_point():
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        return
    limit = ROUNDING[got.dtype] * want.abs() + TERMS[compute_dtype(got.dtype)] * terms
    limit += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    error = (got.double() - want).abs()
    wrong = ~(error <= limit)  # NaN counts as wrong
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are wrong, first at {at}: {got[at].item()}, expected "
            f"{want[at].item()}, off by {error[at] / limit[at]:.3g} times the tolerance"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, -0 told from 0; all NaN are one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole_number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    x, y = (torch.where(t.isnan(), torch.zeros_like(t), t).contiguous() for t in (a, b))
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(x.view(whole_number), y.view(whole_number))


@contextmanager
def unchanged(call: Call) -> Iterator[None]:
    """No argument changes but the one that is written, and nothing around that one."""
    written = MUTATES.get(call.op)
    before = {name: whole(x).clone() for name, x in call.tensors.items() if name != written}
    around = outside(call.args[written]).clone() if written else None
    yield
    for name, memory in before.items():
        assert same_bits(whole(call.args[name]), memory), f"{name} was written into"
    if around is not None:
        assert same_bits(outside(call.args[written]), around), f"something beside {written} was written"


@contextmanager
def using(isa: str) -> Iterator[None]:
    """The kernels of one instruction set."""
    assert _native is not None
    before = _native.isa()
    _native.use_isa(isa)
    try:
        yield
    finally:
        _native.use_isa(before)


class GuardedMemory(TorchFunctionMode):
    """`torch.empty` gives memory full of NaN (of 255 for bytes), with guards on both sides.

    Reaches what Python code allocates outside the dispatcher.
    """

    GUARD = 35  # an odd number, so that results are not aligned

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        like = torch.empty(*args, **{**kwargs, "device": "meta"})
        count = like.numel()
        device = (kwargs or {}).get("device")
        row = torch.full((count + 2 * self.GUARD,), SENTINEL, device=device).to(like.dtype)
        row[self.GUARD : self.GUARD + count] = POISON if like.is_floating_point() else 255
        self.given.append((row, count))
        return row.as_strided(like.shape, like.stride(), self.GUARD)

    def check(self) -> None:
        assert self.given, "nothing was allocated by torch.empty: the guards watch nothing"
        for row, count in self.given:
            guards = torch.cat([row[: self.GUARD], row[self.GUARD + count :]])
            assert (guards == SENTINEL).all(), "something was written beside a result"
