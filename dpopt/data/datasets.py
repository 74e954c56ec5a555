"""Datasets by name. A `DataSpec` says what a dataset is before any file is read, so that a plan needs no files.

`load` reads the files: digits ship with scikit-learn; CIFAR, MNIST and Fashion-MNIST come through torchvision,
downloaded where the network allows; ImageNet is a folder tree. Training and test sets are what the authors of the data
made them, except digits, of which a fixed fifth is the test set.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpopt.data.image_files import open_folder
from dpopt.data.inputs import CIFAR10, CIFAR100, FASHION_MNIST, CroppedImages, FixedImages
from dpopt.data.items import Expected
from dpopt.data.sources import MapSource, TensorSource
from dpopt.files import one_process
from dpopt.rng import RandomKey

Loaded = tuple[Any, Any]  # train and test, as Sources or as anything that `dpopt.data.sources.as_source` accepts

UNIT = "one training example with its label (all its augmented views together)"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 1_281_167
_IMAGENET_NAMES = re.compile(r"image[-_ ]?net|imagenette|imagewoof|ilsvrc|(?<![a-z])in[-_]?(1|21|22)k")
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class DataSpec:
    """A dataset before loading.

    Attributes:
        name: short name.
        train_size: number of training examples, public.
        classes: number of classes; 0 where targets are no classes.
        shape: shape of one input, (channels, height, width) or (tokens,).
        load: (data_dir, device, workers) → (train, test): Sources, tensor pairs or map-style Datasets.
        constants: what inputs are normalized by and where it is from, for the privacy card; empty where it is unknown.
        collection: the public collection that the images belong to, on which initial weights must not have been
            trained; empty for none, None to go by the name and the class folders.
        task: what is learned: `classification`, `sequence_classification` or `language_modeling`.
        unit: what a record is, for the privacy card.
        related: whether records are grouped by what other records hold, so that a hold-out by content depends on them.
        inputs: makes the model's inputs of raw ones (`dpopt.data.inputs`); None where that is not known.
        class_names: of the classes in their order, public; empty to number them, or for the names of class folders.
        statistics: of channels, that a private run releases and standardizes inputs by
            (`dpopt.privacy.statistics`); None for none.
    """

    name: str
    train_size: int
    classes: int
    shape: tuple[int, ...]
    load: Callable[[Path, torch.device, int], Loaded]
    constants: str = ""
    collection: str | None = None
    task: str = "classification"
    unit: str = UNIT
    related: bool = False
    inputs: Any = None
    class_names: Sequence[str] = ()
    statistics: "ChannelStatistics | None" = None

    @property
    def expected(self) -> Expected:
        """What every example has to be."""
        return Expected(tuple(self.shape), self.classes or None)


@dataclass(frozen=True)
class ChannelStatistics:
    """How means and deviations of channels are released (`dpopt.privacy.statistics`).

    Attributes:
        noise_multiplier: σ of means and squares together; two releases of σ√2 each are the same.
        mean_norm: M, public: taken from other data.
        square_norm: S, public.

    Raises:
        ValueError: for a number that is not positive.
    """

    noise_multiplier: float
    mean_norm: float
    square_norm: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"statistics.{name}={value} must be a positive number")


def looks_like_imagenet(name: str) -> bool:
    """Tell by its name whether a dataset is part of ImageNet."""
    return _IMAGENET_NAMES.search(name.lower()) is not None


def normalization(mean: Sequence[float], std: Sequence[float], origin: str) -> str:
    """Say what inputs are normalized by, for the privacy card."""
    numbers = (", ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return "mean {}, std {} ({})".format(*numbers, origin)


def digits() -> DataSpec:
    """scikit-learn's 8×8 digits: 1,437 for training and a fixed fifth, 360, for testing; no file needed."""

    inputs = FixedImages((8, 8), (0.29,), (0.35,))

    def load(data_dir: Path, device: torch.device, workers: int) -> Loaded:
        from sklearn.datasets import load_digits

        images, targets = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        images = (images.view(-1, 1, 8, 8) * 15).to(torch.uint8)  # 0…16 → 0…240
        order = torch.argsort(RandomKey.from_seed(0, "digits").uniform(len(images), "split"))

        def part(at: torch.Tensor) -> TensorSource:
            return TensorSource(images[at].to(device), targets[at].long().to(device), inputs.mean, inputs.std)

        return part(order[360:]), part(order[:360])

    constants = normalization(inputs.mean, inputs.std, "rounded, of these public digits")
    return DataSpec("digits", 1437, 10, (1, 8, 8), load, constants, "digits, optdigits", inputs=inputs)


def mnist(augment: bool = False, normalize: bool = True) -> DataSpec:
    """MNIST (LeCun et al., 1998): 60,000 + 10,000 grey images of digits, 28×28.

    Args:
        augment: shift by up to two pixels.
        normalize: by the published mean and deviation; else pixels lie between 0 and 1.
    """
    return _gray("MNIST", (0.1307, 0.3081), 2 if augment else 0, False, normalize, [str(digit) for digit in range(10)])


def fashion_mnist(augment: bool = False, normalize: bool = True) -> DataSpec:
    """Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey images of 28×28.

    Args:
        augment: shift by up to two pixels and mirror.
        normalize: by the published mean and deviation; else pixels lie between 0 and 1.
    """
    return _gray("FashionMNIST", (0.2860, 0.3530), 2 if augment else 0, augment, normalize, FASHION_MNIST)


