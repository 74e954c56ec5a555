"""Every optimizer of conf/: against NumPy transcriptions of its equations, and what any optimizer has to do."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equations import adam, adam_mini, averaged_sgd, lamb, mada, micro_adam, noise_normalized, sgd, sign_sgd, sofim
from helpers import ROOT, make_plan, small_data, small_model, take_steps
from hydra import compose, initialize_config_dir
from torch import nn

import dpopt
from dpopt.config.components import build
from dpopt.config.overrides import from_hydra
from dpopt.config.schema import Config
from dpopt.optim.step_metrics import StepMetrics
from dpopt.privacy.private_gradient import PrivateGradient

NAMES = sorted(p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml"))


def configure(*overrides: str) -> Config:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def make(name, parameters, **options):
    """The optimizer of a YAML file, with some of its options changed."""
    node = configure(f"optimizer={name}", "model=linear").optimizer
    assert set(options) <= set(node) | {"noise_std"}
    optimizer = build("optimizer", {**node, **options})(parameters)
    for group in optimizer.param_groups:  # gradients that nobody has noised or scaled
        known = {"noise_std": 1.0 if name == "dp_nsgd" else 0.0, "pre_clip_scaled": True}
        group.update({key: value for key, value in known.items() if key in group and group[key] is None})
    return optimizer


PAPER = dict(bits=32, scope="tensor", dense_size=0, density=0.1)
BETWEEN = dict(betas=[0.8, 0.99, 0.3], c=0.6, rho=0.4, decay=0.1)  # Adam, Adan, Yogi and AVGrad
TRANSCRIBED = {
    "mada": (
        dict(betas=[0.8, 0.99, 0.3], c=0.6, rho=0.4, hyper_lr=0.0, weight_decay=0.1),
        partial(mada, lr=3e-3, **BETWEEN),
    ),
    "dp_sgd": (dict(lr=0.1), partial(sgd, lr=0.1)),
    "dp_adam": ({}, partial(adam, lr=3e-3)),
    "dp_adam_ac": ({}, partial(adam, lr=3e-3)),  # its clip and learning rate: test_adaptive.py
    "dp_adam_stp": ({}, partial(adam, lr=3e-3)),  # its scale: test_scale_then_privatize.py
    "dp_adamw": (dict(weight_decay=0.1), partial(adam, lr=3e-3, decay=0.1)),
    "dp_adambc": (dict(floor=1e-3), partial(adam, lr=3e-3, corrected=True, floor=1e-3)),
    "dp_adamw_bc": (dict(weight_decay=0.1), partial(adam, lr=3e-3, corrected=True, floor=1e-6, decay=0.1)),
    "dp_signsgd": (dict(momentum=0.8), partial(sign_sgd, lr=3e-3, momentum=0.8)),
    "dp_lamb": (dict(weight_decay=0.1), partial(lamb, lr=1e-2, decay=0.1)),
    "dp_adam_mini": (
        dict(bits=32, bucket=8, dense_size=0, weight_decay=0.1),
        partial(adam_mini, lr=3e-3, bucket=8, decay=0.1),
    ),
    "dp_nsgd": (dict(), partial(noise_normalized, lr=1e-3, momentum=0.9)),
    "dp_psasc_momentum": (dict(plain_steps=5), partial(averaged_sgd, lr=1.0, momentum=0.9, plain_steps=5)),
    "dp_microadam": (PAPER, partial(micro_adam, lr=3e-3, density=0.1, window=10)),
    "dp_microadam_stp": (PAPER, partial(micro_adam, lr=3e-3, density=0.1, window=10)),
    "fed_sofim": ({}, partial(sofim, lr=1.0)),
}
JOINT = ("fed_sofim",)  # its tensors depend on one another
OWN_RATE = ("dp_sgd", "dp_psasc_momentum", "fed_sofim")  # a step is no fixed length


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_equations(name):
    """20 steps, float64, two tensors; the noise that AdamBC subtracts changes from step to step."""
    options, literal = TRANSCRIBED[name]
    options = {"lr": literal.keywords["lr"], **options}
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=(7, 5)), rng.normal(size=11)]
    gradients = [[rng.normal(size=x.shape) for _ in range(20)] for x in starts]
    noise = [0.3 + 0.01 * t for t in range(20)]
    parameters = [nn.Parameter(torch.tensor(x)) for x in starts]
    optimizer = make(name, parameters, **options)
    for t in range(20):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g[t])
        for group in optimizer.param_groups:
            group.update({"noise_std": noise[t]} if "noise_std" in group else {})
        optimizer.step()
    if name in JOINT:
        starts = [np.concatenate([x.ravel() for x in starts])]
        gradients = [[np.concatenate([g.ravel() for g in step]) for step in zip(*gradients, strict=True)]]
        parameters = [torch.cat([p.flatten() for p in parameters])]
    for p, x, g in zip(parameters, starts, gradients, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), literal(x, g, noise), rtol=1e-8, atol=1e-8)


def test_adam_bc_by_hand():
    """θ = (1, 2), one step: g = (.5, .1), noise .3 → v̂ = (.25, .01), Φ = .09: (.16, floor) under the root."""
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = dpopt.optim.AdamBC([p], lr=0.1, floor=0.0004, noise_std=0.3)
    p.grad = torch.tensor([0.5, 0.1], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == pytest.approx([1 - 0.1 * 0.5 / 0.4, 2 - 0.1 * 0.1 / 0.02])
    # g = (−.5, .1): m̂ = (.9·.05 − .05)/.19, v̂ = .25 as before, and Φ = .09: √.16
    p.grad = torch.tensor([-0.5, 0.1], dtype=torch.float64)
    optimizer.step()
    assert p[0].item() == pytest.approx(0.875 + 0.1 * (0.005 / 0.19) / 0.4)


@pytest.mark.parametrize("name, original", [("dp_sgd", "SGD"), ("dp_adam", "Adam"), ("dp_adamw", "AdamW")])
def test_without_clip_and_noise_it_is_the_original(name, original):
    """An infinite clip, σ = 0 and q = 1: torch's own optimizer on the mean gradient."""
    data, plan = small_data(16), make_plan(sigma=0.0, size=16, batch=16, steps=10)
    model, twin = small_model(), small_model()
    optimizer, node = make(name, list(model.parameters())), configure(f"optimizer={name}", "model=linear").optimizer
    options = {key: value for key, value in node.items() if key != "_target_"}
    reference = getattr(torch.optim, original)(twin.parameters(), **options)
    private = PrivateGradient(model, F.cross_entropy, plan, dpopt.clipping.Flat(1e30))
    for batch in dpopt.poisson_batches(data, plan, micro_batch=5):
        private.backward(batch)
        optimizer.step()
        reference.zero_grad()
        F.cross_entropy(twin(data[0]), data[1]).backward()
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_what_differs_by_noise_or_scale_only_is_adam_without():
    """Without noise and with a vanishing floor, AdamBC is Adam with ε = 0."""
    trajectories = []
    for optimizer in (
        partial(torch.optim.Adam, lr=0.01, eps=0.0),
        partial(dpopt.optim.AdamBC, lr=0.01, floor=1e-30, noise_std=0.0),
        partial(dpopt.optim.AdamSTP, lr=0.01, eps=0.0),
    ):
        p = nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64))
        made = optimizer([p])
        made.param_groups[0].update(pre_clip_scaled=True)
        for t in range(20):
            p.grad = torch.sin(p.detach() * (t + 1)) + 0.1
            made.step()
        trajectories.append(p.detach())
    for other in trajectories[1:]:
        torch.testing.assert_close(other, trajectories[0], rtol=1e-8, atol=1e-10)


