"""No example adds more than the clip norm to the sum, however it rounds: each check fails on a mutant.

4. The clipped norm is that of what is summed, in the type of the sum, where an example's positions cancel, too.
"""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from dpopt.grad_sample import conv, norms, per_sample, rules, standardized_conv, text_rules
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


def longest(made, policy, dtype=torch.float32, sizes=(1e0, 1e3, 1e6, 1e9), which=(AT,)):
    """The most that an example, one of some, adds next to others, over the clip norm."""
    make, inputs = made
    found = []
    for size in sizes:
        torch.manual_seed(0)
        model = make()
        x = inputs(size, model)
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
        engine = GradSampler(model, lambda outputs, targets: outputs * targets, policy)
        per_sample = engine(x, torch.ones(len(x), dtype=dtype))
        weights = (1 / per_sample.norms).clamp(max=1.0)

        def total(weights, model=model, per_sample=per_sample):
            sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            per_sample.add_weighted_sum(sums, weights)
            return torch.cat([s.double().flatten() for s in sums.values()])

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


def check_what_a_standardized_filter_is_blind_to_rounds_nothing_away():
    for policy in POLICIES:
        for dtype in (torch.float32, torch.float64):
            assert longest(ALONG, policy, dtype) <= 1 + 1e-5, (policy, dtype)


def many_along_a_filter(size, model):
    """But one all are along it."""
    found = torch.cat([along_a_filter(size, model) for _ in range(512)])[AT::BATCH]
    found[100] = torch.randn(found.shape[1:])
    return found


def check_nobody_is_rounded_away_by_what_standardized_filters_are_blind_to():
    for policy in set(POLICIES) - {"ghost"}:
        made = ALONG[0], many_along_a_filter
        assert longest(made, policy, sizes=(1e2, 1e3, 1e5), which=(0, 99, 100, 511)) <= 1 + 1e-5, policy


def sums_in_float32(patch, real=per_sample._weighted):
    patch.setattr(per_sample, "_weighted", lambda gradient, weights, select, wide: real(gradient, weights, select, False))


def norms_without_rounding(patch):
    for module in (conv, norms, rules, standardized_conv, text_rules):
        patch.setattr(module, "never_short", lambda square, lengths, positions, features, dtype: square)


def norms_of_exact_squares(patch):
    def lengthened(square, lengths, positions, features, dtype):
        norm = square.clamp(min=0).sqrt()
        return (norm + norms.TERMS * torch.finfo(dtype).eps / 2 * (lengths - norm).clamp(min=0)).square()

    for module in (conv, norms, rules, standardized_conv, text_rules):
        patch.setattr(module, "never_short", lengthened)


def norms_without_what_filters_are_blind_to(patch):
    def exact(module, found):
        return standardized_conv.norms_through(module, found)[0]

    for kind, rule in rules.RULES.items():
        if rule.square_norms is not None:
            patch.setitem(rules.RULES, kind, dataclasses.replace(rule, square_norms=exact))


def filters_without_their_sum(patch):
    def left(through, square, total, along):
        h = through.direction
        return square - total.square() / h.shape[1] - through.project * (2 - h.square().sum(1)) * along.square()

    patch.setattr(standardized_conv, "_left_of", left)


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
    check_the_products_of_positions_that_cancel_are_not_exact: [norms_of_exact_squares],
    check_what_a_standardized_filter_is_blind_to_rounds_nothing_away: [
        filters_without_their_sum,
        norms_without_what_filters_are_blind_to,
    ],
    check_nobody_is_rounded_away_by_what_standardized_filters_are_blind_to: [sums_in_float32],
}
