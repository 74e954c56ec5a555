"""The rules of the layers: against a loop over examples in float64, under every policy."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import Head, assert_exact, images, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpopt.grad_sample import conv
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.norms import inner_products
from dpopt.grad_sample.standardized_conv import norms_through
from dpopt.models.layers import StandardizedConv2d

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "1x1 strided": nn.Conv2d(4, 6, 1, stride=2),
    "patches": nn.Conv2d(4, 6, 4, stride=4, bias=False),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "odd": nn.Conv2d(4, 6, (3, 2), stride=(3, 2), padding=(2, 1), dilation=(2, 3), groups=2),
    "same": nn.Conv2d(4, 6, 4, padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "standardized": StandardizedConv2d(4, 6, 3),
    "standardized strided": StandardizedConv2d(4, 6, 3, stride=2, affine=False),
    "timm": timm.layers.ScaledStdConv2d(4, 6, 3, stride=2),
    "timm same": timm.layers.ScaledStdConv2dSame(4, 6, 3, stride=2),
    "timm grouped": timm.layers.ScaledStdConv2d(4, 6, 3, groups=2, bias=False),
    "timm unscaled": timm.layers.StdConv2d(4, 6, 3),
}


def every_way(what, device, ways, then=None):
    """Whichever way is the fastest on this machine, it gives what all others give."""
    first, *others = (way() for way in ways.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-12)
    return others[-1] if others else first


def assert_pixels_suffice(layer, inputs):
    """Inner products of pixels give those of what the filters meet, whichever of the two are fewer."""
    inputs = inputs.double()
    expected = inner_products(conv.columns(layer, inputs))
    torch.testing.assert_close(conv.products_of_pixels(layer, inputs), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, views, monkeypatch):
    monkeypatch.setattr(conv, "fastest", every_way)
    plans = assert_exact(Head(CONVOLUTIONS[name]), *images(4, views=views))
    assert plans["store"] == ({"layers.0": "store"}, [])
    assert plans["recompute"][0] == {"layers.0": "recompute"}
    assert plans["ghost"][0] == {"layers.0": "ghost"}
    assert_pixels_suffice(CONVOLUTIONS[name], images(4, views=views)[0])


def tokens(shape, views):
    return torch.randn(3, views, *shape), torch.arange(3)


OTHERS = {
    "linear": (nn.Linear(5, 4), (5,)),
    "linear without bias": (nn.Linear(5, 4, bias=False), (5,)),
    "linear over tokens": (nn.Linear(5, 4), (6, 5)),
    "linear over a grid": (nn.Linear(5, 4), (2, 3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 11)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 5)),
    "group norm of vectors": (nn.GroupNorm(2, 4), (4,)),
    "layer norm": (nn.LayerNorm(5), (6, 5)),
    "layer norm of matrices": (nn.LayerNorm((6, 5)), (2, 6, 5)),
    "rms norm": (nn.RMSNorm(5), (6, 5)),
    "timm's layer norm": (timm.layers.LayerNorm(5), (6, 5)),
}


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers(name, views):
    layer, shape = OTHERS[name]
    plans = assert_exact(Head(layer), *tokens(shape, views))
    assert plans["store"] == ({"layers.0": "store"}, [])


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("padding", [None, 1])
def test_embedding(views, padding):
    inputs = torch.randint(0, 5, (3, views, 6))
    plans = assert_exact(Head(nn.Embedding(5, 4, padding_idx=padding), nn.Linear(4, 3)), inputs, torch.arange(3))
    assert plans["ghost"][0]["layers.0"] == "ghost"


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 4),
    views=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    standardized=st.booleans(),
    channels_last=st.booleans(),
)
def test_convolutions_of_any_shape(
    examples, views, groups, channels, kernel, stride, padding, dilation, size, standardized, channels_last
):
    torch.manual_seed(0)
    kind = timm.layers.ScaledStdConv2d if standardized and kernel != (1, 1) else nn.Conv2d
    layer = kind(groups * channels[0], groups * channels[1], kernel, stride, padding, dilation, groups)
    inputs = torch.randn(examples, views, groups * channels[0], *size)
    if channels_last:
        inputs = inputs.movedim(2, -1).contiguous().movedim(-1, 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(conv, "fastest", every_way)
        assert_exact(Head(layer), inputs, torch.arange(examples) % 3, validate=False, tolerance=1e-9)
    assert_pixels_suffice(layer, inputs)


class Reused(nn.Module):
    """A layer that is called twice, and two that share a weight."""

    def __init__(self, standardized=False):
        super().__init__()
        self.twice = StandardizedConv2d(4, 4, 3) if standardized else nn.Linear(6, 6)
        self.once = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.once.weight
        self.standardized = standardized

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = x.flatten(1)[:, :6]
        return self.other(torch.tanh(self.once(x)))


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("standardized", [False, True])
def test_layers_used_twice_and_tied_weights(views, standardized):
    shape = (4, 5, 5) if standardized else (6,)
    assert_exact(Reused(standardized), torch.randn(3, views, *shape), torch.arange(3))


class Bare(nn.Module):
    """Parameters next to submodules: a class token, a position embedding, gains of all shapes; one layer is frozen."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.scalar, self.vector = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(5, 6))
        self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.partly = nn.Linear(6, 6)
        self.partly.weight.requires_grad_(False)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        x = self.vector * torch.tanh(x * self.matrix) + self.scalar * x
        return self.head(self.partly(torch.tanh(self.frozen(x)))[:, 0])


