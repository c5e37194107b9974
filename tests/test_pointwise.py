"""The 1x1 convolution of our own: its numbers, what it is used for, and what a pass makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from op_checks import ISAS, Poisoned, laid, using
from own_convolutions import (
    DTYPES,
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
from attrfast import pointwise, reference
from attrfast.convolution import Geometry

pytestmark = pytest.mark.skipif(not ISAS, reason="the native module is not built")

Tensor = torch.Tensor

# N, channels in, channels out, H, W: whole and partial blocks, vectors and panels of channels; more positions
# than output channels, and fewer.
CASES = [
    (2, 32, 32, 8, 8),
    (1, 16, 48, 1, 2),
    (3, 24, 37, 7, 9),
    (2, 5, 3, 6, 5),
    (1, 1, 1, 3, 3),
    (2, 33, 17, 1, 4),
    (1, 130, 70, 4, 3),
    (5, 20, 65, 13, 30),
    (2, 700, 40, 9, 9),
    (1, 40, 300, 5, 5),
]


def strided(weight: Tensor) -> Tensor:
    """The same numbers in every third column of every second row of a larger matrix."""
    wide = weight.new_full((2 * weight.shape[0], 3 * weight.shape[1], 1, 1), torch.nan)
    wide[::2, ::3] = weight
    return wide[::2, ::3]


WEIGHTS = {
    "output channels apart": lambda weight: weight,
    "output channels together": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": strided,
}


def tensors(
    shape: Sequence[int], transposed: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and memory full of NaN for the result."""
    n, reads, makes, rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(n, reads, rows, columns, generator=generator)
    channels = (reads, makes) if transposed else (makes, reads)
    weight = torch.randn(*channels, 1, 1, generator=generator) / reads**0.5
    out = torch.full((n, rows, columns, makes), torch.nan).movedim(3, 1)
    return laid(x).to(dtype), weight.to(dtype), out.to(dtype)


