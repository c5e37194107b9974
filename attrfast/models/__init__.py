"""Networks for small images. They know nothing of attribution or pruning."""

from attrfast.models.resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from attrfast.models.vgg import vgg16_bn, vgg_small

__all__ = [
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg16_bn",
    "vgg_small",
]
