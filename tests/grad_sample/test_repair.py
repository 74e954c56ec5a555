"""dpopt.fix: what private training refuses is repaired in a copy, or named."""

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from torch import nn

import dpopt
from dpopt.grad_sample.model_check import check_model
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient

pytestmark = pytest.mark.slow


def step(model, inputs, classes=3):
    """Validate a model and take a private gradient of three examples."""
    plan = make_plan(sigma=1.0, size=6, batch=3)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    private.backward(batch_of(plan, inputs, torch.arange(len(inputs)) % classes))


def test_a_resnet_of_torchvision_is_validated_after_fix():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=3)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    inputs = torch.randn(3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"layer 'bn1' \(BatchNorm2d\) .* as dpopt\.fix\(model\) does"):
        step(model, inputs)
    fixed = dpopt.fix(model)
    step(fixed.model, inputs)
    assert fixed.remaining == [] and len(fixed.changes) == 20
    assert fixed.changes[0] == (
        "layer 'bn1': BatchNorm2d is GroupNorm(32, 64) now, with its affine values; its running statistics are dropped"
    )
    assert isinstance(model.bn1, nn.BatchNorm2d) and "GroupNorm(32, 64)" in str(fixed)
    assert torch.equal(fixed.model.layer1[0].bn1.weight, model.layer1[0].bn1.weight)
    assert fixed.model.layer1[0].bn1.weight is not model.layer1[0].bn1.weight
    assert sum(p.numel() for p in fixed.model.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 24), (7, 1), (2, 1), (1, 1), (34, 17), (512, 32), (6, 3)])
def test_a_group_of_maps_has_two_channels_at_least(channels, groups):
    fixed = dpopt.fix(nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels, affine=False)))
    assert fixed.model[1].num_groups == groups and "without affine values" in str(fixed)


def test_features_are_normalized_together():
    """Of two features a group would keep their order alone."""
    torch.manual_seed(0)
    fixed = dpopt.fix(nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64)))
    inputs = torch.randn(50, 4)
    assert fixed.model(inputs).std(0).min() > 0.1
    expected = F.layer_norm(fixed.model[0](inputs), (64,))
    torch.testing.assert_close(fixed.model(inputs), expected)


def test_random_layers_and_what_rescales_weights():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 3))
    model.recurrent, model.norm = (
        nn.LSTM(4, 4, 2, dropout=0.2),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    )
    fixed = dpopt.fix(model)
    check_model(fixed.model, private=True)
    assert [change.partition(":")[0] for change in fixed.changes] == [
        *("layer '0'", "layer '2'", "layer 'recurrent'", "layer 'norm'")
    ]
    assert "Dropout.p=0.3 is 0 now" in str(fixed) and "LSTM.dropout=0.2 is 0 now" in str(fixed)
    assert model[0].max_norm == 1.0 and model[2].p == 0.3 and model.recurrent.dropout == 0.2
    plain = nn.Sequential(fixed.model[0], fixed.model[1], fixed.model[2], fixed.model[3])
    step(plain, torch.arange(6).view(3, 2))


def test_wrappers_frozen_layers_and_a_layer_held_twice():
    frozen = nn.BatchNorm1d(4).eval()
    shared = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), frozen, shared, nn.Linear(4, 4), shared)
    fixed = dpopt.fix(nn.DataParallel(model))
    assert isinstance(fixed.model, nn.Sequential) and fixed.model[2] is fixed.model[4]
    assert isinstance(fixed.model[1], nn.BatchNorm1d) and not fixed.model[1].training
    assert len(fixed.changes) == 2 and "DataParallel" in fixed.changes[0]
    assert isinstance(dpopt.fix(nn.BatchNorm1d(4)).model, nn.GroupNorm)
    assert str(dpopt.fix(nn.Linear(2, 2))) == "nothing to fix"


def test_what_cannot_be_fixed_is_named():
    class Normed(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(1, 4, 3), Normed(4), nn.BatchNorm2d(4))
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.cfloat)))
    fixed = dpopt.fix(model)
    assert len(fixed.changes) == 1 and len(fixed.remaining) == 2
    assert "'phase' is complex" in fixed.remaining[0] and "layer '1' (Normed) mixes" in fixed.remaining[1]
    assert "not fixed: layer '1'" in str(fixed)
