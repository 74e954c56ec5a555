"""Losses: class weights become weights of examples, exactly; what is no mean over examples is refused."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from torch import nn

from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.zeroth_order import ZerothOrder

WEIGHT = torch.tensor([100.0, 1.0, 0.01])
LABELS = torch.arange(12) % 3
WIDE = Flat(1e9)  # reached by no gradient


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


def mean_gradient(model, loss_fn, x, targets, clip=WIDE, kind=PrivateGradient, **options):
    plan = PrivacyPlan(0.0, len(x), len(x), 1, 1e-5, key=make_plan().key)
    kind(model, loss_fn, plan, clip, **options).backward(batch_of(plan, x, targets))
    return [p.grad.clone() for p in model.parameters()]


def weighted_mean(model, x, targets, **options):
    """The gradient of the mean over examples of w[y]·ℓ."""
    losses = F.cross_entropy(model(x), targets, weight=WEIGHT.to(x), reduction="none", **options)
    return torch.autograd.grad(losses.mean(), list(model.parameters()))


@pytest.mark.parametrize("engine", ["auto", "store", "recompute", "ghost", "vmap"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_weights_of_examples(engine, smoothing):
    x = inputs()
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=smoothing)
    found = mean_gradient(network(), loss_fn, x, LABELS, engine=engine)
    for g, e in zip(found, weighted_mean(network(), x, LABELS, label_smoothing=smoothing), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: nn.NLLLoss(WEIGHT), lambda: functools.partial(F.nll_loss, weight=WEIGHT)])
def test_negative_log_likelihoods_too(make):
    model = nn.Sequential(*network(), nn.LogSoftmax(1))
    found = mean_gradient(model, make(), inputs(), LABELS)
    for g, e in zip(found, weighted_mean(network(), inputs(), LABELS), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def by_hand(outputs, targets):
    return (F.cross_entropy(outputs, targets, reduction="none") * WEIGHT.to(outputs)[targets]).mean()


def test_the_control_and_zeroth_order_have_the_same_weights():
    found = mean_gradient(network(), nn.CrossEntropyLoss(WEIGHT), inputs(), LABELS, clip=None)
    for g, e in zip(found, weighted_mean(network(), inputs(), LABELS), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)
    one, two = (  # the same weights
        mean_gradient(network(), loss_fn, inputs(), LABELS, kind=ZerothOrder)
        for loss_fn in (nn.CrossEntropyLoss(WEIGHT), by_hand)
    )
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(one, two, strict=True))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens)).transpose(1, 2)  # (N, classes, positions)


@pytest.mark.parametrize("engine", ["auto", "vmap", "control"])
def test_ignored_targets_do_not_count(engine):
    """Σ w[y]·ℓ over an example's targets, divided by those that are not ignored."""
    torch.manual_seed(0)
    model, tokens = Words().double(), torch.randint(0, 9, (6, 4))
    targets = torch.randint(0, 3, (6, 4))
    targets[0, 1:], targets[3, 2:] = -100, -100
    options = {"clip": None} if engine == "control" else {"engine": engine}
    found = mean_gradient(model, nn.CrossEntropyLoss(WEIGHT), tokens, targets, **options)
    losses = F.cross_entropy(model(tokens), targets, weight=WEIGHT.double(), reduction="none").sum(1)
    mean = (losses / (targets != -100).sum(1)).mean()
    for g, e in zip(found, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


ACCEPTED = {
    "cross entropy": (F.cross_entropy, LABELS),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "squares": (nn.MSELoss(), torch.randn(12, 3)),
    "binary with pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), torch.rand(12, 3).round()),
    "focal": (lambda o, t: ((1 - torch.exp(-(loss := F.cross_entropy(o, t, reduction="none")))) * loss).mean(), LABELS),
    "hinge": (lambda o, t: (1 - o[:, 0] * (2 * t - 1)).clamp(min=0).mean(), (LABELS > 0).float()),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHT), torch.rand(12, 3).softmax(1)),
    "some ignored": (nn.CrossEntropyLoss(), torch.where(torch.arange(12) % 5 == 0, -100, LABELS)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACCEPTED)
