"""A small vision transformer (Dosovitskiy et al., 2010.11929), for digits and Fashion-MNIST in minutes."""

from torch import nn


def vit(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    patch_size: int = 4,
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
) -> nn.Module:
    """Build a transformer on image patches, its classifier on the class token.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image.
        image_size: pixels along a side, a multiple of `patch_size`.
        patch_size: pixels along a side of a patch.
        width: of a token, a multiple of `heads`.
        depth: blocks.
        heads: of the attention.

    Raises:
        ValueError: for a patch size or a width that does not divide.
    """
    if image_size % patch_size:
        raise ValueError(f"patch_size={patch_size} must divide the image of {image_size} pixels")
    if width % heads:
        raise ValueError(f"width={width} must be a multiple of heads={heads}")
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2.0,
    )
