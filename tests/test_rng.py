import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpopt.rng import RandomKey

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


@pytest.mark.parametrize("count", [1, 2, 3, 1000, (1 << 17) + 5])
def test_every_length(count):
    draws = KEY.normal(count, "length")
    assert draws.shape == (count,) and draws.isfinite().all()
    assert torch.equal(draws, KEY.normal(300_000, "length")[:count])  # draw i does not depend on how many there are


def test_gaussian_and_not_another_gaussian():
    draws = KEY.normal(200_000, "ks").numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(draws / wrong, "norm").pvalue < 1e-9
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01


def test_tails():
    """99.9 % Poisson bounds on the counts; `scripts/check_noise.py` does it on a thousand million draws."""
    count, bounds = 30_000_000, (3, 4, 4.5, 5)
    found = dict.fromkeys(bounds, 0)
    for piece in KEY.gaussians(count, "tails"):
        for bound in bounds:
            found[bound] += int((piece.abs() > bound).sum())
    for bound in bounds:
        expected = count * math.erfc(bound / math.sqrt(2))
        assert stats.poisson.ppf(5e-4, expected) <= found[bound] <= stats.poisson.ppf(1 - 5e-4, expected)


def test_steps_parameters_and_streams_are_uncorrelated():
    """Correlations of n pairs have a standard deviation of 1/√n."""
    n = 1_000_000
    reference = KEY.normal(n, "noise", 0).double()
    others = {
        "step": KEY.normal(n, "noise", 1),
        "stream": KEY.normal(n, "sample", 0),
        "run": RandomKey.from_seed(0, "another").normal(n, "noise", 0),
        "next": KEY.normal(n + 1, "noise", 0)[1:],
        "pair": reference.view(-1).roll(1 << 16),  # the other draw of the same pair of uniforms
        "square": KEY.normal(n, "noise", 1).square() - 1,
    }
    for other in others.values():
        assert abs(float((reference * other).mean()) / float(other.double().std())) < 5 / math.sqrt(n)
    radius = reference.square() - 1
    for lag in (1, 1 << 16, 1 << 17):
        assert abs(float((radius * radius.roll(lag)).mean())) < 5 * 2 / math.sqrt(n)


def test_the_extremes_of_the_uniforms(monkeypatch):
    """The words 0 and 2³² − 1 give finite draws other than zero, the former the largest there is."""

    class Constant:
        def __init__(self, byte):
            self.byte = byte

        def update_into(self, zeros, out):
            np.asarray(out)[: len(zeros)] = self.byte

    for byte, largest in ((0, 6.7637), (255, 3.45e-4)):
        monkeypatch.setattr(RandomKey, "_keystream", lambda self, *labels, byte=byte: Constant(byte))
        draws = KEY.normal(1 << 17)
        assert float(draws.abs().max()) == pytest.approx(largest, rel=1e-2) and bool((draws != 0).all())


def test_uniform():
    draws = KEY.uniform(200_000, "uniform").numpy()
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_keys_from_the_operating_system_differ_and_stay_out_of_repr():
    one, other = RandomKey.from_os(), RandomKey.from_os()
    assert one.material != other.material and one.secure and len(one.material) == 32
    assert "material" not in repr(one)
