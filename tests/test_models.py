"""The small-image networks have the published sizes and refuse sizes that cannot be built."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attrfast import models
from attrfast.errors import InputError

RESNETS = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Of the convolutions and linear layers, for one image; the model is on the meta device."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def batch_norm_operations(model: nn.Module, shape: tuple[int, ...]) -> int:
    """One multiplication and one addition for every element that a batch norm gives."""
    total = 0

    def count(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    model.eval()(torch.empty(1, *shape, device="meta"))
    return total


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "shape", "expected_macs", "expected_parameters"),
    [
        # 4.055e7 and 1.255e8 multiply-adds, 0.27, 0.46, 0.66, 0.85 and 1.7 million parameters are
        # the figures usually given for the paper's networks (option A).
        ("resnet20", {"shortcut": "A"}, (3, 32, 32), 40_551_040, 269_722),
        ("resnet32", {"shortcut": "A"}, (3, 32, 32), 68_862_592, 464_154),
        ("resnet44", {"shortcut": "A"}, (3, 32, 32), 97_174_144, 658_586),
        ("resnet56", {"shortcut": "A"}, (3, 32, 32), 125_485_696, 853_018),
        ("resnet110", {"shortcut": "A"}, (3, 32, 32), 252_887_680, 1_727_962),
        # Option B adds two projections: 16 -> 32 at 16x16 and 32 -> 64 at 8x8 pixels.
        ("resnet20", {}, (3, 32, 32), 40_551_040 + 2 * 131_072, 269_722 + 512 + 64 + 2048 + 128),
        ("vgg16_bn", {}, (3, 32, 32), 313_201_664, 14_724_042),
        ("vgg_small", {}, (1, 28, 28), 29_128_448, 288_170),
    ],
)
def test_sizes_are_the_published_ones(
    name: str,
    options: dict[str, str],
    shape: tuple[int, ...],
    expected_macs: int,
    expected_parameters: int,
) -> None:
    with torch.device("meta"):
        model = getattr(models, name)(**options)
    assert multiply_adds(model, shape) == expected_macs
    assert parameters(model) == expected_parameters


def test_vgg16_has_3_14e8_operations_when_batch_norms_count() -> None:
    with torch.device("meta"):
        model = models.vgg16_bn()
    total = multiply_adds(model, (3, 32, 32)) + batch_norm_operations(model, (3, 32, 32))
    assert total == pytest.approx(3.14e8, rel=0.002)
    assert parameters(model) == pytest.approx(1.47e7, rel=0.002)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vgg16_bn", (3, 32, 32)),
        ("vgg_small", (3, 8, 8)),
        ("vgg_small", (3, 28, 28)),
        ("resnet20", (3, 32, 32)),
    ],
)
def test_every_parameter_gets_a_gradient(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=7, in_channels=3, width=0.25)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_padded_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    x = torch.arange(2 * 2 * 4 * 4, dtype=torch.float32).view(2, 2, 4, 4) + 1
    block = models.resnet.BasicBlock(2, 5, 2, "A")
    out = block.shortcut(x)
    assert out.shape == (2, 5, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()


def test_width_scales_every_layer_but_never_to_nothing() -> None:
    full, half, least = (models.vgg_small(width=w) for w in (1.0, 0.5, 1e-6))
    widths = [
        [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
        for net in (full, half, least)
    ]
    assert widths[1] == [w // 2 for w in widths[0]]
    assert widths[2] == [1] * len(widths[0])


@pytest.mark.parametrize("name", [*RESNETS[:1], "vgg16_bn", "vgg_small"])
@pytest.mark.parametrize(
    "bad",
    [
        {"num_classes": 0},
        {"in_channels": -1},
        {"width": 0.0},
        {"width": float("nan")},
        {"width": float("inf")},
    ],
)
def test_impossible_sizes_are_refused_by_name(name: str, bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        getattr(models, name)(**bad)


def test_unknown_shortcut_is_refused() -> None:
    with pytest.raises(InputError, match="'C'"):
        models.resnet20(shortcut="C")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", models.__all__)
def test_same_seed_gives_the_same_weights(name: str) -> None:
    def build() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(getattr(models, name)(width=0.1).parameters())

    for first, second in zip(build(), build(), strict=True):
        assert torch.equal(first, second)
