"""The privacy invariants of the design. Each is a check, and for each there are mutants that the check must catch.

A check is a function that asserts; a mutant is a function that breaks the library through monkeypatch. The tests at the
end run every check as it is, and again under each of its mutants, where it must fail.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import loop_oracle, make_plan, rekeyed, small_data, small_model, train
from scipy import stats
from torch import nn

import dpopt
from dpopt.card import privacy_card
from dpopt.config import Config
from dpopt.plan import PrivacyPlan
from dpopt.privacy import accounting, gradients, sampling
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.clipping import Flat
from dpopt.privacy.gradients import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.privacy.streams import RandomKey
from dpopt.sources import TensorSource

REAL_GRADIENTS = gradients.per_example_gradients
REAL_EPSILON_AT = PrivacyPlan.epsilon_at
REAL_RELEASE = PrivateGradient._release
REAL_SAMPLE = sampling.sample_indices
REAL_CLIPPED = PrivateGradient._accumulate_clipped


class Zero(nn.Module):
    """A model of many parameters whose loss is flat: `p.grad` is noise alone."""

    def __init__(self, size=20_000):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x[:, :1] + 0 * self.weight.sum()


def flat_loss(outputs, targets):
    return outputs.mean()


def released_noise(plan, clip=None, micro_batch=8, steps=3):
    """`p.grad`·qN over some steps of a flat loss, flattened."""
    model = Zero()
    private = PrivateGradient(model, flat_loss, plan, clip or Flat(0.5))
    seen = []
    data = (torch.zeros(plan.dataset_size, 2), torch.zeros(plan.dataset_size))
    for batch in dpopt.poisson_batches(data, plan, micro_batch=micro_batch):
        private.backward(batch)
        seen.append(model.weight.grad.clone() * plan.batch_size)
        if len(seen) == steps:
            break
    return torch.cat(seen)


# 1. One record feeds sampler, noise and accountant.


def check_noise_is_the_accountants():
    plan, clip = make_plan(sigma=1.3), Flat(0.5)
    noise = released_noise(plan, clip)
    assert stats.kstest(noise.numpy(), stats.norm(scale=1.3 * 0.5).cdf).pvalue > 1e-4
    measured = float(noise.double().std()) / clip.sensitivity
    epsilon = compute_epsilon(measured, plan.batch_size / plan.dataset_size, plan.steps, plan.delta)
    assert plan.epsilon == pytest.approx(epsilon, rel=0.02)


def no_noise(patch):
    patch.setattr(RandomKey, "normal", lambda self, count, *labels: torch.zeros(count, dtype=torch.float64))


def scaled_noise(factor):
    real = RandomKey.normal

    def mutant(patch):
        patch.setattr(RandomKey, "normal", lambda self, count, *labels: factor * real(self, count, *labels))

    mutant.__name__ = f"noise_times_{factor:.2f}"
    return mutant


def accountant_fed_another_sigma(patch):
    patch.setattr(
        PrivacyPlan,
        "epsilon_at",
        lambda self, step, accountant=None: REAL_EPSILON_AT(
            replace(self, noise_multiplier=1.3 * self.noise_multiplier), step, accountant
        ),
    )


def accountant_fed_another_rate(patch):
    patch.setattr(PrivacyPlan, "sample_rate", property(lambda self: 0.5 * self.batch_size / self.dataset_size))


# 2. Truly Poisson; an empty batch is a step; divided by the public qN.


def check_poisson_and_divisor():
    plan = make_plan(size=200, batch=20, steps=300)
    sizes = torch.tensor([float(len(sampling.sample_indices(plan, step))) for step in range(300)])
    assert 20 * 0.9 * 0.6 < sizes.var() < 20 * 0.9 * 1.5
    model, plan = small_model(), make_plan(sigma=0.0, steps=8)
    data = small_data()
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    for batch in dpopt.poisson_batches(data, plan):
        private.backward(batch)
        at = batch.indices
        expected = loop_oracle(model, F.cross_entropy, data[0][at][:, None], data[1][at], Flat(1.0))
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, e / plan.batch_size, rtol=1e-9, atol=1e-12)


def check_empty_batches_are_noisy_steps():
    plan = make_plan(size=64, batch=1, steps=12)
    sizes = [len(sampling.sample_indices(plan, step)) for step in range(12)]
    assert 0 in sizes
    model = small_model()
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    before = None
    for batch in dpopt.poisson_batches(small_data(), plan):
        private.backward(batch)
        now = model[0].weight.grad
        assert now is not None and (before is None or not torch.equal(now, before))
        before = now.clone()
    assert private.step == 12


def fixed_size_batches(patch):
    patch.setattr(
        sampling,
        "sample_indices",
        lambda plan, step: torch.argsort(plan.key.uniform(plan.dataset_size, "s", step))[: plan.batch_size],
    )


def realised_divisor(patch):
    def release(self, parameters, sums):
        REAL_RELEASE(self, parameters, sums)
        for p in parameters.values():
            p.grad *= self.plan.batch_size / max(1, self.realised)

    def backward(self, batch, real=PrivateGradient.backward):
        self.realised = len(batch.indices)
        real(self, batch)

    patch.setattr(PrivateGradient, "_release", release)
    patch.setattr(PrivateGradient, "backward", backward)


def empty_batches_skipped(patch):
    def backward(self, batch, real=PrivateGradient.backward):
        if len(batch.indices):
            return real(self, batch)
        self.step += 1

    patch.setattr(PrivateGradient, "backward", backward)


def empty_batches_uncounted(patch):
    real = sampling._batches

    def batches(*arguments):
        return (batch for batch in real(*arguments) if len(batch.indices))

    patch.setattr(sampling, "_batches", batches)


# 3. Views are averaged per example before the clip.


def check_views_belong_to_their_example():
    plan, clip = make_plan(sigma=0.0), Flat(0.05)
    model, (inputs, targets) = small_model(), small_data(8, views=4)
    private = PrivateGradient(model, F.cross_entropy, plan, clip)
    micro_batch = (inputs, targets, torch.ones(8, dtype=torch.bool))
    private.backward(PoissonBatch(plan, 0, torch.arange(8), iter([micro_batch])))
    for p, e in zip(model.parameters(), loop_oracle(model, F.cross_entropy, inputs, targets, clip), strict=True):
        torch.testing.assert_close(p.grad, e / plan.batch_size, rtol=1e-9, atol=1e-12)


def views_clipped_one_by_one(patch):
    def accumulate(self, parameters, sums, inputs, targets, mask, raw):
        flat, views = inputs.flatten(0, 1).unsqueeze(1), inputs.shape[1]
        REAL_CLIPPED(
            self, parameters, sums, flat, targets.repeat_interleave(views, 0), mask.repeat_interleave(views), raw
        )

    patch.setattr(PrivateGradient, "_accumulate_clipped", accumulate)


def views_in_another_order_than_labels(patch):
    def mutant(model, loss_fn, inputs, targets, autocast):
        shuffled = inputs.transpose(0, 1).reshape(inputs.shape)
        return REAL_GRADIENTS(model, loss_fn, shuffled, targets, autocast)

    patch.setattr(gradients, "per_example_gradients", mutant)


# 4. The clipped norm is bounded; non-finite and padded examples contribute zero.


def check_every_contribution_is_bounded():
    """The gradient of the mean output with respect to the weight is the input itself: easy to make adversarial."""
    model, plan, clip = nn.Linear(64, 1), make_plan(sigma=0.0), Flat(0.1)
    inputs = torch.randn(12, 1, 64, generator=torch.Generator().manual_seed(0))
    inputs *= torch.logspace(-3, 3, 12)[:, None, None]
    inputs[4], inputs[5, 0, 0], inputs[6] = 7.0, float("nan"), float("inf")
    mask = torch.ones(12, dtype=torch.bool)
    mask[9:] = False

    def contribution(selected):
        private = PrivateGradient(model, flat_loss, plan, clip)
        private.backward(PoissonBatch(plan, 0, torch.zeros(0), iter([(inputs, torch.zeros(12), selected)])))
        return torch.cat([p.grad.flatten().double() * plan.batch_size for p in model.parameters()])

    total = contribution(mask)
    assert total.isfinite().all()
    for index in range(12):
        without = mask.clone()
        without[index] = False
        norm = (total - contribution(without)).norm()
        assert norm <= 0.1 * (1 + 1e-5)
        assert (norm == 0) == (index in (5, 6) or not mask[index])


def no_clip(patch):
    patch.setattr(Flat, "weight", lambda self, norm: torch.ones_like(norm))


def clip_of_the_mean(patch):
    def accumulate(self, parameters, sums, inputs, targets, mask, raw):
        found, _ = REAL_GRADIENTS(self.model, self.loss_fn, inputs[mask], targets[mask])
        means = {name: g.nan_to_num(0, 0, 0).mean(0) for name, g in found.items()}
        norm = torch.sqrt(sum(m.square().sum() for m in means.values()))
        for name, mean in means.items():
            sums[name] += mean * self.clip.weight(norm) * int(mask.sum())

    patch.setattr(PrivateGradient, "_accumulate_clipped", accumulate)


def weights_instead_of_selection(patch):
    patch.setattr(torch.Tensor, "masked_fill", lambda self, mask, value: self)


def pads_counted(patch):
    def accumulate(self, parameters, sums, inputs, targets, mask, raw):
        REAL_CLIPPED(self, parameters, sums, inputs, targets, torch.ones_like(mask), raw)

    patch.setattr(PrivateGradient, "_accumulate_clipped", accumulate)


def norm_of_the_first_parameter(patch):
    real = gradients._norms
    patch.setattr(gradients, "_norms", lambda g: real(dict(list(g.items())[1:])))


def variance_for_the_square(patch):
    patch.setattr(
        gradients,
        "_norms",
        lambda g: torch.sqrt(sum(v.flatten(1).float().var(1, correction=0) * v[0].numel() for v in g.values())),
    )


# 5. Noise once per logical step, on the sum.


def check_noise_is_drawn_once_per_step():
    for micro_batch in (1, 4, 64):
        noise = released_noise(make_plan(sigma=1.0), Flat(1.0), micro_batch)
        assert float(noise.std()) == pytest.approx(1.0, rel=0.02)


def noise_per_micro_batch(patch):
    def accumulate(self, parameters, sums, inputs, targets, mask, raw):
        REAL_CLIPPED(self, parameters, sums, inputs, targets, mask, raw)
        for total in sums.values():
            total += torch.randn_like(total) * self.plan.noise_multiplier * self.clip.sensitivity

    patch.setattr(PrivateGradient, "_accumulate_clipped", accumulate)


# 6. The micro-batch size changes nothing.


def check_micro_batches_change_nothing():
    images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = TensorSource(images, torch.arange(64) % 3, (0.5,), (0.5,), crop=1, flip=True)

    def final(size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
        return train(make_plan(steps=8), model, source, torch.optim.Adam(model.parameters()), size, views=2)[-1]

    reference = final(64)
    for size in (1, 5):
        torch.testing.assert_close(final(size), reference, rtol=1e-9, atol=1e-12)


def augmentation_keyed_by_micro_batch(patch):
    def views(self, requests, key, views, micro_batch, real=TensorSource.views):
        for step, indices in requests:
            for number, at in enumerate(indices.split(micro_batch)):
                yield from real(self, [(step + 1000 * number, at)], key, views, micro_batch)

    patch.setattr(TensorSource, "views", views)


def check_dropout_is_refused():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="Dropout"):
        PrivateGradient(model, F.cross_entropy, make_plan(), Flat(1.0))


def models_unchecked(patch):
    patch.setattr(gradients, "check_model", lambda model, private: None)


# 7. What is derived meets its target; nothing raw is recorded by default.


def check_derived_quantities_meet_their_target():
    common = dict(delta=1e-5, dataset_size=50_000, batch_size=4096)
    sigma = PrivacyPlan.calibrate(epsilon=3, steps=500, **common).noise_multiplier
    exact = accounting._one_step_pld.__wrapped__(sigma, 4096 / 50_000, 1e-4).self_compose(500)
    assert 3 * (1 - 1e-4) <= exact.get_epsilon_for_delta(1e-5) <= 3
    steps = PrivacyPlan.calibrate(epsilon=3, noise_multiplier=6.0, **common).steps
    one = accounting._one_step_pld.__wrapped__(6.0, 4096 / 50_000, 1e-4)
    after, beyond = (one.self_compose(t).get_epsilon_for_delta(1e-5) for t in (steps, steps + 1))
    assert after <= 3 < beyond


def calibrated_by_the_other_accountant(patch):
    real = accounting.calibrate_noise
    patch.setattr(accounting, "calibrate_noise", lambda e, q, t, d, a: real(e, q, t, d, "rdp"))


def calibrated_a_little_low(patch):
    real = accounting.calibrate_noise
    patch.setattr(accounting, "calibrate_noise", lambda *arguments: 0.999 * real(*arguments))


def steps_one_too_many(patch):
    real = accounting.calibrate_steps
    patch.setattr(accounting, "calibrate_steps", lambda *arguments: real(*arguments) + 1)


def check_nothing_raw_without_diagnostics():
    model, plan = small_model(), make_plan()
    private = PrivateGradient(model, F.cross_entropy, plan, Flat(1.0))
    private.backward(next(dpopt.poisson_batches(small_data(), plan)))
    assert private.statistics == {}


def diagnostics_always_on(patch):
    real = PrivateGradient.__init__

    def init(self, *arguments, **options):
        real(self, *arguments, **options)
        self.diagnostics = True

    patch.setattr(PrivateGradient, "__init__", init)


# 8. Keyed streams: replayable, and never shared between runs.


def check_streams_are_keyed():
    noise = [released_noise(rekeyed(make_plan(), seed), steps=2) for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    for a, b in ((noise[0], noise[2]), (noise[0][:20_000], noise[0][20_000:])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.03
    samples = [set(REAL_SAMPLE(rekeyed(make_plan(), seed), step).tolist()) for seed in (0, 1) for step in (0, 1)]
    assert len({frozenset(s) for s in samples}) == 4
    names = [RandomKey.from_seed(0, run, "data").normal(9, "noise", 0) for run in ("run-a", "run-b")]
    assert not torch.equal(*names)


def key_of_the_seed_alone(patch):
    real = RandomKey.from_seed
    patch.setattr(RandomKey, "from_seed", classmethod(lambda cls, seed, *context: real(seed)))


def the_same_noise_at_every_step(patch):
    real = RandomKey.words
    patch.setattr(RandomKey, "words", lambda self, count, *labels: real(self, count, labels[0]))


def unkeyed_noise(patch):
    patch.setattr(RandomKey, "normal", lambda self, count, *labels: torch.randn(count, dtype=torch.float64))


# 9. Nothing is silently left untrained or unclipped.


def check_uncovered_parameters_are_refused():
    norm = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match=r"'1'.*1\.weight"):
        PrivateGradient(norm, F.cross_entropy, make_plan(), Flat(1.0))


def check_parameters_outside_the_loss_are_refused():
    model = small_model()
    model.orphan = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="orphan"):
        train(make_plan(), model, small_data(), torch.optim.SGD(model.parameters(), lr=0.1), stop=1)


def unprobed(patch):
    patch.setattr(PrivateGradient, "_probe", lambda self, *arguments: None)


# 10. The card says what ε means.


def check_the_card_says_it_all():
    config = Config(clipping={"_target_": "dpopt.clipping.Flat", "clip_norm": 0.5}, epsilon=8.0, steps=20)
    config = replace(config, diagnostics=True)
    plan = make_plan(sigma=1.3, delta=1e-3)
    card = privacy_card(config, plan, 0.5, 20, {"run": "name"})
    for words in (
        f"ε = {plan.epsilon:.4g}, δ = 0.001",
        "one training example",
        "one example added or removed",
        "64, taken as public",
        "0.001 = 0.064 · 1/N",
        "Poisson, q = 0.25",
        "sensitivity 0.5",
        "1.3",
        f"by rdp {plan.epsilon_at(20, 'rdp'):.4g}",
        "research randomness",
        "choice of hyper-parameters",
        "use of the test set",
        "private/",
        "diagnostics=true",
    ):
        assert words in card, words
    above = privacy_card(config, replace(plan, delta=0.5), 0.5, 20, {"run": "name"})
    assert "not below 1/N" in above and "not below 1/N" not in card
    config = replace(config, secure_rng=True)
    assert "operating system" in privacy_card(config, plan, 0.5, 20, {"run": "name"})
    none = privacy_card(Config(private=False, steps=20), replace(plan, noise_multiplier=0.0), None, 20, {"run": "x"})
    clipped = privacy_card(config, replace(plan, noise_multiplier=0.0), 0.5, 20, {"run": "x"})
    for text in (none, clipped):
        assert "is not private" in text and "differential privacy for" not in text


def card_without_the_unaccounted(patch):
    patch.setattr("dpopt.card._UNACCOUNTED", "")


def card_of_the_planned_epsilon(patch):
    patch.setattr(PrivacyPlan, "epsilon_at", lambda self, step, accountant=None: 1.0)


MUTANTS = {
    check_noise_is_the_accountants: [
        no_noise,
        scaled_noise(0.5),
        scaled_noise(2 / 3),
        scaled_noise(3 / 2),
        accountant_fed_another_sigma,
        accountant_fed_another_rate,
    ],
    check_poisson_and_divisor: [fixed_size_batches, realised_divisor],
    check_empty_batches_are_noisy_steps: [no_noise, empty_batches_skipped, empty_batches_uncounted],
    check_views_belong_to_their_example: [views_clipped_one_by_one, views_in_another_order_than_labels],
    check_every_contribution_is_bounded: [
        no_clip,
        clip_of_the_mean,
        weights_instead_of_selection,
        pads_counted,
        norm_of_the_first_parameter,
        variance_for_the_square,
    ],
    check_noise_is_drawn_once_per_step: [no_noise, noise_per_micro_batch],
    check_micro_batches_change_nothing: [augmentation_keyed_by_micro_batch],
    check_dropout_is_refused: [models_unchecked],
    check_derived_quantities_meet_their_target: [
        calibrated_by_the_other_accountant,
        calibrated_a_little_low,
        steps_one_too_many,
    ],
    check_nothing_raw_without_diagnostics: [diagnostics_always_on],
    check_streams_are_keyed: [key_of_the_seed_alone, the_same_noise_at_every_step, unkeyed_noise],
    check_uncovered_parameters_are_refused: [models_unchecked],
    check_parameters_outside_the_loss_are_refused: [unprobed],
    check_the_card_says_it_all: [card_without_the_unaccounted, card_of_the_planned_epsilon],
}
PAIRS = [(check, mutant) for check, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize("check", MUTANTS, ids=lambda f: f.__name__)
def test_invariant(check):
    check()


@pytest.mark.parametrize("check, mutant", PAIRS, ids=lambda f: f.__name__)
def test_mutant_is_caught(check, mutant, monkeypatch):
    compute_epsilon.cache_clear()
    mutant(monkeypatch)
    try:
        check()
    except (AssertionError, ValueError, pytest.fail.Exception):  # ValueError: the library itself refuses
        return
    finally:
        monkeypatch.undo()
        compute_epsilon.cache_clear()
    raise AssertionError(f"{check.__name__} does not notice {mutant.__name__}")


def test_all_checks_are_listed():
    assert set(MUTANTS) == {f for name, f in globals().items() if name.startswith("check_")}