def test_means_over_examples_pass(name, dtype):
    loss_fn, targets = ACCEPTED[name]
    mean_gradient(network(dtype), loss_fn, inputs(dtype), targets.to(dtype) if targets.is_floating_point() else targets)


@pytest.mark.parametrize("pad", [-100, 0])
def test_token_losses_with_padding_pass(pad):
    tokens, targets = torch.randint(0, 9, (6, 4)), torch.randint(1, 3, (6, 4))
    for i in range(6):
        targets[i, 1 + i % 3 :] = pad
    loss_fn = functools.partial(F.cross_entropy, ignore_index=pad)
    mean_gradient(Words(), loss_fn, tokens, targets)
    with pytest.raises(ValueError, match="not the mean of their losses"):
        mean_gradient(Words(), lambda o, t: loss_fn(o, t, reduction="sum"), tokens, targets)


def contrastive(outputs, targets):
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


class Moving(nn.Module):
    """Keeps a center of the outputs, as DINO's loss does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(3))

    def forward(self, outputs, targets):
        loss = F.cross_entropy(outputs, targets)
        self.center = 0.9 * self.center + 0.1 * outputs.detach().mean(0).to(self.center)
        return loss


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.temperature, targets)


MEAN, TWICE = "not the mean of their losses", "differs between two calls"
REFUSED = {
    "weights in a function": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHT.to(o)), MEAN),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum'"),
    "sum in a function": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), MEAN),
    "sum over a fixed size": (lambda o, t: F.cross_entropy(o, t, reduction="sum") / 256, MEAN),
    "no reduction": (lambda o, t: F.cross_entropy(o, t, reduction="none"), "a scalar is needed"),
    "contrastive": (contrastive, MEAN),
    "spread over the batch": (lambda o, t: ((o - o.mean(0)) ** 2).mean(), MEAN),
    "hard examples": (
        lambda o, t: F.cross_entropy(o, t, reduction="none").topk(max(1, len(o) // 2)).values.mean(),
        MEAN,
    ),
    "root of a mean": (lambda o, t: F.cross_entropy(o, t).sqrt(), MEAN),
    "entropy of the mean": (lambda o, t: (p := o.softmax(1).mean(0)) @ p.log(), MEAN),
    "deviation": (lambda o, t: o.std(0).sum(), "not finite"),
    "center": (Moving(), f"keeps what it sees of the data in center|{TWICE}"),
    "random": (lambda o, t: F.cross_entropy(o, t) * random.random(), TWICE),
    "trainable": (Tempered(), "reads trainable tensors"),
    "branch": (lambda o, t: o.mean() if o.sum().item() > 9 else F.cross_entropy(o, t), "cannot be taken for many"),
    "misfit": (lambda o, t: F.cross_entropy(o[:, :, None], t), "raised RuntimeError on outputs of shape"),
    "class that does not exist": (
        lambda o, t: F.cross_entropy(o, t + 5),
        "take both; class numbers run from 0 to below",
    ),
}


@pytest.mark.parametrize("engine", ["auto", "vmap", "zeroth order"])
@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("name", REFUSED)
def test_other_losses_are_refused(name, engine):
    loss_fn, words = REFUSED[name]
    kind, policy = (ZerothOrder, "auto") if engine == "zeroth order" else (PrivateGradient, engine)
    with pytest.raises(ValueError, match=words) as error:
        mean_gradient(network(), loss_fn, inputs(), LABELS, kind=kind, engine=policy)
    assert "\n" not in str(error.value)


def test_class_weights_show_on_one_class_alone():
    with pytest.raises(ValueError, match=MEAN):
        mean_gradient(network(), REFUSED["weights in a function"][0], inputs(), torch.zeros(12, dtype=torch.long))


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_penalties_on_parameters_are_refused(engine):
    model = network()

    def penalized(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.01 * model[0].weight.square().sum()

    with pytest.raises(ValueError, match=r"reads the parameter 0\.weight .* weight_decay"):
        mean_gradient(model, penalized, inputs(), LABELS, engine=engine)
    assert torch.isfinite(mean_gradient(model, penalized, inputs(), LABELS, clip=None)[0]).all()  # the control takes it
