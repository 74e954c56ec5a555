import math

import pytest
import torch

from dpopt.privacy.clipping import Automatic, Flat

RULES = [Flat(1.0), Flat(0.37), Automatic(1.0), Automatic(2.5, gamma=0.1)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weighted_norm_is_within_the_sensitivity(rule):
    generator = torch.Generator().manual_seed(0)
    norms = 10 ** torch.empty(10_000).uniform_(-30, 30, generator=generator)
    norms = torch.cat([norms, torch.tensor([0.0, 1e-38, 3e38, rule.clip_norm])])
    weights = rule.weight(norms)
    assert weights.isfinite().all() and (weights >= 0).all()
    assert (weights.double() * norms.double() <= rule.sensitivity * (1 + 1e-6)).all()


def test_weights_by_hand():
    assert Flat(1.0).weight(torch.tensor([0.5, 1.0, 4.0])).tolist() == [1, 1, 0.25]
    assert Automatic(2.0, gamma=0.5).weight(torch.tensor([0.5, 1.5])).tolist() == [2, 1]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_bad_clip_norms(value):
    for rule in (Flat, Automatic):
        with pytest.raises(ValueError, match="positive number"):
            rule(value)