# What any optimizer has to do


@pytest.mark.parametrize("name", NAMES)
def test_goes_down(name):
    """A quadratic of 50 dimensions, by 300 steps of decreasing size."""
    target = torch.linspace(-1, 1, 50)
    p = nn.Parameter(torch.ones(50))
    optimizer = make(name, [p], **({} if name in OWN_RATE else {"lr": 0.05}))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        p.grad = p.detach() - target
        optimizer.step()
        schedule.step()
    assert (p - target).norm() < 0.05 * (torch.ones(50) - target).norm()


def steps(model, optimizer, count, start=0, plan=None, data=None):
    plan = plan or make_plan(sigma=0.5, steps=40)
    private = PrivateGradient(
        model,
        F.cross_entropy,
        plan,
        dpopt.clipping.Flat(1.0),
        start=start,
        pre_clip_scale=getattr(optimizer, "pre_clip_scale", None),
    )
    data = data or small_data(dtype=next(model.parameters()).dtype)
    for batch in dpopt.poisson_batches(data, plan, start=start):
        if batch.step == start + count:
            return
        private.backward(batch)
        private.update_param_groups(optimizer)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_small_network_learns(name):
    """40 private steps at little noise, on labels that a line separates."""
    model = small_model(torch.float32)
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    data, plan = (inputs, (inputs[:, 0] > 0).long()), make_plan(sigma=0.3, steps=40)
    options = {} if name in OWN_RATE else {"lr": 0.03}
    options |= {"eps_scale": 1.0} if name.endswith("stp") else {}  # s starts at 1, so it hardly moves
    optimizer = make(name, list(model.parameters()), **options)
    before = F.cross_entropy(model(inputs), data[1])
    steps(model, optimizer, 40, plan=plan, data=data)
    assert F.cross_entropy(model(inputs), data[1]) < 0.5 * before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_save_load_continue(name, dtype, tmp_path):
    """Through a file, on private gradients: the same parameters as without a stop. In bf16, too."""
    model = small_model(dtype)
    optimizer = make(name, list(model.parameters()))
    steps(model, optimizer, 4)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    steps(model, optimizer, 4, start=4)
    again = small_model(dtype, seed=1)
    other = make(name, list(again.parameters()))
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(stored[0])
    other.load_state_dict(copy.deepcopy(stored[1]))
    steps(again, other, 4, start=4)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_on_alike(name):
    """Copied or pickled with its model, an optimizer keeps every option."""
    model = small_model()
    optimizer = make(name, list(model.parameters()))
    steps(model, optimizer, 3)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    steps(model, optimizer, 3, start=3)
    for other, its_optimizer in copies:
        steps(other, its_optimizer, 3, start=3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_another_optimizer_is_refused_in_a_sentence(name):
    """Unless it has all that is needed: then the next step works. torch's own optimizers are left to torch."""
    parameters = list(small_model().parameters())
    for original in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad):
        optimizer, other = make(name, parameters), original(parameters, lr=0.1)
        if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):
            return
        take_steps(other, parameters, [0])
        lacking = sorted(set(optimizer.defaults) - set(other.defaults))
        if not lacking:
            optimizer.load_state_dict(other.state_dict())
            take_steps(optimizer, parameters, [1])
            continue
        with pytest.raises(ValueError, match=f"lack {', '.join(lacking)}: load a state of") as seen:
            optimizer.load_state_dict(other.state_dict())
        assert type(optimizer).__name__ in str(seen.value) and "\n" not in str(seen.value)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay(name):
    model = small_model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = make(name, [p for p in model.parameters() if p.requires_grad])
    steps(model, optimizer, 3)
    assert torch.equal(model[0].weight, before) and not torch.equal(model[2].weight, small_model()[2].weight)


