"""CNN5: four convolutions with tanh and pooling, a fifth of one channel per class, and an average.

The network in which DP-AdamBC (2312.14334) and DP-AdamW (2511.07843) train CIFAR-10; layers as in the former's released
code: the first convolution without padding, no normalization. Tempered sigmoids are those of Papernot et al.
(2007.14191), who found bounded activations to cost less accuracy under clipping than ReLU.
"""

from typing import Literal

import torch
from torch import Tensor, nn


class TemperedSigmoid(nn.Module):
    """scale·σ(inverse_temperature·x) − offset; (2, 2, 1) is tanh.

    Args:
        scale: s.
        inverse_temperature: T.
        offset: o.
    """

    def __init__(self, scale: float = 1.58, inverse_temperature: float = 3.0, offset: float = 0.71) -> None:
        super().__init__()
        self.scale, self.inverse_temperature, self.offset = scale, inverse_temperature, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.inverse_temperature * x) - self.offset


class ChannelsLast(nn.Sequential):
    """A sequence of layers on images, with the channels last in memory: so processors pool several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # a copy that vmap knows, too


_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "tempered_sigmoid": TemperedSigmoid}


def cnn5(
    num_classes: int = 10,
    in_channels: int = 3,
    activation: Literal["tanh", "relu", "tempered_sigmoid"] = "tanh",
) -> nn.Module:
    """CNN5 for images of 14 pixels and more, 32 as published: 411,466 parameters for ten classes of color images.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image.
        activation: after each convolution but the last.

    Raises:
        ValueError: for an unknown activation.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation} must be one of {', '.join(_ACTIVATIONS)}")
    make, layers, width = _ACTIVATIONS[activation], [], in_channels
    for number, out in enumerate((32, 64, 128, 256)):
        layers += [nn.Conv2d(width, out, 3, padding=min(number, 1)), make()]
        layers += [nn.MaxPool2d(2)] if number < 3 else []
        width = out
    return ChannelsLast(*layers, nn.Conv2d(width, num_classes, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
