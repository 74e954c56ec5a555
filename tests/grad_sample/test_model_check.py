"""What is refused before any data are seen, frozen BatchNorm, modes that come back one by one, and precision."""

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, make_plan
from torch import nn

from dpopt.data.datasets import digits
from dpopt.data.sources import TensorSource
from dpopt.grad_sample import modes
from dpopt.grad_sample.model_check import check_model
from dpopt.grad_sample.modes import eval_mode
from dpopt.privacy.clipping import Flat
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.tasks.classification import Classification
from dpopt.training.trainer import evaluate


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.cfloat))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) @ self.weight, n=8)


@pytest.mark.parametrize("private", [True, False])
def test_complex_parameters_are_refused(private):
    model = nn.Sequential(nn.Linear(8, 8), Spectrum(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"'1\.weight' is complex.*view_as_complex"):
        check_model(model, private)


def with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("trained", [True, False])
def test_batch_norm_in_eval_mode_is_exact(trained, engine):
    """Its running statistics are constants; its weight and bias may be trained."""
    model, plan = with_batch_norm(), make_plan(sigma=0.0, size=6, batch=6)
    model[1].eval().requires_grad_(trained)
    inputs, targets = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1e9), engine=engine)
    private.backward(batch_of(plan, inputs, targets))
    found = [p.grad for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(
        F.cross_entropy(model(inputs), targets), [p for p in model.parameters() if p.requires_grad]
    )
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_batch_norm_in_train_mode_is_refused_frozen_or_not():
    model, plan = with_batch_norm(), make_plan()
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\).*eval\(\)"):
        PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    without = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\)"):
        PrivateGradient(without, F.cross_entropy, plan, Flat(1.0))


def test_a_model_put_into_train_mode_later_is_refused():
    model, plan = with_batch_norm().eval(), make_plan(sigma=0.0)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    inputs, targets = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    private.backward(batch_of(plan, inputs, targets))
    model.train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\)"):
        private.backward(batch_of(plan, inputs, targets, 1))


def test_modes_come_back_one_by_one():
    model = with_batch_norm().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert modes == [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), eval_mode(model):
        raise RuntimeError
    task = Classification(digits())
    task.check(model)
    evaluate(model, task, TensorSource(torch.randn(4, 1, 8, 8).double(), torch.arange(4)))
    assert modes == [m.training for m in model.modules()] and model.training and not model[1].training


@pytest.mark.parametrize("slow, precision, times", [(True, "bf16", 1), (True, "fp32", 0), (False, "bf16", 0)])
def test_bf16_without_instructions_is_told_once(monkeypatch, slow, precision, times):
    monkeypatch.setattr(modes, "emulates_bf16", lambda: slow)
    modes._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            with modes.autocast(nn.Linear(2, 2), precision):
                pass
    assert [str(w.message).startswith("bf16 is slower") for w in found] == [True] * times


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's limit is one of x86")
def test_a_processor_kept_from_bf16_emulates_it():
    code = "from dpopt.grad_sample.modes import emulates_bf16; print(emulates_bf16())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True"
