"""MicroAdam against a literal NumPy transcription of its equations, against Adam, and as a citizen of torch.optim."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import small_data, small_model
from torch import nn

from dpopt.optim import MicroAdam


def transcription(theta, gradients, lr, betas, eps, decay, density, window, feedback=True):
    """2405.15593 / 2511.20509, one tensor, dense vectors throughout; nothing of dpopt."""
    theta, size = theta.copy(), theta.size
    k = math.ceil(density * size)
    error, history, out = np.zeros(size), [], []
    for t, gradient in enumerate(gradients, start=1):
        a = gradient.ravel() + error
        chosen = np.argsort(-np.abs(a), kind="stable")[:k]
        sparse = np.zeros(size)
        sparse[chosen] = a[chosen]
        error = a - sparse if feedback else np.zeros(size)
        history.append(sparse)
        m, v = np.zeros(size), np.zeros(size)
        for age, row in enumerate(reversed(history[-window:])):
            m += betas[0] ** age * row
            v += betas[1] ** age * row**2
        m *= (1 - betas[0]) / (1 - betas[0] ** t)
        v *= (1 - betas[1]) / (1 - betas[1] ** t)
        theta = theta * (1 - lr * decay) - lr * (m / (eps + np.sqrt(v))).reshape(theta.shape)
        out.append(theta.copy())
    return out


@pytest.mark.parametrize("shape", [(1,), (7,), (13, 11), (5, 3, 3, 3)])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_transcription(shape, feedback, decay):
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=shape), generator.normal(size=(50, *shape))
    arguments = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    expected = transcription(start, gradients, **arguments, decay=decay, density=0.1, window=4, feedback=feedback)
    parameter = nn.Parameter(torch.tensor(start))
    options = dict(weight_decay=decay, density=0.1, window=4, error_feedback=feedback, dense_size=0)
    optimizer = MicroAdam([parameter], **arguments, **options)
    for gradient, e in zip(gradients, expected, strict=True):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_dense_with_a_long_window_is_adam(decay):
    model, twin = small_model(), small_model()
    adam = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=decay)
    micro = MicroAdam(model.parameters(), lr=0.01, density=1.0, window=30, weight_decay=decay)
    inputs, targets = small_data()
    for _ in range(30):
        for network, optimizer in ((model, micro), (twin, adam)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_selected_plus_kept_is_the_accumulator():
    parameter = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = MicroAdam([parameter], density=0.05, window=3, dense_size=0)
    kept = torch.zeros(100, dtype=torch.float64)
    for step in range(5):
        parameter.grad = torch.randn(100, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[parameter]
        selected = torch.zeros(100, dtype=torch.float64)
        row = step % 3
        selected[state["window_indices"][row].long()] = state["window_values"][row]
        assert torch.equal(selected + state["error_feedback"], kept + parameter.grad)
        assert int((selected != 0).sum()) == 5
        kept = state["error_feedback"].clone()
    assert optimizer.diagnostics()["optimizer/error_feedback_norm"] == pytest.approx(float(kept.norm()))


def test_what_moves():
    """Only coordinates of the window move; small tensors move whole."""
    large, small = nn.Parameter(torch.zeros(2000)), nn.Parameter(torch.zeros(1000))
    optimizer = MicroAdam([large, small], lr=0.1, density=0.01, window=2)
    for parameter in (large, small):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert int((large != 0).sum()) == 20 and int((small != 0).sum()) == 1000
    assert "error_feedback" not in optimizer.state[small]


def test_state_bytes():
    parameter = nn.Parameter(torch.zeros(100_000))
    optimizer = MicroAdam([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 100_000 * (4 + 10 * 0.01 * 8)


def steps(optimizer, parameters, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_load_continue(dtype, tmp_path):
    def fresh():
        parameters = [nn.Parameter(torch.ones(40, 50, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
        return parameters, MicroAdam(parameters, density=0.05, window=3)

    whole, optimizer = fresh()
    steps(optimizer, whole, range(9))
    first, optimizer = fresh()
    steps(optimizer, first, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second, other = fresh()
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(other, second, range(4, 9))
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))
    assert other.state[second[0]]["window_indices"].dtype == torch.int32


def test_citizenship():
    a, b, frozen = (nn.Parameter(torch.ones(2000)) for _ in range(3))
    optimizer = MicroAdam([{"params": [a], "lr": 0.5}, {"params": [b, frozen], "density": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    a.grad, b.grad = torch.randn(2000), torch.randn(2000)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert int((a != 1).sum()) == 20 and int((b != 1).sum()) == 1000 and (frozen == 1).all()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert len(twin.state_dict()["state"]) == 2
    assert optimizer.step(lambda: 3.0) == 3.0


def test_quadratic_goes_down():
    parameter = nn.Parameter(torch.linspace(-1, 1, 2000))
    optimizer = MicroAdam([parameter], lr=0.02, density=0.05)
    start = float(parameter.detach().square().sum())
    for _ in range(300):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert float(parameter.detach().square().sum()) < 0.05 * start


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(lr=-1), dict(betas=(1.0, 0.9)), dict(eps=0), dict(density=0), dict(density=1.5), dict(window=0)),
        *(dict(bits=4), dict(weight_decay=-1), dict(dense_size=-1)),
    ],
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MicroAdam([nn.Parameter(torch.zeros(3))], **bad)
