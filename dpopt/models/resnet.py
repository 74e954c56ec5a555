"""ResNet-18 and ResNet-50 (He et al., 1512.03385), torchvision's, with GroupNorm in the place of BatchNorm."""

from functools import partial

from torch import nn


def _resnet(
    name: str, num_classes: int = 1000, in_channels: int = 3, groups: int = 32, small_images: bool = False
) -> nn.Module:
    """Build a ResNet with GroupNorm.

    Args:
        name: torchvision's.
        num_classes: size of the output.
        in_channels: channels of the image.
        groups: groups of every GroupNorm.
        small_images: a 3×3 stem without pooling, for images of about 32×32.
    """
    import torchvision.models  # takes as long as torch itself

    make = getattr(torchvision.models, name)
    model: nn.Module = make(num_classes=num_classes, norm_layer=lambda channels: nn.GroupNorm(groups, channels))
    if small_images or in_channels != 3:
        kernel, stride, padding = (3, 1, 1) if small_images else (7, 2, 3)
        model.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small_images:
        model.maxpool = nn.Identity()
    return model


resnet18 = partial(_resnet, "resnet18")
resnet50 = partial(_resnet, "resnet50")
