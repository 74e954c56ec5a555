"""Own data that cannot be used: one sentence that names the item, the reason and the fix."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import configure, make_plan
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

import dpopt
from dpopt.data import DataSpec
from dpopt.data.items import Expected
from dpopt.data.sources import MapSource, TensorSource, as_source
from dpopt.training.build import build_components
from dpopt.training.loading import load_data

CPU = torch.device("cpu")
SPEC = Expected((3,), 4)


class Made(Dataset):
    """Items by a function of their index."""

    def __init__(self, item, size=64):
        self.item, self.size = item, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.item(index)


def first_batch(dataset, workers=0):
    return next(iter(next(dpopt.poisson_batches(MapSource(dataset, CPU, workers), make_plan(batch=32)))))


def raising(index):
    raise KeyError("no such row")


X = torch.zeros(3)
BAD_ITEMS = {
    "dict": (lambda i: {"input_ids": X, "labels": 1}, "is a dict (input_ids, labels): return a pair"),
    "image": (lambda i: (Image.new("L", (4, 4)), 1), "has a PIL image as its input: give the Dataset a transform"),
    "two inputs": (lambda i: ((X, X), 1), "has 2 inputs: stack or concatenate them"),
    "list of inputs": (lambda i: ([X, X], 1), "has 2 inputs: stack or concatenate them"),
    "dict of inputs": (lambda i: ({"a": X}, 1), "has 1 inputs: stack or concatenate them"),
    "weight": (lambda i: (X, 1, 0.5), "has 3 parts: return a pair"),
    "input alone": (lambda i: torch.zeros(2), "is a Tensor: return a pair"),
    "nothing": (lambda i: None, "is a NoneType: return a pair"),
    "text": (lambda i: ("a sentence", 1), "has an input that is text ('a sentence'): turn it into numbers"),
    "text label": (lambda i: (X, "cat"), "has a label that is text ('cat'): number the classes from 0"),
    "missing label": (lambda i: (X, None), "has a label that is missing: number the classes"),
    "object": (lambda i: (object(), 1), "has an input of type object, which is no tensor"),
    "uint8": (lambda i: (X.byte(), 1), "has a uint8 input without mean and std: scale it"),
    "raises": (raising, "cannot be fetched (KeyError: 'no such row'): repair"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", BAD_ITEMS)
def test_items_that_cannot_be_used(name, workers):
    item, message = BAD_ITEMS[name]
    with pytest.raises(ValueError) as caught:
        first_batch(Made(item), workers)
    assert str(caught.value).startswith("item 0 of Made ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_late_item_is_named_without_the_workers_traceback(workers):
    """Item 13 is none of those that are fetched at the start."""
    shapes = Made(lambda i: (torch.zeros(4 if i == 13 else 3), 1))
    targets = Made(lambda i: (X, torch.zeros(2) if i == 13 else 1))
    source = MapSource(Made(lambda i: (X, 9 if i == 13 else 1)), CPU, workers, expected=SPEC)
    plan = make_plan(batch=64)
    for data, message in (
        (MapSource(shapes, CPU, workers), "item 13 of Made has an input of shape (4,) where (3,) is needed: resize"),
        (MapSource(targets, CPU, workers), "targets differ in shape or type"),
        (source, "item 13 of Made has the label 9 where 4 classes are numbered 0 to 3"),
    ):
        with pytest.raises(ValueError) as caught:
            list(next(dpopt.poisson_batches(data, plan)))
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


BAD_LABELS = {
    "above": (torch.tensor([0, 4, 5]), "1 has the label 4 where 4 classes are numbered 0 to 3: renumber"),
    "below": (torch.tensor([-1, 0, 1]), "0 has the label -1 where 4 classes"),
    "float": (torch.tensor([0.0, 1.0, 2.0]), "0 has a label of type float32: give integer class numbers"),
    "bool": (torch.tensor([True, False, True]), "0 has a label of type bool: give integer"),
    "one-hot": (torch.eye(4)[:3], "0 has a one-hot label: give the class number"),
    "column": (torch.zeros(3, 1, dtype=torch.long), "0 has a label of shape (1,): give one class number"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_are_no_classes(name):
    labels, message = BAD_LABELS[name]
    with pytest.raises(ValueError) as caught:
        TensorSource(torch.zeros(3, 3), labels).check(SPEC, "training")
    assert str(caught.value).startswith("training example " + message)
    with pytest.raises(ValueError) as caught:
        MapSource(Made(lambda i: (X, labels[i]), 3), CPU).check(SPEC, "training").fingerprint()
    assert message.split(":")[0] in str(caught.value).replace(" of Made", "")


def test_labels_of_other_integer_types_become_classes():
    narrow = torch.tensor([0, 3], dtype=torch.uint8)
    assert TensorSource(torch.zeros(2, 3), narrow).check(SPEC, "test").targets.dtype == torch.long
    source = MapSource(Made(lambda i: (X, narrow[i]), 2), CPU).check(SPEC, "test")
    assert next(source.plain(2))[1].tolist() == [0, 3]


def test_shapes_are_the_announced_ones():
    with pytest.raises(ValueError, match=r"training inputs have the shape \(5,\) where the DataSpec announces \(3,\)"):
        TensorSource(torch.zeros(3, 5), torch.zeros(3)).check(SPEC, "training")
    images = TensorSource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), (0.0,), (1.0,), 0, 0, 8)
    assert images.check(Expected((1, 8, 8), 2), "training").image_size == 8


@pytest.mark.parametrize("options", [{}, {"mean": (0.5,)}, {"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}])
def test_uint8_tensors_need_mean_and_std(options):
    with pytest.raises(ValueError, match="a mean and a positive std for each of the C channels"):
        TensorSource(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), **options)


def test_nan_inputs_are_allowed():
    """They contribute zero; the comparison of an item with itself must not take NaN for a difference."""
    inputs, _, mask = first_batch(Made(lambda i: (torch.full((3,), float("nan")), 1)))
    assert inputs[mask].isnan().all()


class OwnGenerator(Dataset):
    """Randomness that no seed of ours reaches."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.rand(3, generator=self.generator), index % 3


