"""The per-layer engine: against a loop over examples in float64, all rules and policies; against vmap in training."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import loop_oracle, make_plan, small_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpopt
from dpopt import models
from dpopt.models.layers import StandardizedConv2d
from dpopt.privacy.clipping import Flat
from dpopt.privacy.convolution import standardized_norms
from dpopt.privacy.engine import POLICIES, Engine
from dpopt.privacy.gradients import PrivateGradient
from dpopt.privacy.proof import check
from dpopt.privacy.sampling import PoissonBatch

RULED = ("auto", "store", "recompute", "gram")


class Head(nn.Module):
    """A layer under test, then a small nonlinear head that makes logits of whatever comes out."""

    def __init__(self, *layers, classes=3):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.mix = nn.Parameter(torch.randn(classes, 7))

    def forward(self, x):
        y = torch.tanh(self.layers(x).flatten(1))
        y = F.pad(y, (0, -y.shape[1] % 7)).unflatten(1, (7, -1)).sum(2)
        return y @ self.mix.detach().T


def oracle(model, inputs, targets):
    """Gradients (B, *shape) by one backward pass per example."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for views, target in zip(inputs, targets, strict=True):
        loss = F.cross_entropy(model(views), target.expand(len(views)))
        rows.append(torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True))
    return {name: torch.stack(columns) for name, columns in zip(parameters, zip(*rows, strict=True), strict=True)}


def assert_exact(model, inputs, targets, policies=RULED, prove=True, tolerance=1e-10):
    """Norms and weighted sums of every policy are the loop's; an example that is masked has weight 0."""
    model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(model, Head):
        model.mix.requires_grad_(False)
    expected = oracle(model, inputs, targets)
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    weights = (0.3 / norms).clamp(max=1.0)
    weights[-1:] = 0.0  # a pad
    plans = {}
    for policy in policies:
        engine = Engine(model, F.cross_entropy, policy)
        if prove:
            check(engine, inputs, targets)
        taken = engine.take(inputs, targets)
        torch.testing.assert_close(taken.norms, norms, rtol=tolerance, atol=1e-14)
        sums = {name: torch.zeros_like(g[0]) for name, g in expected.items()}
        taken.add_to(sums, weights)
        for name, g in expected.items():
            total = torch.einsum("b,b...->b...", weights, g).sum(0)
            torch.testing.assert_close(sums[name], total, rtol=tolerance, atol=1e-13, msg=f"{policy} {name}")
        plans[policy] = (engine.plan, engine.fallbacks)
    return plans


def images(channels, height=9, width=8, examples=3, views=1):
    return torch.randn(examples, views, channels, height, width), torch.arange(examples) % 3


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
    "standardised": StandardizedConv2d(4, 6, 3),
    "standardised strided": StandardizedConv2d(4, 6, 3, stride=2, affine=False),
    "timm": timm.layers.ScaledStdConv2d(4, 6, 3, stride=2),
    "timm same": timm.layers.ScaledStdConv2dSame(4, 6, 3, stride=2),
    "timm grouped": timm.layers.ScaledStdConv2d(4, 6, 3, groups=2, bias=False),
    "timm unscaled": timm.layers.StdConv2d(4, 6, 3),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, views):
    plans = assert_exact(Head(CONVOLUTIONS[name]), *images(4, views=views))
    assert plans["store"] == ({"layers.0": "store"}, [])
    assert plans["recompute"][0] == {"layers.0": "recompute"}
    assert plans["gram"][0]["layers.0"] == ("store" if "standard" in name or "timm" in name else "gram")


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
    assert plans["gram"][0]["layers.0"] == "gram"


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
    standardised=st.booleans(),
)
def test_convolutions_of_any_shape(
    examples, views, groups, channels, kernel, stride, padding, dilation, size, standardised
):
    torch.manual_seed(0)
    kind = timm.layers.ScaledStdConv2d if standardised and kernel != (1, 1) else nn.Conv2d
    layer = kind(groups * channels[0], groups * channels[1], kernel, stride, padding, dilation, groups)
    inputs = torch.randn(examples, views, groups * channels[0], *size)
    assert_exact(Head(layer), inputs, torch.arange(examples) % 3, prove=False, tolerance=1e-9)


