"""SqueezeNet 1.1 (Iandola et al., 1602.07360) through torchvision, for fine-tuning: no BatchNorm, 722,496 parameters.

Weights come from a local file of a state dict (safetensors) under torchvision's names, made for RGB images of 0 to 255
minus the means (123.68, 116.779, 103.939), as those of Caffe are. The classifier is a linear layer on the averages of
the last map, at the place of a convolution before them: for it, that is the same but for the ReLU behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dpopt.models.cnn5 import ChannelsLast

WIDTH = 512  # channels of the last map
_MEANS = (123.68, 116.779, 103.939)


class _Rescale(nn.Module):
    """From images (N, 3, h, w) normalized by mean and std to what the weights were made for."""

    factor: Tensor
    offset: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        factor = 255 * torch.tensor(std)
        self.register_buffer("factor", factor.view(3, 1, 1), persistent=False)
        offset = 255 * torch.tensor(mean) - torch.tensor(_MEANS)
        self.register_buffer("offset", offset.view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


def squeezenet(
    num_classes: int = 10,
    in_channels: int = 3,
    weights: str | None = None,
    train: Literal["all", "fires", "head"] = "all",
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.2470, 0.2435, 0.2616),
) -> nn.Module:
    """SqueezeNet 1.1 for images of any size from 32 pixels; its classifier starts at zero.

    Args:
        num_classes: size of the output.
        in_channels: 3.
        weights: path of a local state dict in safetensors; None to start at random.
        train: `all`, `fires` for the last two fire modules and the classifier, or `head` for the classifier alone.
        mean: that images were normalized with, of values from 0 to 1; by default CIFAR-10's.
        std: likewise.

    Raises:
        ValueError: when the weights do not fit, `train` is unknown or images are not in color.
        FileNotFoundError: when `weights` does not exist.
    """
    from torchvision.models import squeezenet1_1

    if train not in ("all", "fires", "head"):
        raise ValueError(f"train={train} must be all, fires (the last two and the classifier) or head (the classifier)")
    if in_channels != 3:
        raise ValueError(f"SqueezeNet takes images of 3 channels, not {in_channels}: choose another model")
    network: nn.Module = squeezenet1_1(num_classes=1)
    features: nn.Sequential = network.features  # type: ignore[assignment]
    if weights is not None:
        load_weights(network, weights)
    head = nn.Linear(WIDTH, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for module in features.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # per-example gradients want to read what a layer was given
    if train != "all":
        features.requires_grad_(False)
    if train == "fires":
        features[-2:].requires_grad_(True)
    return ChannelsLast(_Rescale(mean, std), features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def load_weights(network: nn.Module, weights: str) -> None:
    """Load the features of torchvision's SqueezeNet from a file; its classifier may be missing.

    Raises:
        ValueError: when the file does not fit.
        FileNotFoundError: when it does not exist.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights={weights} does not exist: give the path of a state dict of torchvision's squeezenet1_1"
        )
    try:
        state = {name: x for name, x in load_file(weights).items() if not name.startswith("classifier.")}
        found = network.load_state_dict(state, strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"weights={weights} do not fit: {str(error).splitlines()[0]}") from error
    missing = [name for name in [*found.missing_keys, *found.unexpected_keys] if not name.startswith("classifier.")]
    if missing:
        raise ValueError(
            f"weights={weights} do not fit ({missing[0]}): give a state dict of torchvision's squeezenet1_1"
        )
