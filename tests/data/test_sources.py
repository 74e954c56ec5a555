import numpy as np
import pytest
import torch
from helpers import make_plan
from torch.utils.data import Dataset, TensorDataset

import dpopt
from dpopt.data.sources import MapSource, TensorSource, _crop_flip, as_source
from dpopt.rng import RandomKey


class Noisy(Dataset):
    """Random augmentation through torch's global generator, as torchvision's transforms do it."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((3,), float(index)) + torch.rand(3) / 4 + float(np.random.rand()) / 4, index % 3


@pytest.mark.parametrize("workers", [0, 2])
def test_map_style_views_are_keyed_by_step_and_example(workers):
    plan = make_plan(size=40, batch=8, steps=4)
    runs = []
    for size, count in ((3, workers), (40, 0)):
        source = MapSource(Noisy(), torch.device("cpu"), count)
        before = torch.random.get_rng_state()
        runs.append(
            [
                torch.cat([x[m] for x, _, m in batch])
                for batch in dpopt.poisson_batches(source, plan, views=2, micro_batch=size)
            ]
        )
        assert count or torch.equal(before, torch.random.get_rng_state())  # the global generator is left alone
    for step, (a, b) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(a, b)
        indices = dpopt.privacy.sampling.sample_indices(plan, step)
        assert torch.equal(a[:, 0].floor()[:, 0].long(), indices)
        assert len(indices) == 0 or not torch.equal(a[:, 0], a[:, 1])


def test_map_style_empty_batches_with_workers():
    plan = make_plan(size=40, batch=1, steps=12)
    source = MapSource(Noisy(), torch.device("cpu"), 1)
    sizes = [sum(int(m.sum()) for *_, m in batch) for batch in dpopt.poisson_batches(source, plan, micro_batch=2)]
    assert 0 in sizes and sum(sizes) > 0 and len(sizes) == 12


def test_plain_order_and_subset():
    source = MapSource(Noisy(), torch.device("cpu"))
    targets = torch.cat([y for _, y in source.plain(7)])
    assert torch.equal(targets, torch.arange(40) % 3)
    assert len(source.subset(torch.tensor([1, 5]))) == 2
    tensors = as_source((torch.arange(6.0)[:, None], torch.arange(6)))
    assert torch.equal(next(tensors.subset(torch.tensor([1, 5])).plain(8))[1], torch.tensor([1, 5]))


def test_crop_and_flip_by_hand():
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    at = torch.tensor([0])
    same = torch.tensor([[[0.5, 0.5, 0.9]]])
    assert torch.equal(_crop_flip(image, at, same, crop=1, flip=True), image)
    mirrored = torch.tensor([[[0.5, 0.5, 0.1]]])
    assert torch.equal(_crop_flip(image, at, mirrored, crop=1, flip=True), image.flip(3))
    up = torch.tensor([[[0.0, 0.5, 0.9]]])  # shifted by −1: the row above the first is the second, reflected
    assert torch.equal(_crop_flip(image, at, up, crop=1, flip=True)[0, 0], image[0, 0, [1, 0, 1, 2]])
    right = torch.tensor([[[0.5, 0.99, 0.9]]])
    assert torch.equal(_crop_flip(image, at, right, crop=1, flip=True)[0, 0], image[0, 0][:, [1, 2, 3, 2]])


def test_without_shifts_every_second_view_is_the_mirror_image_of_the_one_before():
    maps = torch.arange(24.0).view(2, 2, 2, 3)
    source = TensorSource(maps, torch.arange(2), flip=True, flip_channels=(1, 0))
    order = torch.arange(2).repeat(50)
    views = torch.cat([images for images, _ in source.views([(0, order)], RandomKey.from_seed(0), 3, 7)])
    mirror = maps.flip(3)[:, [1, 0]]
    first = [torch.equal(view, maps[at]) for view, at in zip(views[:, 0], order, strict=True)]
    assert 30 < sum(first) < 70
    for view, at, plain in zip(views, order, first, strict=True):
        pair = (maps[at], mirror[at]) if plain else (mirror[at], maps[at])
        assert torch.equal(view, torch.stack([*pair, pair[0]]))
    other = TensorSource(maps, torch.arange(2), flip=True)
    assert other.fingerprint() != source.fingerprint()
    assert torch.equal(next(source.plain(2))[0], maps)
    with pytest.raises(ValueError, match="crop=0"):
        TensorSource(maps, torch.arange(2), crop=1, flip=True, flip_channels=(1, 0))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (4, 3, 5, 5, 5)])
def test_only_images_are_augmented(shape):
    """Rows would be broadcast over each other: an example would hold others."""
    TensorSource(torch.zeros(shape), torch.zeros(4))
    for augmentation in ({"flip": True}, {"crop": 1}, {"flip_channels": (0, 1, 2)}):
        with pytest.raises(ValueError, match=r"are not \(N, C, H, W\): set crop=0 and flip=False"):
            TensorSource(torch.zeros(shape), torch.zeros(4), **augmentation)


@pytest.mark.parametrize("channels", [(0,), (0, 0, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_mirrored_channels_are_an_order_of_all(channels):
    with pytest.raises(ValueError, match="each of the channels"):
        TensorSource(torch.zeros(4, 3, 5, 5), torch.zeros(4), flip=True, flip_channels=channels)


def test_normalization_and_resizing():
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    source = TensorSource(images, torch.zeros(2), (0.5, 0.0, 1.0), (0.5, 1.0, 2.0), image_size=16)
    plain = next(source.plain(2))[0]
    assert plain.shape == (2, 3, 16, 16)
    assert torch.allclose(plain[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    views = next(source.views([(0, torch.zeros(0, dtype=torch.long))], RandomKey(b""), 2, 4))[0]
    assert views.shape == (0, 2, 3, 16, 16)


def test_fingerprints_see_every_byte():
    images, targets = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)

    def source(images, targets, std=(1.0,), **options):
        return TensorSource(images, targets, (0.0,), std, **options)

    def fingerprint(*arguments):
        return source(*arguments).fingerprint()

    reference = fingerprint(images, targets)
    other_image, other_target = images.clone(), targets.clone()
    other_image[3, 0, 1, 1] = other_target[0] = 1
    assert fingerprint(images.clone(), targets.clone()) == reference
    others = [
        fingerprint(other_image, targets),
        fingerprint(images, other_target),
        fingerprint(images, targets, (2.0,)),
    ]
    assert len({reference, *others}) == 4
    records = source(images, targets).records()
    other = source(images, targets, (2.0,), crop=2, flip=True, image_size=8)
    assert records == other.records() == other.subset(torch.arange(2)).records() != reference
    assert records != source(other_image, targets).records()


def test_fingerprints_of_map_style_data_see_the_content():
    class Other(Noisy):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + 1, index % 3

    same, again, other = (MapSource(d, torch.device("cpu")).fingerprint() for d in (Noisy(), Noisy(), Other()))
    assert same == again != other


def test_plain_data_of_a_map_source_is_not_augmented():
    plain = TensorDataset(torch.arange(40.0).view(40, 1), torch.arange(40))
    source = MapSource(Noisy(), torch.device("cpu"), plain_dataset=plain).subset(torch.tensor([3, 4]))
    assert next(source.plain(2))[0].tolist() == [[3.0], [4.0]]


def test_what_is_a_source():
    pair = (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    assert isinstance(as_source(pair), TensorSource) and isinstance(as_source(TensorDataset(*pair)), TensorSource)
    assert isinstance(as_source(Noisy()), MapSource)
    listed = [(x, int(y)) for x, y in zip(*pair, strict=True)]
    assert isinstance(as_source(listed), MapSource) and isinstance(as_source(listed[:2]), MapSource)
    for other in ([], [(1.0, 2, 3)] * 4, [pair[0].tolist(), pair[1].tolist()]):  # the last: all inputs, all targets
        with pytest.raises(ValueError, match="or give a list of pairs"):
            as_source(other)
    with pytest.raises(ValueError, match="3 inputs but 4 targets"):
        as_source((pair[0], torch.zeros(4)))
    with pytest.raises(ValueError, match="neither a pair of tensors nor a map-style"):
        as_source(iter([1, 2]))
    with pytest.raises(ValueError, match="is not a pair of tensors"):
        as_source((torch.zeros(3), torch.zeros(3), torch.zeros(3)))
    with pytest.raises(ValueError, match="floating-point inputs"):
        as_source((torch.zeros(3, 2, dtype=torch.uint8), pair[1]))
