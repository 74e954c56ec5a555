"""A dataset of features whose channels are standardized by statistics that a run releases."""

import torch

from dpopt.data import ChannelStatistics, DataSpec
from dpopt.data.sources import TensorSource

BOUNDS = ChannelStatistics(4.0, 0.5, 2.0)


def features() -> DataSpec:
    """Describe noise of mean 1 and deviation 3 in three channels."""

    def load(*_):
        generator = torch.Generator().manual_seed(0)
        return tuple(
            TensorSource(3 * torch.randn(n, 3, 4, 4, generator=generator) + 1, torch.arange(n) % 10) for n in (64, 16)
        )

    return DataSpec("made", 64, 10, (3, 4, 4), load, statistics=BOUNDS)
