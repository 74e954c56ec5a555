"""Items of a map-style Dataset as tensors, fetched under a seed; every fault is one sentence that names the item.

A resumed run has to see what the first one saw, so an item fetched twice under one seed must be equal. Around every
access the global generators of torch, NumPy and Python are seeded, which keys torchvision's transforms without their
knowing. A Dataset with generators of another kind has a method `keyed_item(index, seed)`, which is called instead of
`__getitem__` and takes all of its randomness from `seed`.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from dpopt.data.fingerprint import tensor_digest
from dpopt.rng import RandomKey

_FETCHED_TWICE = 4  # items that are compared with themselves at the start
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Expected:
    """What every item of a dataset has to be; None where it is not known.

    Attributes:
        shape: of an input.
        classes: number of classes, for integer labels.
    """

    shape: tuple[int, ...] | None = None
    classes: int | None = None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python; restore them afterwards."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def fetch(dataset: Any, index: int, seed: int, expected: Expected) -> Pair:
    """Fetch an item under a seed.

    Args:
        dataset: map-style, of (input, target) pairs.
        index: of the item.
        seed: decides all of its randomness.
        expected: what it has to be.

    Returns:
        The input and the target, an int64 class where classes are expected.

    Raises:
        ValueError: when the item is no pair, or not what is expected.
        OSError: when its file cannot be read.
    """
    where = name_of(dataset, index)
    while type(dataset) is Subset:  # which would hide keyed_item
        index, dataset = int(dataset.indices[index]), dataset.dataset
    try:
        keyed = getattr(dataset, "keyed_item", None)
        with seeded(seed):
            item = dataset[index] if keyed is None else keyed(index, seed)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{where} cannot be fetched ({reason}): repair or replace it, or the Dataset") from error
    inputs, target = _pair(item, where)
    tensor = _input(inputs, where)
    if expected.shape is not None and tuple(tensor.shape) != expected.shape:
        raise ValueError(
            f"{where} has an input of shape {tuple(tensor.shape)} where {expected.shape} is needed: resize, crop or "
            "pad every input to one shape, or correct the shape in the DataSpec"
        )
    return tensor, _target(target, where, expected.classes)


def name_of(dataset: Any, index: int) -> str:
    """Name an item by its index, its Dataset and its file."""
    while isinstance(dataset, Subset):
        index, dataset = int(dataset.indices[index]), dataset.dataset
    path = ""
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and 0 <= index < len(samples):
        sample = samples[index]
        first = sample[0] if isinstance(sample, tuple | list) and sample else sample
        path = f" ({first})" if isinstance(first, str) else ""
    return f"item {index} of {type(dataset).__name__}{path}"


def _pair(item: Any, where: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        keys = ", ".join(map(str, list(item)[:4]))
        raise ValueError(f"{where} is a dict ({keys}): return a pair (input, target) of tensors")
    if not isinstance(item, tuple | list):
        raise ValueError(f"{where} is a {type(item).__name__}: return a pair (input, target) of tensors")
    if len(item) != 2:
        raise ValueError(
            f"{where} has {len(item)} parts: return a pair (input, target), several inputs stacked into one tensor and "
            "weights left out"
        )
    return item[0], item[1]


def _input(value: Any, where: str) -> Tensor:
    if type(value).__module__.startswith("PIL."):
        raise ValueError(
            f"{where} has a PIL image as its input: give the Dataset a transform to tensors, "
            "transform=torchvision.transforms.ToTensor() for instance"
        )
    parts = isinstance(value, list) and any(isinstance(v, Tensor) or hasattr(v, "shape") for v in value)
    if isinstance(value, tuple | Mapping) or parts:
        raise ValueError(f"{where} has {len(value)} inputs: stack or concatenate them into one tensor")
    tensor = _tensor(value, where, "an input", "turn it into numbers, text by a tokenizer")
    if tensor.dtype == torch.uint8:
        raise ValueError(
            f"{where} has a uint8 input without mean and std: scale it to floating point in the Dataset, or put the "
            "images into a dpopt.data.sources.TensorSource with mean and std"
        )
    return tensor


def _target(value: Any, where: str, classes: int | None) -> Tensor:
    tensor = _tensor(value, where, "a label", "number the classes from 0 and return the number")
    return tensor if classes is None else class_labels(tensor[None], classes, lambda _: where)[0]


def _tensor(value: Any, where: str, role: str, fix: str) -> Tensor:
    if isinstance(value, str | bytes) or value is None:
        kind = "missing" if value is None else f"text ({str(value)[:20]!r})"
        raise ValueError(f"{where} has {role} that is {kind}: {fix}")
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} has {role} of type {type(value).__name__}, which is no tensor: {fix}") from error


def class_labels(targets: Tensor, classes: int, where: Callable[[int], str]) -> Tensor:
    """Check that targets are class numbers; return them as int64.

    Args:
        targets: (N,), integers.
        classes: number of classes.
        where: names example i in an error.

    Raises:
        ValueError: for one-hot, floating-point or vector labels, and for labels out of range.
    """
    if targets.ndim != 1:
        shape = tuple(targets.shape[1:])
        if shape == (classes,) and classes > 1:
            raise ValueError(f"{where(0)} has a one-hot label: give the class number, by argmax(-1) for instance")
        raise ValueError(f"{where(0)} has a label of shape {shape}: give one class number per example")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        kind = str(targets.dtype).removeprefix("torch.")
        raise ValueError(f"{where(0)} has a label of type {kind}: give integer class numbers, by .long() for instance")
    outside = (targets < 0) | (targets >= classes)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"{where(first)} has the label {int(targets[first])} where {classes} classes are numbered 0 to "
            f"{classes - 1}: renumber the labels from 0, or correct the number of classes in the DataSpec"
        )
    return targets.long()


def check_replay(dataset: Any, indices: Sequence[int], expected: Expected) -> None:
    """Check that a few items are equal when fetched twice.

    Args:
        dataset: map-style, of (input, target) pairs.
        indices: the items that may be fetched.
        expected: what they have to be.

    Raises:
        ValueError: naming the item that differs, or that is not what is expected.
    """
    key = RandomKey.from_seed(0, "replay")
    step = max(1, len(indices) // _FETCHED_TWICE)
    chosen = [int(i) for i in [*indices[::step][: _FETCHED_TWICE - 1], indices[-1]]]
    first, second = ([fetch(dataset, i, key.seed(i), expected) for i in chosen] for _ in range(2))
    for index, a, b in zip(chosen, first, second, strict=True):
        if any(tensor_digest(x) != tensor_digest(y) for x, y in zip(a, b, strict=True)):  # bits: NaN equals NaN
            raise ValueError(not_replayable(name_of(dataset, index)))


def not_replayable(where: str) -> str:
    """Say why an item with its own randomness is refused."""
    return (
        f"{where} differs when it is fetched twice under one seed, so a resumed run would not see the same data: draw "
        "from the global generators of torch, NumPy or Python, or give the Dataset a method keyed_item(index, seed)"
    )
