import itertools

import pytest
import torch
from helpers import make_plan, small_data
from scipy import stats

import dpopt
from dpopt.data.sources import TensorSource
from dpopt.privacy.sampling import sample_indices


def test_batches_are_poisson():
    plan = make_plan(size=500, batch=50, steps=400)
    member = torch.zeros(400, 500)
    for step in range(400):
        member[step, sample_indices(plan, step)] = 1
    sizes = member.sum(1)
    assert sizes.mean() == pytest.approx(50, abs=3 * (45 / 400) ** 0.5)
    assert sizes.var() == pytest.approx(45, rel=0.3)  # N q (1 − q); a fixed-size sampler has 0
    frequencies = member.sum(0).numpy()
    assert stats.kstest(frequencies, stats.binom(400, 0.1).cdf).pvalue > 1e-4
    pairs = torch.corrcoef(member.T[:50])  # examples enter independently of one another
    assert (pairs - torch.eye(50)).abs().max() < 0.25


def test_micro_batches_cut_and_pad_the_same_batch():
    plan, data = make_plan(size=64, batch=16, steps=6), small_data()

    def flattened(size):
        for batch in dpopt.poisson_batches(data, plan, micro_batch=size):
            pieces = list(batch)
            assert {x.shape for x, _, _ in pieces} == {(size, 1, 5)} and {m.shape for *_, m in pieces} == {(size,)}
            assert all((x[~m] == 0).all() for x, _, m in pieces)
            yield batch.step, torch.cat([x[m] for x, _, m in pieces]), torch.cat([y[m] for _, y, m in pieces])

    for (step, x, y), (_, x2, y2) in zip(flattened(1), flattened(100), strict=True):
        indices = sample_indices(plan, step)
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert torch.equal(x[:, 0], data[0][indices]) and torch.equal(y, data[1][indices])


def test_an_empty_batch_is_one_piece_of_padding():
    plan = make_plan(size=64, batch=1, steps=50)
    sizes = [len(sample_indices(plan, step)) for step in range(50)]
    assert 0 in sizes
    for step, (batch, size) in enumerate(
        zip(dpopt.poisson_batches(small_data(), plan, micro_batch=4), sizes, strict=True)
    ):
        assert batch.step == step
        masks = [mask for _, _, mask in batch]
        assert sum(int(mask.sum()) for mask in masks) == size and len(masks) >= 1


def test_breaking_off_a_batch_does_not_shift_the_next():
    plan = make_plan(size=64, batch=32, steps=3)
    whole = [[x.clone() for x, _, _ in batch] for batch in dpopt.poisson_batches(small_data(), plan, micro_batch=4)]
    for batch, expected in zip(dpopt.poisson_batches(small_data(), plan, micro_batch=4), whole, strict=True):
        assert torch.equal(next(iter(batch))[0], expected[0])


def test_start_continues_the_sequence():
    plan, data = make_plan(steps=5), small_data()
    tail = list(itertools.islice(dpopt.poisson_batches(data, plan), 3, None))
    for a, b in zip(tail, dpopt.poisson_batches(data, plan, start=3), strict=True):
        assert a.step == b.step and torch.equal(a.indices, b.indices)


def test_augmentation_ignores_the_micro_batch_size():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    source = TensorSource(images, torch.zeros(64, dtype=torch.long), (0.5,) * 3, (0.5,) * 3, crop=2, flip=True)
    plan = make_plan(steps=2)

    def views(size):
        batches = dpopt.poisson_batches(source, plan, views=4, micro_batch=size)
        return [torch.cat([x[m] for x, _, m in batch]) for batch in batches]

    for a, b in zip(views(3), views(64), strict=True):
        assert torch.equal(a, b) and a.shape[1] == 4
        assert not torch.equal(a[:, 0], a[:, 1])  # the views differ


def test_the_plan_and_the_data_must_agree_on_n():
    with pytest.raises(ValueError, match="64 examples but the plan was made for 65"):
        dpopt.poisson_batches(small_data(64), make_plan(size=65))
