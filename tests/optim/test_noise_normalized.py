"""The momentum in few bits: how many, how near, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import dpopt
from dpopt.training.cost import optimizer_state_bytes


def trained(bits, steps=300, **options):
    """The path of a quadratic bowl under noise."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(64, 96))
    optimizer = dpopt.optim.NoiseNormalizedSGD([p], lr=0.02, bits=bits, noise_std=0.5, **options)
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        p.grad = p.detach() + 0.5 * torch.randn(p.shape, generator=noise)
        optimizer.step()
    return p.detach(), optimizer


def test_four_bits_are_a_sixteenth_of_adam():
    p, optimizer = trained(4, steps=1)
    assert optimizer_state_bytes(optimizer) / p.numel() == pytest.approx(0.5 + 4 / 256, abs=0.01)


@pytest.mark.parametrize("bits, far", [(8, 0.02), (4, 0.4)])
def test_few_bits_add_little_noise_and_no_bias(bits, far):
    """Compared with the path in 32 bits, whose spread at the end is 1.

    Of 256 values the range is about 5.6 of their deviations. In 4 bits a step of it is .37, stochastic rounding adds
    .15 (the root of a sixth of a step), and the momentum of .9 makes .35 of that.
    """
    exact, few = trained(32)[0], trained(bits)[0]
    assert 0 < (few - exact).norm() <= far * exact.norm()
    assert abs(float((few - exact).mean())) < 4 * far * float(exact.std()) / exact.numel() ** 0.5 + 1e-3


def test_a_loaded_state_goes_on_alike():
    p, optimizer = trained(4, steps=5)
    q = nn.Parameter(p.clone())
    other = dpopt.optim.NoiseNormalizedSGD([q], lr=0.02, noise_std=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = optimizer.param_groups[0]["params"][0]
    for parameter, one in ((twin, optimizer), (q, other)):
        parameter.grad = torch.ones_like(parameter)
        one.step()
    assert torch.equal(twin, q)


def test_small_tensors_keep_their_momentum():
    p = nn.Parameter(torch.ones(10))
    optimizer = dpopt.optim.NoiseNormalizedSGD([p], noise_std=1.0)
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


@pytest.mark.parametrize("options", [dict(bits=2), dict(bucket=6), dict(momentum=1.0), dict(lr=-1.0)])
def test_options_outside_their_range(options):
    with pytest.raises(ValueError, match=next(iter(options)) + "="):
        dpopt.optim.NoiseNormalizedSGD([nn.Parameter(torch.ones(2))], **options)
