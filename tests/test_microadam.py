"""MicroAdam against a literal NumPy transcription of its equations, against Adam, and as a citizen of torch.optim."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import small_data, small_model
from torch import nn

from dpopt.kernels.microadam import select
from dpopt.optim import MicroAdam
from dpopt.optim.blocks import layout

PAPER = dict(bits=32, scope="tensor", dense_size=0)


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


def blocks(x, size):
    """A flat tensor in rows of `size`, padded with zeros."""
    return nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def take_steps(optimizer, parameters, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


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
    expected = transcription(start, gradients, **arguments, decay=decay, density=0.1, window=10, feedback=feedback)
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
    """Accumulator = selected + feedback + quantisation error, which is at most half a bucket step (or one step)."""
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
        assert torch.equal(positions, select(accumulated, form.k))
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
    assert torch.equal(select(x, k), expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(bits=32), dict(rounding="stochastic"), dict(window=None, bits=8)])
def test_save_load_continue(dtype, options, tmp_path):
    def fresh():
        parameters = [nn.Parameter(torch.ones(40, 50, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
        return parameters, MicroAdam(parameters, density=0.05, **({"window": 3} | options))

    whole, optimizer = fresh()
    take_steps(optimizer, whole, range(9))
    first, optimizer = fresh()
    take_steps(optimizer, first, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second, other = fresh()
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(other, second, range(4, 9))
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))
    for name, value in optimizer.state[first[0]].items():
        assert name == "step" or other.state[second[0]][name].dtype == value.dtype


def test_loading_does_not_touch_what_was_saved():
    parameter = nn.Parameter(torch.ones(2000))
    optimizer = MicroAdam([parameter])
    take_steps(optimizer, [parameter], [0])
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = MicroAdam([nn.Parameter(torch.ones(2000))])
    other.load_state_dict(saved)
    take_steps(other, other.param_groups[0]["params"], [1])
    assert all(torch.equal(saved["state"][0][n], kept["state"][0][n]) for n in ("indices", "values", "feedback"))


def test_citizenship():
    a, b, frozen = (nn.Parameter(torch.ones(8192)) for _ in range(3))
    optimizer = MicroAdam([{"params": [a], "lr": 0.5}, {"params": [b, frozen], "density": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    a.grad, b.grad = torch.randn(8192), torch.randn(8192)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert int((a != 1).sum()) == 82 and int((b != 1).sum()) == 4096 and (frozen == 1).all()
    assert frozen not in optimizer.state
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert len(twin.state_dict()["state"]) == 2 and twin.kernels == "auto"
        parameters = [p for group in twin.param_groups for p in group["params"]][:2]
        for p, q in zip(parameters, (a, b), strict=True):
            p.grad = q.grad.clone()
        twin.step()
    optimizer.step()
    assert torch.equal(parameters[0], a) and torch.equal(parameters[1], b)
    assert optimizer.step(lambda: 3.0) == 3.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(9))], "lr": 1.0})
    with pytest.raises(ValueError, match="density"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(9))], "density": 2.0})


def test_parameters_come_go_and_keep_their_own_step():
    """A parameter without a gradient rests; one that joins later, or rests, equals one that is alone."""
    together = [nn.Parameter(torch.ones(5000)) for _ in range(3)]
    optimizer = MicroAdam(together, lr=0.1)
    alone = [nn.Parameter(torch.ones(5000)) for _ in range(3)]
    singles = [MicroAdam([p], lr=0.1) for p in alone]
    for step in range(8):
        active = [i for i in range(3) if not (i == 0 and step in (3, 4)) and not (i == 1 and step < 2)]
        for i in range(3):
            gradient = torch.randn(5000, generator=torch.Generator().manual_seed(10 * step + i))
            together[i].grad = alone[i].grad = gradient if i in active else None
            if i in active:
                singles[i].step()
        optimizer.step()
    assert [optimizer.state[p]["step"] for p in together] == [6, 6, 8]
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


def test_memory_format_and_views_change_nothing():
    """Not contiguous parameters and gradients, and parameters that are views of one buffer."""
    values, gradient = torch.randn(32, 16, 3, 3), torch.randn(32, 16, 3, 3)
    buffer = torch.zeros(2 * values.numel())
    buffer[: values.numel()] = values.flatten()
    variants = [
        nn.Parameter(values.clone()),
        nn.Parameter(values.clone().to(memory_format=torch.channels_last)),
        nn.Parameter(buffer[: values.numel()].view(values.shape)),
    ]
    for number, p in enumerate(variants):
        optimizer = MicroAdam([p], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            p.grad = gradient.clone(memory_format=torch.channels_last) if number == 1 else gradient.clone()
            optimizer.step()
        assert torch.equal(p, variants[0])
    assert (buffer[values.numel() :] == 0).all()


def test_a_model_that_changes_its_precision():
    model = nn.Linear(100, 100)
    optimizer = MicroAdam(model.parameters(), lr=0.1)
    take_steps(optimizer, list(model.parameters()), [0, 1])
    model.bfloat16()
    take_steps(optimizer, list(model.parameters()), [2])
    assert model.weight.dtype == torch.bfloat16 and optimizer.state[model.weight]["step"] == 3


def test_options_of_a_training_cannot_change():
    changes = dict(density=0.1, window=5, bits=8, bucket=64, error_feedback=False, dense_size=5000, scope="tensor")
    for name, value in changes.items():
        parameter = nn.Parameter(torch.ones(5000))
        optimizer = MicroAdam([parameter])
        take_steps(optimizer, [parameter], [0])
        optimizer.param_groups[0][name] = value
        for _ in range(2):
            with pytest.raises(ValueError, match="must stay as they were"):
                take_steps(optimizer, [parameter], [1])


def test_cleared_state_starts_anew():
    pair = [nn.Parameter(torch.ones(5000)) for _ in range(2)]
    optimizers = [MicroAdam([p], lr=0.1) for p in pair]
    take_steps(optimizers[0], pair[:1], range(3))
    optimizers[0].state.clear()
    with torch.no_grad():
        pair[0].fill_(1)
    for p, optimizer in zip(pair, optimizers, strict=True):
        take_steps(optimizer, [p], range(3, 6))
    assert torch.equal(*pair)


def test_a_parameter_that_grows_is_refused():
    parameter = nn.Parameter(torch.ones(5000))
    optimizer = MicroAdam([parameter])
    take_steps(optimizer, [parameter], [0])
    parameter.data, parameter.grad = torch.ones(9000), None
    with pytest.raises(ValueError, match="does not fit"):
        take_steps(optimizer, [parameter], [1])


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(2000, 3, sparse=True)
    optimizer = MicroAdam(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="SparseAdam"):
        optimizer.step()


def test_compile():
    """A compiled function may call `step`."""
    model, twin = small_model(torch.float32), small_model(torch.float32)
    inputs, targets = small_data(dtype=torch.float32)
    optimizers = [MicroAdam(network.parameters(), lr=0.1, dense_size=4) for network in (model, twin)]

    def train_step(network, optimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    compiled = torch.compile(train_step, backend="eager")
    for _ in range(3):
        train_step(model, optimizers[0])
        compiled(twin, optimizers[1])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore")  # Opacus warns about its own hooks and generator
def test_under_opacus():
    from opacus import PrivacyEngine

    torch.manual_seed(0)
    inputs = torch.randn(256, 5)
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = MicroAdam(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(data, batch_size=64)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.5, max_grad_norm=1.0
    )
    for _ in range(25):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert float((model(inputs).argmax(1) == (inputs[:, 0] > 0)).float().mean()) > 0.9
    assert any("ranges" in state for state in optimizer.original_optimizer.state.values())


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
    after = optimizer.watch()
    optimizer.step()
    found = after()
    a = (feedback + parameter.grad.view(2, 4096)).double()
    rest = a.clone().scatter_(1, select(a, 41), 0.0)
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
