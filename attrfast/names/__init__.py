"""Networks and data sets by the names that the command line knows them by."""

from attrfast.names.datasets import KINDS, NamedData, limited
from attrfast.names.networks import load_imagenet, network, pretrained

__all__ = ["KINDS", "NamedData", "limited", "load_imagenet", "network", "pretrained"]
