"""One network of each of torchvision's families, as after some training."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import get_model

# Name -> height and width of its images.
FAMILIES = {
    "vgg11": 32,
    "vgg11_bn": 32,
    "resnet18": 48,
    "resnet50": 48,
    "resnext50_32x4d": 48,
    "wide_resnet50_2": 48,
    "densenet121": 48,
    "googlenet": 64,
    "inception_v3": 299,
    "mobilenet_v2": 48,
    "mobilenet_v3_small": 48,
    "efficientnet_b0": 48,
    "squeezenet1_1": 48,
    "shufflenet_v2_x0_5": 48,
    "regnet_y_400mf": 48,
    "mnasnet0_5": 48,
    "convnext_tiny": 48,
}
CLASSES = 10


def family(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights, in float32 and eval mode."""
    torch.manual_seed(seed)
    # These two take a minute to draw their default weights.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return lived_in(get_model(name, weights=None, num_classes=CLASSES, **options))


def images_for(name: str, samples: int, seed: int = 1) -> torch.Tensor:
    size = FAMILIES[name]
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lived_in(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and affine parameters as after training (not ones and zeros)."""
    model.eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.1)
            elif isinstance(module, nn.PReLU):
                module.weight.uniform_(0.1, 0.5)
    return model
