"""MicroAdam as a citizen of torch.optim: saved, loaded, copied, scheduled, compiled, moved, and under Opacus."""

import copy
import pickle

import pytest
import torch
from helpers import small_data, small_model, take_steps
from torch import nn

from dpopt.optim import MicroAdam


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


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default):
    found = []
    for dtype in (torch.float32, default):
        torch.manual_seed(0)
        parameter, gradients = torch.nn.Parameter(torch.randn(50_000)), torch.randn(5, 50_000)
        torch.set_default_dtype(dtype)
        try:
            optimizer = MicroAdam([parameter], lr=1e-3)
            for gradient in gradients:
                parameter.grad = gradient.clone()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(parameter.detach())
    assert torch.equal(*found)