def defined(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    return (functional.conv_transpose2d if transposed else functional.conv2d)(x, weight)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", list(WEIGHTS))
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_it_convolves(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str, transposed: bool
) -> None:
    x, weight, out = tensors(shape, transposed, dtype)
    weight = WEIGHTS[layout](weight)
    with using(isa):
        pointwise.convolve(x, weight, [0, 0], transposed=transposed, out=out, buffers=Poisoned())
    assert_near(out, defined(x.double(), weight.double(), transposed))


@pytest.mark.parametrize("bounds", [(-reference.INF, reference.INF), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("given", ["scale", "shift", "residual", "factor", "all"])
@pytest.mark.parametrize("shape", CASES[2:3] + CASES[-1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_what_follows_a_convolution_is_done_in_the_same_launch(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], given: str, bounds: tuple[float, float]
) -> None:
    x, weight, out = tensors(shape, dtype=dtype)
    channels = {"scale": shape[2], "shift": shape[2], "factor": shape[1]}
    more = {name: torch.randn(count) for name, count in channels.items()}
    more["residual"] = torch.randn(out.shape).to(dtype)
    more = {name: value for name, value in more.items() if given in (name, "all")}
    with using(isa):
        y = pointwise.convolve(x, weight, [0, 0], lower=bounds[0], upper=bounds[1], **more)
    wide = {name: value.double() for name, value in more.items()}
    factor = wide.pop("factor", torch.ones(shape[1]).double()).view(-1, 1, 1)
    z = defined(x.double() * factor, weight.double())
    want, _ = reference.affine_relu(z, **wide, lower=bounds[0], upper=bounds[1])
    scale = wide.get("scale", torch.ones(shape[2]).double()).view(-1, 1, 1)
    products = defined((x.double() * factor).abs(), weight.double().abs()) * scale.abs()
    assert_near(y, want, products if "factor" in more else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_it_may_write_into_the_residual(isa: str, dtype: torch.dtype) -> None:
    x, weight, out = tensors(CASES[2], dtype=dtype)
    residual = laid(torch.randn(out.shape)).to(dtype)
    with using(isa):
        want = pointwise.convolve(x, weight, [0, 0], residual=residual)
        pointwise.convolve(x, weight, [0, 0], residual=residual, out=residual)
    assert torch.equal(residual, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_goes_through_as_in_the_definition(isa: str, dtype: torch.dtype) -> None:
    x, weight, _ = tensors((1, 20, 18, 2, 8), dtype=dtype)
    x[0, 3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 0, 1, 2, 3])
    with using(isa):
        y = pointwise.convolve(x, weight, [0, 0], lower=0.0, upper=6.0)
    want, _ = reference.affine_relu(defined(x.double(), weight.double()), lower=0.0, upper=6.0)
    assert torch.equal(y.isnan(), want.isnan())
    assert_near(y.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [CASES[0], *CASES[-4:]], ids=str)
def test_the_bits_depend_on_neither_threads_nor_neighbours(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight, _ = tensors(shape, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(pointwise.convolve(x, weight, [0, 0]))
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([pointwise.convolve(one, weight, [0, 0]) for one in x.split(1)])
    assert all(torch.equal(result, alone) for result in results)


def gradients(
    shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """a, g and a weight, and what else the backward may read: its bounds are met by some of a."""
    g, weight, _ = tensors(shape, transposed=True, dtype=dtype)
    generator = torch.Generator().manual_seed(shape[1])
    a, residual = (laid(torch.randn(g.shape, generator=generator)).to(dtype) for _ in range(2))
    scale = torch.randn(shape[1], generator=generator)
    return a.clamp(0.0, 1.0), g, weight, {"residual": residual, "scale": scale}


@pytest.mark.parametrize("split", [None, "new", "in place"], ids=["alone", "with g1", "g1 is g"])
@pytest.mark.parametrize("attribute", [0, 1, 2])
@pytest.mark.parametrize(("upper", "guided"), [(1.0, False), (reference.INF, True)])
@pytest.mark.parametrize("shape", [CASES[2], CASES[-2], CASES[-1], (2, 20, 40, 17, 19)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_gradient_is_masked_and_measured_on_its_way(
    isa: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    upper: float,
    guided: bool,
    attribute: int,
    split: str | None,
) -> None:
    a, g, weight, more = gradients(shape, dtype)
    given = a, g, weight, more["residual"], more["scale"]
    rules = 0.0, upper, guided, attribute
    want = reference.pointwise_backward(*(x.double() for x in given), *rules)
    g1 = {None: None, "new": torch.full_like(g, torch.nan), "in place": g}[split]
    with using(isa):
        gx, s = pointwise.gradient(*given, *rules, g1=g1, buffers=Poisoned())
    sizes = (want[1] * more["scale"].double().view(-1, 1, 1)).abs(), weight.double().abs()
    assert_near(gx, want[0], defined(*sizes, transposed=True), atol=2e-5)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.double(), want[2], rtol=0, atol=2e-5)
    assert g1 is None or torch.equal(g1.double(), want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_gradient_passes_where_nothing_was_clamped(isa: str, dtype: torch.dtype) -> None:
    a, g, weight, _ = gradients((1, 20, 18, 2, 8), dtype)
    a[0, 3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 6, 1, 2, 3])
    for upper in (6.0, reference.INF):
        want = reference.pointwise_backward(a.double(), g.double(), weight.double(), upper=upper)
        with using(isa):
            gx, s = pointwise.gradient(a, g, weight, upper=upper)
        assert_near(gx, want[0], atol=2e-5)
        torch.testing.assert_close(s.double(), want[2], rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [CASES[0], *CASES[-4:], (2, 20, 40, 17, 19)], ids=str)
def test_the_bits_of_a_gradient_depend_on_neither_threads_nor_neighbours(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, g, weight, _ = gradients(shape, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(pointwise.gradient(a, g, weight))
    finally:
        torch.set_num_threads(before)
    pairs = zip(a.split(1), g.split(1), strict=True)
    alone = [pointwise.gradient(*pair, weight) for pair in pairs]
    for gx, s in results:
        assert torch.equal(gx, torch.cat([one[0] for one in alone]))
        assert torch.equal(s, torch.cat([one[1] for one in alone]))


def test_it_is_about_as_exact_as_the_librarys() -> None:
    """Where the library adds partial sums, it loses less: two and a half times less of 1,024 channels."""
    x, weight, _ = tensors((4, 1024, 64, 14, 14))
    want = defined(x.double(), weight.double())
    ours = (pointwise.convolve(x, weight, [0, 0]) - want).norm()
    assert ours <= 4 * (defined(x, weight) - want).norm()


PLAIN = Geometry([1, 1], [0, 0], [1, 1], 1)


@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        (torch.ones(4, 32, 8, 8), torch.ones(32, 32, 1, 1), PLAIN),
        (laid(torch.ones(4, 32, 8, 8).double()), torch.ones(32, 32, 1, 1).double(), PLAIN),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 3, 3), PLAIN),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 1, 3), PLAIN),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 16, 1, 1), PLAIN._replace(groups=2)),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 1, 1), PLAIN._replace(stride=[2, 1])),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 1, 1), PLAIN._replace(padding=[0, 1])),
        (laid(torch.ones(4, 3, 8, 8)), torch.ones(32, 3, 1, 1), PLAIN),
        (laid(torch.ones(4, 512, 8, 8)), torch.ones(8, 512, 1, 1), PLAIN),
        (laid(torch.ones(0, 32, 8, 8)), torch.ones(32, 32, 1, 1), PLAIN),
    ],
    ids=[
        *("contiguous", "float64", "3x3", "1x3", "grouped", "strided", "padded"),
        *("few channels", "many to few", "empty"),
    ],
)
def test_the_library_convolves_what_is_not_for_it(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    assert not pointwise.suits(x, weight, geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_about_the_dtype(dtype: torch.dtype, cast: torch.dtype) -> None:
    x, weight = laid(torch.ones(4, 32, 8, 8)).to(dtype), torch.ones(32, 32, 1, 1).to(dtype)
    assert pointwise.suits(x, weight, PLAIN)
    with torch.autocast("cpu", cast):
        assert pointwise.suits(x, weight, PLAIN) == (dtype == cast)
    assert not pointwise.suits(x, weight.to(DTYPES[dtype == torch.float32]), PLAIN)


class Bottleneck(nn.Module):
    """A ResNet's: both of its 1x1 convolutions, one of them added to, and a bare one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 40, 3, nn.ReLU())
        self.branch = nn.Sequential(
            block(40, 16, 1, nn.ReLU()), block(16, 16, 3, nn.ReLU()), block(16, 40, 1)
        )
        self.shortcut = block(40, 40, 1)
        self.bare = nn.Conv2d(40, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.relu(self.branch(x) + self.shortcut(x))
        return functional.leaky_relu(self.bare(x))


class InvertedResidual(nn.Module):
    """A MobileNet's: ReLU6 after the first, nothing after the last, which is added to without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24, 3, nn.ReLU6())
        self.branch = nn.Sequential(
            block(24, 72, 1, nn.ReLU6()), block(72, 72, 3, nn.ReLU6(), groups=72), block(72, 24, 1)
        )
        self.last = block(24, 24, 1, nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + self.branch(x))


class Dense(nn.Module):
    """A DenseNet's: batch norms and ReLUs before the convolutions, concatenations, a pooled transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 24, 3, nn.ReLU())
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(24 + 8 * i), nn.ReLU(), nn.Conv2d(24 + 8 * i, 32, 1, bias=False)),
                *(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1, bias=False)),
            )
            for i in range(2)
        )
        self.transition = nn.Sequential(
            *(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 24, 1), nn.MaxPool2d(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return self.transition(x)


NETWORKS = {"bottleneck": Bottleneck, "inverted residual": InvertedResidual, "dense": Dense}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every launch of a pass was for."""
    return launches_of(pointwise, monkeypatch)


@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided", "attribution", "apoz"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_pass_gives_the_scores_of_float64(name: str, criterion: str, calls: list[str]) -> None:
    net, data = trained_statistics(NETWORKS[name])
    assert_scores_of_float64(net, data, criterion)
    assert calls.count("convolve") >= 3


@pytest.mark.parametrize(
    ("name", "forward", "fused", "transposed"),
    [("bottleneck", 4, 2, 2), ("inverted residual", 3, 2, 1), ("dense", 3, 2, 1)],
)
def test_a_pass_uses_it_forward_and_backward(
    name: str, forward: int, fused: int, transposed: int, calls: list[str]
) -> None:
    net, data = trained_statistics(NETWORKS[name])
    attrfast.attribute(net, data, "attribution", progress=False)
    made = {each: calls.count(each) for each in ("convolve", "gradient", "transposed")}
    assert made == {"convolve": forward, "gradient": fused, "transposed": transposed}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_contiguous_pass_gives_the_scores_of_float64_too(name: str, calls: list[str]) -> None:
    net, data = trained_statistics(NETWORKS[name])
    net = net.to(memory_format=torch.contiguous_format)
    data = [(images.contiguous(), labels) for images, labels in data]
    assert_scores_of_float64(net, data, "attribution")
    assert calls.count("gradient") >= 2


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_pass_in_bfloat16_is_as_exact_as_by_the_library(
    name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = trained_statistics(NETWORKS[name])
    ours, librarys = bfloat16_errors(net, data, pointwise, monkeypatch)
    assert calls.count("convolve") >= 3
    assert calls.count("gradient") >= 2
    assert ours <= 1.1 * librarys
