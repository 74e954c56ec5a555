"""The per-layer engine: whole models against the loop, against vmap in training, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from helpers import RULED, assert_exact, images, loop_oracle, make_plan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpopt
from dpopt import models
from dpopt.grad_sample import conv
from dpopt.grad_sample.engine import POLICIES, GradSampler
from dpopt.grad_sample.norms import exact
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.models.layers import StandardizedConv2d
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch

pytestmark = pytest.mark.slow


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
    assert plans["auto"][1] == ["0.self_attn"]


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


@pytest.mark.parametrize("kind", [Functional, Across])
def test_layouts_that_no_rule_reads_are_exact_all_the_same(kind):
    inputs = torch.randn(6, 1, *((6, 4) if kind is Across else (4,)))
    plans = assert_exact(kind(), inputs, torch.arange(6) % 3, policies=[*RULED, "vmap", "loop"])
    assert plans["auto"][1] == (["the whole model"] if kind is Functional else [])


def test_a_model_that_mixes_examples_is_refused():
    model = Mixing().double()
    inputs = torch.randn(6, 1, 4, dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="or it mixes them"):
        validate_against_autograd(GradSampler(model, F.cross_entropy), inputs, torch.zeros(6, dtype=torch.long))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_input_changed_in_place():
    class Changed(nn.Module):
        """The first layer's input is gone when its gradient is taken; the second is none of autograd's business."""

        def __init__(self, early):
            super().__init__()
            self.layer, self.early = nn.Linear(4, 4), early

        def forward(self, x):
            x = torch.tanh(x) if self.early else x.clone()
            y = self.layer(x)
            return y + x.mul_(2)

    with pytest.raises(ValueError, match=r"fails on a single example.*modified by an inplace operation"):
        GradSampler(Changed(True), F.cross_entropy)(torch.randn(2, 1, 4), torch.tensor([0, 1]))
    inplace = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    assert_exact(inplace, torch.randn(3, 2, 4), torch.arange(3))


@pytest.mark.parametrize("name", ["wrn_16_4", "resnet18", "cnn", "deit_tiny", "nf_resnet50", "squeezenet"])
def test_models(name):
    options = dict(pretrained=False, image_size=32, zero_head=False) if name.startswith("deit") else {}
    options |= {"small_images": True} if name == "resnet18" else {}
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=3, in_channels=3, **options)
    policies = ["auto"] if name == "nf_resnet50" else ["auto", "recompute", "vmap"]
    plans = assert_exact(model, *images(3, 32, 32, examples=2, views=2), policies=policies, tolerance=1e-8)
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


def test_operations_of_a_private_step(monkeypatch):
    """WRN-16-4 under the store policy: at most 1.10 times those of an ordinary step, weight-standardized or not."""
    # Of a grouped convolution torch counts the operations of a full one.
    monkeypatch.setattr(conv, "fastest", lambda what, device, ways, then: ways["one by one"]())
    model = models.wrn_16_4()
    inputs, targets = torch.randn(4, 1, 3, 32, 32), torch.arange(4)
    with FlopCounterMode(display=False) as plain:
        F.cross_entropy(model(inputs[:, 0]), targets).backward()
    engine = GradSampler(model, F.cross_entropy, "store")
    engine(inputs, targets)  # the first batch is checked
    with FlopCounterMode(display=False) as private:
        per_sample = engine(inputs, targets)
        per_sample.add_weighted_sum({n: torch.zeros_like(p) for n, p in model.named_parameters()}, 1 / per_sample.norms)
    assert 0.9 < private.get_total_flops() / plain.get_total_flops() <= 1.10


def test_policies_follow_shapes_and_memory():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(12544, 10)
    )
    inputs, targets = torch.randn(8, 1, 3, 16, 16), torch.arange(8)
    for memory, plan in (
        (None, {"0": "store", "2": "store", "4": "ghost"}),
        (8 * 4 * 30_000, {"0": "store", "2": "recompute", "4": "ghost"}),
        (0, {"0": "store", "2": "recompute", "4": "ghost"}),  # what recomputing keeps would be more
    ):
        engine = GradSampler(model, F.cross_entropy, memory=memory)
        engine(inputs, targets)
        assert engine.policies == plan
    for policy in POLICIES:
        GradSampler(model, F.cross_entropy, policy)
    with pytest.raises(ValueError, match="engine=fast must be one of auto"):
        GradSampler(model, F.cross_entropy, "fast")


class Shifted(nn.Module):
    """With a buffer, which few values make a candidate for a constant of the graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return x + self.shift


