"""What runs on the pretended GPU take: random pictures, and a clip rule that makes the host wait."""

import torch
from torch.utils.data import Dataset

from dpopt.data.datasets import DataSpec
from dpopt.data.sources import TensorSource
from dpopt.privacy.clipping import Flat


class Asking(Flat):
    """Flat clipping that brings a norm to the host."""

    def weight(self, norm):
        assert float(norm.sum()) >= 0
        return super().weight(norm)


class Read(Dataset):
    """What a folder of images would give, one at a time."""

    def __init__(self, images, targets):
        self.images, self.targets = images, targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].float() / 255, int(self.targets[index])


def pictures(
    size: int = 32, count: int = 256, classes: int = 10, from_disk: bool = False, flip: bool = False
) -> DataSpec:
    """Make `count` images (3, size, size) to train on, and 16 to test.

    Args:
        size: pixels.
        count: of examples.
        classes: of examples.
        from_disk: whether workers read them one by one; else they lie on the device.
        flip: whether those that lie there are augmented.
    """

    def load(data_dir, device, workers):
        torch.manual_seed(0)
        images = torch.randint(256, (count + 16, 3, size, size), dtype=torch.uint8)
        targets = torch.randint(classes, (count + 16,))
        parts = (images[:count], targets[:count]), (images[count:], targets[count:])
        if from_disk:
            return tuple(Read(*part) for part in parts)
        return tuple(TensorSource(x.to(device), y.to(device), (0.5,) * 3, (0.25,) * 3, flip=flip) for x, y in parts)

    return DataSpec("pictures", count, classes, (3, size, size), load)
