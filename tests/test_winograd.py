"""Winograd's convolution: its numbers, what it is used for, and what a pass makes of it."""

from __future__ import annotations

import pytest
import torch
from op_checks import ISAS, Poisoned, laid, using
from own_convolutions import assert_scores_of_float64
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import reference, winograd
from attrfast.convolution import Geometry

pytestmark = pytest.mark.skipif(not ISAS, reason="the native module is not built")

Tensor = torch.Tensor
LAST = torch.channels_last

# (N, channels in, channels out, H, W), padding: whole and partial tiles, vectors and panels of channels;
# more tiles than output channels, and fewer.
CASES = [
    ((2, 32, 32, 8, 8), (1, 1)),
    ((1, 16, 48, 2, 2), (1, 1)),
    ((3, 24, 37, 7, 9), (1, 1)),
    ((2, 5, 3, 6, 5), (0, 2)),
    ((1, 1, 1, 3, 3), (0, 0)),
    ((2, 33, 17, 1, 4), (1, 1)),
    ((1, 130, 70, 4, 3), (1, 0)),
    ((5, 20, 65, 13, 30), (2, 2)),
]


def tensors(
    shape: tuple[int, ...], padding: tuple[int, int], layout: torch.memory_format, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and memory full of NaN for the result."""
    n, reads, makes, rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(n, reads, rows, columns, generator=generator)
    channels = (reads, makes) if transposed else (makes, reads)
    weight = torch.randn(*channels, 3, 3, generator=generator) / (3 * reads**0.5)
    p, q = (2 - p for p in padding) if transposed else padding
    out = torch.full((n, rows + 2 * p - 2, columns + 2 * q - 2, makes), torch.nan).movedim(3, 1)
    return laid(x), weight.contiguous(memory_format=layout), out


def defined(x: Tensor, weight: Tensor, padding: tuple[int, int], transposed: bool) -> Tensor:
    convolve = functional.conv_transpose2d if transposed else functional.conv2d
    return convolve(x, weight, padding=padding)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("shape", "padding"), CASES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_it_convolves(
    isa: str,
    shape: tuple[int, ...],
    padding: tuple[int, int],
    layout: torch.memory_format,
    transposed: bool,
) -> None:
    x, weight, out = tensors(shape, padding, layout, transposed)
    with using(isa):
        winograd.convolve(x, weight, list(padding), transposed=transposed, out=out, buffers=Poisoned())
    want = defined(x.double(), weight.double(), padding, transposed)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("bounds", [(-reference.INF, reference.INF), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("given", ["scale", "shift", "residual", "all"])
@pytest.mark.parametrize("isa", ISAS)
def test_what_follows_a_convolution_is_done_in_the_same_launch(
    isa: str, given: str, bounds: tuple[float, float]
) -> None:
    x, weight, out = tensors((2, 24, 37, 7, 9), (1, 1), LAST, False)
    more = {"scale": torch.randn(37), "shift": torch.randn(37), "residual": torch.randn(out.shape)}
    more = {name: value for name, value in more.items() if given in (name, "all")}
    with using(isa):
        y = winograd.convolve(x, weight, [1, 1], lower=bounds[0], upper=bounds[1], **more)
    z = defined(x.double(), weight.double(), (1, 1), False)
    wide = {name: value.double() for name, value in more.items()}
    want, _ = reference.affine_relu(z, **wide, lower=bounds[0], upper=bounds[1])
    torch.testing.assert_close(y.double(), want, rtol=0, atol=6e-6)


@pytest.mark.parametrize(("shape", "padding"), [*CASES[:1], *CASES[-2:]], ids=str)
def test_the_bits_depend_on_neither_threads_nor_neighbours(
    shape: tuple[int, ...], padding: tuple[int, int]
) -> None:
    x, weight, _ = tensors(shape, padding, LAST, False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            results.append(winograd.convolve(x, weight, list(padding)))
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([winograd.convolve(one, weight, list(padding)) for one in x.split(1)])
    assert all(torch.equal(result, alone) for result in results)


def test_it_is_as_exact_as_the_librarys() -> None:
    x, weight, _ = tensors((4, 256, 64, 14, 14), (1, 1), LAST, False)
    want = defined(x.double(), weight.double(), (1, 1), False)
    ours = (winograd.convolve(x, weight, [1, 1]) - want).norm()
    library = (defined(x, weight, (1, 1), False) - want).norm()
    assert ours <= 2 * library


PLAIN = Geometry([1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        (torch.ones(4, 32, 8, 8), torch.ones(32, 32, 3, 3), PLAIN),
        (laid(torch.ones(4, 32, 8, 8).double()), torch.ones(32, 32, 3, 3).double(), PLAIN),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 5, 5), PLAIN),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 16, 3, 3), PLAIN._replace(groups=2)),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 3, 3), PLAIN._replace(stride=[2, 1])),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 3, 3), PLAIN._replace(dilation=[1, 2])),
        (laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 3, 3), PLAIN._replace(padding=[3, 1])),
        (laid(torch.ones(4, 3, 8, 8)), torch.ones(32, 3, 3, 3), PLAIN),
        (laid(torch.ones(64, 32, 1, 8)), torch.ones(32, 32, 3, 3), PLAIN),
        (laid(torch.ones(0, 32, 8, 8)), torch.ones(32, 32, 3, 3), PLAIN),
    ],
    ids=[
        *("contiguous", "float64", "5x5", "grouped", "strided", "dilated", "padded by three"),
        *("few channels", "one row", "empty"),
    ],
)
def test_the_library_convolves_what_is_not_for_it(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    assert not winograd.suits(x, weight, geometry)


def test_it_is_not_used_under_autocast() -> None:
    x, weight = laid(torch.ones(4, 32, 8, 8)), torch.ones(32, 32, 3, 3)
    assert winograd.suits(x, weight, PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd.suits(x, weight, PLAIN)


class Net(nn.Module):
    """Every stage that a 3x3 convolution begins: pooled, added to, left bare."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.pooled = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.one = nn.Sequential(
            nn.Conv2d(32, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.two = nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.bare = nn.Conv2d(32, 40, 3)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pooled(functional.relu(self.stem(x)))
        x = functional.relu(self.two(self.one(x)) + x)
        x = functional.leaky_relu(self.bare(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every launch of a pass, whether it was for an input's gradient."""
    made: list[bool] = []
    real = winograd.convolve

    def noted(*args: object, **kwargs: object) -> Tensor:
        made.append(bool(kwargs.get("transposed")))
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(winograd, "convolve", noted)
    return made


def trained_statistics() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = Net().to(memory_format=LAST)
    images = torch.randn(6, 3, 16, 16).contiguous(memory_format=LAST)
    net(images)  # batch norms have statistics
    return net.eval(), [(images, torch.arange(6) % 5)]


@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided", "attribution", "apoz"])
def test_a_pass_gives_the_scores_of_float64(criterion: str, calls: list[bool]) -> None:
    net, data = trained_statistics()
    assert_scores_of_float64(net, data, criterion)
    assert calls.count(False) >= 4


def test_a_pass_uses_it_forward_and_backward(calls: list[bool]) -> None:
    net, data = trained_statistics()
    attrfast.attribute(net, data, "attribution", progress=False)
    assert (calls.count(False), calls.count(True)) == (4, 4)


def test_a_contiguous_pass_uses_it_too(calls: list[bool]) -> None:
    net, data = trained_statistics()
    net = net.to(memory_format=torch.contiguous_format)
    attrfast.attribute(net, [(x.contiguous(), y) for x, y in data], "attribution", progress=False)
    assert (calls.count(False), calls.count(True)) == (4, 4)
