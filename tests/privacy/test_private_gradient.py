"""The per-example engine against a loop over examples, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from helpers import loop_oracle, make_plan, small_data, small_model, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dpopt
from dpopt.grad_sample.norms import square_norms
from dpopt.privacy import private_gradient
from dpopt.privacy.clipping import Automatic, Flat
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.ranks import Share


def clipped_mean(model, plan, inputs, targets, mask, clip, **options):
    """`p.grad` after one batch of these micro-batches."""
    private = PrivateGradient(model, F.cross_entropy, plan, clip, **options)
    private.backward(PoissonBatch(plan, 0, torch.arange(int(mask.sum())), iter([(inputs, targets, mask)])))
    return [p.grad for p in model.parameters() if p.requires_grad]


@settings(max_examples=15, deadline=None)
@given(
    examples=st.integers(1, 9),
    pads=st.integers(0, 3),
    views=st.sampled_from([1, 2, 4]),
    clip=st.sampled_from([Flat(0.3), Flat(100.0), Automatic(1.0)]),
    seed=st.integers(0, 100),
)
def test_equals_the_loop_over_examples(examples, pads, views, clip, seed):
    model, plan = small_model(seed=seed), make_plan(sigma=0.0)
    inputs, targets = small_data(examples + pads, views)
    mask = torch.arange(examples + pads) < examples
    found = clipped_mean(model, plan, inputs, targets, mask, clip)
    expected = loop_oracle(model, F.cross_entropy, inputs[mask], targets[mask], clip)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e / plan.batch_size, rtol=1e-10, atol=1e-14)


def test_frozen_and_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = nn.Linear(5, 5)
            self.second.weight = self.first.weight
            self.head = nn.Linear(5, 3)
            self.head.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model, plan, clip = Tied().double(), make_plan(sigma=0.0), Flat(0.2)
    inputs, targets = small_data(6, 2)
    found = clipped_mean(model, plan, inputs, targets, torch.ones(6, dtype=torch.bool), clip)
    expected = loop_oracle(model, F.cross_entropy, inputs, targets, clip)
    assert model.head.bias.grad is None
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e / plan.batch_size, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_a_non_finite_example_contributes_nothing(poison):
    inputs, targets = small_data(5, 1)
    bad = inputs.clone()
    bad[2] = poison
    mask = torch.ones(5, dtype=torch.bool)
    good = mask.clone()
    good[2] = False
    # Linear without Tanh: the poison reaches the gradient.
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    found = clipped_mean(model, make_plan(sigma=0.0), bad, targets, mask, Flat(1.0))
    if poison == 1e200:  # finite input, finite gradient, norm whose square overflows: clipped like any other
        assert all(f.isfinite().all() for f in found)
        assert torch.sqrt(sum(f.square().sum() for f in found)) * 16 <= 5 * (1 + 1e-5)
        return
    expected = clipped_mean(model, make_plan(sigma=0.0), inputs, targets, good, Flat(1.0))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e-20, 1e18])
def test_the_clipped_norm_is_bounded_in_the_dtype_of_the_sum(dtype, offset, monkeypatch):
    """One example at a time, near-constant gradients among them: its contribution never exceeds C(1 + 1e-5)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4096, 3).to(dtype)
    inputs = (torch.randn(8, 1, 4096, generator=generator) * 1e-3 + offset).to(dtype)
    plan = make_plan(sigma=0.0, size=16, batch=1)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    released = []
    monkeypatch.setattr(private_gradient, "add_noise", lambda total, *_: released.append(total))
    for step, example in enumerate(inputs):
        one = (example[None], torch.tensor([1]), torch.ones(1, dtype=torch.bool))
        private.backward(PoissonBatch(plan, step, torch.zeros(1), iter([one])))
        assert released[step].dtype == torch.float32
        assert released[step].double().norm() <= 1 + 1e-5


@pytest.mark.parametrize("value", [0.1, 0.3, 1e15])
def test_norms_of_long_constant_gradients(value):
    """Summed one by one in fp32, the squares of 25 million equal entries lose 1 % of the norm."""
    gradient = torch.full((2, 5_000_001), value)
    exact = float(gradient[0, 0]) * 5_000_001**0.5
    found = square_norms(gradient).sqrt()
    assert ((found - exact).abs() <= 3e-7 * exact).all()


