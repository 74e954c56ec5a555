"""Clip rules: no example adds more than the rule states, not even with its slack, and none decides over another."""

import torch
from helpers import Flatland, batch_of, flat_loss, make_plan

from dpopt.privacy import bounded
from dpopt.privacy.clipping import Adaptive, Slack
from dpopt.privacy.private_gradient import PrivateGradient

NORMS = torch.tensor([3.0, 0.5, 40.0, 1.0])
PRESENT = torch.ones(4, dtype=torch.bool)


class Long:
    sensitivity = 1.0

    def weight(self, norm):
        return 10 * torch.ones_like(norm)


class ByBatch(Long):
    """Divides by the longest gradient of the batch."""

    def weight(self, norm):
        return torch.ones_like(norm) / norm.max()


class ByAttribute(Long):
    """Divides by the longest gradient so far."""

    def __init__(self):
        self.longest = torch.tensor(0.0)

    def weight(self, norm):
        self.longest = torch.maximum(self.longest, norm.max())
        return torch.ones_like(norm) / self.longest


class ByClosure(Long):
    """The same, out of sight of what the object keeps."""

    def __init__(self):
        longest = [torch.tensor(0.0)]

        def weight(norm):
            longest[0] = torch.maximum(longest[0], norm.max())
            return torch.ones_like(norm) / longest[0]

        self.weight = weight


class ByClass(Long):
    """The same, kept by the class."""

    longest = torch.tensor(0.0)

    def weight(self, norm):
        ByClass.longest = torch.maximum(ByClass.longest, norm.max())
        return torch.ones_like(norm) / ByClass.longest


class BySlot(Long):
    """The same, in a slot."""

    __slots__ = ("longest",)

    def __init__(self):
        self.longest = torch.tensor(0.0)

    weight = ByAttribute.weight


def ours_with_another_weight():
    rule = Adaptive(1.0)
    rule.weight = ByBatch().weight
    return rule


class CountsLong(Adaptive):
    def count(self, norm, present):
        return 100.0


class CountsByBatch(Adaptive):
    """Counts by the longest gradient so far."""

    def __init__(self, clip_norm):
        super().__init__(clip_norm)
        longest = [0.0]

        def count(norm, present):
            longest[0] = max(longest[0], float(norm.max()))
            return 0.5 if longest[0] > 10 else -0.5

        self.count = count


def check_weights_are_cut_to_the_sensitivity():
    weights = bounded.clip_weights(Long(), NORMS, PRESENT, 1.0)
    assert (weights * NORMS <= 1 + 1e-6).all() and (weights * NORMS > 0.99).all()


def check_no_example_decides_over_another():
    """Either the rule is refused, or the first example's weight is the same without the others."""
    for make in (ByBatch, ByAttribute, ByClosure, ByClass, BySlot, ours_with_another_weight):
        ByClass.longest = torch.tensor(0.0)
        try:
            together = bounded.clip_weights(make(), NORMS, PRESENT, 1.0)
        except ValueError:
            continue
        alone = bounded.clip_weights(make(), NORMS[:1], PRESENT[:1], 1.0)
        assert torch.equal(together[:1], alone), make.__name__


def check_counts_move_by_one_half_at_most():
    assert abs(bounded.unclipped_count(CountsLong(1.0), NORMS, PRESENT)) <= 2
    try:
        with_all = bounded.unclipped_count(CountsByBatch(1.0), NORMS, PRESENT)
    except ValueError:
        return
    without = bounded.unclipped_count(CountsByBatch(1.0), NORMS[[0, 1, 3]], PRESENT[:3])
    assert abs(with_all - without) <= 0.5


def check_an_example_and_its_slack_add_the_sensitivity_at_most():
    """What is summed for one example, by gradients of all lengths; the shortest and the longest reach the bound."""
    lengths = [0.0, 1e-9, *torch.linspace(0.01, 0.99, 40).tolist(), 0.9999999, 1.0, 1.0000001, 7.0, float("inf")]
    for coordinates in (1, 3, 16):
        sums = []
        private = PrivateGradient(Slope(), slope_loss, make_plan(sigma=0.0), Slack(0.7, coordinates=coordinates))
        private._release = lambda total, bound, seen=sums: seen.append(total.clone())
        private.clip.observe_shares = lambda released: None
        for step, length in enumerate(lengths):
            private.step = step % private.plan.steps
            private.backward(batch_of(private.plan, torch.tensor([[0.7 * length]]), torch.zeros(1), private.step))
        found = torch.stack(sums).double().norm(dim=1) / 0.7
        assert (found <= 1 + 1e-6).all() and found[0] > 0.999 and found[-2] > 0.999 and found[-1] == 0


