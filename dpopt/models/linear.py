"""A linear classifier on the pixels: the smallest model there is, for quick comparisons of optimizers."""

from torch import nn


def linear(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> nn.Module:
    """Logits linear in the in_channels·image_size² pixels of a square image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
