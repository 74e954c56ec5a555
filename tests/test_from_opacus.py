"""docs/from_opacus.md: both of its trainings run, and agree on ε."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import dpopt
from dpopt.privacy import accounting
from dpopt.privacy.accounting import compute_epsilon

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Opacus warns about its hooks and generator


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,792 of the 1,797 digits: seven batches of 256."""
    data = load_digits()
    return torch.tensor(data.data[:1792], dtype=torch.float32) / 16, torch.tensor(data.target[:1792])


@pytest.fixture(scope="module")
def trained() -> dict[str, dict]:
    """What the two blocks of the page leave, by library."""
    inputs, targets = digits()
    found = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/from_opacus.md").read_text(), re.DOTALL):
        scope = {"torch": torch, "F": F, "DataLoader": DataLoader, "TensorDataset": TensorDataset}
        scope |= {"inputs": inputs, "targets": targets}
        torch.manual_seed(0)
        exec(block, scope)
        found["opacus" if "PrivacyEngine" in block else "dpopt"] = scope
    assert set(found) == {"opacus", "dpopt"}
    return found


def test_both_spend_the_same_epsilon(trained):
    engine, plan = trained["opacus"]["engine"], trained["dpopt"]["plan"]
    ((sigma, rate, steps),) = engine.accountant.history
    assert (sigma, rate, steps) == (plan.noise_multiplier, plan.sample_rate, plan.steps) == (1.1, 1 / 7, 21)
    assert trained["dpopt"]["private"].step == 21
    theirs = engine.get_epsilon(delta=1e-4)
    assert plan.epsilon_at(21) == pytest.approx(theirs, rel=1e-6) and 1 < theirs < 10
    assert plan.epsilon_at(20) < theirs * (1 - 1e-3)  # a step more or less shows


@pytest.mark.parametrize("sigma, rate, steps", [(0.7, 0.01, 500), (1.5, 0.2, 1000), (4.0, 1.0, 10)])
def test_the_accountants_agree_elsewhere(sigma, rate, steps):
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    assert compute_epsilon(sigma, rate, steps, 1e-5, "rdp") == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_more_renyi_orders_give_a_smaller_epsilon():
    """As the page says: 0.085 where Opacus's own orders, up to 63, give 0.123."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(20.0, 0.05, 100)]
    ours = compute_epsilon(20.0, 0.05, 100, 1e-5, "rdp")
    assert (round(ours, 3), round(accountant.get_epsilon(1e-5), 3)) == (0.085, 0.123)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5, alphas=accounting._RDP_ORDERS), rel=1e-6)
    assert ours > compute_epsilon(20.0, 0.05, 100, 1e-5, "pld")


def test_both_learn(trained):
    """To about the same accuracy: gradients are clipped and scaled alike."""
    inputs, targets = digits()
    accuracies = [float((scope["model"](inputs).argmax(1) == targets).float().mean()) for scope in trained.values()]
    assert min(accuracies) > 0.6 and abs(accuracies[0] - accuracies[1]) < 0.1


def test_the_model_is_not_wrapped(trained):
    assert set(trained["dpopt"]["model"].state_dict()) == {"weight", "bias"}
    assert set(trained["opacus"]["model"].state_dict()) == {"_module.weight", "_module.bias"}


def test_the_sampling_rate_differs_where_the_batch_does_not_divide():
    from opacus import PrivacyEngine

    model, data = torch.nn.Linear(1, 1), TensorDataset(torch.zeros(1797, 1))
    _, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=256),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert loader.sample_rate == 1 / 8
    assert dpopt.PrivacyPlan(1.0, 1797, 256, 1, 1e-4).sample_rate == pytest.approx(256 / 1797)
