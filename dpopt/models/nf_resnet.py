"""NF-ResNet-50 (Brock et al., 2101.08692), the normalizer-free network of De et al.'s ImageNet results (2204.13650).

A block computes x + α·g·F(act(x)·β): act is a ReLU scaled to keep unit variance, β = 1/std(x) is the reciprocal of the
standard deviation expected at initialization (the variance grows by α² per block and restarts at 1 + α² behind a
projection), g the learned gain of the skip ("skip gain"). Convolutions are standardized and have neither gain nor
bias: 25,503,928 parameters with 1,000 classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt.models.layers import StandardizedConv2d

_RELU_GAIN = 1.7139588594436646  # 1/std(relu(z)) for z ~ N(0, 1)
_ALPHA = 0.2


def _activation(x: Tensor) -> Tensor:
    return F.relu(x) * _RELU_GAIN


class _Bottleneck(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, beta: float, skip_gain: float) -> None:
        super().__init__()
        inner = out_channels // 4
        self.beta = beta
        self.conv1 = StandardizedConv2d(in_channels, inner, 1, affine=False)
        self.conv2 = StandardizedConv2d(inner, inner, 3, stride, affine=False)
        self.conv3 = StandardizedConv2d(inner, out_channels, 1, affine=False)
        project = in_channels != out_channels
        self.shortcut = StandardizedConv2d(in_channels, out_channels, 1, stride, affine=False) if project else None
        self.skip_gain = nn.Parameter(torch.tensor(skip_gain))

    def forward(self, x: Tensor) -> Tensor:
        h = _activation(x) * self.beta
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv3(_activation(self.conv2(_activation(self.conv1(h)))))
        return shortcut + _ALPHA * self.skip_gain * h


class NFResNet50(nn.Module):
    """NF-ResNet-50.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image.
        skip_gain: initial gain of the residual branches: 1 (De et al.) or 0.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, skip_gain: float = 1.0) -> None:
        super().__init__()
        self.stem = StandardizedConv2d(in_channels, 64, 7, 2, affine=False)
        blocks: list[nn.Module] = []
        channels, variance = 64, 1.0
        for stage, depth in enumerate((3, 4, 6, 3)):
            out_channels = 256 * 2**stage
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Bottleneck(channels, out_channels, stride, variance**-0.5, skip_gain))
                variance = (1.0 if index == 0 else variance) + _ALPHA**2
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        return self.head(_activation(self.blocks(x)).mean(dim=(2, 3)))


def nf_resnet50(num_classes: int = 1000, in_channels: int = 3, skip_gain: float = 1.0) -> nn.Module:
    """NF-ResNet-50: 25,503,928 parameters with 1,000 classes."""
    return NFResNet50(num_classes, in_channels, skip_gain)
