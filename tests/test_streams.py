import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpopt.privacy.streams import RandomKey

KEY = RandomKey.from_seed(0, "test")


def test_draws_are_functions_of_key_and_labels():
    assert torch.equal(KEY.normal(1000, "noise", 3, 0), KEY.normal(1000, "noise", 3, 0))
    others = [
        RandomKey.from_seed(1, "test").normal(1000, "noise", 3, 0),
        RandomKey.from_seed(0, "other").normal(1000, "noise", 3, 0),
        KEY.normal(1000, "noise", 4, 0),
        KEY.normal(1000, "noise", 3, 1),
        KEY.normal(1000, "sample", 3, 0),
    ]
    reference = KEY.normal(1000, "noise", 3, 0)
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([reference, other]))[0, 1])) < 0.15


def test_labels_cannot_be_confused():
    assert not np.array_equal(KEY.words(4, "a", "b"), KEY.words(4, "ab"))
    assert not np.array_equal(KEY.words(4, 1, 23), KEY.words(4, 12, 3))


@pytest.mark.parametrize("count", [1, 2, 3, 1000, (1 << 19) + 5])
def test_every_length(count):
    draws = KEY.normal(count, "length")
    assert draws.shape == (count,) and draws.isfinite().all()


def test_gaussian_and_not_another_gaussian():
    draws = KEY.normal(200_000, "ks").numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(draws / wrong, "norm").pvalue < 1e-9
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01


def test_tails():
    draws = KEY.normal(4_000_000, "tails").abs()
    for bound in (3, 4):
        expected = len(draws) * math.erfc(bound / math.sqrt(2))
        found = int((draws > bound).sum())
        assert stats.poisson.ppf(5e-4, expected) <= found <= stats.poisson.ppf(1 - 5e-4, expected)


def test_uniform():
    draws = KEY.uniform(200_000, "uniform").numpy()
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_keys_from_the_operating_system_differ_and_stay_out_of_repr():
    one, other = RandomKey.from_os(), RandomKey.from_os()
    assert one.material != other.material and one.secure and len(one.material) == 32
    assert "material" not in repr(one)
