"""Wide residual networks for private training as De et al. (2204.13650) published them, with standardized convs.

Inside a block ReLU comes before GroupNorm(16) before the convolution; a group's first block has its own ReLU, GroupNorm
and 1×1 convolution on the shortcut. WRN-16-4 has 2,753,818 parameters, WRN-40-4 8,961,306 (10 classes).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.models.layers import StandardizedConv2d


class _NormConv(nn.Module):
    """ReLU → GroupNorm → standardized convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(16, in_channels)
        self.conv = StandardizedConv2d(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(F.relu(x)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.first = _NormConv(in_channels, out_channels, 3, stride)
        self.second = _NormConv(out_channels, out_channels, 3)
        self.shortcut = _NormConv(in_channels, out_channels, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class WideResNet(nn.Module):
    """WRN-depth-width for images of about 32×32.

    Args:
        depth: 6n + 4.
        width: multiplies the group widths 16, 32, 64.
        num_classes: size of the output.
        in_channels: channels of the image.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"depth={depth} must be 6n + 4: 16 or 40, for example")
        self.stem = StandardizedConv2d(in_channels, 16, 3)
        blocks: list[nn.Module] = []
        channels = 16
        for group in range(3):
            out_channels = 16 * 2**group * width
            for index in range((depth - 4) // 6):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(_Block(channels, out_channels, stride, project=index == 0))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(16, channels)
        self.head = nn.Linear(channels, num_classes)
        nn.init.normal_(self.head.weight, std=channels**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.blocks(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def wrn_16_4(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-16-4: 2,753,818 parameters with 10 classes."""
    return WideResNet(16, 4, num_classes, in_channels)


def wrn_40_4(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-40-4: 8,961,306 parameters with 10 classes."""
    return WideResNet(40, 4, num_classes, in_channels)