@pytest.mark.parametrize("views", [1, 4])
def test_parameters_beside_submodules_and_frozen_ones(views):
    model = Bare()
    plans = assert_exact(model, torch.randn(3, views, 4, 3), torch.arange(3))
    assert all(fallbacks == [] for _, fallbacks in plans.values())
    assert plans["store"][0].keys() == {"embed", "head", "partly"}


def test_norms_through_standardization_are_never_too_small():
    """Gradients almost constant over a filter, or almost along it: what is left is small, and its norm is right."""
    torch.manual_seed(0)
    layer = StandardizedConv2d(64, 8, 3, affine=False)
    for inputs in (torch.ones(4, 1, 64, 3, 3) + 1e-3 * torch.randn(4, 1, 64, 3, 3), None):
        if inputs is None:  # every patch is the filter of channel 0
            inputs = (layer.weight[0] + 1e-3 * torch.randn(4, 1, 64, 3, 3)).detach()
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(72, 3)).requires_grad_(False)
        layer.weight.requires_grad_(True)
        per_sample = GradSampler(model, F.cross_entropy, "store")(inputs, torch.arange(4) % 3)
        expected = oracle(model.double(), inputs.double(), torch.arange(4) % 3)
        norms = expected["0.weight"].flatten(1).norm(dim=1)
        model.float()
        torch.testing.assert_close(per_sample.norms.double(), norms, rtol=2e-5, atol=0)


def test_a_clamped_filter():
    """Where ‖w − mean(w)‖ < .01 the standardization does not project."""
    layer = StandardizedConv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight[:3] *= 1e-3
    assert_exact(Head(layer), *images(4, views=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_through_standardization_are_not_taken_in_16_bits(dtype):
    """Of a bf16 gradient as it is: against the chain rule in float64."""
    torch.manual_seed(0)
    layer = StandardizedConv2d(16, 8, 3)
    gradient = (torch.randn(5, 8, 16, 3, 3) + layer.weight.detach()).to(dtype)
    found = {"weight": gradient, "bias": torch.zeros(5, 8)}
    norms = norms_through(layer, found)[0].sqrt()
    layer.double()
    for g, norm in zip(gradient.double(), norms, strict=True):
        expected = torch.autograd.grad(layer.standardized_weight(), [layer.weight, layer.gain], g)
        exact = torch.cat([e.flatten() for e in expected]).norm()
        assert abs(norm / exact - 1) < 1e-5


def test_group_norm_gives_torch_a_weight():
    """`native_group_norm_backward` of torch 2.11 takes no weight that is None."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.native_group_norm_backward.default:
                seen.append(args[4])
            return function(*args, **(kwargs or {}))

    inputs, targets = images(4, 6, 6)
    engine = GradSampler(nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)), F.cross_entropy, "store")
    with Watch():
        engine(inputs, targets)
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)


@pytest.mark.parametrize("policy", ["auto", "store", "recompute", "ghost"])
def test_standardized_filters_that_share_a_weight(policy):
    """The chain rule goes through the weight once for all calls."""
    torch.manual_seed(0)
    first, second = StandardizedConv2d(4, 4, 3), StandardizedConv2d(4, 4, 3)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    x, ones = torch.randn(3, 1, 4, 4, 4), torch.ones(3)
    found, expected = (GradSampler(model, lambda a, b: a * b, p)(x, ones).norms for p in (policy, "loop"))
    torch.testing.assert_close(found, expected)