def check_slack_has_the_noise_of_the_gradient():
    """σ√K/(qN) in what the rule is given, where σ is the plan's: nothing is paid, and nothing is free of noise."""
    plan = make_plan(sigma=2.0, size=6400, batch=32, steps=400, delta=1e-5)
    seen, clip = [], Slack(0.5, coordinates=4, lr=1e-9)
    clip.observe_shares = lambda released, real=clip.observe_shares: (real(released), seen.append(clip.shares))
    private = PrivateGradient(Flatland(1), flat_loss, plan, clip)
    for step in range(400):
        private.backward(batch_of(plan, torch.zeros(1, 2), torch.zeros(1), step))
    shares = torch.tensor(seen)
    assert abs(float(shares.std()) / (2.0 * 2 / 32) - 1) < 0.08
    assert (shares.mean(0) - 1 / 32).abs().max() < 5 * (2.0 * 2 / 32) / 20  # one example, all of its room free


class Slope(torch.nn.Module):
    """One weight whose gradient is the input."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)

    def forward(self, x):
        return self.layer(x)


def slope_loss(outputs, targets):
    return outputs.mean()


def capacity_of_the_whole(patch):
    real = Slack.fill
    patch.setattr(Slack, "fill", lambda self, norm, present: real(self, norm, present) * self.coordinates**0.5)


def filled_by_the_square(patch):
    """√(C² − n²) is what the gradient leaves, but not of coordinates that are filled one after the other."""
    real = Slack.fill
    patch.setattr(
        Slack, "fill", lambda self, norm, present: real(self, norm**2 / self.clip_norm, present) * self.coordinates**0.5
    )


def filled_for_what_is_not_there(patch):
    real = Slack.fill
    patch.setattr(
        Slack, "fill", lambda self, norm, present: real(self, norm.nan_to_num(0, 0, 0), torch.ones_like(present))
    )


def slack_without_noise(patch):
    real = PrivateGradient._observe
    patch.setattr(
        PrivateGradient,
        "_observe",
        lambda self, raw, slack: real(self, raw, raw.slack / self.plan.batch_size),
    )


def weights_as_they_are(patch):
    patch.setattr(bounded, "clip_weights", lambda clip, norms, present, bound: clip.weight(norms))


def asked_about_all_at_once(patch):
    patch.setattr(bounded, "_one_by_one", lambda clip, norms: clip.weight(norms))


def asked_once(patch):
    patch.setattr(bounded, "_ask_alone", lambda clip, ask, examples: torch.cat([ask(i) for i in examples]))


def watched_by_attributes_alone(patch):
    def ask_alone(clip, ask, examples):
        before = bounded._state(clip)
        answers = torch.cat([ask(i) for i in examples])
        if bounded._state(clip) != before:
            raise ValueError
        return answers

    patch.setattr(bounded, "_ask_alone", ask_alone)


def trusted_by_type(patch):
    patch.setattr(bounded, "_is_ours", lambda clip: type(clip) in bounded._OURS)


def counted_all_at_once(patch):
    patch.setattr(bounded, "unclipped_count", lambda clip, norms, present: clip.count(norms, present))


MUTANTS = {
    check_an_example_and_its_slack_add_the_sensitivity_at_most: [
        capacity_of_the_whole,
        filled_by_the_square,
        filled_for_what_is_not_there,
    ],
    check_slack_has_the_noise_of_the_gradient: [slack_without_noise],
    check_weights_are_cut_to_the_sensitivity: [weights_as_they_are],
    check_no_example_decides_over_another: [
        asked_about_all_at_once,
        asked_once,
        watched_by_attributes_alone,
        trusted_by_type,
    ],
    check_counts_move_by_one_half_at_most: [counted_all_at_once, watched_by_attributes_alone],
}
