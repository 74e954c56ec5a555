"""Clip rules of users: no example adds more than the rule states, and none decides over another."""

import torch

from dpopt.privacy import bounded
from dpopt.privacy.clipping import Adaptive

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
    check_weights_are_cut_to_the_sensitivity: [weights_as_they_are],
    check_no_example_decides_over_another: [
        asked_about_all_at_once,
        asked_once,
        watched_by_attributes_alone,
        trusted_by_type,
    ],
    check_counts_move_by_one_half_at_most: [counted_all_at_once, watched_by_attributes_alone],
}
