"""What (ε, δ) leaves to an adversary who guesses whether one record was in the data.

Let F be the chance of calling an absent record present, and T that of calling a present one present. Both datasets are
neighbors, so (ε, δ)-differential privacy says, of the guess "present" and of the guess "absent",

    T ≤ e^ε·F + δ,     1 − F ≤ e^ε·(1 − T) + δ.

These two lines and the unit square bound a polygon, and every guesser lies in it (Kairouz et al., 1311.0776). Some
mechanism reaches each of its corners: (0, δ), (1 − δ, 1), and where the lines meet

    F* = (1 − δ)/(1 + e^ε),     T* = (e^ε + δ)/(1 + e^ε).

A guesser who holds the record for present with probability p before is right with probability pT + (1 − p)(1 − F). It
is linear in T and F, so its largest value is at a corner. At p = ½ that is ½(1 + T* − F*) = (e^ε + δ)/(1 + e^ε).

The odds that a record was there grow by the factor e^L, L being the privacy loss of the outcome. From
δ ≥ E[(1 − e^(ε−L))⁺] ≥ ½·P[L ≥ ε + ln 2] follows: they grow by 2e^ε or more with a chance of 2δ at most.
"""

import math


def correct_guesses(epsilon: float, delta: float, prior: float = 0.5) -> float:
    """Bound the chance that a guess is right whether a record was in the data.

    Args:
        epsilon: the ε of (ε, δ); infinity bounds nothing.
        delta: the δ.
        prior: the chance of the record being there, before anything is released.
    """
    corners = ((0.0, delta), meeting_point(epsilon, delta), (1 - delta, 1.0), (0.0, 0.0), (1.0, 1.0))
    return max(prior * true + (1 - prior) * (1 - false) for false, true in corners)


def found_members(epsilon: float, delta: float, false_positives: float) -> float:
    """Bound the share of present records that are found when this share of absent ones is accused."""
    by_present = math.exp(min(epsilon, 700.0)) * false_positives + delta
    by_absent = 1 - math.exp(-epsilon) * (1 - delta - false_positives)
    return min(1.0, by_present, by_absent)


def meeting_point(epsilon: float, delta: float) -> tuple[float, float]:
    """Return (F*, T*), where the two bounds meet."""
    small = math.exp(-epsilon)
    return (1 - delta) * small / (1 + small), (1 + delta * small) / (1 + small)