@pytest.mark.parametrize("name", [name for name in NAMES if "bc" in name])
def test_the_noise_that_is_subtracted_is_the_plans(name):
    model, plan = small_model(), make_plan(sigma=1.7, batch=16)
    optimizer = make(name, list(model.parameters()))
    steps(model, optimizer, 2, plan=plan)
    assert optimizer.param_groups[0]["noise_std"] == 1.7 * 1.0 / 16
    state = optimizer.state[model[0].weight]
    assert state["noise"] / (1 - 0.999**2) == pytest.approx((1.7 / 16) ** 2)


@pytest.mark.parametrize(
    "name, option, value",
    [
        *(("dp_adambc", "betas", [0.9, 1.0]), ("dp_lamb", "betas", [-0.1, 0.9]), ("dp_adambc", "floor", 0.0)),
        *(("dp_signsgd", "momentum", 1.0), ("dp_psasc_momentum", "momentum", 1.0)),
        *(("dp_adam_stp", "eps_scale", 0.0), ("dp_microadam_stp", "eps_root", -1.0)),
    ],
)
def test_bad_options(name, option, value):
    with pytest.raises(ValueError, match=option):
        make(name, [nn.Parameter(torch.zeros(3))], **{option: value})


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_and_shown(name):
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        make(name, [nn.Parameter(torch.zeros(3))], lr=-1.0)
    assert "lr" in repr(make(name, [nn.Parameter(torch.zeros(3))]))


@pytest.mark.parametrize("after", [False, True])
def test_own_figures_of_a_step(after):
    """Known before it, or measured after it; what there is before a step, gradients for instance, may be read."""

    class Own(torch.optim.SGD):
        def step_metrics(self):
            (parameter,) = self.param_groups[0]["params"]
            found = {"optimizer/x": float(parameter.grad.sum())}
            return (lambda: found) if after else found

    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    metrics = StepMetrics(Own([parameter], 0.1))
    assert metrics.measure()["optimizer/x"] == 2.0
