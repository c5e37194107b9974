"""Convolutions that PyTorch would take the slower way, and their input's gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_networks import CLASSES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attrfast
from attrfast import pointwise
from attrfast.convolution import Geometry, input_gradient, left_behind, library_pointwise

POINTWISE = Geometry([1, 1], [0, 0], [1, 1], 1)
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Seen(TorchDispatchMode):
    """Names of the ops that ran, and what was cast."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.casts: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        self.names.append(name)
        if name == "aten::_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.casts.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def random_case(
    samples: int, size: int, reads: int, makes: int, memory_format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a weight, a bias and a gradient for the output."""
    x = torch.randn(samples, reads, size, size).to(memory_format=memory_format)
    g = torch.randn(samples, makes, size, size).to(memory_format=memory_format)
    return x, torch.randn(makes, reads, 1, 1), torch.randn(makes), g


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("samples", "size", "reads", "makes"),
    [(1, 23, 7, 5), (2, 16, 24, 10), (15, 9, 33, 64), (3, 14, 1, 1)],
)
def test_it_is_the_sum_that_a_convolution_is(
    one_thread: None,
    samples: int,
    size: int,
    reads: int,
    makes: int,
    memory_format: torch.memory_format,
) -> None:
    x, weight, bias, g = random_case(samples, size, reads, makes, memory_format)
    assert left_behind(x, weight, POINTWISE)
    wide = weight.double()[:, :, 0, 0]
    expected = torch.einsum("oi,nihw->nohw", wide, x.double()) + bias.double().view(-1, 1, 1)
    assert torch.allclose(library_pointwise(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    with Seen() as seen:
        got = input_gradient(g, weight, x.shape, x.stride(), POINTWISE)
    assert "aten::mkldnn_convolution" in seen.names
    expected = torch.einsum("oi,nohw->nihw", wide, g.double())
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        "threads",
        "samples",
        "few positions",
        "empty",
        "stride",
        "padding",
        "groups",
        "3x3",
        "dtype",
        "autocast",
    ],
)
def test_all_others_are_left_to_pytorch(one_thread: None, change: str) -> None:
    x, weight, _, _ = random_case(2, 20, 8, 8, torch.channels_last)
    assert left_behind(x, weight, POINTWISE)
    geometry = POINTWISE
    if change == "threads":
        torch.set_num_threads(2)
    elif change == "samples":
        x = x.repeat(8, 1, 1, 1)
    elif change == "few positions":
        x = x[:, :, :15, :15]
    elif change == "empty":
        x = x[:, :, :0]
    elif change == "3x3":
        weight = torch.randn(8, 8, 3, 3)
    elif change == "dtype":
        x, weight = x.double(), weight.double()
    elif change != "autocast":
        value = 2 if change == "groups" else [1, 1] if change == "padding" else [2, 2]
        geometry = geometry._replace(**{change: value})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        assert not left_behind(x, weight, geometry)


def pointwise_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)).eval()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, 3, 16, 16, generator=generator), torch.arange(3) % CLASSES) for _ in range(count)
    ]


def test_a_pass_of_one_thread_takes_the_faster_way_and_scores_as_float64_does(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "ENABLED", False)
    model = pointwise_network()
    with Seen() as seen:
        scores = attrfast.attribute(model, batches(2), "attribution", progress=False)
    assert seen.names.count("aten::mkldnn_convolution") >= 4
    wide = [(images.double(), labels) for images, labels in batches(2)]
    expected = attrfast.attribute(model.double(), wide, "attribution", progress=False)
    assert torch.allclose(scores.importance.double(), expected.importance, rtol=1e-4)


def test_a_weight_is_cast_once_however_many_batches_there_are() -> None:
    model = pointwise_network()
    weights = [part.weight.shape for part in model if isinstance(part, nn.Conv2d)]
    counts = []
    for count in (1, 5):
        with Seen() as seen:
            attrfast.attribute(
                model, batches(count), "attribution", amp_dtype=torch.bfloat16, progress=False
            )
        counts.append([seen.casts.count(shape) for shape in weights])
    assert counts[0] == counts[1]
    assert min(counts[0]) >= 1
