"""MicroAdam against a literal NumPy transcription of its equations, against Adam."""

import math

import numpy as np
import pytest
import torch
from helpers import small_data, take_steps
from torch import nn

from dpopt.optim import MicroAdam
from dpopt.optim.microadam.packing import layout
from dpopt.optim.microadam.reference import topk_positions

PAPER = dict(bits=32, scope="tensor", dense_size=0)


def transcription(theta, gradients, lr, betas, eps, decay, sparsity, feedback=True):
    """2405.15593 / 2511.20509, one tensor, dense vectors throughout; nothing of dpopt."""
    theta, size, (density, window) = theta.copy(), theta.size, sparsity
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


def blocks(x, size):
    """A flat tensor in rows of `size`, padded with zeros."""
    return nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def state_bytes(optimizer):
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("shape", [(1,), (7,), (13, 11), (5, 3, 3, 3), (70, 71)])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_transcription(shape, feedback, decay):
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=shape), generator.normal(size=(50, *shape))
    arguments = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    expected = transcription(start, gradients, **arguments, decay=decay, sparsity=(0.1, 10), feedback=feedback)
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = MicroAdam([parameter], **arguments, **PAPER, weight_decay=decay, density=0.1, error_feedback=feedback)
    for gradient, e in zip(gradients, expected, strict=True):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [dict(window=None), dict(window=50), dict(window=None, dense_size=0)])
