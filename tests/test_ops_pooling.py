"""The pooling op against PyTorch's own pooling, through autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import LAYOUTS, make_call, pools
from torch.nn import functional

from attrfast import ops
from attrfast.reference import pooled_size

Tensor = torch.Tensor
CLAMPS = {(0.0, None): functional.relu, (0.0, 6.0): functional.relu6, (None, None): lambda y: y}


@st.composite
def pooled(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[list[int], ...], bool]:
    """z in float64 with many equal values, scale and shift that keep sums exact, and a pooling."""
    size = (draw(st.integers(1, 13)), draw(st.integers(1, 13)))
    *geometry, ceil_mode = draw(pools(size))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    channels = draw(st.sampled_from([1, 2, 5]))

    def whole_numbers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=random).double()

    z = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](whole_numbers(2, channels, *size))
    scale = whole_numbers(channels) if draw(st.booleans()) else None
    shift = whole_numbers(channels) if draw(st.booleans()) else None
    return z, scale, shift, tuple(geometry), ceil_mode


@pytest.mark.parametrize("bounds", CLAMPS, ids=str)
def test_pooling_and_its_gradient_are_pytorch_s(bounds: tuple[float | None, float | None]) -> None:
    @given(pooled())
    @settings(max_examples=200, deadline=None)
    def check(case: tuple[Tensor, Tensor | None, Tensor | None, tuple[list[int], ...], bool]) -> None:
        z, scale, shift, (kernel, stride, padding), ceil_mode = case
        z.requires_grad_()
        y = z if scale is None else z * scale.view(1, -1, 1, 1)
        y = y if shift is None else y + shift.view(1, -1, 1, 1)
        want = functional.max_pool2d(CLAMPS[bounds](y), kernel, stride, padding, ceil_mode=ceil_mode)
        p, code, n = ops.affine_relu_max_pool(
            z, scale, shift, kernel, stride, padding, ceil_mode, *bounds, count=True
        )
        assert torch.equal(p, want)
        assert torch.equal(n, CLAMPS[bounds](y).count_nonzero((2, 3)).double())
        g = torch.randint(-3, 4, p.shape, generator=torch.Generator().manual_seed(0)).double()
        (want_gz,) = torch.autograd.grad(want, z, g)
        (gz,) = torch.autograd.grad(p, z, g)
        assert torch.equal(gz, want_gz)
        size = list(z.shape[2:])
        _, s = ops.affine_relu_max_pool_backward(
            p.detach(), code, g, scale, size, kernel, stride, padding, *bounds
        )
        assert torch.equal(s, (want * g).sum((2, 3)))

    check()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_pooled_size_is_pytorch_s(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool
) -> None:
    padding = min(padding, kernel // 2)
    size = max(size, kernel - 2 * padding)
    want = functional.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, ceil_mode=ceil_mode)
    assert pooled_size(size, kernel, stride, padding, ceil_mode) == want.shape[2]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_guided_gradient_is_summed_before_its_sign_counts(layout: str, guided: bool) -> None:
    # Two windows share the maximum in the middle; their gradients are 3 and -1.
    z = LAYOUTS[layout](torch.tensor([1.0, 5.0, 1.0]).view(1, 1, 1, 3).expand(1, 2, 1, 3))
    geometry = ([1, 2], [1, 1], [0, 0])
    p, code, _ = ops.affine_relu_max_pool(z, None, None, *geometry)
    g = torch.tensor([3.0, -1.0]).view(1, 1, 1, 2).expand(1, 2, 1, 2) * torch.tensor([1, -1]).view(
        1, 2, 1, 1
    )
    gz, _ = ops.affine_relu_max_pool_backward(p, code, g, None, [1, 3], *geometry, 0.0, None, guided)
    assert gz[0, 0].tolist() == [[0, 2, 0]]
    assert gz[0, 1].tolist() == [[0, 0 if guided else -2, 0]]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        (0, slice(1, None), slice(1, None)),
        (1, slice(1, None), slice(None)),
        (2, slice(1, None), slice(-1)),
        (8, slice(-1), slice(-1)),
        (255, slice(0), slice(0)),
    ],
)
def test_kernels_write_to_no_place_outside_the_input(
    layout: str, place: int, rows: slice, columns: slice
) -> None:
    native = pytest.importorskip("attrfast.native", reason="the native module is not built")
    # Windows at the borders reach into the padding. Writing there would damage memory of others.
    geometry = ([3, 3], [2, 2], [1, 1])
    call = make_call(
        "affine_relu_max_pool_backward",
        (2, 3, 7, 9),
        layouts=(layout,),
        pool=(*geometry, False),
        bounds=(None, None),
        scale=False,
        coarse=True,
    )
    call = call.with_args(code=torch.full_like(call.args["code"], place))
    gz, _ = call.with_numbers().run(native.CpuBackend().affine_relu_max_pool_backward)
    assert gz.sum() == call.args["g"][:, :, rows, columns].sum()
