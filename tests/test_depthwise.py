"""The depthwise convolution of our own: its numbers, what it is used for, and what a pass makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from op_checks import ISAS, Poisoned, laid, using
from own_convolutions import (
    DTYPES,
    LAST,
    assert_near,
    assert_scores_of_float64,
    bfloat16_errors,
    block,
    launches_of,
    trained_statistics,
)
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import depthwise, reference
from attrfast.convolution import Geometry

pytestmark = pytest.mark.skipif(not ISAS, reason="the native module is not built")

Tensor = torch.Tensor

# N, channels, H, W, kernel, stride, padding: whole and partial vectors, blocks and parts; windows wider than
# the map, rows that no window reads, windows over nothing but padding.
CASES = [
    (2, 32, 8, 8, 3, 1, (1, 1)),
    (1, 40, 7, 9, 3, 2, (1, 1)),
    (3, 17, 30, 5, 5, 1, (2, 2)),
    (2, 16, 9, 14, 5, 2, (0, 2)),
    (1, 5, 1, 1, 3, 1, (1, 1)),
    (2, 8, 3, 2, 7, 1, (6, 3)),
    (1, 300, 15, 7, 7, 2, (3, 3)),
    (1, 530, 4, 6, 3, 2, (2, 2)),
    (2, 24, 29, 70, 3, 1, (0, 1)),
    (1, 33, 31, 131, 3, 2, (1, 0)),
]


def tensors(case: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight, and memory full of NaN for the result."""
    n, channels, rows, columns, kernel, *_ = case
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(n, channels, rows, columns, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel
    made = defined(x, weight, case)
    out = torch.full((n, *made.shape[2:], channels), torch.nan).movedim(3, 1)
    return laid(x).to(dtype), weight.to(dtype), out.to(dtype)


def defined(x: Tensor, weight: Tensor, case: Sequence[int]) -> Tensor:
    *_, stride, padding = case
    return functional.conv2d(x, weight, None, stride, padding, groups=len(weight))


def strided(weight: Tensor) -> Tensor:
    """The same numbers in every other column of every third row, channels next to each other."""
    channels, _, kernel, _ = weight.shape
    wide = weight.new_full((3 * kernel, 2 * kernel, 1, channels), torch.nan)
    view = wide[::3, ::2].permute(3, 2, 0, 1)
    view.copy_(weight)
    return view


@pytest.mark.parametrize("layout", [lambda weight: weight, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_it_convolves(
    isa: str, dtype: torch.dtype, case: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    x, weight, out = tensors(case, dtype)
    given = layout(weight)
    *_, stride, padding = case
    with using(isa):
        depthwise.convolve(x, given, list(padding), stride=stride, out=out, buffers=Poisoned())
    assert_near(out, defined(x.double(), weight.double(), case))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_it_gives_the_gradient_for_an_input(isa: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    x, weight, out = tensors(case, dtype)
    *_, stride, padding = case
    g = laid(torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    into = x.new_full((len(x), *x.shape[2:], x.shape[1]), torch.nan).movedim(3, 1)
    how = {"stride": stride, "size": x.shape[2:], "transposed": True}
    with using(isa):
        depthwise.convolve(g, weight, list(padding), **how, out=into, buffers=Poisoned())
    want = torch.nn.grad.conv2d_input(
        x.shape, weight.double(), g.double(), stride, padding, groups=len(weight)
    )
    assert_near(into, want)


@pytest.mark.parametrize("bounds", [(-reference.INF, reference.INF), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("given", ["scale", "shift", "residual", "factor", "all"])
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_what_follows_a_convolution_is_done_in_the_same_launch(
    isa: str, dtype: torch.dtype, case: tuple[int, ...], given: str, bounds: tuple[float, float]
) -> None:
    x, weight, out = tensors(case, dtype)
    *_, stride, padding = case
    more = {name: torch.randn(case[1]) for name in ("scale", "shift", "factor")}
    more["residual"] = torch.randn(out.shape).to(dtype)
    more = {name: value for name, value in more.items() if given in (name, "all")}
    how = {"stride": stride, "lower": bounds[0], "upper": bounds[1]}
    with using(isa):
        y = depthwise.convolve(x, weight, list(padding), **how, **more)
    wide = {name: value.double() for name, value in more.items()}
    factor = wide.pop("factor", torch.ones(case[1]).double()).view(-1, 1, 1, 1)
    z = defined(x.double(), weight.double() * factor, case)
    want, _ = reference.affine_relu(z, **wide, lower=bounds[0], upper=bounds[1])
    assert_near(y, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_it_may_write_into_the_residual(isa: str, dtype: torch.dtype) -> None:
    x, weight, out = tensors(CASES[2], dtype)
    residual = laid(torch.randn(out.shape)).to(dtype)
    with using(isa):
        want = depthwise.convolve(x, weight, [2, 2], residual=residual)
        depthwise.convolve(x, weight, [2, 2], residual=residual, out=residual)
    assert torch.equal(residual, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_goes_through_as_in_the_definition(isa: str, dtype: torch.dtype) -> None:
    x, weight, _ = tensors((1, 20, 5, 8, 3, 1, (1, 1)), dtype)
    x[0, 3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 0, 1, 2, 3])
    with using(isa):
        y = depthwise.convolve(x, weight, [1, 1], lower=0.0, upper=6.0)
    z = functional.conv2d(x.double(), weight.double(), None, 1, 1, groups=20)
    want, _ = reference.affine_relu(z, lower=0.0, upper=6.0)
    assert torch.equal(y.isnan(), want.isnan())
    assert_near(y.nan_to_num(), want.nan_to_num())


def gradients(
    case: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, of which some meets its bounds; g; x; a weight and a scale."""
    x, weight, out = tensors(case, dtype)
    generator = torch.Generator().manual_seed(case[1])
    a, g = (laid(torch.randn(out.shape, generator=generator)).to(dtype) for _ in range(2))
    return a.clamp(0.0, 1.0), g, x, weight, torch.randn(case[1], generator=generator)


@pytest.mark.parametrize("attribute", [False, True])
@pytest.mark.parametrize(("upper", "guided"), [(1.0, False), (reference.INF, True)])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_gradient_is_masked_and_measured_on_its_way(
    isa: str, dtype: torch.dtype, case: tuple[int, ...], upper: float, guided: bool, attribute: bool
) -> None:
    a, g, x, weight, scale = gradients(case, dtype)
    *_, stride, padding = case
    rules = 0.0, upper, guided, attribute
    where = list(padding), stride, list(x.shape[2:])
    with using(isa):
        gx, s = depthwise.gradient(a, g, weight, *where, scale, *rules, buffers=Poisoned())
    wide = a.double(), g.double(), weight.double(), *where, scale.double()
    want = reference.depthwise_backward(*wide, *rules)
    assert_near(gx, want[0], atol=2e-5)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.double(), want[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_gradient_passes_where_nothing_was_clamped(isa: str, dtype: torch.dtype) -> None:
    a, g, x, weight, _ = gradients((1, 20, 5, 8, 3, 1, (1, 1)), dtype)
    a[0, 3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 6, 1, 2, 3])
    for upper in (6.0, reference.INF):
        where = [1, 1], 1, list(x.shape[2:])
        with using(isa):
            gx, s = depthwise.gradient(a, g, weight, *where, upper=upper)
        wide = a.double(), g.double(), weight.double()
        want = reference.depthwise_backward(*wide, *where, upper=upper)
        assert_near(gx, want[0], atol=2e-5)
        torch.testing.assert_close(s.double(), want[1], rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_depend_on_neither_threads_nor_neighbours(
    case: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, g, x, weight, _ = gradients(case, dtype)
    *_, stride, padding = case
    where = list(padding), stride, list(x.shape[2:])

    def run(a: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = depthwise.convolve(x, weight, list(padding), stride=stride)
        return y, *depthwise.gradient(a, g, weight, *where)

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(run(a, g, x))
    finally:
        torch.set_num_threads(before)
    alone = [run(*one) for one in zip(a.split(1), g.split(1), x.split(1), strict=True)]
    for result in results:
        for whole, parts in zip(result, zip(*alone, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))


PLAIN = Geometry([1, 1], [1, 1], [1, 1], 32)
IMAGE, WINDOWS = laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 1, 3, 3)


@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        (torch.ones(4, 32, 8, 8), WINDOWS, PLAIN),
        (laid(torch.ones(4, 32, 8, 8).double()), WINDOWS.double(), PLAIN),
        (IMAGE, torch.ones(32, 1, 1, 1), PLAIN),
        (IMAGE, torch.ones(32, 1, 3, 5), PLAIN),
        (IMAGE, torch.ones(32, 1, 9, 9), PLAIN),
        (IMAGE, torch.ones(64, 1, 3, 3), PLAIN),
        (IMAGE, torch.ones(32, 2, 3, 3), PLAIN._replace(groups=16)),
        (IMAGE, WINDOWS, PLAIN._replace(stride=[2, 1])),
        (IMAGE, WINDOWS, PLAIN._replace(stride=[3, 3])),
        (IMAGE, WINDOWS, PLAIN._replace(padding=[3, 1])),
        (IMAGE, WINDOWS, PLAIN._replace(dilation=[2, 2])),
        (laid(torch.ones(4, 4, 8, 8)), torch.ones(4, 1, 3, 3), PLAIN._replace(groups=4)),
        (laid(torch.ones(0, 32, 8, 8)), WINDOWS, PLAIN),
    ],
    ids=[
        *(
            "contiguous",
            "float64",
            "1x1",
            "3x5",
            "9x9",
            "multiplied",
            "grouped",
            "one stride",
            "stride 3",
        ),
        *("wide padding", "dilated", "few channels", "empty"),
    ],
)
def test_the_library_convolves_what_is_not_for_it(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    assert depthwise.suits(IMAGE, WINDOWS, PLAIN)
    assert not depthwise.suits(x, weight, geometry)


class Separable(nn.Module):
    """Depthwise convolutions with ReLU6, bare, strided, large, biased and with an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24, 3, nn.ReLU6())
        self.layers = nn.Sequential(
            *(block(24, 24, 3, nn.ReLU6(), groups=24), block(24, 32, 1)),
            *(block(32, 32, 5, nn.ReLU(), groups=32, stride=2), block(32, 40, 1, nn.Hardswish())),
            *(nn.Conv2d(40, 40, 7, padding=3, groups=40), nn.GELU(), nn.Conv2d(40, 24, 1)),
        )
        self.added = block(24, 24, 3, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))
        return functional.relu(self.added(x) + x)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every launch of a pass was for."""
    return launches_of(depthwise, monkeypatch)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided", "attribution", "apoz"])
def test_a_pass_gives_the_scores_of_float64(
    criterion: str, layout: torch.memory_format, calls: list[str]
) -> None:
    net, data = trained_statistics(Separable)
    net = net.to(memory_format=layout)
    data = [(images.contiguous(memory_format=layout), labels) for images, labels in data]
    assert_scores_of_float64(net, data, criterion)
    assert "convolve" in calls


def test_a_pass_uses_it_forward_and_backward(calls: list[str]) -> None:
    net, data = trained_statistics(Separable)
    attrfast.attribute(net, data, "attribution", progress=False)
    made = {each: calls.count(each) for each in ("convolve", "gradient", "transposed")}
    assert made == {"convolve": 4, "gradient": 1, "transposed": 2}


def test_a_pass_in_bfloat16_is_as_exact_as_by_the_library(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = trained_statistics(Separable)
    ours, librarys = bfloat16_errors(net, data, depthwise, monkeypatch)
    assert calls.count("convolve") >= 3
    assert "gradient" in calls
    assert ours <= 1.1 * librarys
