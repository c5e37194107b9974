"""Small networks that are built as users build theirs, not as layers in a row.

Each stands for one thing that an analysis of modules alone would miss. `NETWORKS` lists them all
with the inputs they take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

CLASSES = 5


class Plain(nn.Module):
    """Convolution, batch norm, ReLU, pooling, linear layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * width, 12), nn.ReLU(), nn.Linear(12, CLASSES)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class Functional(nn.Module):
    """Activations and pooling that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 8, 3)
        self.third = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.first(x))
        x = functional.max_pool2d(torch.relu(self.second(x)), 2)
        x = self.third(x).relu_()
        return self.head(x.mean((2, 3)))


class Reused(nn.Module):
    """A convolution and a ReLU that are called twice, around a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 6, 1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        x = x + self.relu(self.body(x))
        x = x + self.relu(self.body(x))
        return self.head(self.relu(self.side(x)).amax((2, 3)))


class SeveralInputsAndOutputs(nn.Module):
    """Two images in, two heads out, channels concatenated in between."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv2d(10, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)
        self.second_head = nn.Linear(10, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([torch.relu(self.left(a)), torch.relu(self.right(b))], 1)
        x = torch.relu(self.mix(both))
        return self.head(x.mean((2, 3))), self.second_head(both.mean((2, 3)))


class Grouped(nn.Module):
    """Grouped, depthwise and depth-multiplied convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.point = nn.Conv2d(16, 6, 1)
        self.multiplied = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.last = nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.grouped(x)))
        x = functional.relu6(self.depthwise(x))
        x = torch.relu(self.multiplied(torch.relu(self.point(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class NeverUsed(nn.Module):
    """A branch that forward never takes, as code that was left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class DataDependent(nn.Module):
    """How often the block runs depends on the values of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        times = 1 if float(x.sum()) > 0 else 2
        x = torch.relu(self.first(x))
        for _ in range(times):
            x = torch.relu(self.block(x)) + x
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class UpAndDown(nn.Module):
    """Transposed convolutions, grouped and depthwise too, with PReLU and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.prelu = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.norm = nn.InstanceNorm2d(12, affine=True, track_running_stats=True)
        self.depthwise_up = nn.ConvTranspose2d(12, 24, 3, padding=1, groups=12)
        self.grouped_up = nn.ConvTranspose2d(24, 8, 3, stride=2, padding=1, groups=2)
        self.last = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.down(x))
        x = torch.relu(self.norm(self.up(x)))
        x = torch.relu(self.grouped_up(torch.relu(self.depthwise_up(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Sequence1d(nn.Module):
    """Convolutions over time, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6 * 8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).flatten(1))


class Volume3d(nn.Module):
    """Convolutions over volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm3d(6)
        self.second = nn.Conv3d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool3d(torch.relu(self.norm(self.first(x))), 2)
        return self.head(torch.relu(self.second(x)).mean((2, 3, 4)))


class Gated(nn.Module):
    """Squeeze and excitation: channels multiplied by what a side branch makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Linear(4, 8)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        x = x * gate[:, :, None, None]
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class FixedView(nn.Module):
    """A view whose sizes are written out in the code: cutting `second` would break it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 2).view(-1, 32))


class Half(nn.Module):
    """Of what one call makes, a part is used, and is larger where it is read than where it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.first(x).chunk(2, 1)[1]
        return self.head(torch.relu(self.third(torch.relu(self.second(half)))).mean((2, 3)))


class Quarters(nn.Module):
    """Its second convolution sees the quarters of an image as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        x = torch.relu(self.first(x))
        x = x.view(n, 6, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.head(x.mean((2, 3)).view(n, 4, -1).mean(1))


class ChannelsInTheLastDimension(nn.Module):
    """A linear layer at every position, between permutations; no ReLU after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.mix = nn.Linear(6, 8)
        self.third = nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4 * 9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(self.mix(torch.relu(self.first(x)).permute(0, 2, 3, 1)))
        x = self.third(x.permute(0, 3, 1, 2)).tanh()
        return self.head(functional.dropout(functional.adaptive_avg_pool2d(x, 3), 0.5, False).flatten(1))


def _image(size: int = 16, channels: int = 3) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda samples: (torch.randn(samples, channels, size, size),)


# Name -> what makes the network, and what makes its inputs for so many samples.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "plain": (Plain, _image()),
    "functional": (Functional, _image()),
    "reused": (Reused, _image()),
    "several inputs and outputs": (
        SeveralInputsAndOutputs,
        lambda n: (torch.randn(n, 3, 12, 12), torch.randn(n, 3, 12, 12)),
    ),
    "grouped": (Grouped, _image()),
    "never used": (NeverUsed, _image()),
    "data dependent": (DataDependent, _image()),
    "up and down": (UpAndDown, _image()),
    "1d": (Sequence1d, lambda n: (torch.randn(n, 4, 16),)),
    "3d": (Volume3d, lambda n: (torch.randn(n, 1, 8, 8, 8),)),
    "gated": (Gated, _image()),
    "fixed view": (FixedView, _image()),
    "half": (Half, _image()),
}
