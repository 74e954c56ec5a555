"""DeiT-Tiny, -Small and -Base (Touvron et al., 2012.12877) through timm, for fine-tuning.

Weights come by timm's names from its hub, or from a local file of a state dict (safetensors or torch). With
`train="head"` everything but the classifier is frozen: only the head's gradients are taken, clipped and noised.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn


def deit(
    size: Literal["tiny", "small", "base"],
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    pretrained: bool = True,
    weights: str | None = None,
    train: Literal["all", "head"] = "all",
    zero_head: bool = True,
) -> nn.Module:
    """DeiT of 5.7 M (tiny), 22 M (small) or 86 M (base) parameters, with patches of 16 pixels.

    Args:
        size: which one.
        num_classes: size of the output.
        in_channels: channels of the image.
        image_size: pixels of the square input, a multiple of 16.
        pretrained: load timm's ImageNet weights from its hub.
        weights: path of a local state dict, instead of the hub.
        train: `all` for full fine-tuning, `head` for the classifier only.
        zero_head: start the classifier at zero (Mehta et al., 2205.02973).

    Raises:
        ValueError: when the weights cannot be loaded or `train` is unknown.
        FileNotFoundError: when `weights` does not exist.
    """
    import timm

    if train not in ("all", "head"):
        raise ValueError(f"train={train} must be all (full fine-tuning) or head (the classifier only)")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights={weights} does not exist: give the path of a state dict of timm's DeiT-{size}"
        )
    try:
        model = timm.create_model(
            f"deit_{size}_patch16_224",
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=None if weights is None else {"file": weights},
            num_classes=num_classes,
            in_chans=in_channels,
            img_size=image_size,
        )
    except (OSError, RuntimeError) as error:
        if not pretrained and weights is None:
            raise
        raise ValueError(
            f"the pretrained weights of DeiT-{size} could not be loaded ({str(error).splitlines()[0]}): give a local "
            "file with model.weights=PATH, or train from scratch with model.pretrained=false"
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


deit_tiny, deit_small, deit_base = (partial(deit, size) for size in ("tiny", "small", "base"))
