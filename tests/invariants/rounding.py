"""No example adds more than the clip norm to the sum, however it rounds: each check fails on a mutant.

4. The clipped norm is that of what is summed, in the type of the sum, where an example's positions cancel, too.
"""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from dpopt.grad_sample import conv, cpu_kernels, norms, per_sample, rules, standardized_conv, text_rules
from dpopt.grad_sample.engine import POLICIES, GradSampler
from dpopt.grad_sample.per_sample import PerSampleGradients
from dpopt.models.layers import StandardizedConv2d

BATCH, AT = 32, 16


class Signs(nn.Module):
    """An embedding whose positions count with alternating signs and a factor that grows with the last token."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(64, 128)

    def forward(self, x):
        signs = torch.tensor([1.0, -1.0]) * 10.0 ** x[:, 2:]
        return (self.rows(x[:, :2]) * signs[..., None]).sum((1, 2))


class Mean(nn.Module):
    """A layer, and the sum of its outputs, averaged over positions."""

    def __init__(self, layer, positions):
        super().__init__()
        self.layer, self.positions = layer, positions

    def forward(self, x):
        return self.layer(x).mean(self.positions).sum(1)


def cancelling(shape, dim):
    """Inputs of ordinary size, but for one whose two halves cancel, all but `left` of them."""

    def inputs(size, model, left=0.0):
        found = torch.randn(BATCH, 1, *shape, dtype=torch.float64)
        half = size * found[AT, 0].chunk(2, dim)[0]
        found[AT, 0] = torch.cat([half, -half * (1 + left)], dim)
        return found

    return inputs


class Filter(nn.Module):
    """What one filter of a layer finds at one place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[:, 0, 1, 1]


def along_a_filter(size, model):
    """Inputs of ordinary size, but for one that a standardized filter takes for itself and a constant, nearly."""
    weight = model.layer.weight.detach()[0]
    h = (weight - weight.mean()).double()
    h /= h.norm()
    constant, rest = h.sum().sign() * h.numel() ** -0.5, torch.randn(h.shape).double()
    rest -= rest.mean()
    rest -= h * (h * rest).sum()
    found = torch.randn(BATCH, 1, *h.shape)
    left = 0.95 * (2 * (constant * h.sum()).abs()).sqrt()
    found[AT, 0] = (size * (h + constant + left * rest / rest.norm())).to(found)
    return found


def tokens(size, model):
    found = torch.randint(0, 64, (BATCH, 1, 3))
    found[..., 2] = 0
    found[AT, 0] = torch.tensor([5, 5, round(math.log10(size))])
    return found


MODELS = {
    "linear": (lambda: Mean(nn.Linear(256, 128, bias=False), 1), cancelling((8, 256), 0)),
    "convolution": (lambda: Mean(nn.Conv2d(64, 128, 1, bias=False), (2, 3)), cancelling((64, 6, 6), 2)),
    "wide kernel": (
        lambda: Mean(nn.Conv2d(16, 128, 3, 1, 1, padding_mode="circular", bias=False), (2, 3)),
        cancelling((16, 8, 8), 2),
    ),
    "standardized": (lambda: Mean(StandardizedConv2d(64, 128, 1, affine=False), (2, 3)), cancelling((64, 6, 6), 2)),
    "embedding": (Signs, tokens),
}
ALONG = lambda: Filter(StandardizedConv2d(16, 8, 3, affine=False)), along_a_filter


def blind_to_a_constant():
    model = Filter(StandardizedConv2d(1, 2, 2, affine=False))
    with torch.no_grad():
        model.layer.weight[0] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    return model


def constant(size, model):
    found = torch.randn(BATCH, 1, *model.layer.weight[0].shape)
    found[AT] = size
    return found


def longest(made, policy, dtype=torch.float32, sizes=(1e0, 1e3, 1e6, 1e9), which=(AT,), scaled=False):
    """The most that an example, one of some, adds next to others, over the clip norm, scaled before the clip or not."""
    make, inputs = made
    found = []
    for size in sizes:
        torch.manual_seed(0)
        model = make()
        x = inputs(size, model)
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
        engine = GradSampler(model, lambda outputs, targets: outputs * targets, policy)
        scales = {n: 10 ** torch.rand_like(p) if scaled else torch.ones_like(p) for n, p in model.named_parameters()}
        per_sample = engine(x, torch.ones(len(x), dtype=dtype), scales if scaled else None)
        weights = (1 / per_sample.norms).clamp(max=1.0)

        def total(weights, scales=scales, per_sample=per_sample):
            sums = {name: torch.zeros_like(scale) for name, scale in scales.items()}
            per_sample.add_weighted_sum(sums, weights)
            return torch.cat([(sums[name] * scale).double().flatten() for name, scale in scales.items()])

        for i in which:
            without = weights.clone()
            without[i] = 0.0
            found.append(float((total(weights) - total(without)).norm()))
    return max(found)


def check_positions_that_cancel_add_no_more_than_the_clip_norm():
    for name in MODELS:
        for policy in POLICIES:
            assert longest(MODELS[name], policy) <= 1 + 1e-5, (name, policy)


