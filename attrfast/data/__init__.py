"""Image sets ready for training and pruning. Nothing is downloaded unless asked for.

torchvision and scikit-learn are imported when a set is opened; `pip install "attrfast[data]"`
brings them.
"""

from attrfast.data.cifar import cifar10
from attrfast.data.digits import digits
from attrfast.data.fashion import fashion_mnist
from attrfast.data.flowers import flowers102
from attrfast.data.folder import image_folder
from attrfast.data.loaders import Splits

__all__ = ["Splits", "cifar10", "digits", "fashion_mnist", "flowers102", "image_folder"]