def cifar10(augment: bool = True, image_size: int = 32) -> DataSpec:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 color images of 32×32.

    Args:
        augment: shift by up to four pixels (reflected) and mirror.
        image_size: resize to this many pixels (224 for a pretrained DeiT).
    """
    return _cifar("CIFAR10", CIFAR10, _CIFAR10_MEAN, _CIFAR10_STD, augment, image_size)


def cifar100(augment: bool = True, image_size: int = 32) -> DataSpec:
    """CIFAR-100 (Krizhevsky, 2009): as CIFAR-10, with 100 classes."""
    return _cifar("CIFAR100", CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), augment, image_size)


def imagenet(
    folder: str = "imagenet",
    image_size: int = 224,
    train_size: int = _IMAGENET_SIZE,
    classes: int = 1000,
    is_imagenet: bool | None = None,
) -> DataSpec:
    """Describe a folder tree of images; the defaults are ImageNet's.

    The images lie at DATA_DIR/folder/{train,val}/CLASS/*.JPEG.

    Args:
        folder: the folder below data_dir.
        image_size: pixels after a random resized crop (training) or a center crop of 87.5% (test).
        train_size: number of training images, checked against the folder.
        classes: number of classes, checked against the folder.
        is_imagenet: whether these are images of ImageNet, on which weights pretrained there get no ε; null goes by
            the names of the folders and the number of images.
    """

    inputs = CroppedImages(image_size, _IMAGENET_MEAN, _IMAGENET_STD)

    def load(data_dir: Path, device: torch.device, workers: int) -> Loaded:
        from torchvision.transforms import v2

        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
        views = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), *finish])
        root = data_dir / folder
        for part in ("train", "val"):
            if not (root / part).is_dir():
                raise FileNotFoundError(
                    f"{root / part} is missing: put the images at {root}/{{train,val}}/CLASS/IMAGE, or set data_dir "
                    "(or DPOPT_DATA_DIR)"
                )
        train, test = open_folder(root / "train", views), open_folder(root / "val", inputs)
        found = (len(train), len(train.classes))
        if found != (train_size, classes):
            raise ValueError(
                f"{root} holds {found[0]:,} training images in {found[1]} classes where {train_size:,} in {classes} "
                f"were announced: set dataset.train_size={found[0]} dataset.classes={found[1]}"
            )
        if train.classes != test.classes:
            only = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"{root}/train and {root}/val differ in their class folders ({', '.join(only[:4])}): give both the same"
            )
        plain = open_folder(root / "train", inputs)
        return MapSource(train, device, workers, plain), MapSource(test, device, workers)

    if is_imagenet is None and not (looks_like_imagenet(folder) or train_size == _IMAGENET_SIZE):
        collection = None
    else:
        collection = "" if is_imagenet is False else "imagenet"
    constants = normalization(_IMAGENET_MEAN, _IMAGENET_STD, "published for ImageNet")
    shape = (3, image_size, image_size)
    return DataSpec(Path(folder).name, train_size, classes, shape, load, constants, collection, inputs=inputs)


def _cifar(
    name: str,
    classes: Sequence[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: bool,
    image_size: int,
) -> DataSpec:
    inputs = FixedImages((32, 32), mean, std, image_size if image_size != 32 else None)
    load = _torchvision(name, inputs, 4 if augment else 0, augment)
    constants = normalization(mean, std, f"published for {name[:5]}-{len(classes)}")
    shape = (3, image_size, image_size)
    name = name.lower()
    return DataSpec(name, 50_000, len(classes), shape, load, constants, name, inputs=inputs, class_names=classes)


def _gray(
    name: str, moments: tuple[float, float], crop: int, flip: bool, normalize: bool, classes: Sequence[str]
) -> DataSpec:
    """Describe images of MNIST's kind, of a class of torchvision."""
    mean, std = moments if normalize else (0.0, 1.0)
    inputs = FixedImages((28, 28), (mean,), (std,))
    shown = "fashion_mnist" if name == "FashionMNIST" else "mnist"
    constants = normalization(inputs.mean, inputs.std, f"published for {name}") if normalize else "pixels in [0, 1]"
    load = _torchvision(name, inputs, crop, flip)
    return DataSpec(shown, 60_000, 10, (1, 28, 28), load, constants, shown, inputs=inputs, class_names=classes)


def _torchvision(name: str, inputs: FixedImages, crop: int, flip: bool) -> Callable[[Path, torch.device, int], Loaded]:
    def load(data_dir: Path, device: torch.device, workers: int) -> Loaded:
        import torchvision.datasets

        def part(train: bool) -> TensorSource:
            dataset = _open(getattr(torchvision.datasets, name), data_dir, train)
            images = torch.as_tensor(dataset.data)
            images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1)
            targets = torch.as_tensor(dataset.targets).long()
            shift, mirror = (crop, flip) if train else (0, False)
            images = images.contiguous().to(device)
            return TensorSource(images, targets.to(device), inputs.mean, inputs.std, shift, mirror, inputs.image_size)

        return part(True), part(False)

    return load


def _open(factory: Any, data_dir: Path, train: bool) -> Any:
    try:
        return factory(root=data_dir, train=train, download=False)
    except RuntimeError:  # torchvision's word for "not there, or damaged"
        pass
    try:
        with one_process(data_dir):
            return factory(root=data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        where = f"{data_dir}/{getattr(factory, 'base_folder', factory.__name__ + '/raw')}"
        raise FileNotFoundError(
            f"{factory.__name__} is not in {where} and could not be downloaded ({error}): put its files there, or set "
            "data_dir (or DPOPT_DATA_DIR) to the folder that holds them"
        ) from error
