"""Networks and the batches they are measured with, by name. Random weights and random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Batches = list[tuple[torch.Tensor, torch.Tensor]]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCHES = 4  # in one importance pass


@dataclass(frozen=True)
class Network:
    """A network and the shape of one batch, as (N, C, H, W)."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]

    @property
    def label(self) -> str:
        return f"{self.title} {'×'.join(map(str, self.shape))}"


def _vgg16_bn() -> nn.Module:
    from attrfast.models import vgg16_bn

    return vgg16_bn()


def _small() -> nn.Module:
    from attrfast.models import vgg_small

    return vgg_small()


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name, weights=None)
        return model

    return build


NETWORKS = {
    "vgg16_bn": Network("VGG-16-BN", _vgg16_bn, (64, 3, 32, 32)),
    "vgg16_bn_224": Network("VGG-16-BN", _torchvision("vgg16_bn"), (8, 3, 224, 224)),
    "resnet18": Network("ResNet-18", _torchvision("resnet18"), (16, 3, 224, 224)),
    "resnet50": Network("ResNet-50", _torchvision("resnet50"), (8, 3, 224, 224)),
    "mobilenet_v2": Network("MobileNet-v2", _torchvision("mobilenet_v2"), (16, 3, 224, 224)),
    "densenet121": Network("DenseNet-121", _torchvision("densenet121"), (8, 3, 224, 224)),
    "vgg_small": Network("VGG-small", _small, (4, 1, 28, 28)),
}
FIVE = ("vgg16_bn", "resnet18", "resnet50", "mobilenet_v2", "densenet121")
AMP_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # what forward passes run in under autocast


@dataclass(frozen=True)
class Case:
    """A network of `NETWORKS` in a dtype of `AMP_DTYPES`."""

    network: str
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.network} {self.dtype}"

    @property
    def label(self) -> str:
        return f"{NETWORKS[self.network].label}, {self.dtype}"

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return AMP_DTYPES[self.dtype]


def load(
    name: str,
    layout: str,
    batches: int = BATCHES,
    *,
    samples: int | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, Batches]:
    """The model, in eval mode, and its batches in one memory format; the same at every call.

    Args:
        samples: in a batch; None takes the network's own.
    """
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build().eval().to(device, memory_format=FORMATS[layout])
    shape = (samples or network.shape[0], *network.shape[1:])
    data = [
        (
            torch.randn(shape).to(device, memory_format=FORMATS[layout]),
            torch.randint(0, 10, shape[:1]).to(device),
        )
        for _ in range(batches)
    ]
    return model, data