class Counting(OwnGenerator):
    """Items that depend on how often they were asked for."""

    def __init__(self):
        self.asked = Counter()

    def __getitem__(self, index):
        self.asked[index] += 1
        return torch.full((3,), float(self.asked[index])), index % 3


class System(OwnGenerator):
    def __getitem__(self, index):
        return torch.tensor([random.SystemRandom().random()] * 3), index % 3


class Hooked(OwnGenerator):
    """The documented way out."""

    def __init__(self):
        pass

    def keyed_item(self, index, seed):
        return torch.rand(3, generator=torch.Generator().manual_seed(seed)), index % 3


class ByWorker(OwnGenerator):
    def __getitem__(self, index):
        worker = torch.utils.data.get_worker_info()
        return torch.full((3,), float(worker.id if worker else 0)), index % 3


@pytest.mark.parametrize("dataset", [OwnGenerator, Counting, System, lambda: Subset(OwnGenerator(), range(64))])
def test_items_with_their_own_randomness_are_refused(dataset):
    with pytest.raises(ValueError, match=r"differs when it is fetched twice under one seed.*keyed_item\(index, seed\)"):
        first_batch(dataset())


def test_workers_must_fetch_the_same():
    with pytest.raises(ValueError, match=r"item 0 of ByWorker differs when it is fetched twice"):
        MapSource(ByWorker(), CPU, 1).check(SPEC, "training")
    MapSource(ByWorker(), CPU, 0).check(SPEC, "training")


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(64))])
def test_a_dataset_that_takes_the_seed_is_keyed_by_it(wrap):
    plan = make_plan(batch=32, steps=2)

    def inputs(workers, micro_batch):
        source = MapSource(wrap(Hooked()), CPU, workers)
        batches = dpopt.poisson_batches(source, plan, views=2, micro_batch=micro_batch)
        return [torch.cat([x[m] for x, _, m in batch]) for batch in batches]

    for a, b in zip(inputs(0, 64), inputs(2, 3), strict=True):
        assert torch.equal(a, b) and not torch.equal(a[:, 0], a[:, 1])


def test_a_secret_key_stays_out_of_worker_processes(monkeypatch):
    """With `spawn` the views are pickled: the key in them must draw no noise."""
    plan = replace(make_plan(batch=8), key=dpopt.rng.RandomKey.from_os())
    seen = []
    real = torch.utils.data.DataLoader.__init__

    def init(self, dataset, *arguments, **options):
        seen.append(dataset)
        real(self, dataset, *arguments, **options)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", init)
    next(dpopt.poisson_batches(MapSource(Hooked(), CPU), plan)).micro_batches.__next__()
    key = seen[-1].key
    assert not key.secure and key.material != plan.key.material
    assert not torch.equal(key.normal(9, "noise", 0), plan.key.normal(9, "noise", 0))
    __import__("pickle").dumps(seen[-1])


