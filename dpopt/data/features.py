"""Image sets as features that take no training, or were trained elsewhere.

They are computed once, kept next to the images in half precision, and read from there by all processes. They depend on
one example each, so they cost no privacy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from dpopt.data.datasets import ChannelStatistics, DataSpec, Loaded, cifar10, fashion_mnist, mnist
from dpopt.data.scattering import VERSION, mirrored_channels, scatter, scattering_channels
from dpopt.data.sources import TensorSource
from dpopt.files import one_process, replace_durably


def cifar10_scattering(
    groups: int | None = 27, statistics: Mapping[str, float] | None = None, augment: bool = False
) -> DataSpec:
    """CIFAR-10 as scattering features (J = 2, 8 orientations), each example normalized over groups of channels.

    1.9 GB. Setting: Tramèr & Boneh, 2011.11660.

    Args:
        groups: number of groups of channels; null leaves the features as they are.
        statistics: releases means and deviations of the channels with noise, in ε, and standardizes by them: the
            arguments of `ChannelStatistics`; null for none.
        augment: mirror, for which `groups` must be null; with two views, one is the mirror image of the other.

    Raises:
        ValueError: for `augment` with groups.
    """
    return _scattering(cifar10(augment=False), groups, statistics, augment)


def mnist_scattering(groups: int | None = 27, statistics: Mapping[str, float] | None = None) -> DataSpec:
    """MNIST as scattering features of pixels between 0 and 1; otherwise as `cifar10_scattering`. 0.6 GB.

    Args:
        groups: number of groups of channels; null leaves the features as they are.
        statistics: see `cifar10_scattering`.
    """
    return _scattering(mnist(normalize=False), groups, statistics)


def fashion_mnist_scattering(groups: int | None = 27, statistics: Mapping[str, float] | None = None) -> DataSpec:
    """Fashion-MNIST as scattering features of pixels between 0 and 1; otherwise as `cifar10_scattering`. 0.6 GB.

    Args:
        groups: number of groups of channels; null leaves the features as they are.
        statistics: see `cifar10_scattering`.
    """
    return _scattering(fashion_mnist(normalize=False), groups, statistics)


def cifar10_squeezenet(weights: str = "squeezenet1_1.safetensors", image_size: int = 96) -> DataSpec:
    """CIFAR-10 as the 512 averages of SqueezeNet 1.1's last map, each example normalized to mean 0 and variance 1.

    What the weights were trained on is not covered by ε.

    Args:
        weights: file of a state dict in the data folder, or its path (`dpopt.models.squeezenet`).
        image_size: pixels that images are resized to.
    """
    images = cifar10(augment=False, image_size=image_size)

    def network(data_dir: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        from dpopt.models import squeezenet

        features = squeezenet(weights=str(data_dir / weights))[:-1]  # type: ignore[index]
        return lambda x: F.layer_norm(features.to(x.device)(x), (512,))[:, :, None, None]

    load = _features(images, f"squeezenet_{Path(weights).stem}_{image_size}", network)
    constants = (
        f"{images.constants}; then features of SqueezeNet 1.1 ({Path(weights).name}, taken as trained on ImageNet, "
        "which ε does not cover), each example by its own mean and variance"
    )
    return DataSpec("cifar10_squeezenet", 50_000, 10, (512, 1, 1), load, constants, images.collection)


def _scattering(
    images: DataSpec, groups: int | None, statistics: Mapping[str, float] | None, mirror: bool = False
) -> DataSpec:
    """Describe scattering features of images in memory."""
    if mirror and groups:
        raise ValueError(
            f"dataset.groups={groups} cannot be mirrored, as a group holds some of the wavelets' directions: set "
            "dataset.groups=null, or dataset.augment=false"
        )
    channels, side = scattering_channels(images.shape[0]), images.shape[-1] // 4

    def features(_: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: F.group_norm(scatter(x), groups) if groups else scatter(x)

    mirrored = mirrored_channels(images.shape[0]) if mirror else ()
    load = _features(images, f"scattering_v{VERSION}_{groups or 'raw'}", features, mirrored)
    constants = images.constants + ("; then each example by its own groups of channels" if groups else "")
    try:
        released = ChannelStatistics(**statistics) if statistics else None
    except TypeError:
        raise ValueError(
            f"dataset.statistics={dict(statistics or {})} must be three numbers: give noise_multiplier, mean_norm and "
            "square_norm"
        ) from None
    return replace(
        images,
        name=f"{images.name}_scattering",
        shape=(channels, side, side),
        load=load,
        constants=constants,
        inputs=None,
        statistics=released,
    )


def _features(
    images: DataSpec,
    name: str,
    network: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]],
    mirrored: Sequence[int] = (),
) -> Callable[[Path, torch.device, int], Loaded]:
    """Load features of images, which the first process computes and all read from a file, in half precision.

    With `mirrored` channels, training examples are mirrored.
    """

    def load(data_dir: Path, device: torch.device, workers: int) -> Loaded:
        path = data_dir / f"{images.name}_{name}.pt"
        if not path.exists():
            sources = images.load(data_dir, device, workers)  # not under the lock, which a download takes, too

            @torch.no_grad()
            def features() -> dict[str, torch.Tensor]:
                take, found = network(data_dir), dict[str, torch.Tensor]()
                for part, source in zip(("train", "test"), sources, strict=True):
                    pieces = [take(x).half().cpu() for x, _ in source.plain(128)]
                    found |= {part: torch.cat(pieces), f"{part}_targets": source.targets.cpu()}
                return found

            _make_once(path, features)
        parts = _read(path)
        train, test = (TensorSource(parts[p].to(device), parts[f"{p}_targets"].to(device)) for p in ("train", "test"))
        return replace(train, flip=bool(mirrored), flip_channels=mirrored), test

    return load


def _make_once(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Write tensors to a file; of several processes the first one does, and the others wait."""
    with one_process(path.parent):
        if not path.exists():
            print(f"computing {path}: once, some minutes on a CPU", flush=True)
            temporary = path.with_name(f".{path.name}.tmp")
            torch.save(make(), temporary)
            replace_durably(temporary, path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors from a file, whose pages are shared between processes."""
    try:
        tensors: dict[str, torch.Tensor] = torch.load(path, mmap=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and it is computed again") from error
    return tensors