@pytest.mark.parametrize("policy, precision", [("auto", "fp32"), ("recompute", "fp32"), ("auto", "bf16")])
def test_compiled_is_the_same(policy, precision):
    """Also after all parameters and buffers have moved: none of them is part of the graph."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "fp32" else torch.float32
    layers = StandardizedConv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(144, 3), Shifted()).to(dtype)
    model[6].bias.requires_grad = False
    inputs, targets = torch.randn(4, 2, 3, 8, 8, dtype=dtype), torch.arange(4) % 3
    engines = [GradSampler(model, F.cross_entropy, policy, None, precision, compiled) for compiled in (False, True)]
    before = []
    for _ in range(2):
        found = []
        for engine in engines:
            sums = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
            per_sample = engine(inputs, targets)
            per_sample.add_weighted_sum(sums, 1 / per_sample.norms)
            found.append(torch.cat([per_sample.norms, *(total.flatten() for total in sums.values())]))
        tolerance = 1e-9 if precision == "fp32" else 0.03
        assert (found[0] - found[1]).norm() <= tolerance * found[0].norm()
        assert all((found[0] - one).norm() > 0.1 * one.norm() for one in before)
        before = found
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.rand_like(tensor))
    assert len(engines[1]._graphs) == 1 and not engines[1].fallbacks


@pytest.mark.parametrize("policy", ["store", "recompute", "ghost", "vmap"])
def test_compiled_norms_are_of_what_is_summed(policy):
    """In bfloat16 a graph that took the norms, too, took them before rounding: up to .1% less than the length."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(256, 3))
    inputs, targets = torch.randn(4, 2, 3, 8, 8), torch.arange(4) % 3
    engine = GradSampler(model, F.cross_entropy, policy, None, "bf16", True)
    for one in torch.eye(4):
        per_sample = engine(inputs, targets)
        sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        per_sample.add_weighted_sum(sums, one / per_sample.norms)
        length = torch.cat([total.double().flatten() for total in sums.values()]).norm()
        assert float(length) <= 1 + 1e-5
        assert float(length) >= 1 - (1e-3 if policy == "ghost" else 1e-5)  # its norms count what rounding may add
    assert len(engine._graphs) == 1


def test_what_cannot_be_compiled_is_said(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    engine = GradSampler(model, F.cross_entropy, compiled=True)
    monkeypatch.setattr(torch._inductor, "compile", fail)
    with pytest.raises(ValueError, match=r"of Sequential cannot be compiled.*no compiler.*train with compile=false"):
        engine(torch.randn(2, 1, 4), torch.arange(2))
    assert engine.policy == "auto"


def test_cudnn_stays_on(monkeypatch):
    """Full precision is asked of it, for as long as it takes."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    with exact(torch.device("cuda")):
        assert cudnn.enabled and not cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert cudnn.enabled and cudnn.allow_tf32


def test_buffers_and_hooks_are_left_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen.add_(x.detach().mean(0))
            return x

    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 3))
    engine = GradSampler(model, F.cross_entropy, "store")
    engine(torch.randn(3, 1, 4), torch.arange(3))
    assert (model[1].seen == 0).all() and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("examples", [1, 5, 64])
def test_the_proof_forgives_rounding(examples):
    """In fp32 a ReLU that rounding turns on or off is worth .4 % of a gradient of WRN-16-4."""
    torch.manual_seed(0)
    validate_against_autograd(
        GradSampler(models.wrn_16_4(), F.cross_entropy),
        torch.randn(examples, 1, 3, 32, 32),
        torch.zeros(examples).long(),
    )


def test_a_parameter_unfrozen_later_is_refused():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    engine = GradSampler(model, F.cross_entropy)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.bias.*make a new PrivateGradient"):
        engine(torch.randn(3, 1, 4), torch.arange(3))
