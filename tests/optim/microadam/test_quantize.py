"""The low-bit quantizer against a value-by-value transcription of its definition, and its corners."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpopt.optim.microadam.quantize import TINY, dequantize, golden_dither, quantize


def store(x, bits=4, bucket=256, dither=None):
    """Quantize a copy; returns what is read back, the ranges, and the bucket step of each value."""
    packed = torch.empty(len(x), x.shape[1] * bits // 8, dtype=torch.uint8)
    ranges = torch.empty(len(x), x.shape[1] // bucket, 2, dtype=torch.bfloat16)
    quantize(x.clone(), packed, ranges, torch.empty_like(x), dither)
    step = (ranges[:, :, 1].double() - ranges[:, :, 0].double()) / (2**bits - 1)
    return dequantize(packed, ranges, torch.empty_like(x)), ranges, step.repeat_interleave(bucket, 1), packed


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bucket", [8, 24, 256, 4096])
def test_equals_the_definition(bits, bucket):
    x = torch.randn(3, bucket * 2, generator=torch.Generator().manual_seed(bits))
    found, ranges, _, packed = store(x, bits, bucket)
    for row in range(3):
        for b in range(2):
            values = x[row, b * bucket : (b + 1) * bucket].numpy()
            low, high = ranges[row, b].double().tolist()
            assert low <= values.min() and values.max() <= high
            assert low >= values.min() - 2**-7 * abs(values.min()) and high <= values.max() + 2**-7 * abs(values.max())
            unit = np.float32(np.float32(high - low) / np.float32(2**bits - 1))
            per_byte = 8 // bits
            gap = bucket // per_byte
            for i in range(0, bucket, max(1, bucket // 50)):
                q = math.floor((values[i] - np.float32(low)) * np.float32(1 / unit) + np.float32(0.5))
                byte = int(packed[row, b * gap + i % gap])
                assert (byte >> (bits * (i // gap))) & (2**bits - 1) == q
                assert float(found[row, b * bucket + i]) == np.float32(np.float32(q) * unit + np.float32(low))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.floats(-35, 35), st.floats(-8e2, 8e2), st.integers(0, 10**6))
def test_error_of_rounding_to_nearest(bits, exponent, offset, seed):
    x = (torch.randn(2, 512, generator=torch.Generator().manual_seed(seed)) + offset) * 10.0**exponent
    found, _, step, _ = store(x, bits)
    corner = torch.where(step < 1.01 * TINY, step * (2**bits - 1), 0.0)  # all read back as the smallest
    assert ((found.double() - x.double()).abs() <= 0.5 * step * (1 + 1e-3) + 1e-6 * x.double().abs() + corner).all()


def test_stochastic_rounding_is_unbiased():
    """Over 4,000 steps the mean of what is read back is the value: errors have a variance of f(1 − f)·step²."""
    x, n = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)), 4000
    total = torch.zeros(2, 512, dtype=torch.float64)
    for t in range(n):
        found, ranges, step, _ = store(x, 4, 256, golden_dither(torch.arange(2), t, 2, 256))
        total += found
        assert ((found.double() - x.double()).abs() < step * (1 + 1e-5)).all()
    low = ranges[:, :, 0].double().repeat_interleave(256, 1)
    fraction = ((x - low) / step) % 1
    z = (total / n - x) / (step * (fraction * (1 - fraction) / n).sqrt().clamp(min=1e-3))
    assert z.abs().max() < 6 and abs(float(z.mean())) < 0.2 and 0.8 < float(z.std()) < 1.2
    nearest = store(x)[0].double() - x
    assert (
        nearest.abs() / (total / n - x).abs().clamp(min=1e-9)
    ).median() > 5  # the same, rounded to nearest, is biased


def test_the_dither_is_uniform():
    draws = torch.cat([golden_dither(torch.arange(50), t, 16, 256).flatten() for t in (0, 1, 2**31 - 1)])
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    counts = torch.histc(draws, 64, 0, 1) / len(draws)
    assert ((counts - 1 / 64).abs() < 0.05 / 64).all()
    one, other = (
        golden_dither(torch.arange(50), 1, 16, 256)[:, ::256],
        golden_dither(torch.arange(50), 2, 16, 256)[:, ::256],
    )
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.15


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_corners(bits):
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    x[0] = 2.5  # constant, and held by bfloat16
    x[1] = 0.0
    x[2] = -0.0
    x[3] = 1e-42
    x[4, 7], x[4, 9], x[4, 11] = float("nan"), float("inf"), -float("inf")
    x[5, 3] = 3e38
    x[6] = 1.2345678  # constant, and not held by bfloat16
    found, ranges, step, _ = store(x, bits)
    assert (found[0] == 2.5).all() and (found[1:3] == 0).all()
    assert found.isfinite().all() and ranges.float().isfinite().all()
    assert (found[3] - x[3]).abs().max() < 1e-35
    clean = x.clone()
    clean[4, [7, 9, 11]] = clean[5, 3] = 0.0  # what is not finite, or huge, counts as zero and spoils nothing
    assert ((found - clean).abs() <= 0.5 * step * 1.001 + 1e-35).all()
