"""Sources: where the examples of a batch come from, in memory or through worker processes.

Small image sets live on the device as uint8 and are augmented there by batched tensor code (`TensorSource`); anything
else is a map-style Dataset read by worker processes (`MapSource`). A source is told which examples each step wants and
yields their K views in micro-batches; its randomness is keyed by the step and the example, never by the micro-batch
size or the order of loading.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dpopt.rng import RandomKey

_FINGERPRINTED = 64  # examples of a map-style Dataset whose content enters its fingerprint: reading all takes hours
Request = tuple[int, Tensor]  # a step and the indices of all its examples


class Source(Protocol):
    """What sampling and evaluation ask of training or test data."""

    def __len__(self) -> int: ...

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut each request as `torch.split` does; yield augmented inputs (n, views, …) and targets (n, …) per piece.

        A request for nothing is one piece of n = 0 with the usual trailing shape.
        """
        ...

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples in order, not augmented: inputs (n, …) and targets (n, …)."""
        ...

    def subset(self, indices: Tensor) -> "Source":
        """The source restricted to these examples."""
        ...

    def fingerprint(self) -> str:
        """A hash of the data, to notice that a resumed run sees another data set."""
        ...


@dataclass(frozen=True, eq=False)
class TensorSource:
    """Inputs and targets in memory, on one device, with batched augmentation.

    Attributes:
        inputs: (N, C, H, W) as uint8, or float of any trailing shape (no augmentation then).
        targets: (N, …).
        mean: per channel, subtracted from inputs scaled to [0, 1]; uint8 only.
        std: per channel.
        crop: shift by up to this many pixels in each direction (reflected at the border); 0 for none.
        flip: mirror horizontally with probability ½.
        image_size: resize (bilinear) to this many pixels after augmentation.
    """

    inputs: Tensor
    targets: Tensor
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    crop: int = 0
    flip: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"there are {len(self.inputs):,} inputs but {len(self.targets):,} targets: give one for each"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step, indices in requests:
            indices = indices.to(self.inputs.device)
            if not (self.crop or self.flip):
                for at in indices.split(micro_batch):
                    images = self._finish(self.inputs.index_select(0, at))
                    yield images.unsqueeze(1).expand(-1, views, *images.shape[1:]), self.targets[at]
                continue
            draws = key.uniform(3 * views * len(indices), "augment", step).view(-1, views, 3).to(indices.device)
            for at, piece in zip(indices.split(micro_batch), draws.split(micro_batch), strict=True):
                images = self._finish(_crop_flip(self.inputs, at, piece, self.crop, self.flip))
                yield images.view(len(at), views, *images.shape[1:]), self.targets[at]

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in zip(self.inputs.split(batch_size), self.targets.split(batch_size), strict=True):
            yield self._finish(images), targets

    def subset(self, indices: Tensor) -> "TensorSource":
        at = indices.to(self.inputs.device)
        return TensorSource(
            self.inputs[at], self.targets[at], self.mean, self.std, self.crop, self.flip, self.image_size
        )

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.inputs, self.targets):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def _finish(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        column = (-1, 1, 1)
        mean, std = (torch.tensor(v, device=images.device).view(column) for v in (self.mean, self.std))
        images = (images.float() / 255 - mean) / std
        if self.image_size and len(images):
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        elif self.image_size:
            images = images.new_zeros(0, images.shape[1], self.image_size, self.image_size)
        return images


@dataclass(frozen=True, eq=False)
class MapSource:
    """A map-style Dataset of (input, target) pairs, read by worker processes; the Dataset does its own augmentation.

    The global generators of torch, NumPy and Python are seeded per (step, example, view) around every access, so that
    torchvision's transforms are keyed without knowing it.

    Attributes:
        dataset: the data, with training transforms.
        device: where batches are wanted.
        workers: number of worker processes.
        plain_dataset: the same examples without augmentation, for `plain`; by default `dataset`.
    """

    dataset: Dataset[Any]
    device: torch.device
    workers: int = 0
    plain_dataset: Dataset[Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset) if isinstance(self.dataset, Sized) else 0

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        keyed = _KeyedViews(self.dataset, key, views)
        batches = ([(step, int(i)) for i in at] for step, indices in requests for at in indices.split(micro_batch))
        yield from self._load(keyed, batches, keyed.empty())

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        keyed = _KeyedViews(self.plain_dataset or self.dataset, RandomKey(b""), 1)
        batches = ([(0, int(i)) for i in indices] for indices in torch.arange(len(self)).split(batch_size))
        for inputs, targets in self._load(keyed, batches, keyed.empty()):
            yield inputs.squeeze(1), targets

    def subset(self, indices: Tensor) -> "MapSource":
        at = indices.tolist()
        parts = [self.dataset, self.plain_dataset]
        augmented, plain = (None if part is None else torch.utils.data.Subset(part, at) for part in parts)
        assert augmented is not None
        return MapSource(augmented, self.device, self.workers, plain)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=16)
        keyed = _KeyedViews(self.plain_dataset or self.dataset, RandomKey(b""), 1)
        for index in torch.linspace(0, len(self) - 1, min(len(self), _FINGERPRINTED)).long():
            for tensor in keyed[(0, int(index))]:
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        root = getattr(self.dataset, "root", None)
        for path, target in getattr(self.dataset, "samples", []):  # ImageFolder: names, classes and sizes of the files
            name = Path(path).relative_to(root) if root else Path(path).name
            digest.update(f"{name}\0{target}\0{Path(path).stat().st_size}\n".encode())
        return digest.hexdigest()

    def _load(
        self, keyed: "_KeyedViews", batches: Iterable[list[tuple[int, int]]], empty: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            keyed,
            batch_sampler=batches,  # any iterable of lists will do
            collate_fn=partial(_stack, empty),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that the global one is left alone
        )
        for inputs, targets in loader:
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


class _KeyedViews(Dataset[Any]):
    """(step, index) → the K views of an example, stacked, and its target."""

    def __init__(self, dataset: Dataset[Any], key: RandomKey, views: int) -> None:
        self.dataset, self.key, self.views = dataset, key, views

    def __getitem__(self, at: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, index = at
        state, numpy_state = random.getstate(), np.random.get_state()
        seen = []
        with torch.random.fork_rng(devices=[]):
            for view in range(self.views):
                seed = self.key.seed("augment", step, index, view)
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                seen.append(self.dataset[index])
        random.setstate(state)
        np.random.set_state(numpy_state)
        return torch.stack([torch.as_tensor(x) for x, _ in seen]), torch.as_tensor(seen[0][1])

    def __getitems__(self, batch: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        return [self[at] for at in batch]  # also called with an empty list, for an empty batch

    def empty(self) -> tuple[Tensor, Tensor]:
        inputs, target = self[(0, 0)]
        return inputs.new_zeros(0, *inputs.shape), target.new_zeros(0, *target.shape)


def _stack(empty: tuple[Tensor, Tensor], examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not examples:
        return empty
    inputs, targets = zip(*examples, strict=True)
    return torch.stack(inputs), torch.stack(targets)


def as_source(data: Any, device: torch.device | str | None = None, workers: int = 0) -> Source:
    """Make a Source of a pair of tensors, a TensorDataset, or any map-style Dataset of (input, target) pairs.

    Without a device, tensors stay where they are.

    Raises:
        ValueError: when it is none of these.
    """
    if isinstance(data, TensorSource | MapSource):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        inputs, targets = data
        if inputs.dtype == torch.uint8:
            raise ValueError(
                "a pair of tensors needs floating-point inputs: scale your uint8 images, or build a "
                "dpopt.data.sources.TensorSource with mean and std"
            )
        return TensorSource(inputs.to(device), targets.to(device))
    if isinstance(data, tuple | list):
        kinds = ", ".join(type(part).__name__ for part in data[:4])
        raise ValueError(f"({kinds}) is not a pair of tensors (inputs, targets): convert it with torch.as_tensor")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapSource(data, torch.device(device or "cpu"), workers)
    if all(hasattr(data, name) for name in ("views", "plain", "subset", "fingerprint")):
        return data
    raise ValueError(f"{type(data).__name__} is neither a pair of tensors nor a map-style Dataset with a length")


def _crop_flip(images: Tensor, at: Tensor, draws: Tensor, crop: int, flip: bool) -> Tensor:
    """Shifted and mirrored copies (n·K, C, H, W) of images[at]; draws (n, K, 3) are uniform in [0, 1)."""
    count, views = draws.shape[:2]
    height, width = images.shape[-2:]
    draws = draws.reshape(count * views, 3)
    rows = _reflect(torch.arange(height, device=at.device) + _shift(draws[:, 0], crop), height)
    columns = _reflect(torch.arange(width, device=at.device) + _shift(draws[:, 1], crop), width)
    if flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    example = at.repeat_interleave(views)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=at.device)[None, :, None, None]
    return images[example, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _shift(uniform: Tensor, crop: int) -> Tensor:
    return (uniform * (2 * crop + 1)).long().sub(crop)[:, None]


def _reflect(position: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()
