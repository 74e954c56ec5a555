import copy
import math
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from dpopt.privacy.plan import PrivacyPlan
from dpopt.rng import CHUNK, RandomKey, stream_key

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_and_not_another_gaussian(dtype):
    """Kolmogorov–Smirnov over 20 streams: the smallest p-value is above 0.01/20, as declared beforehand."""
    values = []
    for stream in range(20):
        draws = KEY.normal(100_000, "ks", stream, dtype=dtype).numpy()
        values.append(stats.kstest(draws, "norm").pvalue)
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.016  # 5 standard deviations
    assert min(values) > 0.01 / 20
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(draws / wrong, "norm").pvalue < 1e-9


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


@pytest.mark.parametrize("dtype, largest, smallest", [(torch.float32, 10.66, 6.9e-4), (torch.float64, 12.24, 2.98e-8)])
def test_the_extremes_of_the_uniforms(dtype, largest, smallest, monkeypatch):
    """Words of zeros and of ones give finite draws other than zero, the former the largest there is."""
    for byte, bound in ((0, largest), (255, smallest)):

        def constant(self, start, out, size, byte=byte):
            out[:size] = bytes([byte]) * size

        monkeypatch.setattr("dpopt.rng._Stream.read_into", constant)
        draws = KEY.normal(CHUNK, dtype=dtype)
        assert float(draws.abs().max()) == pytest.approx(bound, rel=2e-2) and bool((draws != 0).all())


def quarter_round(state, a, b, c, d):
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        state[x] = (state[x] + state[y]) & 0xFFFFFFFF
        word = state[z] ^ state[x]
        state[z] = (word << bits | word >> (32 - bits)) & 0xFFFFFFFF


def chacha20(key, counter):
    """A block by its definition (Bernstein, 2008), 64-bit counter and a nonce of zeros."""
    words = [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *words, counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    state = list(start)
    for _ in range(10):
        for columns in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            quarter_round(state, *columns)
        for diagonals in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            quarter_round(state, *diagonals)
    return b"".join(((x + y) & 0xFFFFFFFF).to_bytes(4, "little") for x, y in zip(state, start, strict=True))


@pytest.mark.parametrize("block", [0, 1, 17, 2**32 - 1, 2**32, 2**33 + 5])
def test_the_keystream_is_chacha20_from_any_block_on(block):
    expected = b"".join(chacha20(stream_key(KEY, "noise", 3), block + i) for i in range(3))
    assert KEY.keystream(block, 150, "noise", 3) == expected[:150]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start, count", [(0, 1), (5, 1000), (CHUNK // 2 - 3, 10), (CHUNK - 1, 2), (CHUNK + 7, CHUNK)])
def test_a_stream_can_be_read_from_anywhere(start, count, dtype):
    whole = KEY.normal(3 * CHUNK, "seek", dtype=dtype)
    assert torch.equal(KEY.normal(count, "seek", start=start, dtype=dtype), whole[start : start + count])


SECRET = RandomKey.from_os()


def draw_of_the_parent():
    return SECRET.words(1, "noise")


def test_secret_keys_cannot_be_copied():
    plan = PrivacyPlan.calibrate(epsilon=float("inf"), delta=1e-5, dataset_size=64, batch_size=16, steps=5)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        for secret in (plan.key, plan.key.derive("run")):
            with pytest.raises(ValueError, match="cannot be copied, pickled"):
                copied(secret)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="cannot be copied, pickled"):
            copied(plan)
    assert copy.copy(plan).key is plan.key  # and what is spent for one is spent for both
    assert copy.deepcopy(KEY) == KEY and pickle.loads(pickle.dumps(KEY)) == KEY
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(ValueError, match="in another process"):
        pool.apply(draw_of_the_parent)
    workers = plan.key.for_workers("augment")
    assert pickle.loads(pickle.dumps(workers)) == workers and workers.material != plan.key.material


def test_uniform():
    draws = KEY.uniform(200_000, "uniform").numpy()
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_keys_from_the_operating_system_differ_and_stay_out_of_repr():
    one, other = RandomKey.from_os(), RandomKey.from_os()
    assert one.material != other.material and one.secure and len(one.material) == 32
    assert "material" not in repr(one)
