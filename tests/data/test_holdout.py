"""The hold-out: coins by content, the public sizes, and the split by position of papers."""

import pytest
import torch
from helpers import make_plan

import dpopt
from dpopt.data.holdout import split_holdout
from dpopt.data.sources import MapSource, TensorSource, as_source
from dpopt.privacy.sampling import sample_indices
from dpopt.rng import RandomKey


def numbers(size=1000):
    return torch.arange(float(size))[:, None]


def source(inputs, groups=None):
    return TensorSource(inputs, torch.arange(len(inputs)), groups=groups)


def sides(train, held_out):
    """{input: whether it is trained on}."""
    parts = ((next(train.plain(9999))[0], True), (next(held_out.plain(9999))[0], False))
    return {float(x): side for inputs, side in parts for x in inputs[:, 0]}


def test_an_examples_side_depends_on_nothing_else():
    inputs = numbers()
    reference = sides(*split_holdout(source(inputs), 0.2, seed=3))
    assert len(reference) == 1000 and 700 < sum(reference.values()) < 900
    for other in (inputs[1:], inputs[:500], inputs.flip(0), torch.cat([inputs, inputs + 5000])):
        found = sides(*split_holdout(source(other), 0.2, seed=3))
        assert all(found[x] == side for x, side in reference.items() if x in found)
    assert sides(*split_holdout(source(inputs), 0.2, seed=4)) != reference
    wider = sides(*split_holdout(source(inputs), 0.3, seed=3))
    assert all(not wider[x] for x, side in reference.items() if not side)


def test_coins_are_fair_and_independent():
    counts = [len(split_holdout(source(numbers()), 0.25, seed)[1]) for seed in range(60)]
    mean, deviation = 250, (1000 * 0.25 * 0.75) ** 0.5
    assert abs(sum(counts) / 60 - mean) < 4 * deviation / 60**0.5
    assert 0.6 < torch.tensor(counts).double().std() / deviation < 1.5


def test_equal_examples_and_groups_share_a_coin():
    doubled = numbers().repeat(2, 1)
    train, held_out = split_holdout(source(doubled), 0.3, 0)
    kept, left = (set(next(s.plain(9999))[0].flatten().tolist()) for s in (train, held_out))
    assert not kept & left and len(train) == 2 * len(kept)
    users = [f"user {i % 50}" for i in range(1000)]
    for grouped in (source(numbers(), users), MapSource(_Grouped(users), torch.device("cpu"))):
        train, held_out = split_holdout(grouped, 0.3, 0)
        kept, left = ({int(x) % 50 for x in next(s.plain(9999))[0]} for s in (train, held_out))
        assert not kept & left and len(kept | left) == 50
    with pytest.raises(ValueError, match="999 groups for 1,000 examples"):
        split_holdout(source(numbers(), users[1:]), 0.3, 0)


class _Grouped:
    def __init__(self, groups):
        self.groups = groups

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        return torch.tensor([float(index)]), 0


@pytest.mark.parametrize("make", [lambda x: source(x), lambda x: as_source(_Grouped(list(range(len(x)))))])
def test_plans_go_by_the_public_size(make):
    train, held_out = split_holdout(make(numbers()), 0.25, 0)
    assert (train.public_size, held_out.public_size) == (750, 250) and len(train) != 750
    plan = make_plan(size=750, batch=375, steps=20)
    seen = set()
    for step in range(plan.steps):
        indices = sample_indices(plan, step, len(train)).tolist()
        assert max(indices) < len(train)
        seen |= set(indices)
    assert seen == set(range(len(train)))  # each of those there are, not of those announced
    batch = next(dpopt.poisson_batches(train, plan))
    assert batch.indices.tolist() == sample_indices(plan, 0, len(train)).tolist()
    with pytest.raises(ValueError, match="750 examples but the plan was made for"):
        dpopt.poisson_batches(train, make_plan(size=len(train)))


def test_by_position_it_is_the_split_of_earlier_versions():
    train, held_out = split_holdout(source(numbers(103)), 0.1, 5, "position")
    order = torch.argsort(RandomKey.from_seed(5).uniform(103, "split"))
    assert next(train.plain(999))[1].tolist() == order[10:].sort().values.tolist()
    assert next(held_out.plain(999))[1].tolist() == order[:10].sort().values.tolist()
    assert (train.public_size, held_out.public_size) == (93, 10) == (len(train), len(held_out))
    whole = source(numbers(3))
    assert split_holdout(whole, 0.1, 0, "position") == (whole, None) == split_holdout(whole, 0.0, 0)


def test_a_side_without_examples_is_refused():
    with pytest.raises(ValueError, match=r"holdout=0.001 of 5 examples leaves none to hold out"):
        split_holdout(source(numbers(5)), 0.001, 0)
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_holdout(source(numbers(5)), 0.999, 0)
    with pytest.raises(ValueError, match="must be content or position"):
        split_holdout(source(numbers(5)), 0.5, 0, "date")