class Reused(nn.Module):
    """A layer that is called twice, and two that share a weight."""

    def __init__(self, standardised=False):
        super().__init__()
        self.twice = StandardizedConv2d(4, 4, 3) if standardised else nn.Linear(6, 6)
        self.once = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.once.weight
        self.standardised = standardised

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = x.flatten(1)[:, :6]
        return self.other(torch.tanh(self.once(x)))


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("standardised", [False, True])
def test_layers_used_twice_and_tied_weights(views, standardised):
    shape = (4, 5, 5) if standardised else (6,)
    assert_exact(Reused(standardised), torch.randn(3, views, *shape), torch.arange(3))


class Bare(nn.Module):
    """Parameters beside submodules: a class token, a position embedding, gains of all shapes; one layer is frozen."""

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


class Product(nn.Module):
    """A layer with two inputs, which no rule knows."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x, y):
        return torch.einsum("bi,oij,bj->bo", x, self.matrix, y)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.both = nn.Linear(4, 4), Product()

    def forward(self, x):
        return self.both(self.first(x), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_without_a_rule_go_through_vmap_and_are_named():
    plans = assert_exact(Odd(), torch.randn(3, 2, 4), torch.arange(3))
    assert all(fallbacks == ["both"] for _, fallbacks in plans.values())
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    plans = assert_exact(nn.Sequential(nn.Linear(4, 4), norm), torch.randn(3, 2, 4), torch.arange(3))
    assert plans["auto"][1] == ["1"]
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plans = assert_exact(
        nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)), torch.randn(3, 2, 3, 8), torch.arange(3)
    )
    assert plans["auto"][1] == ["0"]


class Outside(nn.Linear):
    """Its parent reads the weight without calling the layer."""


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Outside(4, 3)

    def forward(self, x):
        return self.layer(x) + F.linear(x, self.layer.weight)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


class Across(nn.Module):
    """Positions first, examples second."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x.transpose(0, 1))).sum(0)


@pytest.mark.parametrize("kind", [Functional, Mixing, Across])
def test_the_engine_proves_itself_before_it_is_trusted(kind):
    model = kind().double()
    inputs = torch.randn(6, 1, *((6, 4) if kind is Across else (4,)), dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"layer\.weight.*engine=vmap"):
        check(Engine(model, F.cross_entropy), inputs, torch.zeros(6, dtype=torch.long))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if kind is not Mixing:  # which has no per-example gradient
        assert_exact(model, inputs, torch.arange(6) % 3, policies=["vmap"])


def test_an_input_changed_in_place_is_refused():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = torch.tanh(x)
            y = self.layer(x)
            return y + x.mul_(2)

    engine = Engine(Changed(), F.cross_entropy)
    with pytest.raises(ValueError, match=r"input of layer 'layer' is changed in place.*engine=vmap"):
        engine.take(torch.randn(2, 1, 4), torch.tensor([0, 1]))
    inplace = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    assert_exact(inplace, torch.randn(3, 2, 4), torch.arange(3))


@pytest.mark.parametrize("name", ["wrn_16_4", "resnet18", "cnn", "deit_tiny", "nf_resnet50"])
def test_models(name):
    options = dict(pretrained=False, image_size=32, zero_head=False) if name.startswith("deit") else {}
    options |= {"small_images": True} if name == "resnet18" else {}
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=3, in_channels=3, **options)
    plans = assert_exact(model, *images(3, 32, 32, views=2), policies=["auto", "recompute"], tolerance=1e-8)
    assert plans["auto"][1] == []


