"""Nothing enters an unvalidated model: each check fails on a mutant of the validation.

9. No layer, loss or buffer may mix examples or carry raw statistics of one step into the next.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from mixing import MIXING, Layer, data, network, step
from torch import nn

from dpopt.grad_sample import forward_check, gradient_check, losses, modes, rules, snapshot, trial, validate, validated
from dpopt.grad_sample.engine import GradSampler
from dpopt.privacy import private_gradient
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient

pytestmark = pytest.mark.slow


def refused(model, *arguments, words="mixes the examples|other outputs", **options):
    with pytest.raises(ValueError, match=words):
        step(model, *(arguments or data()), **options)


def check_forwards_that_mix_are_refused():
    for name in (
        "batch mean from 16 examples on",
        "largest value, out of range only",
        "experts with a capacity",
        "guard against NaN",
        "hundredth of the batch mean",
        "place in the batch",
    ):
        torch.manual_seed(0)
        refused(network(MIXING[name]()))


def two_examples_only(patch):
    real = private_gradient.validate

    def two(engine, inputs, targets, present, gradients):
        real(engine, inputs[:2], targets[:2], present[:2], gradients)

    patch.setattr(private_gradient, "validate", two)


def noise_of_usual_size_only(patch):
    real = forward_check.replacements
    for module in (forward_check, validate, gradient_check):
        patch.setattr(module, "replacements", lambda inputs: list(real(inputs))[:2])


def places_unseen(patch):
    patch.setattr(validate, "check_places", lambda *arguments: None)


def check_what_is_not_finite_fails():
    refused(network(Layer(lambda x: x + x.new_tensor(float("nan")))), words="not finite")
    refused(
        network(Layer(lambda x: torch.log1p(x) - torch.log1p(x).mean(0))), torch.poisson(4 + data()[0] * 0), data()[1]
    )


def nan_counts_as_passed(patch):
    patch.setattr(trial, "finite_rows", lambda outputs, count: torch.ones(count, dtype=torch.bool))
    patch.setattr(forward_check, "relative", lambda one, other: 0.0)


def check_vmap_is_validated():
    for name in ("hundredth of the batch mean", "attention over the batch"):
        refused(network(MIXING[name]()), engine="vmap")


def vmap_taken_on_trust(patch):
    real = private_gradient.covered
    patch.setattr(private_gradient, "covered", lambda engine, *a: engine.policy == "vmap" or real(engine, *a))


class Mode(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


def check_changes_are_seen():
    for change in (
        lambda model: model[0].train(),
        lambda model: model[3].register_forward_hook(lambda module, inputs, output: output - output.mean(0)),
    ):
        model, plan, (inputs, targets) = network(Mode().eval()), make_plan(sigma=0.0), data()
        private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
        private.backward(batch_of(plan, inputs, targets))
        change(model)
        with pytest.raises(ValueError, match="mixes the examples"):
            private.backward(batch_of(plan, inputs, targets, 1))


def validated_once(patch):
    real = private_gradient.covered
    patch.setattr(private_gradient, "covered", lambda engine, *a: engine.validated or real(engine, *a))


def modes_unseen(patch):
    patch.setattr(validated, "_parts", lambda model, written: tuple(model.modules()))


def check_pads_prove_nothing():
    private = PrivateGradient(network(nn.Identity()), F.cross_entropy, make_plan(sigma=0.0), Flat(1.0))
    inputs, targets = data()
    private._validate(0 * inputs[:, None], targets, torch.zeros(32, dtype=torch.bool))
    assert not private_gradient.covered(private.engine, inputs[:, None])


def pads_taken_for_examples(patch):
    real = private_gradient.validate
    patch.setattr(private_gradient, "validate", lambda e, x, y, present, gradients: real(e, x, y, None, gradients))


class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0).to(self.mean)
        return x


def check_forwards_that_write_are_refused():
    refused(network(Average()), words=r"buffer 0\.mean")


def writes_unseen(patch):
    patch.setattr(validate, "check_state", lambda *arguments: set())


class WarmUp(nn.Module):
    """Mixes examples from its thousandth call on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x - x.mean(0) if self.calls > 1000 else x


def check_what_may_begin_later_is_refused():
    refused(network(WarmUp()), words="changes 0.calls with every call")


def calls_unseen(patch):
    patch.setattr(validate, "check_settled", lambda *arguments: None)


def check_losses_are_means_over_examples():
    inputs, targets = data()
    refused(nn.Linear(8, 3), inputs, targets, lambda o, t: F.cross_entropy(o, t, reduction="sum"), words="not the mean")
    found = []
    for weight in (None, torch.tensor([9.0, 1.0, 0.1])):
        model = network(nn.Identity())
        step(model, inputs, targets, nn.CrossEntropyLoss(weight=weight))
        found.append(model[1].weight.grad)
    assert not torch.allclose(*found)


def losses_on_trust(patch):
    patch.setattr(validate, "check_loss", lambda *arguments: None)


def class_weights_that_cancel(patch):
    patch.setattr(
        losses.ExampleWeighted, "__call__", lambda loss, o, t: F.cross_entropy(o, t, weight=loss.weight.to(o))
    )


def check_small_errors_of_gradients_are_seen():
    """A rule that is wrong by a hundredth, in a model of float32."""
    real = rules.RULES[nn.LayerNorm]

    def wrong(module, a, g):
        return {name: 1.01 * gradient for name, gradient in real.gradients(module, a, g).items()}

    rules.RULES[nn.LayerNorm] = rules.Rule(wrong)
    try:
        refused(network(nn.LayerNorm(8)), words=r"0\.weight")
    finally:
        rules.RULES[nn.LayerNorm] = real


def three_percent_of_tolerance(patch):
    patch.setattr(gradient_check, "_tolerance", lambda engine: 0.03)


def check_validation_leaves_no_trace():
    model = network(Mode().eval())
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes_before = [m.training for m in model.modules()]
    inputs, targets = data()
    validate.validate(GradSampler(model, F.cross_entropy), inputs[:, None], targets)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with modes.eval_mode(model):
        pass
    assert modes_before == [m.training for m in model.modules()]


def nothing_restored(patch):
    patch.setattr(snapshot.Snapshot, "restore", lambda self: None)


def one_mode_for_all(patch):
    from contextlib import contextmanager

    @contextmanager
    def flipping(model):
        was = model.training
        model.eval()
        yield
        model.train(was)

    patch.setattr(modes, "eval_mode", flipping)


MUTANTS = {
    check_forwards_that_mix_are_refused: [two_examples_only, noise_of_usual_size_only, places_unseen],
    check_what_is_not_finite_fails: [nan_counts_as_passed],
    check_vmap_is_validated: [vmap_taken_on_trust],
    check_changes_are_seen: [validated_once, modes_unseen],
    check_pads_prove_nothing: [pads_taken_for_examples],
    check_forwards_that_write_are_refused: [writes_unseen],
    check_what_may_begin_later_is_refused: [calls_unseen],
    check_losses_are_means_over_examples: [losses_on_trust, class_weights_that_cancel],
    check_small_errors_of_gradients_are_seen: [three_percent_of_tolerance],
    check_validation_leaves_no_trace: [nothing_restored, one_mode_for_all],
}
