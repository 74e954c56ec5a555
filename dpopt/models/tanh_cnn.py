"""Small networks of convolutions with tanh, in which private training of images is compared.

`model=tanh_cnn_28` on MNIST and Fashion-MNIST is the network of Papernot et al. (2007.14191), who found that bounded
activations cost less accuracy under clipping than ReLU; the others are those of Tramèr & Boneh (2011.11660).
"""

from collections.abc import Sequence

import torch
from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def tanh_cnn(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    layers: Sequence[Sequence[int]] = ((16, 8, 2, 2), (2, 1), (32, 4, 2, 0), (2, 1)),
    hidden: int = 32,
    activation: str = "tanh",
) -> nn.Module:
    """Convolutions, each with tanh, and max pooling; then one hidden layer with tanh, and a linear one.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image.
        image_size: pixels of a side.
        layers: in their order; four numbers are a convolution (channels, kernel, stride, padding), two numbers max
            pooling (kernel, stride).
        hidden: units of the hidden layer; 0 for none.
        activation: tanh, or relu to compare with.

    Raises:
        ValueError: for a layer of another length, images that are too small, or another activation.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known: use {' or '.join(_ACTIVATIONS)}")
    nonlinear = _ACTIVATIONS[activation]
    body: list[nn.Module] = []
    width = in_channels
    for layer in layers:
        if len(layer) not in (2, 4):
            raise ValueError(
                f"the layer {list(layer)} must have four numbers (channels, kernel, stride, padding), or two for max "
                "pooling (kernel, stride)"
            )
        if len(layer) == 2:
            body.append(nn.MaxPool2d(layer[0], layer[1]))
            continue
        out, kernel, stride, padding = layer
        body += [nn.Conv2d(width, out, kernel, stride, padding), nonlinear()]
        width = out
    features = nn.Sequential(*body, nn.Flatten())
    try:
        with torch.no_grad():
            size = features(torch.zeros(1, in_channels, image_size, image_size)).shape[1]
    except RuntimeError as error:
        raise ValueError(f"images of {image_size} pixels are too small for these layers ({error}): drop one") from error
    if hidden:
        return nn.Sequential(*features, nn.Linear(size, hidden), nonlinear(), nn.Linear(hidden, num_classes))
    return nn.Sequential(*features, nn.Linear(size, num_classes))
