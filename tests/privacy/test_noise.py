"""The noise that is added: its size, its place, and the GPU kernel under Triton's interpreter."""

import numpy as np
import pytest
import torch
from scipy import stats

from dpopt.privacy.noise import add_noise
from dpopt.rng import RandomKey

KEY = RandomKey.from_seed(0, "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sum_plus_noise_over_the_divisor(dtype):
    total = torch.linspace(-5, 5, 200_001, dtype=dtype)
    expected = (total + 3 * KEY.normal(len(total), "noise", 7).to(dtype)) / 50
    torch.testing.assert_close(add_noise(total.clone(), 3.0, 50.0, KEY, 7), expected)
    torch.testing.assert_close(add_noise(total.clone(), 0.0, 50.0, KEY, 7), total / 50)


def test_a_shard_of_the_parameters_sees_the_same_noise():
    whole = add_noise(torch.zeros(400_000), 1.0, 1.0, KEY, 0)
    assert torch.equal(add_noise(torch.zeros(150_000), 1.0, 1.0, KEY, 0), whole[:150_000])


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011), one counter at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (q >> 32) ^ c1 ^ k0, q & 0xFFFFFFFF, (p >> 32) ^ c3 ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def box_muller(first, second):
    radius = np.sqrt(-2 * np.log((first + 0.5) * 2.0**-32))
    angle = np.pi * 2.0**-31 * (np.int32(np.uint32(second)) + 0.5)
    return radius * np.cos(angle), radius * np.sin(angle)


def test_kernel():
    pytest.importorskip("triton")
    from dpopt.privacy.noise_triton import add_noise_kernel

    start = torch.linspace(-1, 1, 60_001)
    total = start.to("cuda" if torch.cuda.is_available() else "cpu", copy=True)
    noise = (add_noise_kernel(total, 2.0, 4.0, (5 << 40) + 3).cpu() * 4 - start).numpy() / 2
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise / wrong, "norm").pvalue < 1e-9
    for block, lane in ((0, 0), (0, 1023), (3, 17), (14, 0)):
        words = philox((block * 1024 + lane, 0, 0, 0), (3, 5 << 8))
        expected = [*box_muller(*words[:2]), *box_muller(*words[2:])]
        at = [block * 4096 + lane + 1024 * quarter for quarter in range(4)]
        np.testing.assert_allclose(
            noise[[i for i in at if i < 60_001]], expected[: sum(i < 60_001 for i in at)], atol=1e-5
        )