def test_where_worker_processes_are_spawned():
    """A secret key is no obstacle; a Dataset that cannot be pickled is."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(ValueError, match=r"Made cannot be sent to worker processes .*set workers=0"):
            first_batch(Made(lambda i: (X, 1)), workers=1)
        with pytest.raises(ValueError, match=r"OwnGenerator could not be read .*set workers=0"):
            list(MapSource(OwnGenerator(), CPU, 1).plain(8))  # torch cannot send a Generator
        plan = replace(make_plan(batch=8, steps=1), key=dpopt.rng.RandomKey.from_os())
        batch = next(dpopt.poisson_batches(MapSource(Hooked(), CPU, 1), plan))
        assert sum(int(mask.sum()) for *_, mask in batch) == len(batch.indices)
    finally:
        torch.multiprocessing.set_start_method(before, force=True)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("data", [Stream(), {"a": 1}, "folder"])
def test_what_cannot_be_sampled(data):
    with pytest.raises(ValueError, match="cannot be sampled example by example"):
        as_source(data)


def test_an_unfinished_source_is_told_what_it_lacks():
    class Old:
        views = plain = subset = fingerprint = None

    with pytest.raises(ValueError, match="Old lacks public_size, contents, check"):
        as_source(Old())


# Own data through the configuration: refused before there is a run directory.


def blobs(case: str = "") -> DataSpec:
    """Three classes of inputs (1, 4, 4), spoiled by `case`."""

    def load(data_dir, device, workers):
        inputs, labels = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
        good, other = (inputs, labels), (-inputs, labels)
        return {
            "": (good, other),
            "twice": (good, good),
            "no test": (good, (inputs[:0], labels[:0])),
            "no training": ((inputs[:0], labels[:0]), good),
            "not a pair": good + good[:1],
            "other length": (good, (inputs, labels[:39])),
            "classes": ((inputs, labels + 1), good),
            "test classes": (good, (inputs, labels + 1)),
            "shape": ((inputs[..., :3], labels), good),
            "uint8": ((inputs.byte(), labels), good),
            "numpy": ((inputs.numpy(), labels.numpy()), good),
            "size": ((inputs[:39], labels[:39]), good),
            "own randomness": (Made(lambda i: (torch.tensor(np.random.default_rng().random((1, 4, 4))), 1), 40), good),
        }[case]

    return DataSpec("blobs", 40, 3, (1, 4, 4), load)


@pytest.mark.parametrize(
    "case, message",
    [
        ("no test", "blobs has no test examples: give it at least one"),
        ("no training", "blobs has no training examples: give it at least one"),
        ("twice", "the training set of blobs is its test set, too"),
        ("not a pair", "the load function of blobs must return a pair (train, test)"),
        ("other length", "there are 40 inputs but 39 targets: give one for each"),
        ("classes", "training example 2 has the label 3 where 3 classes"),
        ("test classes", "test example 2 has the label 3 where 3 classes"),
        ("shape", "the training inputs have the shape (1, 4, 3)"),
        ("uint8", "a pair of tensors needs floating-point inputs"),
        ("numpy", "(ndarray, ndarray) is not a pair of tensors (inputs, targets): convert it"),
        ("size", "blobs has 39 training examples, not 40 as announced: correct train_size"),
        ("own randomness", "item 0 of Made differs when it is fetched twice"),
    ],
)
def test_own_data_in_a_run(case, message):
    config = replace(
        configure("experiment=quickstart", "device=cpu", "workers=0"),
        dataset={"_target_": f"{__name__}.blobs", "case": case},
        model={"_target_": "dpopt.models.linear"},
        delta=1e-3,
        batch_size=8,
    )
    components = build_components(config)
    with pytest.raises(ValueError) as caught:
        load_data(components.config, components.task.spec, components.device)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    fine = build_components(replace(config, dataset=config.dataset | {"case": ""}))
    data = load_data(fine.config, fine.task.spec, fine.device)
    assert data.fingerprint == data.train.fingerprint() and len(data.test) == 40