def check_the_products_of_positions_that_cancel_are_not_exact():
    """In float64, too: inner products of size² lose a norm of 1e-9·size."""
    for name in MODELS.keys() - {"embedding"}:
        make, inputs = MODELS[name]
        for policy in POLICIES:
            for left in (1e-9, 3e-9, 1e-8):
                nearly = make, functools.partial(inputs, left=left)
                assert longest(nearly, policy, torch.float64) <= 1 + 1e-5, (name, policy, left)


def creeping(size, model):
    """One example alone: a large position, many small ones that all round up next to it, and one that takes it back."""
    step = 0.55 * 2.0 ** (math.floor(math.log2(size)) - 23)
    found = torch.full((1, 1, 4096, 1), step)
    found[..., 0, 0], found[..., -1, 0] = size, 1 - size - 4094 * step
    return found


def check_positions_that_round_one_way_add_no_more_than_the_clip_norm():
    for policy in POLICIES:
        made = (lambda: Mean(nn.Linear(1, 1, bias=False), 1)), lambda size, model: 4096 * creeping(size, model)
        assert longest(made, policy, sizes=(5.0, 31.0, 62.0), which=(0,)) <= 1 + 1e-5, policy


def at_a_power_of_two(size, model):
    """Unit gradients that add up to 255.5, number 256, and 255 small ones, which round up above 256 and down below."""
    found = torch.full((512, 1, 1), size * 2.0**-15)
    found[1:257], found[0] = 1.0, 0.5
    return found


def check_how_others_are_rounded_does_not_change():
    """Beyond how their whole sum is, which is one of float32."""
    for policy in POLICIES:
        made = (lambda: nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(0))), at_a_power_of_two
        assert longest(made, policy, sizes=(0.55, 0.7, 0.9), which=(256,)) <= 1 + 1e-4, policy


def check_what_a_standardized_filter_is_blind_to_rounds_nothing_away():
    sizes = 1e0, 1e3, 1e6, 1e9, 2.0**50
    for made in (ALONG, (blind_to_a_constant, constant)):
        for policy in POLICIES:
            for dtype in (torch.float32, torch.float64):
                for scaled in (False, True):
                    most = longest(made, policy, dtype, sizes, (0, AT), scaled)
                    assert most <= 1 + 1e-5, (policy, dtype, scaled, most)


def many(inputs, count):
    """Examples that are not ordinary; 90 to 100 are."""

    def found(size, model):
        batch = torch.cat([inputs(size, model)[AT:][:1] for _ in range(count)])
        batch[90:101] = inputs(1.0, model)[:11]
        return batch

    return found


def check_nobody_is_rounded_away_by_many_others():
    for name, (make, inputs) in {"along a filter": ALONG, **MODELS}.items():
        for policy in POLICIES:
            made = make, many(inputs, 512 if inputs is along_a_filter else 128)
            most = longest(made, policy, sizes=(1e2, 1e4, 1e9), which=range(88, 101))
            assert most <= 1 + (1e-4 if policy == "ghost" else 1e-5), (name, policy, most)  # ghost sums 64 in float32


def sums_in_float32(patch):
    def add_up(gradient, weights, select):
        total = torch.zeros_like(gradient[0])
        for weight, one in zip(weights, gradient, strict=True):
            total += weight * one
        return total

    patch.setattr(per_sample, "_weighted", add_up)


def norms_that_count_no_rounding(patch):
    for module in (conv, norms, rules, standardized_conv, text_rules):
        patch.setattr(module, "never_short", lambda square, lengths, *_: torch.maximum(square, (lengths / 64).square()))


def norms_without_rounding(patch):
    for module in (conv, norms, rules, standardized_conv, text_rules):
        patch.setattr(module, "never_short", lambda square, lengths, positions, dtype: square)


def norms_without_what_filters_are_blind_to(patch):
    def exact(module, found, scale):
        through = standardized_conv.norms_through, standardized_conv._scaled_norms_through
        return through[0](module, found)[0] if scale is None else through[1](module, found, scale)[0]

    for kind, rule in rules.RULES.items():
        if rule.square_norms is not None:
            patch.setitem(rules.RULES, kind, dataclasses.replace(rule, square_norms=exact))


def recomputed_norms_without_what_filters_are_blind_to(patch, real=cpu_kernels.conv_square_norms):
    def squares(*arguments, **options):
        return real(*arguments, **options)[0], torch.zeros(())

    patch.setattr(cpu_kernels, "conv_square_norms", squares)


def recomputed_in_another_way(patch, real=PerSampleGradients.add_weighted_sum):
    def add(self, sums, weights):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(PerSampleGradients, "in_closed_form", lambda self, call: True)
            real(self, sums, weights)

    patch.setattr(PerSampleGradients, "add_weighted_sum", add)


MUTANTS = {
    check_positions_that_cancel_add_no_more_than_the_clip_norm: [
        norms_without_rounding,
        recomputed_in_another_way,
    ],
    check_the_products_of_positions_that_cancel_are_not_exact: [norms_without_rounding],
    check_what_a_standardized_filter_is_blind_to_rounds_nothing_away: [
        norms_without_what_filters_are_blind_to,
        recomputed_norms_without_what_filters_are_blind_to,
    ],
    check_positions_that_round_one_way_add_no_more_than_the_clip_norm: [norms_that_count_no_rounding],
    check_how_others_are_rounded_does_not_change: [sums_in_float32],
    check_nobody_is_rounded_away_by_many_others: [sums_in_float32, norms_without_rounding],
}
