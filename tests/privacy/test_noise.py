"""The noise that is added: its size, its place, its grid, and the GPU kernel under Triton's interpreter."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpopt.privacy.noise import add_count_noise, add_noise, release_grid
from dpopt.rng import CHUNK, RandomKey

KEY = RandomKey.from_seed(0, "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sum_plus_noise_on_the_grid_over_the_divisor(dtype):
    total = torch.linspace(-5, 5, 200_001, dtype=dtype)
    grid = release_grid(3.0)
    assert grid == 2.0**-11 and math.log2(grid).is_integer()
    found = add_noise(total.clone(), 3.0, 50.0, KEY, 7).double() * 50
    exact = total.double() + 3 * KEY.normal(len(total), "noise", 7, dtype=dtype).double()
    assert float((found - exact).abs().max()) <= grid / 2 * 1.01
    assert float((found / grid - (found / grid).round()).abs().max()) < 1e-2  # the division by 50 rounds, too
    torch.testing.assert_close(add_noise(total.clone(), 0.0, 50.0, KEY, 7), total / 50)


def test_a_sum_of_few_bits_is_refused():
    with pytest.raises(ValueError, match="sum in float32 or float64"):
        add_noise(torch.zeros(4, dtype=torch.bfloat16), 1.0, 1.0, KEY, 0)


@pytest.mark.parametrize("start, size", [(0, 150_000), (1, 70_000), (CHUNK // 2, 100), (CHUNK + 5, 200_000)])
def test_a_shard_of_the_parameters_sees_the_same_noise(start, size):
    whole = add_noise(torch.zeros(400_000), 1.0, 1.0, KEY, 0)
    assert torch.equal(add_noise(torch.zeros(size), 1.0, 1.0, KEY, 0, start), whole[start : start + size])


def test_the_count_is_released_on_its_grid():
    draws = np.array([add_count_noise(2.5, 0.8, KEY, step) for step in range(4000)])
    assert stats.kstest((draws - 2.5) / 0.8, "norm").pvalue > 1e-3
    assert np.all(draws / release_grid(0.8) == np.round(draws / release_grid(0.8)))
    assert add_count_noise(2.5, 0.0, KEY, 0) == 2.5


@pytest.mark.parametrize("size, start", [(300, 0), (CHUNK + 9000, 0), (70_000, 100_000)])
def test_the_kernel_draws_the_same_words(size, start, monkeypatch):
    """Only the last bits of log, sine and cosine may differ, which move few values by one cell of the grid."""
    pytest.importorskip("triton")
    from dpopt.privacy import noise_triton
    from dpopt.privacy.noise_triton import add_noise_kernel

    if not torch.cuda.is_available():  # the interpreter pays by the program
        monkeypatch.setattr(noise_triton, "_LANES", 4096)
    total = torch.linspace(-1, 1, size).to("cuda" if torch.cuda.is_available() else "cpu")
    grid = release_grid(2.0)
    expected = add_noise(total.cpu(), 2.0, 4.0, KEY, 3, start)
    cells = (add_noise_kernel(total, 2.0, 4.0, grid, KEY, 3, start).cpu() - expected).abs() * 4 / grid
    assert float(cells.max()) <= 1 and float((cells != 0).float().mean()) < 0.01