def test_dense_with_an_unbounded_window_is_adam(decay, options):
    """50 steps to 1e-10, and a window as long as the training is unbounded, too."""
    models = [
        nn.Sequential(nn.Linear(5, 60), nn.Tanh(), nn.Linear(60, 60), nn.Linear(60, 3)).double() for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    torch_class = torch.optim.AdamW if decay else torch.optim.Adam
    adam = torch_class(models[1].parameters(), lr=0.01, weight_decay=decay)
    micro = MicroAdam(models[0].parameters(), lr=0.01, density=1.0, bits=32, weight_decay=decay, **options)
    inputs, targets = small_data()
    for _ in range(50):
        for network, optimizer in zip(models, (micro, adam), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "bits, rounding", [(2, "nearest"), (4, "nearest"), (4, "stochastic"), (8, "nearest"), (32, "nearest")]
)
@pytest.mark.parametrize("shape", [(63, 100), (4096,), (4097,), (100_003,)])
def test_conservation(bits, rounding, shape):
    """Accumulator = selected + feedback + quantization error, which is at most half a bucket step (or one step)."""
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = MicroAdam([parameter], bits=bits, rounding=rounding, window=3, kernels="torch")
    form = layout(parameter, optimizer.param_groups[0])
    feedback = torch.zeros(len(blocks(parameter.detach(), form.size)), form.size)
    for step in range(5):
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        accumulated = blocks(parameter.grad, form.size) + feedback
        accumulated.view(-1)[parameter.numel() :] = 0  # padding neither accumulates nor is selected
        optimizer.step()
        state = optimizer.state[parameter]
        positions = state["indices"][:, step % 3].long()
        selected = torch.zeros_like(accumulated).scatter_(1, positions, state["values"][:, step % 3].float())
        assert torch.equal(positions, topk_positions(accumulated, form.k))
        feedback, unit = optimizer.feedback(parameter), 0.0
        error = (accumulated.double() - selected - feedback).abs()
        if bits < 32:
            low, high = state["ranges"].double().unbind(2)
            unit = ((high - low) / (2**bits - 1)).repeat_interleave(256, 1)
        assert (error <= (0.5 if rounding == "nearest" else 1.0) * unit * 1.001 + 1e-6).all()
        assert bits == 32 or float(error.max()) > 0


@pytest.mark.parametrize(
    "size, k", [(16, 3), (64, 1), (256, 3), (4096, 41), (4096, 300), (100, 99), (100, 100), (1, 1)]
)
def test_selection(size, k):
    """Against a stable sort, on rows with and without ties, zeros, NaN and infinities."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, size, generator=generator)
    x[10:20] = torch.randint(-3, 4, (10, size), generator=generator).float()
    x[20] = 0.0
    x[21] = -1.5
    x[22, size // 2 :] = 0.0
    x[23, ::2], x[24, ::3], x[25, 0] = float("nan"), float("inf"), -float("inf")
    x[26, : size // 3], x[26, size // 2 :] = float("nan"), float("inf")
    x[27, 0], x[27, -1] = torch.finfo().max, float("inf")
    magnitude = x.abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    expected = magnitude.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    assert torch.equal(topk_positions(x, k), expected)


def test_what_moves():
    """Only coordinates of the window move; small tensors move whole, by Adam's rule."""
    large, small = nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(1000))
    optimizer = MicroAdam([large, small], lr=0.1, density=0.01, window=2)
    take_steps(optimizer, [large, small], [0])
    # a full block of 4,096 selects 41, and so does the shorter one
    assert int((large != 0).sum()) == 82 and int((small != 0).sum()) == 1000
    assert set(optimizer.state[small]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_gradient_that_is_not_finite_shows_in_the_parameter_and_spoils_nothing_else():
    parameter = nn.Parameter(torch.zeros(8192))
    optimizer = MicroAdam([parameter], lr=0.1)
    for step in range(3):
        parameter.grad = torch.randn(8192, generator=torch.Generator().manual_seed(step))
        if step == 1:
            parameter.grad[5000] = float("nan")
        optimizer.step()
    assert torch.nonzero(~parameter.isfinite()).flatten().tolist() == [5000]
    assert optimizer.feedback(parameter).isfinite().all()


@pytest.mark.parametrize("gradient", [0.0, 2.5, 1e-30])
def test_constant_gradients(gradient):
    parameter = nn.Parameter(torch.zeros(4097))
    optimizer = MicroAdam([parameter], lr=0.1)
    for _ in range(12):
        parameter.grad = torch.full((4097,), gradient)
        optimizer.step()
    assert parameter.isfinite().all() and bool((parameter != 0).any()) == (gradient != 0)


@pytest.mark.parametrize("model", ["wrn_16_4", "resnet50"])
def test_state_bytes(model):
    """At the defaults at most .95 bytes per parameter: 2.75 M parameters, 25.5 M parameters. Adam has 8."""
    if model == "wrn_16_4":
        from dpopt.models import wrn_16_4

        network = wrn_16_4(num_classes=10)
    else:
        import torchvision

        network = torchvision.models.resnet50()
    network = network.to("meta")
    optimizer = MicroAdam(network.parameters())
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    count = sum(p.numel() for p in network.parameters())
    assert count > 2.7e6
    assert 0.9 < state_bytes(optimizer) / count <= 0.95


@pytest.mark.parametrize("options", [{}, dict(bits=2, rounding="stochastic"), dict(scope="tensor"), dict(window=None)])
def test_quadratic_goes_down(options):
    parameter = nn.Parameter(torch.linspace(-1, 1, 10_000))
    optimizer = MicroAdam([parameter], lr=0.02, density=0.05, **options)
    start = float(parameter.detach().square().sum())
    for _ in range(400):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert float(parameter.detach().square().sum()) < 0.05 * start


def test_watch():
    """The diagnostics of one step, against their definitions."""
    parameter, small = nn.Parameter(torch.zeros(8192)), nn.Parameter(torch.zeros(5))
    optimizer = MicroAdam([parameter, small])
    take_steps(optimizer, [parameter, small], range(15))
    feedback = optimizer.feedback(parameter)
    parameter.grad = torch.randn(8192)
    after = optimizer.step_metrics()
    optimizer.step()
    found = after()
    a = (feedback + parameter.grad.view(2, 4096)).double()
    rest = a.clone().scatter_(1, topk_positions(a, 41), 0.0)
    kept = optimizer.feedback(parameter).double()
    expected = {
        "optimizer/error_feedback_norm": kept.norm(),
        "optimizer/contraction": math.sqrt(1 - 41 / 4096),
        "optimizer/left_behind": rest.norm() / a.norm(),
        "optimizer/quantization_omega": (rest - kept).norm() / rest.norm(),
        "optimizer/window_mass": (1 - 0.999**10) / (1 - 0.999**16),
    }
    assert {name: pytest.approx(float(value), rel=1e-5) for name, value in expected.items()} == found
    assert (
        0 < found["optimizer/quantization_omega"] < 0.2
        and found["optimizer/left_behind"] < found["optimizer/contraction"]
    )


@pytest.mark.parametrize(
    "bad",
    [
        *(dict(lr=-1), dict(betas=(1.0, 0.9)), dict(eps=0), dict(density=0), dict(density=1.5), dict(window=0)),
        *(dict(bits=3), dict(bucket=12), dict(rounding="up"), dict(scope="model"), dict(weight_decay=-1)),
        *(dict(dense_size=-1), dict(kernels="cuda")),
    ],
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MicroAdam([nn.Parameter(torch.zeros(3))], **bad)
