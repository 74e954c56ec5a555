"""What several tests share: small private problems, oracles of per-sample gradients, how a mutant is caught."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

import dpopt
from dpopt.config.overrides import from_hydra
from dpopt.config.schema import Config
from dpopt.grad_sample.engine import GradSampler
from dpopt.grad_sample.validate import validate_against_autograd
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.rng import RandomKey
from dpopt.runs.directory import RESULT
from dpopt.runs.identity import locate
from dpopt.tables import spec

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


@cache
def configure(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def make_plan(sigma: float = 1.0, size: int = 64, batch: int = 16, steps: int = 20, seed: int = 0, delta: float = 1e-3):
    """A plan with a reproducible key."""
    return dpopt.PrivacyPlan(sigma, size, batch, steps, delta, key=RandomKey.from_seed(seed, "test"))


def rekeyed(plan: dpopt.PrivacyPlan, seed: int) -> dpopt.PrivacyPlan:
    """The same plan under another key."""
    return replace(plan, key=RandomKey.from_seed(seed, "test"))


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A two-layer network of 5 inputs and 3 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def small_data(size: int = 64, views: int = 0, dtype: torch.dtype = torch.float64):
    """Inputs (size, 5) and targets (size,)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, *([views] if views else []), 5, generator=generator, dtype=dtype)
    return inputs, torch.randint(0, 3, (size,), generator=generator)


def loop_oracle(model: nn.Module, loss_fn, inputs: torch.Tensor, targets: torch.Tensor, clip) -> list[torch.Tensor]:
    """Σ_i w(g_i)·g_i example by example, with autograd alone; inputs (n, K, …)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for views, target in zip(inputs, targets, strict=True):
        loss = loss_fn(model(views), target.expand(len(views)))
        gradient = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum(g.square().sum() for g in gradient))
        if not norm.isfinite():
            continue
        weight = clip.weight(norm)
        for t, g in zip(total, gradient, strict=True):
            t += weight * g
    return total


def train(plan, model, data, optimizer, stop=None, clip=None, start=0, **batches):
    """The library's loop, `batches` in micro-batches of 16; returns the flattened parameters after every step."""
    private = dpopt.PrivateGradient(model, F.cross_entropy, plan, clip=clip or dpopt.clipping.Flat(1.0), start=start)
    trajectory = []
    for batch in dpopt.poisson_batches(data, plan, start=start, **{"micro_batch": 16, **batches}):
        if batch.step == stop:
            break
        private.backward(batch)
        optimizer.step()
        trajectory.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return trajectory


def take_steps(optimizer, parameters, seeds):
    """One step per seed on Gaussian gradients."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


class Flatland(nn.Module):
    """A model of many parameters whose loss is flat: `p.grad` is noise alone."""

    def __init__(self, size=20_000):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x[:, :1] + 0 * self.weight.sum()


def flat_loss(outputs, targets):
    return outputs.mean()


def released_noise(plan, clip=None, micro_batch=8, steps=3, size=20_000):
    """`p.grad`·qN over some steps of a flat loss, flattened."""
    model = Flatland(size)
    private = dpopt.PrivateGradient(model, flat_loss, plan, clip or dpopt.clipping.Flat(0.5))
    seen = []
    data = (torch.zeros(plan.dataset_size, 2), torch.zeros(plan.dataset_size))
    for batch in dpopt.poisson_batches(data, plan, micro_batch=micro_batch):
        private.backward(batch)
        seen.append(model.weight.grad.clone() * plan.batch_size)
        if len(seen) == steps:
            break
    return torch.cat(seen)


def assert_caught(check, mutant, monkeypatch):
    """Assert that `check` fails, or that the library itself refuses, once `mutant` has broken the library."""
    compute_epsilon.cache_clear()
    mutant(monkeypatch)
    try:
        check()
    except (AssertionError, ValueError, pytest.fail.Exception):
        return
    finally:
        monkeypatch.undo()
        compute_epsilon.cache_clear()
    raise AssertionError(f"{check.__name__} does not notice {mutant.__name__}")


RULED = ("auto", "store", "recompute", "ghost")


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


def assert_exact(model, inputs, targets, policies=RULED, validate=True, tolerance=1e-10):
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
        engine = GradSampler(model, F.cross_entropy, policy)
        if validate:
            validate_against_autograd(engine, inputs, targets)
        per_sample = engine(inputs, targets)
        torch.testing.assert_close(per_sample.norms, norms, rtol=tolerance, atol=1e-14)
        sums = {name: torch.zeros_like(g[0]) for name, g in expected.items()}
        per_sample.add_weighted_sum(sums, weights)
        for name, g in expected.items():
            total = torch.einsum("b,b...->b...", weights, g).sum(0)
            torch.testing.assert_close(sums[name], total, rtol=tolerance, atol=1e-13, msg=f"{policy} {name}")
        plans[policy] = (engine.policies, engine.fallbacks)
    return plans


def images(channels, height=9, width=8, examples=3, views=1):
    return torch.randn(examples, views, channels, height, width), torch.arange(examples) % 3


def batch_of(plan, inputs, targets, step=0):
    """The draw of a step that took exactly these examples: inputs (B, …), targets (B,)."""
    mask = torch.ones(len(inputs), dtype=torch.bool)
    return PoissonBatch(plan, step, torch.arange(len(inputs)), iter([(inputs[:, None], targets, mask)]))


class Bowl(nn.Module):
    """Example x has the loss ½‖θ − x‖², hence the gradient θ − x; two layers of it."""

    def __init__(self, *start):
        super().__init__()
        self.first = Half(start[: len(start) // 2])
        self.second = Half(start[len(start) // 2 :])

    def forward(self, x):
        left, right = x.tensor_split(2, dim=1)
        return self.first(left) + self.second(right)

    def theta(self):
        return np.concatenate([self.first.theta.detach().numpy(), self.second.theta.detach().numpy()])

    def grad(self):
        return np.concatenate([self.first.theta.grad.numpy(), self.second.theta.grad.numpy()])


class Half(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * (self.theta - x).square().sum(1, keepdim=True)


def bowl(plan, clip, steps, after=lambda private: None, **seams):
    """Train a bowl on fixed full batches; returns it, the data and p.grad·qN of every step."""
    model = Bowl(1.0, -2.0, 0.5, 3.0)
    x = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    private = PrivateGradient(model, flat_loss, plan, clip, **seams(model) if callable(seams) else seams)
    seen = []
    for step in range(steps):
        private.backward(batch_of(plan, x, torch.zeros(6), step))
        after(private)
        seen.append(model.grad() * plan.batch_size)
    return model, x.numpy(), seen, private


def clipped_sum(gradients, c):
    """Σ g·min(1, c/‖g‖) in NumPy."""
    return sum(g * min(1.0, c / np.linalg.norm(g)) for g in gradients)


def fake_jobs(folder, seeds="0,1,2"):
    """Runs of a table of two rows and two columns, with their directories in a folder."""
    words = "experiment=quickstart optimizer=dp_sgd,dp_psasc_momentum privacy=eps1,eps8"
    return spec.expand((*words.split(), f"seed={seeds}", f"output_dir={folder}"))


def finish_run(job, **result):
    """Write the result of a run of a table."""
    directory = locate(job.config)
    directory.mkdir(exist_ok=True)
    result = {"status": "finished", "config": asdict(job.config), **result}
    (directory / RESULT).write_text(json.dumps(result))
