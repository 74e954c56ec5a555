"""Layers that standardize: the weights of a convolution, and the channels of inputs.

The weight-standardized convolution (Qiao et al., 1903.10520; scaling of Brock et al., 2101.08692).

Each filter is used with its mean removed and its norm fixed:

    ŵ = gain · (w − mean(w)) / max(‖w − mean(w)‖, 1e-2)

so that only the filter's direction, its gain and its bias are learned. The sources write the norm as
(var(w) · fan_in)^½, with the biased variance over the filter.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StandardizedConv2d(nn.Conv2d):
    """A convolution with standardized filters, initialized N(0, 1/fan_in), zero-padded to keep the size at stride 1.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd.
        stride: stride.
        affine: learn a gain (1 at first) and a bias (0 at first) per output channel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=affine)
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.gain = nn.Parameter(torch.ones(out_channels)) if affine else None
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def standardized_weight(self) -> Tensor:
        """Return the filters that the convolution uses, (out, in, k, k)."""
        centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        # On a CPU, torch.var_mean takes ten times as long.
        scale = torch.linalg.vector_norm(centered, dim=(1, 2, 3), keepdim=True).clamp(min=1e-2).reciprocal()
        if self.gain is not None:
            scale = scale * self.gain.view(-1, 1, 1, 1)
        return centered * scale

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)


class StandardizeChannels(nn.Module):
    """(x − mean)/deviation by channel, of inputs (N, C, …): constants of the model, in its weights, and not trained.

    Args:
        channels: C.

    Attributes:
        mean: (C,), 0 until it is set.
        deviation: (C,), 1 until it is set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.deviation.view(shape)


def standardizing(network: nn.Module, channels: int) -> nn.Module:
    """Put `StandardizeChannels` before a network."""
    return nn.Sequential(OrderedDict(standardize=StandardizeChannels(channels), network=network))


@torch.no_grad()
def set_statistics(model: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> None:
    """Set the constants of a model of `standardizing`."""
    layer = model.get_submodule("standardize")
    assert isinstance(layer, StandardizeChannels)
    layer.mean.copy_(torch.tensor(mean))
    layer.deviation.copy_(torch.tensor(deviation))
