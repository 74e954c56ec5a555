"""How an image or a row becomes an input of the model, exactly as in the test set; and the names of public classes.

A DataSpec has one such object as `inputs`, so that predictions need none of the data. It is called with one raw input
and returns the model's, without a batch dimension, or raises a ValueError that completes the sentence "FILE …". Its
`reads` says what is raw: an `image` of PIL, or a `row`, a mapping from columns to text, of which it needs its
`columns`. `to_json` describes its steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dpopt.data.sources import TensorSource

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_MNIST = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(_CIFAR100.split())


@dataclass(frozen=True)
class FixedImages:
    """Images of one size, as bytes scaled to [0, 1] and normalized, then resized as a `TensorSource` does.

    Attributes:
        size: height and width of the raw images.
        mean: per channel; one channel is gray.
        std: per channel.
        image_size: pixels after resizing; None to keep the size.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int | None = None
    reads: ClassVar[str] = "image"
    columns: ClassVar[Sequence[str]] = ()

    def __call__(self, raw: Any) -> Tensor:
        height, width = self.size
        if (raw.height, raw.width) != self.size:
            raise ValueError(
                f"is {raw.width}×{raw.height} where the model was trained on {width}×{height}: resize it first"
            )
        pixels = torch.from_numpy(np.array(raw.convert("L" if len(self.mean) == 1 else "RGB")))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        source = TensorSource(pixels[None], torch.zeros(1), self.mean, self.std, image_size=self.image_size)
        return next(iter(source.plain(1)))[0][0]

    def to_json(self) -> dict[str, Any]:
        """Describe the steps as plain values."""
        steps = ["convert to gray" if len(self.mean) == 1 else "convert to RGB", "divide by 255", "subtract mean"]
        steps += ["divide by std", *(["resize, bilinear with antialiasing"] if self.image_size else [])]
        return {"reads": "image", "steps": steps} | asdict(self)


@dataclass(frozen=True)
class CroppedImages:
    """Images of any size: the shorter side is resized, the center cropped to 87.5%, colors normalized.

    Attributes:
        image_size: pixels of the crop.
        mean: per channel.
        std: per channel.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    reads: ClassVar[str] = "image"
    columns: ClassVar[Sequence[str]] = ()

    def __call__(self, raw: Any) -> Tensor:
        found: Tensor = self._steps(raw.convert("RGB"))
        return found

    @cached_property
    def _steps(self) -> Any:
        from torchvision.transforms import v2

        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
        return v2.Compose([v2.Resize(self.resized), v2.CenterCrop(self.image_size), *finish])

    @property
    def resized(self) -> int:
        """Pixels of the shorter side before the crop."""
        return round(self.image_size / 0.875)

    def to_json(self) -> dict[str, Any]:
        """Describe the steps as plain values."""
        steps = [
            "convert to RGB",
            f"resize the shorter side to {self.resized}, bilinear with antialiasing",
            f"crop the center to {self.image_size}×{self.image_size}",
            *("divide by 255", "subtract mean", "divide by std"),
        ]
        return {"reads": "image", "steps": steps} | asdict(self)


def class_names(names: Sequence[Any], classes: int) -> list[str]:
    """Name every class: by number, where there is not a name for each."""
    return list(map(str, names if len(names) == classes else range(classes)))


def column_of(row: Mapping[str, Any], column: str) -> str:
    """Return the text in a column.

    Raises:
        ValueError: for an empty one.
    """
    if not str(row.get(column) or "").strip():
        raise ValueError(f"has no text in the column {column!r}: fill it in")
    return str(row[column])
