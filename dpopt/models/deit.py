"""DeiT-Tiny, -Small and -Base (Touvron et al., 2012.12877) through timm, for fine-tuning.

Weights come by timm's names from its hub, or from a local file of a state dict (safetensors or torch). With
`train="head"` everything but the classifier is frozen: only the head's gradients are taken, clipped and noised.
"""

from pathlib import Path
from typing import Any, Literal

from torch import nn


def _deit(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    pretrained: bool,
    weights: str | None,
    train: str,
    zero_head: bool,
) -> nn.Module:
    import timm

    if train not in ("all", "head"):
        raise ValueError(f"train={train} must be all (full fine-tuning) or head (the classifier only)")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"weights={weights} does not exist: give the path of a state dict of timm's {name}")
    overlay = {"file": weights} if weights is not None else None
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            in_chans=in_channels,
            img_size=image_size,
        )
    except (OSError, RuntimeError) as error:
        if not pretrained and weights is None:
            raise
        raise ValueError(
            f"the pretrained weights of {name} could not be loaded ({str(error).splitlines()[0]}): give a local file "
            "with model.weights=PATH, or train from scratch with model.pretrained=false"
        ) from error
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 (the fused kernel has no batching rule: vmap would loop)
    head: Any = model.get_classifier()  # type: ignore[operator]  # timm types its models as plain modules
    if zero_head:
        nn.init.zeros_(head.weight)
    if train == "head":
        model.requires_grad_(False)
        head.requires_grad_(True)
    return model


Train = Literal["all", "head"]


def deit_tiny(
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    pretrained: bool = True,
    weights: str | None = None,
    train: Train = "all",
    zero_head: bool = True,
) -> nn.Module:
    """DeiT-Tiny, 5.7 M parameters.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image.
        image_size: pixels of the square input, a multiple of 16.
        pretrained: load timm's ImageNet weights from its hub.
        weights: path of a local state dict, instead of the hub.
        train: `all` for full fine-tuning, `head` for the classifier only.
        zero_head: start the classifier at zero (Mehta et al., 2205.02973).

    Raises:
        ValueError: when the weights cannot be loaded or `train` is unknown.
    """
    name = "deit_tiny_patch16_224"
    return _deit(name, num_classes, in_channels, image_size, pretrained, weights, train, zero_head)


def deit_small(
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    pretrained: bool = True,
    weights: str | None = None,
    train: Train = "all",
    zero_head: bool = True,
) -> nn.Module:
    """DeiT-Small, 22 M parameters; arguments as for `deit_tiny`."""
    name = "deit_small_patch16_224"
    return _deit(name, num_classes, in_channels, image_size, pretrained, weights, train, zero_head)


def deit_base(
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    pretrained: bool = True,
    weights: str | None = None,
    train: Train = "all",
    zero_head: bool = True,
) -> nn.Module:
    """DeiT-Base, 86 M parameters; arguments as for `deit_tiny`."""
    name = "deit_base_patch16_224"
    return _deit(name, num_classes, in_channels, image_size, pretrained, weights, train, zero_head)