@pytest.mark.parametrize("policy", RULED)
def test_what_is_not_finite_counts_as_zero(policy):
    """In the input, in the pads, in a gradient that overflows: the sum is that of the other examples."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)).double()
    inputs, targets = torch.randn(6, 2, 2, 6, 6, dtype=torch.float64), torch.arange(6) % 3
    inputs[1, 0, 0, 0, 0], inputs[3], inputs[5] = float("nan"), float("inf"), float("nan")
    mask = torch.tensor([True] * 5 + [False])
    plan, clip = make_plan(sigma=0.0), Flat(0.5)
    private = PrivateGradient(model, F.cross_entropy, plan, clip, engine=policy)
    private.backward(PoissonBatch(plan, 0, torch.arange(5), iter([(inputs, targets, mask)])))
    good = [0, 2, 4]
    expected = loop_oracle(model, F.cross_entropy, inputs[good], targets[good], clip)
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e / plan.batch_size, rtol=1e-9, atol=1e-12)


def test_norms_through_standardisation_are_never_too_small():
    """Gradients almost constant over a filter, or almost along it: what is left is small, and its norm is right."""
    torch.manual_seed(0)
    layer = StandardizedConv2d(64, 8, 3, affine=False)
    for inputs in (torch.ones(4, 1, 64, 3, 3) + 1e-3 * torch.randn(4, 1, 64, 3, 3), None):
        if inputs is None:  # every patch is the filter of channel 0
            inputs = (layer.weight[0] + 1e-3 * torch.randn(4, 1, 64, 3, 3)).detach()
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(72, 3)).requires_grad_(False)
        layer.weight.requires_grad_(True)
        taken = Engine(model, F.cross_entropy, "store").take(inputs, torch.arange(4) % 3)
        expected = oracle(model.double(), inputs.double(), torch.arange(4) % 3)
        norms = expected["0.weight"].flatten(1).norm(dim=1)
        model.float()
        torch.testing.assert_close(taken.norms.double(), norms, rtol=2e-5, atol=0)


def test_a_clamped_filter():
    """Where ‖w − mean(w)‖ < .01 the standardisation does not project."""
    layer = StandardizedConv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight[:3] *= 1e-3
    assert_exact(Head(layer), *images(4, views=2))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_training_equals_that_of_vmap(kind):
    def trajectory(policy):
        torch.manual_seed(0)
        model = models.cnn(num_classes=3, in_channels=1, widths=(8, 16)).to(kind)
        data = (torch.randn(64, 1, 8, 8, dtype=kind), torch.arange(64) % 3)
        private = PrivateGradient(model, F.cross_entropy, make_plan(steps=8), Flat(1.0), engine=policy)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for batch in dpopt.poisson_batches(data, private.plan, views=2, micro_batch=16):
            private.backward(batch)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    tolerance = dict(rtol=1e-9, atol=1e-11) if kind == torch.float64 else dict(rtol=1e-3, atol=1e-5)
    reference = trajectory("vmap")
    for policy in RULED:
        torch.testing.assert_close(trajectory(policy), reference, **tolerance)


@pytest.mark.parametrize("name, size", [("wrn_16_4", 32), ("deit_tiny", 32)])
def test_five_steps_equal_those_of_vmap(name, size):
    options = dict(pretrained=False, image_size=size, zero_head=False) if name == "deit_tiny" else {}

    def trajectory(policy):
        torch.manual_seed(0)
        model = getattr(models, name)(num_classes=3, in_channels=3, **options)
        data = (torch.randn(64, 3, size, size), torch.arange(64) % 3)
        plan = make_plan(sigma=0.1, steps=5)
        private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), engine=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for batch in dpopt.poisson_batches(data, plan, micro_batch=8):
            private.backward(batch)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    one, other = trajectory("auto"), trajectory("vmap")
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_operations_of_a_private_step():
    """WRN-16-4 under the store policy: at most 1.10 times those of an ordinary step, weight-standardised or not."""
    model = models.wrn_16_4()
    inputs, targets = torch.randn(4, 1, 3, 32, 32), torch.arange(4)
    with FlopCounterMode(display=False) as plain:
        F.cross_entropy(model(inputs[:, 0]), targets).backward()
    engine = Engine(model, F.cross_entropy, "store")
    with FlopCounterMode(display=False) as private:
        taken = engine.take(inputs, targets)
        taken.add_to({n: torch.zeros_like(p) for n, p in model.named_parameters()}, 1 / taken.norms)
    assert 0.9 < private.get_total_flops() / plain.get_total_flops() <= 1.10


def test_policies_follow_shapes_and_memory():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(12544, 10)
    )
    inputs, targets = torch.randn(8, 1, 3, 16, 16), torch.arange(8)
    for memory, plan in (
        (None, {"0": "store", "2": "store", "4": "gram"}),
        (8 * 4 * 30_000, {"0": "store", "2": "recompute", "4": "gram"}),
        (0, {"0": "store", "2": "recompute", "4": "gram"}),  # what recomputing keeps would be more
    ):
        engine = Engine(model, F.cross_entropy, memory=memory)
        engine.take(inputs, targets)
        assert engine.plan == plan
    for policy in POLICIES:
        Engine(model, F.cross_entropy, policy)
    with pytest.raises(ValueError, match="engine=fast must be one of auto"):
        Engine(model, F.cross_entropy, "fast")


@pytest.mark.parametrize("policy", ["auto", "recompute"])
def test_compiled_is_the_same(policy):
    torch.manual_seed(0)
    model = nn.Sequential(StandardizedConv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3))
    model.double()
    inputs, targets = torch.randn(4, 2, 3, 8, 8, dtype=torch.float64), torch.arange(4) % 3
    found = []
    for compiled in (False, True):
        engine = Engine(model, F.cross_entropy, policy, compiled=compiled)
        for _ in range(2):
            sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            taken = engine.take(inputs, targets)
            taken.add_to(sums, 1 / taken.norms)
        found.append((taken.norms, *sums.values()))
        with torch.no_grad():
            model[0].weight.mul_(2)  # a graph sees the parameters of the day
            model[0].weight.mul_(0.5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_buffers_and_hooks_are_left_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen.add_(x.detach().mean(0))
            return x

    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 3))
    engine = Engine(model, F.cross_entropy, "store")
    engine.take(torch.randn(3, 1, 4), torch.arange(3))
    assert (model[1].seen == 0).all() and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_small_data_under_every_policy():
    """The library's loop, all policies, several micro-batch sizes: the same parameters."""
    results = []
    for policy, size in itertools.product(("vmap", "store", "recompute"), (5, 64)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        private = PrivateGradient(model, F.cross_entropy, make_plan(), Flat(1.0), engine=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in dpopt.poisson_batches(small_data(), private.plan, micro_batch=size):
            private.backward(batch)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("examples", [1, 5, 64])
def test_the_proof_forgives_rounding(examples):
    """In fp32 a ReLU that rounding turns on or off is worth .4 % of a gradient of WRN-16-4."""
    torch.manual_seed(0)
    check(Engine(models.wrn_16_4(), F.cross_entropy), torch.randn(examples, 1, 3, 32, 32), torch.zeros(examples).long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_through_standardisation_are_not_taken_in_16_bits(dtype):
    """Of a bf16 gradient as it is: against the chain rule in float64."""
    torch.manual_seed(0)
    layer = StandardizedConv2d(16, 8, 3)
    gradient = (torch.randn(5, 8, 16, 3, 3) + layer.weight.detach()).to(dtype)
    found = {"weight": gradient, "bias": torch.zeros(5, 8)}
    norms = standardized_norms(layer, found).sqrt()
    layer.double()
    for g, norm in zip(gradient.double(), norms, strict=True):
        expected = torch.autograd.grad(layer.standardized_weight(), [layer.weight, layer.gain], g)
        exact = torch.cat([e.flatten() for e in expected]).norm()
        assert abs(norm / exact - 1) < 1e-5


def test_a_parameter_unfrozen_later_is_refused():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    engine = Engine(model, F.cross_entropy)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.bias.*make a new PrivateGradient"):
        engine.take(torch.randn(3, 1, 4), torch.arange(3))
