"""A validation holds for modules, modes, settings, hooks and shapes as they were: changes are validated."""

import pytest
import torch.nn.functional as F
from helpers import batch_of, make_plan
from mixing import Layer, data, network
from torch import nn

from dpopt.grad_sample.validate import covered
from dpopt.grad_sample.validated import Validated
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient


class Switch(nn.Module):
    """Mixes in train mode, when told to, and from the fifth feature on."""

    def __init__(self):
        super().__init__()
        self.mix = False

    def forward(self, x):
        x = x.flatten(1)
        mixing = self.training or self.mix or x.shape[1] > 8
        return F.adaptive_avg_pool1d(x[:, None], 8)[:, 0] - (x.mean() if mixing else 0)


def mix_by_mode(model):
    model[0].train()


def mix_by_attribute(model):
    model[0].mix = True


def mix_by_hook(model):
    model[1].register_forward_hook(lambda module, inputs, output: output - output.mean(0))


def mix_by_new_module(model):
    model[2] = Layer(lambda x: x - x.mean(0))


def mix_by_new_forward(model):
    model[2].forward = lambda x: x - x.mean(0)


CHANGES = [mix_by_mode, mix_by_attribute, mix_by_hook, mix_by_new_module, mix_by_new_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_later_changes_are_validated(change):
    model, (inputs, targets) = network(Switch()), data()
    model[0].eval()
    plan = make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    private.backward(batch_of(plan, inputs, targets))
    change(model)
    with pytest.raises(ValueError, match="mixes the examples"):
        private.backward(batch_of(plan, inputs, targets, 1))


def test_longer_inputs_are_validated_and_shorter_ones_need_not():
    model, (inputs, targets), plan = network(Switch()), data(), make_plan(sigma=0.0)
    model[0].eval()
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    for number, batch in enumerate((inputs[:, :4], inputs, inputs[:, :6], inputs[:7])):
        private.backward(batch_of(plan, batch, targets[: len(batch)], number))
    assert covered(private.engine, inputs[:, None, :5]) and not covered(private.engine, inputs[:, None].repeat(1, 1, 2))
    with pytest.raises(ValueError, match="mixes the examples"):
        private.backward(batch_of(plan, inputs.repeat(1, 2), targets, 4))


def test_a_new_loss_or_hook_at_the_old_ones_address_is_new():
    """CPython gives a function the memory of one that went: an id proves nothing."""
    model, (inputs, _) = network(nn.Flatten()), data()
    validated = Validated()
    hook = model[1].register_forward_hook(lambda module, inputs, output: None)
    validated.add(model, lambda outputs, targets: outputs.mean(), inputs[:, None], True)
    for _ in range(100):  # each is dropped at once
        assert not validated.covers(model, lambda outputs, targets: outputs.sum(), inputs[:, None], True)
    validated.add(model, F.cross_entropy, inputs[:, None], True)
    assert validated.covers(model, F.cross_entropy, inputs[:, None], True)
    hook.remove()
    for _ in range(100):
        hook = model[1].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
        assert not validated.covers(model, F.cross_entropy, inputs[:, None], True)
        hook.remove()
