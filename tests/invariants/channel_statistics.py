"""Statistics of channels: what an example can move, the noise, and that the plan pays. For each check mutants."""

import math
from dataclasses import replace

import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from helpers import configure, make_plan, rekeyed
from made_features import BOUNDS

from dpopt.data.sources import TensorSource
from dpopt.privacy import accounting, plan, statistics
from dpopt.training import build
from dpopt.training.build import build_components


def total(rows: list[torch.Tensor]) -> torch.Tensor:
    return statistics._sum(BOUNDS, torch.stack(rows), clip=True)


def check_an_example_moves_a_release_by_its_sensitivity_at_most():
    generator = torch.Generator().manual_seed(0)
    others = [torch.randn(3, 2, 2, generator=generator) for _ in range(5)]
    largest = 0.0
    for scale in (1e-3, 1.0, 10.0, 1e6, 1e30, math.inf, math.nan):
        for made in (torch.ones(3, 2, 2), torch.eye(3)[0].view(3, 1, 1).expand(3, 2, 2), others[0]):
            moved = float((total([*others, made * scale]) - total(others)).norm())
            assert moved <= math.sqrt(2) * (1 + 1e-9)
            largest = max(largest, moved)
    assert largest > math.sqrt(2) * (1 - 1e-9)  # the bound is met, so that a looser clip would be seen


def check_the_noise_is_what_the_plan_accounts_for():
    source = TensorSource(torch.zeros(64, 500, 2, 2), torch.zeros(64))
    paid = replace(make_plan(), statistics_noise=4.0)
    means = torch.tensor([statistics.release_statistics(BOUNDS, source, rekeyed(paid, s))[0] for s in range(20)])
    deviation = float(means.double().std()) * 64 / BOUNDS.mean_norm
    assert abs(deviation / (4.0 * math.sqrt(2)) - 1) < 0.03 and abs(float(means.mean())) * 64 < 0.1
    assert (means[0] - means[1]).abs().max() > 0  # another key, other noise


def check_the_plan_of_a_run_pays_for_them():
    """Against the composition that dp-accounting makes of events."""
    config = replace(
        configure("size=smoke", "optimizer=dp_sgd"),
        dataset={"_target_": "made_features.features"},
        **dict(epsilon=2.0, noise_multiplier=None, steps=5, batch_size=16, delta=1e-3, accountant="pld"),
    )
    made = build_components(config).plan
    events = [dp_event.GaussianDpEvent(4.0)]
    step = dp_event.PoissonSampledDpEvent(16 / 64, dp_event.GaussianDpEvent(made.noise_multiplier))
    events.append(dp_event.SelfComposedDpEvent(step, 5))
    exact = PLDAccountant().compose(dp_event.ComposedDpEvent(events)).get_epsilon(1e-3)
    assert 2 * (1 - 1e-3) <= exact <= 2 * (1 + 1e-3) and made.epsilon <= 2
    assert made.epsilon_at(0) > 0.5 and made.epsilon_at(5, "rdp") > exact


def squares_without_a_bound(patch, real=statistics._sum):
    def add_up(bounds, inputs, clip):
        sums = real(bounds, inputs, clip)
        sums[len(sums) // 2 :] = real(bounds, inputs, False)[len(sums) // 2 :]
        return sums

    patch.setattr(statistics, "_sum", add_up)


def what_is_not_finite_counts(patch):
    patch.setattr(torch.Tensor, "masked_fill", lambda rows, mask, value: rows)


def noise_of_one_release_alone(patch):
    patch.setattr(statistics, "SENSITIVITY", 1.0)


def no_noise(patch):
    patch.setattr(statistics, "release_grid", lambda std: 1e9)


def not_composed(patch, real=accounting.compute_epsilon):
    patch.setattr(plan.accounting, "compute_epsilon", lambda *a: real(*a[:5]))


def not_in_the_plan(patch, real=build.make_plan):
    patch.setattr(build, "make_plan", lambda *a: replace(real(*a), statistics_noise=0.0))


def calibrated_without_them(patch, real=accounting.calibrate_noise):
    patch.setattr(plan.accounting, "calibrate_noise", lambda *a: real(*a[:5]))


MUTANTS = {
    check_an_example_moves_a_release_by_its_sensitivity_at_most: [squares_without_a_bound, what_is_not_finite_counts],
    check_the_noise_is_what_the_plan_accounts_for: [noise_of_one_release_alone, no_noise],
    check_the_plan_of_a_run_pays_for_them: [not_composed, not_in_the_plan, calibrated_without_them],
}
