"""Invariants 1 to 6 of the design: what is released. For each check there are mutants that it must catch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import flat_loss, loop_oracle, make_plan, released_noise, small_data, small_model, train
from scipy import stats
from torch import nn

import dpopt
from dpopt.data.sources import TensorSource
from dpopt.grad_sample import engine, per_sample
from dpopt.grad_sample.engine import POLICIES, GradSampler
from dpopt.privacy import private_gradient, sampling
from dpopt.privacy.accounting import compute_epsilon
from dpopt.privacy.clipping import Flat
from dpopt.privacy.plan import PrivacyPlan
from dpopt.privacy.private_gradient import PrivateGradient
from dpopt.privacy.sampling import PoissonBatch
from dpopt.rng import RandomKey

REAL_GRADIENTS = engine.per_example_gradients
REAL_EPSILON_AT = PrivacyPlan.epsilon_at
REAL_SAMPLE = sampling.sample_indices
REAL_TAKE, REAL_ADD = PrivateGradient._per_sample_gradients, PrivateGradient._add_clipped


# 1. One record feeds sampler, noise and accountant.


def check_noise_is_the_accountants():
    plan, clip = make_plan(sigma=1.3), Flat(0.5)
    noise = released_noise(plan, clip)
    assert stats.kstest(noise.numpy(), stats.norm(scale=1.3 * 0.5).cdf).pvalue > 1e-4
    measured = float(noise.double().std()) / clip.sensitivity
    epsilon = compute_epsilon(measured, plan.batch_size / plan.dataset_size, plan.steps, plan.delta)
    assert plan.epsilon == pytest.approx(epsilon, rel=0.02)


def no_noise(patch):
    scaled_noise(0.0)(patch)


def scaled_noise(factor):
    real = RandomKey.gaussians

    def mutant(patch):
        patch.setattr(RandomKey, "gaussians", lambda *a, **o: (factor * piece for piece in real(*a, **o)))

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
        assert now is not None and bool((now != 0).all()) and (before is None or not torch.equal(now, before))
        before = now.clone()
    assert private.step == 12


def fixed_size_batches(patch):
    patch.setattr(
        sampling,
        "sample_indices",
        lambda plan, step, *_: torch.argsort(plan.key.uniform(plan.dataset_size, "s", step))[: plan.batch_size],
    )


def realized_divisor(patch):
    def backward(self, batch, real=PrivateGradient.backward):
        self.realized = len(batch.indices)
        real(self, batch)
        for p in self.model.parameters():
            p.grad *= self.plan.batch_size / max(1, self.realized)

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
    for policy in POLICIES:
        private = PrivateGradient(model, F.cross_entropy, plan, clip, engine=policy)
        micro_batch = (inputs, targets, torch.ones(8, dtype=torch.bool))
        private.backward(PoissonBatch(plan, 0, torch.arange(8), iter([micro_batch])))
        for p, e in zip(model.parameters(), loop_oracle(model, F.cross_entropy, inputs, targets, clip), strict=True):
            torch.testing.assert_close(p.grad, e / plan.batch_size, rtol=1e-9, atol=1e-12)


def views_clipped_one_by_one(patch):
    def take(self, inputs, targets, scale, points):
        return REAL_TAKE(
            self, inputs.flatten(0, 1).unsqueeze(1), targets.repeat_interleave(inputs.shape[1]), scale, points
        )

    def add(self, sums, per_sample, mask, sensitivity, raw):
        views = mask.repeat_interleave(per_sample.examples // len(mask))
        REAL_ADD(self, sums, per_sample, views, sensitivity, raw)

    patch.setattr(PrivateGradient, "_per_sample_gradients", take)
    patch.setattr(PrivateGradient, "_add_clipped", add)


def views_in_another_order_than_labels(patch):
    def take(self, inputs, targets, scale=None, real=GradSampler.__call__):
        return real(self, inputs.transpose(0, 1).reshape(inputs.shape), targets, scale)

    patch.setattr(GradSampler, "__call__", take)


# 4. The clipped norm is bounded; non-finite and padded examples contribute zero.


def check_every_contribution_is_bounded():
    """The gradient of the mean output with respect to the weight is the input itself: easy to make adversarial."""
    model, plan, clip = nn.Linear(64, 1), make_plan(sigma=0.0), Flat(0.1)
    inputs = torch.randn(12, 1, 64, generator=torch.Generator().manual_seed(0))
    inputs *= torch.logspace(-3, 3, 12)[:, None, None]
    inputs[4], inputs[5, 0, 0], inputs[6] = 7.0, float("nan"), float("inf")
    mask = torch.ones(12, dtype=torch.bool)
    mask[9:] = False

    def contribution(selected, policy):
        private = PrivateGradient(model, flat_loss, plan, clip, engine=policy)
        private.backward(PoissonBatch(plan, 0, torch.zeros(0), iter([(inputs, torch.zeros(12), selected)])))
        return torch.cat([p.grad.flatten().double() * plan.batch_size for p in model.parameters()])

    for policy in POLICIES:
        total = contribution(mask, policy)
        assert total.isfinite().all()
        for index in range(12):
            without = mask.clone()
            without[index] = False
            norm = (total - contribution(without, policy)).norm()
            assert norm <= 0.1 * (1 + 1e-5)
            assert (norm == 0) == (index in (5, 6) or not mask[index])


def no_clip(patch):
    patch.setattr(private_gradient, "clip_weights", lambda clip, norms, present, bound: present.to(norms))


def clip_of_the_mean(patch):
    def add(self, sums, per_sample, mask, sensitivity, raw):
        found, _ = REAL_GRADIENTS(self.model, self.loss_fn, *(x[mask] for x in per_sample))
        means = {name: g.nan_to_num(0, 0, 0).mean(0) for name, g in found.items()}
        norm = torch.sqrt(sum(m.square().sum() for m in means.values()))
        for name, mean in means.items():
            sums[name] += mean * self.clip.weight(norm) * int(mask.sum())

    patch.setattr(
        PrivateGradient, "_per_sample_gradients", lambda self, inputs, targets, scale, points: (inputs, targets)
    )
    patch.setattr(PrivateGradient, "_add_clipped", add)


def weights_instead_of_selection(patch):
    patch.setattr(torch.Tensor, "masked_fill", lambda self, mask, value: self)


def pads_counted(patch):
    def add(self, sums, per_sample, mask, sensitivity, raw):
        REAL_ADD(self, sums, per_sample, torch.ones_like(mask), sensitivity, raw)

    patch.setattr(PrivateGradient, "_add_clipped", add)


def norm_of_the_first_parameter(patch):
    real = per_sample._by_model_names
    patch.setattr(per_sample, "_by_model_names", lambda unit, found: dict(list(real(unit, found).items())[1:]))


def variance_for_the_square(patch):
    def spread(gradient):
        rows = gradient.double().flatten(1)
        return rows.var(1, correction=0) * rows.shape[1]

    patch.setattr(per_sample, "squares_by_example", spread)


# 5. Noise once per logical step, on the sum.


def check_noise_is_drawn_once_per_step():
    for micro_batch in (1, 4, 64):
        noise = released_noise(make_plan(sigma=1.0), Flat(1.0), micro_batch)
        assert float(noise.std()) == pytest.approx(1.0, rel=0.02)
    large = released_noise(make_plan(sigma=1.0), Flat(1.0), 64, steps=1, size=300_000)
    for piece in large.split(10_000):
        assert float(piece.std()) == pytest.approx(1.0, rel=0.05)
    correlations = torch.corrcoef(large.view(30, -1)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 0.05  # 5 standard deviations


def noise_for_the_first_piece_only(patch, real=RandomKey.gaussians):
    pieces = lambda *a, **o: (piece * (i == 0) for i, piece in enumerate(real(*a, **o)))  # noqa: E731
    patch.setattr(RandomKey, "gaussians", pieces)


def noise_per_micro_batch(patch):
    def add(self, sums, per_sample, mask, sensitivity, raw):
        REAL_ADD(self, sums, per_sample, mask, sensitivity, raw)
        for total in sums.values():
            total += torch.randn_like(total) * self.plan.noise_multiplier * self.clip.sensitivity

    patch.setattr(PrivateGradient, "_add_clipped", add)


# 6. The micro-batch size changes nothing.


def check_micro_batches_change_nothing():
    images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = TensorSource(images, torch.arange(64) % 3, (0.5,), (0.5,), crop=1, flip=True)

    def final(size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
        return train(
            make_plan(steps=8), model, source, torch.optim.Adam(model.parameters()), micro_batch=size, views=2
        )[-1]

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
    patch.setattr(private_gradient, "check_model", lambda model, private: None)


MUTANTS = {
    check_noise_is_the_accountants: [
        no_noise,
        scaled_noise(0.5),
        scaled_noise(2 / 3),
        scaled_noise(3 / 2),
        accountant_fed_another_sigma,
        accountant_fed_another_rate,
    ],
    check_poisson_and_divisor: [fixed_size_batches, realized_divisor],
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
    check_noise_is_drawn_once_per_step: [no_noise, noise_per_micro_batch, noise_for_the_first_piece_only],
    check_micro_batches_change_nothing: [augmentation_keyed_by_micro_batch],
    check_dropout_is_refused: [models_unchecked],
}
