"""The optimizers whose momentum is in few bits: how many, how near, and what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import dpopt
from dpopt.training.cost import optimizer_state_bytes

MAKERS = {
    "noise": partial(dpopt.optim.NoiseNormalizedSGD, noise_std=0.5, lr=0.02),
    "mini": partial(dpopt.optim.AdamMini, lr=0.02),
}
OVER_BOTH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def trained(make, bits, steps=300):
    """The path of a quadratic bowl under noise."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(64, 96))
    optimizer = make([p], bits=bits)
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        p.grad = p.detach() + 0.5 * torch.randn(p.shape, generator=noise)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("name, size", [("noise", 0.5 + 4 / 256), ("mini", 0.5 + 4 / 64 + 4 / 64)])
def test_bytes_of_four_bits(name, size):
    p, optimizer = trained(MAKERS[name], 4, steps=1)
    assert optimizer_state_bytes(optimizer) / p.numel() == pytest.approx(size, abs=0.002)


@OVER_BOTH
@pytest.mark.parametrize("bits, far", [(8, 0.02), (4, 0.4)])
def test_few_bits_add_little_noise_and_no_bias(make, bits, far):
    """Compared with the path in 32 bits, whose spread at the end is 1.

    Of 256 values the range is about 5.6 of their deviations, of 64 less. In 4 bits a step of it is .37, stochastic
    rounding adds .15 (the root of a sixth of a step), and the momentum of .9 makes .35 of that.
    """
    exact, few = trained(make, 32)[0], trained(make, bits)[0]
    assert 0 < (few - exact).norm() <= far * exact.norm()
    assert abs(float((few - exact).mean())) < 4 * far * float(exact.std()) / exact.numel() ** 0.5 + 1e-3


@OVER_BOTH
def test_a_loaded_state_goes_on_alike(make):
    p, optimizer = trained(make, 4, steps=5)
    q = nn.Parameter(p.clone())
    other = make([q])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = optimizer.param_groups[0]["params"][0]
    for parameter, one in ((twin, optimizer), (q, other)):
        parameter.grad = torch.ones_like(parameter)
        one.step()
    assert torch.equal(twin, q)


@OVER_BOTH
def test_small_tensors_keep_their_momentum(make):
    p = nn.Parameter(torch.ones(10))
    optimizer = make([p])
    p.grad = torch.ones(10)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[p]
    torch.testing.assert_close(optimizer.first_moment(p), torch.full((10,), 0.1))


@pytest.mark.parametrize("noise", [None, 0.0])
def test_without_noise_there_is_nothing_to_divide_by(noise):
    p = nn.Parameter(torch.ones(10))
    p.grad = torch.ones(10)
    with pytest.raises(ValueError, match="there is none or it is not known"):
        dpopt.optim.NoiseNormalizedSGD([p], noise_std=noise).step()


@OVER_BOTH
@pytest.mark.parametrize("options", [dict(bits=2), dict(bucket=6), dict(lr=-1.0), dict(weight_decay=-1.0)])
def test_options_outside_their_range(make, options):
    with pytest.raises(ValueError, match=next(iter(options)) + "="):
        make([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    "options", [dict(momentum=1.0), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)), dict(eps=-1.0)]
)
def test_own_options_outside_their_range(options):
    make = MAKERS["noise" if "momentum" in options else "mini"]
    with pytest.raises(ValueError, match=next(iter(options)) + r"(\[[01]\])?="):
        make([nn.Parameter(torch.ones(2))], **options)


def test_mini_is_adam_where_values_have_equal_squares():
    """In 32 bits, and in tensors of up to dense_size values whatever their squares are."""
    torch.manual_seed(0)
    for size, even in ((2100, True), (1000, False)):
        p, q = (nn.Parameter(torch.ones(size)) for _ in range(2))
        mini, adam = dpopt.optim.AdamMini([p], lr=0.1, bits=32), torch.optim.Adam([q], lr=0.1)
        for _ in range(5):
            g = torch.randn(size)
            p.grad = q.grad = g.sign() if even else g
            mini.step()
            adam.step()
        torch.testing.assert_close(p, q)


def test_steps_of_mini_stay_bounded_where_the_signal_is_far_above_the_noise():
    """The step over the noise's deviation grows with the signal, by 100 here; the other does not."""
    moved = {}
    for name, make in MAKERS.items():
        p = nn.Parameter(torch.zeros(2048))
        optimizer = make([p], bits=32)
        p.grad = torch.full((2048,), 50.0)
        optimizer.step()
        moved[name] = float(p.detach().abs().max())
    assert moved["noise"] == pytest.approx(0.02 * 100)
    assert moved["mini"] == pytest.approx(0.02)


def test_the_last_bucket_of_mini_is_a_mean_of_its_own_values():
    p = nn.Parameter(torch.zeros(1030))
    optimizer = dpopt.optim.AdamMini([p], lr=1.0, bits=32)
    p.grad = torch.ones(1030)
    optimizer.step()
    torch.testing.assert_close(p.detach(), -torch.ones(1030))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_gradient_of_zero_moves_nothing_in_any_dtype(dtype):
    p = nn.Parameter(torch.ones(2048, dtype=dtype))
    p.grad = torch.zeros_like(p)
    dpopt.optim.AdamMini([p]).step()
    assert torch.equal(p.detach(), torch.ones_like(p))


def test_memory_formats_take_the_same_steps():
    """Buckets go by a tensor's logical order."""
    torch.manual_seed(0)
    start = torch.randn(32, 16, 3, 3)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.to(memory_format=torch.channels_last, copy=True))
    optimizers = [dpopt.optim.AdamMini([one]) for one in (p, q)]
    for _ in range(3):
        g = torch.randn_like(start)
        p.grad, q.grad = g.clone(), g.to(memory_format=torch.channels_last, copy=True)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(p, q)
