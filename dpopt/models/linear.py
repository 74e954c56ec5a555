"""A linear classifier on pixels or features: the smallest model there is."""

from torch import nn


def linear(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Module:
    """Logits linear in the in_channels·image_size² pixels of a square image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
