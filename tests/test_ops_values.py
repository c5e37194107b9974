"""Single values: NaN, infinities, zeros of both signs, subnormal numbers, values at a bound, rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from op_cases import BOUNDS, DTYPES, LAYOUTS, Call, make_call
from op_checks import ISAS, same_bits, using
from torch.nn import functional

from attrfast import ops, reference
from attrfast.reference import INF

pytestmark = pytest.mark.skipif(not ISAS, reason="the native module is not built")

Tensor = torch.Tensor
LAID = ["contiguous", "channels last"]  # two loops of the kernels
NARROW = [torch.float16, torch.bfloat16]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


def special(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    sizes = [0.0, subnormal, info.smallest_normal, 0.3, 0.7, 1.0, 6.0, info.max, INF]
    return torch.tensor([*sizes, *(-x for x in sizes), torch.nan], dtype=torch.float64).to(dtype)


def pairs(dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """Every special value with every other, one pair a channel; at a second position 0.5 and 0."""
    x, y = torch.meshgrid(special(dtype), special(dtype), indexing="ij")
    x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)
    x, y = torch.cat([x, torch.full_like(x, 0.5)], 2), torch.cat([y, torch.zeros_like(y)], 2)
    return LAYOUTS[layout](x), LAYOUTS[layout](y)


def assert_as_defined(call: Call) -> None:
    """Equal numbers; NaN equals NaN, and -0 equals 0."""
    want = call.with_numbers().run(getattr(reference, call.op))
    for a, b in zip(call.run(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_go_forward_as_by_the_definition(
    dtype: torch.dtype, bounds: tuple[float | None, float | None], layout: str, isa: str
) -> None:
    z, other = pairs(dtype, layout)
    vector = other[0, :, 0].to(reference.compute_dtype(dtype))
    # One at a time: where several are huge, it matters whether the processor rounds in between.
    for scale, shift, residual in ((vector, None, None), (None, vector, None), (None, None, other)):
        call = make_call("affine_relu", dtype=dtype, bounds=bounds)
        assert_as_defined(call.with_args(z=z, scale=scale, shift=shift, residual=residual))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_go_backward_as_by_the_definition(
    dtype: torch.dtype, bounds: tuple[float | None, float | None], guided: bool, layout: str, isa: str
) -> None:
    a, g = pairs(dtype, layout)
    assert_as_defined(Call("count_nonzero", {"x": a}))
    limits = {"lower": bounds[0], "upper": bounds[1], "guided": guided}
    vector = g[0, :, 0].to(reference.compute_dtype(dtype))
    for what, scale in itertools.product((0, 1, 2), (None, vector)):
        limits["scale"] = scale
        args = {"a": a, "g": g, **limits}
        assert_as_defined(Call("affine_add_relu_backward", {**args, "residual": g, "attribute": what}))
        if what < 2:
            assert_as_defined(Call("affine_relu_backward", {**args, "attribute": bool(what)}))
            assert_as_defined(Call("attribution", {"x": a, "g": g, "absolute": bool(what)}))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_passes_a_clamped_element(
    dtype: torch.dtype, bounds: tuple[float | None, float | None], layout: str, isa: str
) -> None:
    # Also where a bound is no number of the type, so that what was clamped to it lies beside it.
    z = LAYOUTS[layout](torch.linspace(-9, 9, 2 * 3 * 37, dtype=torch.float64).view(2, 3, 37).to(dtype))
    a, _ = ops.affine_relu(z, None, None, None, *bounds)
    gz, _ = ops.affine_relu_backward(a, torch.ones_like(a), None, *bounds)
    lower, upper = (-INF if bounds[0] is None else bounds[0], INF if bounds[1] is None else bounds[1])
    outside = (z.double() <= lower) | (z.double() >= upper)
    assert not gz[outside].any()
    assert gz[(a > a.min()) & (a < a.max())].eq(1).all()


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_pattern_is_read_and_written_back_unchanged(
    dtype: torch.dtype, layout: str, isa: str
) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = LAYOUTS[layout](patterns.view(4, -1, 64))
    assert same_bits(ops.affine_relu(x, None, None, None, None, None)[0], x)
    # And read as PyTorch reads it: the sums are in float32.
    ones = torch.ones(1, 1 << 16, 1, dtype=dtype)
    read = ops.attribution(patterns.view(1, -1, 1), ones)[0]
    torch.testing.assert_close(read, patterns.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_to_16_bits_is_pytorch_s(dtype: torch.dtype, layout: str, isa: str) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    rising = patterns[: 1 << 15]  # from 0 to infinity, then NaN
    rising = rising[rising.isfinite()].double()
    step = rising.diff()
    middle = (rising + torch.cat([step, step[-1:]]) / 2).float()  # exact: where the rounding turns
    inf = torch.tensor(INF)
    floats = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf)])
    quiet_or_not = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(
        torch.float32
    )
    floats = torch.cat([floats, -floats, special(torch.float32), quiet_or_not, -quiet_or_not])
    # A shift is a float32 that goes through nothing but the sum with -0.
    z = LAYOUTS[layout](torch.full((1, len(floats), 2), -0.0, dtype=dtype))
    got, _ = ops.affine_relu(z, None, floats, None, None, None)
    assert same_bits(got, floats.to(dtype).view(1, -1, 1).expand_as(got))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_small_16_bit_numbers_survive_where_small_floats_are_flushed(
    dtype: torch.dtype, isa: str
) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormal numbers")
    try:
        # Subnormal as float16, and the same numbers as bfloat16: not subnormal as float32.
        x = (torch.arange(-1023, 1024) * 2.0**-24).to(dtype).view(1, 1, -1)
        assert same_bits(ops.affine_relu(x, None, None, None, None, None)[0], x)
        assert same_bits(ops.attribution(x, torch.ones_like(x), True), x.float().abs().sum(2))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("bounds", [(0.0, None), (None, None), (0.0, 6.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_pooled_as_by_pytorch(
    dtype: torch.dtype, bounds: tuple[float | None, float | None], layout: str, isa: str
) -> None:
    values = special(dtype)
    chosen = torch.randint(len(values), (2, 40, 9, 11), generator=torch.Generator().manual_seed(0))
    z = LAYOUTS[layout](values[chosen])
    p, code, _ = ops.affine_relu_max_pool(z, None, None, [3, 2], [2, 1], [1, 1], True, *bounds)
    a = z.clamp(*bounds) if bounds != (None, None) else z
    want, index = functional.max_pool2d(a, (3, 2), (2, 1), (1, 1), ceil_mode=True, return_indices=True)
    torch.testing.assert_close(p, want, rtol=0, atol=0, equal_nan=True)
    y = torch.arange(p.shape[2]).view(-1, 1) * 2 - 1 + code // 2
    x = torch.arange(p.shape[3]) - 1 + code % 2
    # Windows of several NaN, or of equal numbers: the same one of them.
    assert torch.equal(y * z.shape[3] + x, index)


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("bounds", [(0.0, None), (None, None), (0.0, 6.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_gradients_go_through_a_pooling_as_by_the_definition(
    dtype: torch.dtype, bounds: tuple[float | None, float | None], layout: str, isa: str
) -> None:
    values = special(dtype)
    random = torch.Generator().manual_seed(1)
    z, g = (
        LAYOUTS[layout](values[torch.randint(len(values), size, generator=random)])
        for size in ((2, 40, 8, 12), (2, 40, 4, 4))
    )
    vector = values[torch.arange(40) % len(values)].to(reference.compute_dtype(dtype))
    geometry = {"kernel": [2, 3], "stride": [2, 3], "padding": [0, 0]}  # no gradients to add up
    limits = {"lower": bounds[0], "upper": bounds[1]}
    for scale, shift in ((None, None), (vector, None), (None, vector)):
        forward = {"z": z, "scale": scale, "shift": shift, **geometry, "ceil_mode": False, **limits}
        assert_as_defined(Call("affine_relu_max_pool", {**forward, "count": True}))
        p, code, _ = ops.affine_relu_max_pool(**forward)
        for guided in (False, True):
            args = {"p": p, "code": code, "g": g, "scale": scale, "size": [8, 12], **geometry, **limits}
            assert_as_defined(Call("affine_relu_max_pool_backward", {**args, "guided": guided}))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("bounds", [(0.0, None), (0.0, 6.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_and_their_gradients_are_pytorch_s(
    dtype: torch.dtype, bounds: tuple[float, float | None], layout: str, isa: str
) -> None:
    z, g = pairs(dtype, layout)
    z.requires_grad_()
    want = functional.relu(z) if bounds[1] is None else functional.hardtanh(z, *bounds)
    (want_gz,) = torch.autograd.grad(want, z, g)
    y, _ = ops.affine_relu(z, None, None, None, *bounds)
    (gz,) = torch.autograd.grad(y, z, g)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    if bounds[1] is not None:  # NaN stops at PyTorch's hardtanh, and passes its ReLU
        want_gz = torch.where(z.isnan(), g, want_gz)
    torch.testing.assert_close(gz, want_gz, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["l2", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_normalised_each_segment_by_itself(
    dtype: torch.dtype, kind: str, isa: str
) -> None:
    values = special(dtype)
    parts = torch.stack([values, torch.full_like(values, 3.0)], 1).flatten()  # two values a segment
    offsets = torch.arange(0, len(parts) + 1, 2)
    got = ops.segment_normalize(parts, offsets, kind).view(-1, 2)
    want = reference.segment_normalize(parts, offsets, kind).view(-1, 2)
    finite = values.isfinite()
    assert got[~finite].isnan().all()
    assert got[finite].isfinite().all()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
