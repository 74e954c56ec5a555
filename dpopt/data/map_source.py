"""The source of a map-style Dataset: items fetched by worker processes, their randomness keyed by step and example.

A Dataset is either a folder of images, read by torchvision's DatasetFolder with torchvision's loaders, or anything
else. Of a folder, the bytes of the files are fingerprinted, and each image is decoded once. Of anything else every
item is fetched once, under a fixed seed, and hashed: one pass over the data before the first step.
"""

import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpopt.data import items
from dpopt.data.fingerprint import Kind, combine, progress, tensor_digest
from dpopt.data.image_files import image_digests
from dpopt.data.items import Expected, Pair, class_labels
from dpopt.ranks import WHOLE, Share
from dpopt.rng import RandomKey

Request = tuple[int, Tensor]  # a step and the indices of all its examples
_PLAIN_SEED = 0  # for fingerprints: equal items must get equal randomness


@dataclass(frozen=True, eq=False)
class MapSource:
    """A map-style Dataset of (input, target) pairs; the Dataset does its own augmentation.

    Attributes:
        dataset: the data, with training transforms.
        device: where batches are wanted.
        workers: number of worker processes.
        plain_dataset: the same examples without augmentation, for `plain` and fingerprints; by default `dataset`.
        expected: shape and classes that every item must have.
        indices: the examples of `dataset` that belong to this source; None for all.
        announced: the public number of examples; None for the number there is.
        digests: what has been hashed already, shared by the subsets of a source.
    """

    dataset: Any
    device: torch.device
    workers: int = 0
    plain_dataset: Any = None
    expected: Expected = field(default_factory=Expected)
    indices: Tensor | None = None
    announced: int | None = None
    digests: dict[str, list[bytes]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        if self.indices is not None:
            return len(self.indices)
        return len(self.dataset) if isinstance(self.dataset, Sized) else 0

    @property
    def public_size(self) -> int:
        """The number of examples that plans are made for."""
        return len(self) if self.announced is None else self.announced

    def views(
        self, requests: Iterable[Request], key: RandomKey, views: int, micro_batch: int, share: Share = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        items.check_replay(self.dataset, self._positions(), self.expected)
        keyed = _KeyedViews(self.dataset, key.for_workers("augment"), views, self._expected(self.dataset))
        batches = (
            [(step, int(i)) for i in self._at(at)]
            for step, indices in requests
            for at in share.of(indices).split(micro_batch)
        )
        yield from self._load(keyed, batches)

    def plain(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(self):
            return
        keyed = _KeyedViews(self._plain, RandomKey(b""), 1, self._expected(self._plain))
        batches = ([(0, int(i)) for i in self._at(at)] for at in torch.arange(len(self)).split(batch_size))
        for inputs, targets in self._load(keyed, batches):
            yield inputs.squeeze(1), targets

    def subset(self, indices: Tensor, public_size: int | None = None) -> "MapSource":
        return replace(self, indices=self._at(indices.cpu()), announced=public_size)

    def fingerprint(self, kind: Kind = "content") -> str:
        """Hash the whole Dataset and, of a subset, what was selected."""
        whole = self.records(kind)
        return whole if self.indices is None else combine("subset", whole, tensor_digest(self.indices))

    def records(self, kind: Kind = "content") -> str:
        """Hash the whole Dataset."""
        declared = getattr(self.dataset, "fingerprint", None)
        own = [str(declared())] if callable(declared) else []
        folder = _image_folder(self.dataset)
        if kind == "quick" and own:
            return combine("declared", *own)
        targets = self._digest("targets") if folder is None else [repr(_targets(*folder)).encode()]
        names = [] if folder is None else [str(Path(path).relative_to(folder[0])) for path, _ in folder[1]]
        return combine("items", *self._digest("inputs"), *targets, *names, *own)

    def contents(self) -> list[bytes]:
        """Hash each example; equal inputs and records of one group agree."""
        groups = getattr(self.dataset, "groups", None)
        found = self._digest("inputs") if groups is None else group_names(groups, len(self.dataset))
        return [found[int(i)] for i in self._positions()]

    def check(self, expected: Expected, part: str) -> "MapSource":
        """Check what can be checked now, and all items when read.

        Args:
            expected: shape and classes.
            part: what the examples are for, in an error.

        Raises:
            ValueError: naming the item, or OSError the file, that cannot be used.
        """
        source = replace(self, expected=expected)
        folder = _image_folder(self.dataset)
        if folder is not None:
            _targets(*folder, expected)
            source._digest("inputs")
        for dataset in (source._plain, source.dataset):
            items.check_replay(dataset, source._positions(), expected)
        if source.workers:
            source._check_workers()
        return source

    @property
    def _plain(self) -> Any:
        return self.dataset if self.plain_dataset is None else self.plain_dataset

    def _positions(self) -> Sequence[int]:
        return range(len(self)) if self.indices is None else self.indices.tolist()

    def _at(self, indices: Tensor) -> Tensor:
        return indices if self.indices is None else self.indices[indices]

    def _expected(self, dataset: Any) -> Expected:
        """Expect the shape of the first item, unless one is announced."""
        if self.expected.shape is not None or not len(self):
            return self.expected
        inputs, _ = items.fetch(dataset, int(self._positions()[0]), _PLAIN_SEED, self.expected)
        return replace(self.expected, shape=tuple(inputs.shape))

    def _digest(self, part: str) -> list[bytes]:
        """Hash the inputs or the targets of all items, once."""
        if part not in self.digests:
            folder = _image_folder(self.dataset)
            if folder is not None:
                self.digests["inputs"] = image_digests(folder[0], [path for path, _ in folder[1]])
            else:
                self.digests["inputs"], self.digests["targets"] = self._hash_items()
        return self.digests[part]

    def _hash_items(self) -> tuple[list[bytes], list[bytes]]:
        size = len(self.dataset)
        loader = self._loader(_Hashed(self._plain, self._expected(self._plain)), torch.arange(size).split(64), list)
        found: list[tuple[bytes, bytes]] = []
        name = type(self.dataset).__name__
        for piece in progress(loader, -(-size // 64), f"reading {name} for its fingerprint, batches of 64"):
            found += _unless_fault(piece)
        return [inputs for inputs, _ in found], [targets for _, targets in found]

    def _check_workers(self) -> None:
        """Check that two worker processes fetch the same items."""
        chosen = list(self._positions()[:4])
        hashed = _Hashed(self.dataset, self._expected(self.dataset))
        loader = replace(self, workers=2)._loader(hashed, [chosen, chosen], list)
        first, second = (_unless_fault(piece) for piece in loader)
        for index, a, b in zip(chosen, first, second, strict=True):
            if a != b:
                raise ValueError(items.not_replayable(items.name_of(self.dataset, index)))

    def _load(self, keyed: "_KeyedViews", batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for loaded in self._loader(keyed, batches, partial(_stack, keyed.empty(self._positions()))):
            inputs, targets = _unless_fault(loaded)
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _loader(self, dataset: Any, batches: Iterable[Any], collate: Any) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,  # any iterable of lists will do
            collate_fn=partial(_collate, collate),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that the global one is left alone
        )
        name = type(self.dataset).__name__
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # said below in one sentence
                started = iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be sent to worker processes ({error}): define it and its transforms at the top of a "
                "module, or set workers=0"
            ) from error
        try:
            yield from started
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"{name} could not be read ({reason}): set workers=0 to see the reason") from error


class _KeyedViews(Dataset[Any]):
    """(step, index) → the K views of an example, stacked, and its target."""

    def __init__(self, dataset: Any, key: RandomKey, views: int, expected: Expected) -> None:
        self.dataset, self.key, self.views, self.expected = dataset, key, views, expected

    def __getitem__(self, at: tuple[int, int]) -> Pair:
        step, index = at
        seen = [
            items.fetch(self.dataset, index, self.key.seed("augment", step, index, view), self.expected)
            for view in range(self.views)
        ]
        return torch.stack([x for x, _ in seen]), seen[0][1]

    def __getitems__(self, batch: list[tuple[int, int]]) -> Any:
        return _or_fault(lambda: [self[at] for at in batch])  # also called with an empty list, for an empty batch

    def empty(self, positions: Sequence[int]) -> Pair:
        """Make the batch of no examples."""
        inputs, target = self[(0, int(positions[0]))]
        return inputs.new_zeros(0, *inputs.shape), target.new_zeros(0, *target.shape)


class _Hashed(Dataset[Any]):
    """index → the hashes of an example's input and target, under a fixed seed."""

    def __init__(self, dataset: Any, expected: Expected) -> None:
        self.dataset, self.expected = dataset, expected

    def __getitems__(self, batch: Iterable[int]) -> Any:
        def hashes() -> list[tuple[bytes, bytes]]:
            pairs = (items.fetch(self.dataset, int(i), _PLAIN_SEED, self.expected) for i in batch)
            return [(tensor_digest(inputs), tensor_digest(target)) for inputs, target in pairs]

        return _or_fault(hashes)


def _or_fault(make: Any) -> Any:
    """Return an error, to which a worker would add its traceback."""
    try:
        return make()
    except OSError as error:
        return OSError(str(error))
    except ValueError as error:
        return ValueError(str(error))


def _collate(collate: Any, loaded: Any) -> Any:
    return loaded if isinstance(loaded, Exception) else _or_fault(lambda: collate(loaded))


def _unless_fault(loaded: Any) -> Any:
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def _stack(empty: Pair, examples: list[Pair]) -> Pair:
    if not examples:
        return empty
    inputs, targets = zip(*examples, strict=True)
    if len({target.shape for target in targets}) > 1 or len({target.dtype for target in targets}) > 1:
        kinds = sorted({f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in targets})
        raise ValueError(f"targets differ in shape or type ({', '.join(kinds[:3])}): give every item the same")
    return torch.stack(inputs), torch.stack(targets)


def _image_folder(dataset: Any) -> tuple[Path, list[tuple[str, Any]]] | None:
    """Return root and samples of torchvision's image folders, else None."""
    folder = sys.modules.get("torchvision.datasets.folder")  # imported, if the dataset is one
    if folder is None or not isinstance(dataset, folder.DatasetFolder):
        return None
    if type(dataset).__getitem__ is not folder.DatasetFolder.__getitem__:
        return None
    if dataset.loader not in (folder.default_loader, folder.pil_loader):
        return None
    transform = dataset.target_transform
    samples = [(path, target if transform is None else transform(target)) for path, target in dataset.samples]
    return Path(dataset.root), samples


def _targets(root: Path, samples: list[tuple[str, Any]], expected: Expected | None = None) -> list[Any]:
    """Return the targets of a folder, checked where classes are expected."""
    targets = [target for _, target in samples]
    if expected is not None and expected.classes is not None:
        class_labels(torch.as_tensor(targets), expected.classes, lambda i: f"{samples[i][0]} (in {root})")
    return targets


def group_names(groups: Any, size: int) -> list[bytes]:
    """Hash each example's group.

    Raises:
        ValueError: when there is not one group per example.
    """
    listed = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(listed) != size:
        raise ValueError(f"there are {len(listed):,} groups for {size:,} examples: give the group of each example")
    return [combine("group", repr(group)).encode() for group in listed]