def test_a_secret_key_serves_one_training():
    data = small_data()
    plan = dpopt.PrivacyPlan(1.0, 64, 16, 3, 1e-3)
    train(plan, small_model(), data, torch.optim.SGD(small_model().parameters(), lr=0.1))
    model = small_model()
    with pytest.raises(ValueError, match="calibrate a new plan for every training"):
        train(plan, model, data, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model[0].weight.grad is None


def test_a_buffer_of_raw_statistics_is_refused_and_left_alone():
    class Running(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("running", torch.zeros(5))

        def forward(self, x):
            self.running = 0.9 * self.running + 0.1 * x.mean(0)
            return super().forward(x)

    model = Running().double()
    with pytest.raises(
        ValueError, match=r"the model \(Running\) writes what it sees of the data into the buffer running"
    ):
        train(make_plan(), model, small_data(), torch.optim.SGD(model.parameters(), lr=0.1), stop=2)
    assert (model.running == 0).all()


def test_bf16_autocast_keeps_sums_in_fp32():
    model = small_model(torch.float32)
    inputs, targets = small_data(4, 1, torch.float32)
    mask = torch.ones(4, dtype=torch.bool)
    low = clipped_mean(model, make_plan(sigma=0.0), inputs, targets, mask, Flat(1.0), precision="bf16")
    assert all(g.dtype == torch.float32 for g in low)
    high = clipped_mean(model, make_plan(sigma=0.0), inputs, targets, mask, Flat(1.0))
    assert all(torch.allclose(a, b, atol=0.01) for a, b in zip(low, high, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("views", [1, 2])
def test_micro_batch_size_changes_nothing(kind, views):
    def trajectory(size):
        model = small_model()
        make = dict(sgd=torch.optim.SGD, adam=torch.optim.Adam)[kind]
        return train(make_plan(), model, small_data(), make(model.parameters(), lr=0.1), micro_batch=size, views=views)

    reference = trajectory(256)
    for size in (1, 16, 64):
        for found, expected in zip(trajectory(size), reference, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_non_private_control_is_the_plain_gradient():
    model, plan = small_model(), make_plan(sigma=0.0)
    inputs, targets = small_data(6, 2)
    mask = torch.tensor([True] * 5 + [False])
    found = clipped_mean(model, plan, inputs, targets, mask, None)
    loss = sum(F.cross_entropy(model(x), y.expand(2)) for x, y in zip(inputs[:5], targets[:5], strict=True))
    for f, e in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(f, e / plan.batch_size)


def test_diagnostics_only_when_asked():
    model, data = small_model(), small_data()
    plan = make_plan()
    quiet = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    loud = PrivateGradient(model, F.cross_entropy, plan, Flat(1e-3), diagnostics=True)
    for private in (quiet, loud):
        private.backward(next(dpopt.poisson_batches(data, plan, micro_batch=16)))
    assert quiet.statistics == {}
    assert set(loud.statistics) == {
        "private/train_loss",
        "private/clipped_fraction",
        "private/signal_to_noise",
        "private/batch_size",
    }
    assert loud.statistics["private/clipped_fraction"] == 1
    assert loud.noise_std == pytest.approx(1.0 * 1e-3 / 16)


def test_steps_are_taken_once_and_in_order():
    model, data, plan = small_model(), small_data(), make_plan(steps=3)
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    batches = dpopt.poisson_batches(data, plan)
    first = next(batches)
    with pytest.raises(ValueError, match="step 1 where step 0 is due"):
        private.backward(next(dpopt.poisson_batches(data, plan, start=1)))
    private.backward(first)
    with pytest.raises(ValueError, match="used exactly once"):
        private.backward(first)
    passed_over = next(batches)
    next(batches)
    with pytest.raises(ValueError, match="already read or passed over"):
        private.backward(passed_over)
    other = make_plan(steps=3, seed=1)
    with pytest.raises(ValueError, match="another plan"):
        private.backward(next(dpopt.poisson_batches(data, other)))
    spent = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0), start=3)
    with pytest.raises(ValueError, match="steps are spent"):
        spent.backward(PoissonBatch(plan, 3, torch.zeros(0), iter([])))


def test_refusals_name_layer_reason_and_fix():
    plan, clip = make_plan(), Flat(1.0)

    def refuse(model, match, clip: Flat | None = clip):
        with pytest.raises(ValueError, match=match):
            PrivateGradient(model, F.cross_entropy, plan, clip)

    norm = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    refuse(norm, r"layer '1' \(BatchNorm1d\) mixes the examples.*1.weight, 1.bias.*GroupNorm")
    refuse(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.1)), r"layer '1' \(Dropout\) draws random numbers.*rate to 0")
    refuse(nn.Linear(5, 3).requires_grad_(False), "no trainable parameter")
    refuse(small_model(), "noise without a clip", clip=None)
    with pytest.raises(TypeError, match=r"for example Flat\(1.0\)"):
        PrivateGradient(small_model(), F.cross_entropy, plan, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a batch of dpopt\.poisson_batches, not a tuple"):
        PrivateGradient(small_model(), F.cross_entropy, plan, clip).backward(small_data())  # type: ignore[arg-type]
    PrivateGradient(norm, F.cross_entropy, make_plan(sigma=0.0), None)  # the non-private control may have BatchNorm
    PrivateGradient(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0)), F.cross_entropy, plan, Flat(1.0))


def test_parameters_outside_the_loss_are_refused():
    model = small_model()
    model.register_parameter("orphan", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"does not depend on orphan.*freeze"):
        train(make_plan(), model, small_data(), torch.optim.SGD(model.parameters(), lr=0.1))
    model.orphan.requires_grad_(False)
    train(make_plan(), model, small_data(), torch.optim.SGD(model.parameters(), lr=0.1), stop=1)


def test_plain_loop_with_microadam_learns():
    torch.manual_seed(0)
    inputs = torch.randn(512, 5)
    targets = (inputs[:, 0] > 0).long()
    plan = dpopt.PrivacyPlan.calibrate(epsilon=8, delta=1e-4, dataset_size=512, batch_size=128, steps=60, seed=0)
    model = nn.Linear(5, 2)
    train(plan, model, (inputs, targets), dpopt.optim.MicroAdam(model.parameters(), lr=0.05), micro_batch=64)
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.9


def test_a_batch_of_another_process_group_is_refused():
    """A share of a batch, added up by nobody or added up again, would be released under the noise of one."""
    private = PrivateGradient(small_model(), F.cross_entropy, make_plan(), Flat(1.0))
    inputs, targets = small_data(4, 1)
    pieces = iter([(inputs, targets, torch.ones(4, dtype=torch.bool))])
    batch = PoissonBatch(make_plan(), 0, torch.arange(4), pieces, share=Share(1, 2))
    with pytest.raises(ValueError, match=r"for rank 1 of 2 and this is rank 0 of 1: start the process group before"):
        private.backward(batch)
