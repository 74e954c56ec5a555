"""Sources: where the examples of a batch come from, in memory or through worker processes.

Small image sets live on the device as uint8 and are augmented there by batched tensor code (`TensorSource`); anything
else is a map-style Dataset read by worker processes (`MapSource`, in map_source.py). A source gets the examples of
each step and yields their K views in micro-batches; its randomness is keyed by the step and the example, never by
the micro-batch size or the order of loading.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from dpopt.data.fingerprint import Kind, combine, row_digests, tensor_digest
from dpopt.data.items import Expected, class_labels
from dpopt.data.map_source import MapSource, Request, group_names
from dpopt.machine import sent
from dpopt.ranks import WHOLE, Share
from dpopt.rng import RandomKey

__all__ = ["MapSource", "Request", "Source", "TensorSource", "as_source"]

_SHORTEST = 16  # tokens; every length that occurs is validated and measured
_MEMBERS = ("public_size", "subset", "fingerprint", "contents", "check")


class Source(Protocol):
    """What sampling and evaluation ask of training or test data."""

    def __len__(self) -> int: ...

    @property
    def public_size(self) -> int:
        """The number of examples that plans are made for."""
        ...

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut each request as `torch.split` does; yield augmented inputs (n, views, …) and targets (n, …) per piece.

        A request for nothing is one piece of n = 0 with the usual trailing shape. One of several ranks is given its
        `share`: it yields those examples alone, augmented as they are without other ranks.
        """
        ...

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples in order, not augmented: inputs (n, …) and targets (n, …)."""
        ...

    def subset(self, indices: Tensor, public_size: int | None = None) -> "Source":
        """Restrict the source to these examples; its fingerprint covers all."""
        ...

    def fingerprint(self, kind: Kind = "content") -> str:
        """Hash the data; `quick` believes a Dataset that declares a fingerprint."""
        ...

    def contents(self) -> list[bytes]:
        """Hash each example; equal inputs and records of one group agree."""
        ...

    def check(self, expected: Expected, part: str) -> "Source":
        """Check the examples now; return a source that checks the rest."""
        ...


def records_of(source: Source, kind: Kind) -> str:
    """Hash what a source was taken from, without its settings and selection where it can tell them apart."""
    found: str = getattr(source, "records", source.fingerprint)(kind)
    return found


@dataclass(frozen=True, eq=False)
class TensorSource:
    """Inputs and targets in memory, on one device, with batched augmentation.

    Attributes:
        inputs: (N, C, H, W) as uint8, or float of any trailing shape; only (N, C, H, W) can be augmented.
        targets: (N, …).
        mean: per channel, subtracted from inputs scaled to [0, 1]; uint8 only.
        std: per channel.
        crop: shift by up to this many pixels in each direction (reflected at the border); 0 for none.
        flip: mirror horizontally with probability ½; where `crop` is 0, one view is the mirror of the one before.
        image_size: resize (bilinear) to this many pixels after augmentation.
        groups: the group of each example, a user for instance; None for none.
        announced: the public number of examples; None for the number there is.
        trimmed: whether inputs are token ids (N, T) with -1 for padding on the right; a micro-batch is then as long as
            its longest text, rounded up to a power of two, and so are targets (N, T).
        whole: fingerprint of the source that this one is a subset of, and of what was selected.
        flip_channels: the channel that each channel of a mirror image is taken from; () where all stay.
        origin: hash of the records of the source that this one is a subset of.
    """

    inputs: Tensor
    targets: Tensor
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    crop: int = 0
    flip: bool = False
    image_size: int | None = None
    groups: Any = None
    announced: int | None = None
    trimmed: bool = False
    whole: str = ""
    flip_channels: Sequence[int] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"there are {len(self.inputs):,} inputs but {len(self.targets):,} targets: give one for each"
            )
        if self.trimmed:
            _check_padding(self.inputs, self.targets)
        shape = tuple(self.inputs.shape)
        if (self.crop or self.flip or self.flip_channels) and len(shape) != 4:
            raise ValueError(f"inputs of shape {shape} are not (N, C, H, W): set crop=0 and flip=False")
        if self.flip_channels and (self.crop or sorted(self.flip_channels) != list(range(shape[1]))):
            raise ValueError(
                f"flip_channels must name each of the channels of inputs {shape} once, and needs crop=0: correct one"
            )
        if self.inputs.dtype == torch.uint8:
            channels = self.inputs.shape[1] if self.inputs.ndim == 4 else 0
            if not channels or len(self.mean) != channels or len(self.std) != channels or 0 in self.std:
                raise ValueError(
                    f"uint8 inputs of shape {tuple(self.inputs.shape)} need the shape (N, C, H, W) and a mean and a "
                    "positive std for each of the C channels: give them, or scale the inputs to floating point"
                )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def public_size(self) -> int:
        """The number of examples that plans are made for."""
        return len(self) if self.announced is None else self.announced

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step, drawn in requests:
            indices = sent(share.of(drawn), self.inputs.device)
            if not (self.crop or self.flip):
                order = self._lengths(indices).argsort(stable=True) if self.trimmed else None  # alike in length
                for at in (indices if order is None else indices[order]).split(micro_batch):
                    images, targets = self._trim(self._finish(self.inputs.index_select(0, at)), self.targets[at])
                    yield images.unsqueeze(1).expand(-1, views, *images.shape[1:]), targets
                continue
            draws = share.of(key.uniform(3 * views * len(drawn), "augment", step).view(-1, views, 3))
            draws = sent(draws, indices.device)
            for at, piece in zip(indices.split(micro_batch), draws.split(micro_batch), strict=True):
                if self.crop:
                    images = _crop_flip(self.inputs, at, piece, self.crop, self.flip)
                else:
                    images = _flip(self.inputs.index_select(0, at), piece[..., 2], self.flip_channels)
                images = self._finish(images)
                yield images.view(len(at), views, *images.shape[1:]), self.targets[at]

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in zip(self.inputs.split(batch_size), self.targets.split(batch_size), strict=True):
            yield self._trim(self._finish(images), targets)

    def subset(self, indices: Tensor, public_size: int | None = None) -> "TensorSource":
        at = indices.to(self.inputs.device)
        everyone = None if self.groups is None else list(self.groups)
        groups = None if everyone is None else [everyone[i] for i in indices.tolist()]
        whole = combine("subset", self.fingerprint(), tensor_digest(indices))
        part = replace(self, inputs=self.inputs[at], targets=self.targets[at], groups=groups)
        return replace(part, announced=public_size, whole=whole, origin=self.records())

    def fingerprint(self, kind: Kind = "content") -> str:
        """Hash every byte, also of examples outside this subset, and how they are normalized, cropped and flipped."""
        settings = str((tuple(self.mean), tuple(self.std), self.crop, self.flip, self.image_size, *self.flip_channels))
        return self.whole or combine("tensors", self.records(kind), settings)

    def records(self, kind: Kind = "content") -> str:
        """Hash every byte, also of examples outside this subset."""
        return self.origin or combine("records", tensor_digest(self.inputs), tensor_digest(self.targets))

    def contents(self) -> list[bytes]:
        """Hash each example; equal inputs and records of one group agree."""
        return row_digests(self.inputs) if self.groups is None else group_names(self.groups, len(self))

    def check(self, expected: Expected, part: str) -> "TensorSource":
        """Check shapes and targets; return the source with int64 targets.

        Args:
            expected: shape and classes.
            part: what the examples are for, in an error.

        Raises:
            ValueError: naming the first example that is not what is expected.
        """
        shape = tuple(self.inputs.shape[1:])
        if self.image_size and self.inputs.dtype == torch.uint8:
            shape = (shape[0], self.image_size, self.image_size)
        if expected.shape is not None and shape != expected.shape:
            raise ValueError(
                f"the {part} inputs have the shape {shape} where the DataSpec announces {expected.shape}: correct the "
                "shape in the DataSpec, or the inputs"
            )
        if expected.classes is None:
            return self
        return replace(self, targets=class_labels(self.targets, expected.classes, lambda i: f"{part} example {i}"))

    def _lengths(self, at: Tensor) -> Tensor:
        return (self.inputs.index_select(0, at) >= 0).sum(1)

    def _trim(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cut columns that hold padding alone."""
        if not self.trimmed:
            return tokens, targets
        longest = int((tokens >= 0).sum(1).max()) if len(tokens) else 1
        width = min(tokens.shape[1], max(_SHORTEST, 1 << (longest - 1).bit_length()))
        return tokens[:, :width], targets[:, :width] if targets.ndim > 1 else targets

    def _finish(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        mean, std = (_by_channel(tuple(values), images.device) for values in (self.mean, self.std))
        images = (images.float() / 255 - mean) / std
        if self.image_size and len(images):
            images = F.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        elif self.image_size:
            images = images.new_zeros(0, images.shape[1], self.image_size, self.image_size)
        return images


def _check_padding(tokens: Tensor, targets: Tensor) -> None:
    """Check that -1 stands behind tokens only, and that targets that are not classes have their width.

    Raises:
        ValueError: for inputs that trimming would change.
    """
    if tokens.ndim != 2 or bool(((tokens[:, 1:] >= 0) & (tokens[:, :-1] < 0)).any()):
        raise ValueError("trimmed token ids must be (N, T) with -1 behind the last token only: pad them on the right")
    if targets.ndim > 1 and targets.shape[1:] != tokens.shape[1:]:
        raise ValueError(
            f"token ids are {tokens.shape[1]} wide and targets {tuple(targets.shape[1:])}: give one target per token"
        )


@functools.lru_cache(maxsize=64)
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


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
    name = type(data).__name__
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        inputs, targets = data
        if inputs.dtype == torch.uint8:
            raise ValueError(
                "a pair of tensors needs floating-point inputs: scale your uint8 images, or build a "
                "dpopt.data.sources.TensorSource with mean and std"
            )
        return TensorSource(inputs.to(device), targets.to(device))
    pairs = isinstance(data, list) and all(isinstance(item, tuple | list) and len(item) == 2 for item in data)
    if isinstance(data, tuple | list) and not (pairs and data):
        kinds = ", ".join(type(part).__name__ for part in data[:4])
        raise ValueError(
            f"({kinds}) is not a pair of tensors (inputs, targets): convert it with torch.as_tensor, or give a list of "
            "pairs (input, target)"
        )
    if isinstance(data, IterableDataset | dict | str):
        raise ValueError(
            f"a {name} cannot be sampled example by example: give a pair of tensors or a map-style Dataset, which has "
            "__getitem__ by number and __len__"
        )
    if hasattr(data, "views") and hasattr(data, "plain"):
        if missing := [name for name in _MEMBERS if not hasattr(data, name)]:
            raise ValueError(f"{name} lacks {', '.join(missing)}: give it what dpopt.data.sources.Source names")
        return data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapSource(data, torch.device(device or "cpu"), workers)
    raise ValueError(f"{name} is neither a pair of tensors nor a map-style Dataset with a length")


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


def _flip(images: Tensor, draws: Tensor, channels: Sequence[int]) -> Tensor:
    """Images and mirror images (n·K, C, H, W) in turn, as draws (n, K), uniform in [0, 1), say of the first view."""
    views = torch.arange(draws.shape[1], device=draws.device)
    mirrored = (draws[:, :1] < 0.5) ^ (views % 2 == 1)
    other = images.flip(-1)
    if channels:
        other = other.index_select(1, torch.tensor(channels, device=images.device))
    return torch.where(mirrored[..., None, None, None], other[:, None], images[:, None]).flatten(0, 1)


def _shift(uniform: Tensor, crop: int) -> Tensor:
    return (uniform * (2 * crop + 1)).long().sub(crop)[:, None]


def _reflect(position: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - position.abs()).abs()
